"""How kept tokens are laid out: tiles of packed tokens, rows of the attention grid, and buckets that fix them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.planning.bin_packing import shortest_pack_first
from dcconvert.passes.planning.nearest_kept import Ints, Mask

PACKINGS = ("rows", "bins", "varlen")  # varlen: like rows, but torch's attention takes the packed tokens as they are

# Tile length when samples keep different numbers of tokens: on average half a tile per sample is padding.
MIXED_TILE = 8


@dataclass(frozen=True, order=True)
class Bucket:
    """Static shapes of one profile: ``batch`` samples, ``tokens`` packed tokens (T), ``rows`` x ``row_tokens`` slots.

    The packed tokens come in tiles of ``tile`` (L), each tile of one sample. Raises UsageError for a size below 1 or a
    T that is not a multiple of L.
    """

    batch: int
    tokens: int
    rows: int
    row_tokens: int
    tile: int

    def __post_init__(self) -> None:
        if min(self.batch, self.tokens, self.rows, self.row_tokens, self.tile) < 1 or self.tokens % self.tile:
            raise UsageError(f"{self}: every size must be at least 1, and tokens a multiple of the tile")

    def fits(self, counts: ArrayLike) -> bool:
        """Whether samples with these kept counts, the last repeated up to ``batch``, fit with one sample per row."""
        kept = np.asarray(counts)
        spare = self.batch - len(kept)
        if len(kept) == 0 or spare < 0:
            return False
        tiled = -(-kept // self.tile) * self.tile
        total = int(tiled.sum()) + spare * int(tiled[-1])
        return self.rows >= self.batch and self.row_tokens >= int(kept.max()) and self.tokens >= total


@dataclass(frozen=True)
class TokenLayout:
    """Where the kept tokens of a mask [B, N] go: T = G x L packed places, R x S slots of the attention grid.

    Layouts of the same counts share arrays: do not write to them.

    - kept: flat b*N+n of every kept token, in packed order; place: its packed place.
    - sample_ids [G], grid_index [R, S], packed_index [G, L], row_lengths [R], segment_ids [R, S]: as in ``Plan``.
    """

    sizes: Bucket
    counts: Ints
    kept: Ints
    place: Ints
    sample_ids: Ints
    grid_index: Ints
    packed_index: Ints
    row_lengths: Ints
    segment_ids: Ints
    source: Ints  # [G, L], which kept token is in each packed place; pads have the first of their sample

    def spread(self, values: Ints) -> Ints:
        """A value of each kept token [X, ...] on the packed axis [G, L, ...]."""
        return values.take(self.source, axis=0)


def lay_out(keep: Mask, tokens: int, packing: str = "rows", bucket: Bucket | None = None) -> TokenLayout:
    """Lay out a keep mask [B, N]: in exactly the sizes of the bucket, or without one in the smallest that fit.

    Raises CheckFailedError if a sample keeps nothing, and UsageError if the mask has the wrong shape or does not fit.
    """
    if keep.ndim != 2 or len(keep) == 0 or keep.shape[1] != tokens:
        raise UsageError(f"keep mask has shape {list(keep.shape)}: expected [batch, {tokens}]")
    counts = keep.sum(axis=1, dtype=np.int64)
    if counts.min() == 0:
        raise CheckFailedError(f"sample {int(counts.argmin())} keeps no token: every sample needs at least one")
    sizes, place, *grid = _lay_out_counts(counts.tobytes(), packing, bucket)
    return TokenLayout(sizes, counts, np.flatnonzero(keep), place, *grid)


@lru_cache(maxsize=64)
def _lay_out_counts(kept: bytes, packing: str, bucket: Bucket | None) -> tuple[Any, ...]:
    """The parts of a layout that depend only on the numbers of kept tokens, which steps often have in common."""
    counts = np.frombuffer(kept, np.int64)
    row, start, sizes = _sizes(counts, packing, bucket)
    place = _places(counts, sizes.tile)
    grid = _grid(counts, place, row, start, sizes)
    source = np.repeat((np.cumsum(counts) - counts)[grid[0]], sizes.tile)
    source[place] = np.arange(len(place))
    return sizes, place, *grid, source.reshape(-1, sizes.tile)


def _sizes(counts: Ints, packing: str, bucket: Bucket | None) -> tuple[Ints, Ints, Bucket]:
    """Row and first slot of each sample, and the sizes of the plan: the bucket's, or the smallest possible."""
    row, start = np.arange(len(counts)), np.zeros(len(counts), dtype=np.int64)
    longest = int(counts.max())
    if packing == "bins":
        row, start = shortest_pack_first(counts, max(longest, bucket.row_tokens if bucket else 0))
    even = int(counts.min()) == longest
    tile = bucket.tile if bucket else longest if even else MIXED_TILE
    tiled = int((-(-counts // tile)).sum()) * tile
    need = Bucket(len(counts), tiled, int(row.max()) + 1, longest, tile)
    if bucket is None:
        return row, start, need
    if bucket.batch != need.batch:
        raise UsageError(f"a batch of {need.batch} cannot run in a bucket of batch {bucket.batch}: pad it first")
    if bucket.tokens < need.tokens or bucket.rows < need.rows or bucket.row_tokens < need.row_tokens:
        raise UsageError(f"the kept tokens need {need} and do not fit {bucket}: choose a larger bucket")
    return row, start, bucket


def _places(counts: Ints, tile: int) -> Ints:
    """Packed position of every kept token: each sample starts on a new tile."""
    tiles = -(-counts // tile)
    first = (np.cumsum(tiles) - tiles) * tile
    return np.arange(int(counts.sum())) + np.repeat(first - (np.cumsum(counts) - counts), counts)


def _grid(counts: Ints, place: Ints, row: Ints, start: Ints, sizes: Bucket) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """sample_ids, grid_index, packed_index, row_lengths and segment_ids of a layout."""
    first = np.cumsum(counts) - counts
    total = int(counts.sum())
    sample = np.repeat(np.arange(len(counts)), counts)
    sample_ids = np.zeros(sizes.tokens // sizes.tile, dtype=np.int64)
    sample_ids[place // sizes.tile] = sample
    slots = np.arange(total) + (row * sizes.row_tokens + start - first)[sample]
    packed_index = np.full(sizes.tokens, slots[0])
    packed_index[place] = slots
    row_first = np.zeros(sizes.rows, dtype=np.int64)
    row_first[row[start == 0]] = place[first[start == 0]]
    grid_index = np.repeat(row_first, sizes.row_tokens)
    grid_index[slots] = place
    segment_ids = np.full(sizes.rows * sizes.row_tokens, -1, dtype=np.int64)
    segment_ids[slots] = sample
    row_lengths = np.zeros(sizes.rows, dtype=np.int64)
    np.add.at(row_lengths, row, counts)
    shape = (sizes.rows, sizes.row_tokens)
    tiled = packed_index.reshape(-1, sizes.tile)
    return sample_ids, grid_index.reshape(shape), tiled, np.maximum(row_lengths, 1), segment_ids.reshape(shape)
