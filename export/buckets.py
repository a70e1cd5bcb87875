"""Bucket sets: the few static shapes that a model is exported, compiled and profiled for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.layout import MIXED_TILE, Bucket
from dcconvert.passes.planning.schedule import LEVELS

__all__ = ["Bucket", "BucketSet", "choose_buckets"]

REMEMBERED = 256


@dataclass(frozen=True)
class BucketSet:
    """The buckets of one bundle, smallest first.

    ``tokens``: N, tokens per sample. ``expected_waste``: mean over the steps of a run of bucket tokens / kept tokens -
    1, at a batch size in the set; a smaller batch also has the copies that fill it up.
    """

    buckets: tuple[Bucket, ...]
    tokens: int
    expected_waste: float

    @cached_property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes, ascending."""
        return tuple(sorted({bucket.batch for bucket in self.buckets}))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Row lengths, ascending; the last keeps everything."""
        return tuple(sorted({bucket.row_tokens for bucket in self.buckets}))

    def choose(self, batch: int, counts: ArrayLike) -> Bucket:
        """Return the bucket with the fewest tokens that holds ``batch`` samples of ``counts`` (one, or [batch]) tokens.

        The caller fills a batch smaller than the bucket's by repeating its last sample. Raises UsageError for an empty
        batch, one above the largest in the set, or counts that are not 1..N.
        """
        if not 1 <= batch <= self.batches[-1]:
            raise UsageError(
                f"batch {batch} is outside the buckets, which go from 1 to {self.batches[-1]}: "
                f"split it, or convert again with a larger --batch"
            )
        kept = np.asarray(counts, np.int64)
        if kept.ndim > 1 or kept.size not in (1, batch) or kept.min() < 1 or kept.max() > self.tokens:
            raise UsageError(f"counts {kept.tolist()}: expected {batch} of them, each from 1 to {self.tokens}")
        key = np.broadcast_to(kept, (batch,)).tobytes()
        if key not in self._chosen:
            if len(self._chosen) == REMEMBERED:
                self._chosen.clear()
            fitting = (bucket for bucket in self.buckets if bucket.fits(np.frombuffer(key, np.int64)))
            self._chosen[key] = min(fitting, key=lambda bucket: (bucket.tokens, bucket.batch))
        return self._chosen[key]

    @cached_property
    def _chosen(self) -> dict[bytes, Bucket]:
        """A cache of recent choices; the steps of a run often keep the same numbers of tokens."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts for the manifest."""
        return {**asdict(self), "buckets": [asdict(bucket) for bucket in self.buckets]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BucketSet:
        """Undo ``to_dict``; raises UsageError if a value (or the full bucket) is missing or a size is invalid."""
        try:
            buckets = tuple(
                Bucket(*(int(entry[name]) for name in ("batch", "tokens", "rows", "row_tokens", "tile")))
                for entry in data["buckets"]
            )
            result = cls(buckets, int(data["tokens"]), float(data["expected_waste"]))
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise UsageError(f"the manifest's buckets cannot be read ({error!r}): convert the model again") from None
        largest = max((bucket.batch for bucket in buckets), default=1)
        if not any(bucket.fits([result.tokens] * largest) for bucket in buckets):
            raise UsageError(
                "the manifest has no bucket that keeps all tokens at the largest batch: convert the model again"
            )
        return result


def choose_buckets(
    batches: Sequence[int], counts_per_step: ArrayLike, tokens: int, max_lengths: int = LEVELS - 1
) -> BucketSet:
    """Choose the buckets for ``batches`` and the kept tokens per sample at each step of a run (1..``tokens``).

    Chooses at most ``max_lengths`` row lengths with the least expected padding, and always adds the full one. Every
    batch size gets every length, with one sample per row and tile, T = B * S. Raises UsageError for empty or
    out-of-range input.
    """
    sizes = sorted(set(batches))
    if not sizes or sizes[0] < 1:
        raise UsageError(f"batch sizes {list(batches)}: give at least one, each at least 1")
    counts = np.asarray(counts_per_step, dtype=np.int64).ravel()
    if counts.size == 0 or counts.min() < 1 or counts.max() > tokens:
        raise UsageError(f"kept tokens per step must be from 1 to {tokens}: check ratio, schedule and steps")
    if max_lengths < 1:
        raise UsageError(f"{max_lengths} lengths: a bucket set needs at least 1")
    lengths = _best_lengths(counts, tokens, max_lengths)
    padded = lengths[np.searchsorted(lengths, counts)]
    buckets = tuple(
        sorted(Bucket(size, size * length, size, length, length) for size in sizes for length in lengths.tolist())
    )
    return BucketSet(buckets, tokens, float(np.mean(padded / counts) - 1))


def choose_guided_buckets(batch: int, counts: ArrayLike, unconditional: ArrayLike, tokens: int) -> BucketSet:
    """Buckets for ``batch`` pairs of samples; the first of a pair keeps ``counts``, the second ``unconditional``.

    Both have one entry per step of a run. The batch has all first samples, then all second samples (classifier-free
    guidance with fewer tokens for the unconditional half: Lite-CFG in arXiv 2603.06351). A row fits the longer sample
    of a pair; the packed tokens of both are counted together, in tiles of ``MIXED_TILE``. The last bucket keeps
    everything. Errors as in ``choose_buckets``.
    """
    first, second = np.asarray(counts, np.int64), np.asarray(unconditional, np.int64)
    lengths = np.asarray(choose_buckets((batch,), np.maximum(first, second), tokens).lengths)
    step_length = lengths[np.searchsorted(lengths, np.maximum(first, second))]
    buckets = {Bucket(2 * batch, 2 * batch * tokens, 2 * batch, tokens, tokens)}
    for length in np.unique(step_length).tolist():
        here = step_length == length
        tiles = sum(-(-int(half[here].max()) // MIXED_TILE) for half in (first, second))
        if tiles * MIXED_TILE < 2 * tokens:
            buckets.add(Bucket(2 * batch, batch * tiles * MIXED_TILE, 2 * batch, length, MIXED_TILE))
    found = BucketSet(tuple(sorted(buckets)), tokens, 0.0)
    pairs = [np.repeat(pair, batch) for pair in zip(first, second, strict=True)]
    waste = [found.choose(2 * batch, pair).tokens / pair.sum() - 1 for pair in pairs]
    return replace(found, expected_waste=float(np.mean(waste)))


@dataclass(frozen=True)
class PaddedShapes:
    """Shapes without buckets, used instead of a bucket set: every sample is padded to the longest of its batch.

    ``whole``: every sample is padded to the token grid instead, which is a single static shape.
    """

    tokens: int
    whole: bool = False

    def choose(self, batch: int, counts: ArrayLike) -> Bucket:
        """The bucket for ``batch`` samples with ``counts`` (one, or [batch]) tokens."""
        length = self.tokens if self.whole else int(np.max(counts))
        return Bucket(batch, batch * length, batch, length, length)


def _best_lengths(counts: NDArray[np.int64], tokens: int, max_lengths: int) -> NDArray[np.int64]:
    """Ascending row lengths, ``tokens`` the last, with at most ``max_lengths`` before it and the least total padding.

    Exact: an optimal length is one of the counts, so the sorted distinct counts are cut into runs, each padded to its
    largest. least[j] is the least padding of the counts up to j with the lengths so far, the last of them at j.
    """
    values, weights = np.unique(np.append(counts, tokens), return_counts=True)
    weights[-1] -= 1  # the full length is always there, needed or not
    heads = np.concatenate([[0], np.cumsum(weights)])
    sums = np.concatenate([[0], np.cumsum(weights * values)])
    # cost[i, j]: padding of counts i..j raised to count j.
    cost = ((heads[None, 1:] - heads[:-1, None]) * values - (sums[None, 1:] - sums[:-1, None])).astype(np.float64)
    cost[np.tril_indices(len(values), -1)] = np.inf
    least = cost[0]
    cuts = []
    for _ in range(min(max_lengths, len(values) - 1)):
        # One more length: the run before ends at i - 1. A run without it is never better, and a tie is harmless.
        before = np.concatenate([[np.inf], least[:-1]])[:, None] + cost
        cuts.append(before.argmin(axis=0))
        least = before.min(axis=0)
    lengths = [len(values) - 1]
    for cut in reversed(cuts):
        lengths.append(int(cut[lengths[-1]]) - 1)
    return values[lengths[::-1]]
