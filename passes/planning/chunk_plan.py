"""The packing plan: from keep scores to the index arrays for chunk, packed attention and dechunk.

All of it runs on the host in numpy, once per denoising step. Packed tokens are ordered by sample, then by grid index.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.ir.plan_inputs import CHUNK_INPUTS, KEY_SEGMENTS
from dcconvert.passes.planning.layout import PACKINGS, Bucket, TokenLayout, lay_out
from dcconvert.passes.planning.nearest_kept import Ints, Mask, Nearest, Neighbourhood

Floats = NDArray[np.float32]
WeightedIndex = tuple[Ints, Floats]  # where each value comes from, and with what weight

REMEMBERED = 16  # plans, each of a few hundred kilobytes at most for usual sizes

PLAN_ARRAYS = (*CHUNK_INPUTS, *KEY_SEGMENTS)


@dataclass(frozen=True)
class Plan:
    """Index arrays of one step, int64 (weights float32, cu_seqlens int32), and the keep mask they were made from.

    T = G x L packed tokens in tiles, M members of a chunk, R x S slots of the attention grid, B x N token grid,
    K neighbours:

    - chunk_index, chunk_weight [G, L, M]: flat b*N+n of the tokens averaged into each packed token, the kept one first;
      rows of weights sum to 1, unused slots repeat the kept token with weight 0.
    - sample_ids [G]: sample of each tile.
    - grid_index [R, S]: packed token in each slot; an unused slot repeats the first of its row, or token 0.
    - packed_index [G, L]: flat slot r*S+s of each packed token.
    - row_lengths [R]: used slots, a prefix of the row; 1 for a row without a sample, so that no softmax is empty.
    - segment_ids [R, S]: sample of each slot, -1 for unused. A slot attends to the slots of its row with the same id,
      and -1 is an id like any other: no slot is ever without keys.
    - fill_index, fill_weight [B, N, K]: the kept tokens of the same sample nearest to each position, as packed
      indices, and their normalised Gaussian weights; a kept position has itself, weight 1.
    - cu_seqlens [B+G+1]: bounds of segments of the packed axis, for variable-length attention: each sample's tokens,
      then its pads; then every spare tile; then empty ones. None is longer than S or L. cu_seqlens_kv: the same for the
      keys.

    The rest of a sample's last tile, and the tiles that a larger bucket adds, are pads: copies of packed token 0
    (without its other members), at its slot. Nothing reads their results: no grid_index or fill_index points at one.
    """

    keep: Mask
    counts: Ints
    chunk_index: Ints
    chunk_weight: Floats
    sample_ids: Ints
    grid_index: Ints
    packed_index: Ints
    row_lengths: Ints
    segment_ids: Ints
    fill_index: Ints
    fill_weight: Floats

    def arrays(self) -> dict[str, np.ndarray]:
        """The inputs of ``denoise``, by name."""
        return {name: getattr(self, name) for name in PLAN_ARRAYS}

    @cached_property
    def cu_seqlens(self) -> NDArray[np.int32]:
        tiles, tile = self.packed_index.shape
        batch, pads = len(self.counts), -self.counts % tile
        lengths = np.zeros(batch + tiles, np.int64)
        lengths[: 2 * batch] = np.stack([self.counts, pads], axis=1).ravel()
        spare = tiles - int((self.counts + pads).sum()) // tile
        lengths[2 * batch : 2 * batch + spare] = tile
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    @property
    def cu_seqlens_kv(self) -> NDArray[np.int32]:
        return self.cu_seqlens

    @property
    def kept(self) -> int:
        """Kept tokens of all samples, padding not counted."""
        return int(self.counts.sum())

    @property
    def token_waste(self) -> float:
        """Padding on the packed axis, as a fraction of the kept tokens."""
        return self.packed_index.size / self.kept - 1

    @property
    def slot_waste(self) -> float:
        """Unused slots of the attention grid, as a fraction of the kept tokens."""
        return self.grid_index.size / self.kept - 1


class Planner:
    """Makes plans for one token grid; everything that depends only on the grid is computed once, here.

    ``grid``: (H, W). ``members``: M, tokens averaged into a packed one; 1 leaves the token unchanged. ``neighbours``:
    K. ``packing``: ``rows`` puts sample b in row b (what cross-attention needs), as does ``varlen``; ``bins`` lets
    short samples share a row. ``coverage``: keep the best token of every cell of the grid before filling up by score.
    Raises UsageError for sizes below 1 or an unknown packing.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        members: int = 8,
        neighbours: int = 4,
        packing: str = "rows",
        coverage: bool = True,
    ) -> None:
        height, width = grid
        if min(height, width, members, neighbours) < 1:
            raise UsageError(f"grid {grid}, members {members}, neighbours {neighbours}: all must be at least 1")
        if packing not in PACKINGS:
            raise UsageError(f"unknown packing {packing!r}: choose one of {', '.join(PACKINGS)}")
        self.grid = (height, width)
        self.tokens = height * width
        self.members = members
        self.neighbours = neighbours
        self.packing = packing
        self.coverage = coverage
        self._neighbourhood = Neighbourhood(height, width)
        self._cell_size = _cell_sizes(height, width)
        self._cells: dict[int, Ints] = {}
        self._lately: dict[tuple[bytes, bytes, Bucket | None], Plan] = {}

    def __call__(self, scores: np.ndarray, counts: ArrayLike, bucket: Bucket | None = None) -> Plan:
        """Select ``counts`` [B] tokens per sample by ``scores`` [B, N] and plan them; errors as in `select` and `plan`.

        The last plan is reused for the same scores and counts: a router that does not use the tokens, such as `pool`,
        returns the same scores at every step.
        """
        key = (np.asarray(scores).tobytes(), np.asarray(counts).tobytes(), bucket)
        if key not in self._lately:
            if len(self._lately) == REMEMBERED:
                del self._lately[next(iter(self._lately))]
            self._lately[key] = self.plan(self.select(scores, counts), bucket, scores)
        return self._lately[key]

    def full_plan(self, batch: int, bucket: Bucket | None = None) -> Plan:
        """Plan that keeps every token of ``batch`` samples."""
        return self.plan(np.ones((batch, self.tokens), dtype=bool), bucket)

    def select(self, scores: np.ndarray, counts: ArrayLike) -> Mask:
        """Keep mask [B, N] with exactly ``counts`` [B] tokens per sample, best scores first, ties by lower index.

        With coverage, the best token of every square cell comes before all others; the cells are the smallest for which
        there are no more cells than the count. Raises CheckFailedError with the number of a sample that has a
        non-finite score, and UsageError for shapes that do not match the grid or a count outside 1..N.
        """
        scores = np.asarray(scores)
        if scores.ndim != 2 or len(scores) == 0 or scores.shape[1] != self.tokens:
            raise UsageError(f"scores have shape {list(scores.shape)}: expected [batch, {self.tokens}]")
        wanted = np.asarray(counts, dtype=np.int64)
        if wanted.shape != scores.shape[:1] or wanted.min() < 1 or wanted.max() > self.tokens:
            raise UsageError(f"counts {wanted.tolist()}: expected {len(scores)} of them, each from 1 to {self.tokens}")
        finite = np.isfinite(scores)
        if not finite.all():
            bad = int(np.argmin(finite.all(axis=1)))
            raise CheckFailedError(
                f"sample {bad} has a non-finite keep score: check that its input and weights are finite"
            )
        keep, left = self._cover(scores, wanted)
        if not left.any():
            return keep
        # Covered tokens sort last; negation keeps the order of ties because the sort is stable.
        order = np.argsort(np.where(keep, np.inf, -scores), axis=1, kind="stable")
        sample, place = np.nonzero(np.arange(self.tokens) < left[:, None])
        keep[sample, order[sample, place]] = True
        return keep

    def _cover(self, scores: np.ndarray, wanted: Ints) -> tuple[Mask, Ints]:
        """Mask of the best token of every cell, and how many more tokens each sample must keep."""
        keep = np.zeros(scores.shape, dtype=bool)
        left = wanted.copy()
        if not self.coverage:
            return keep, left
        sizes = self._cell_size[wanted]
        padded = np.concatenate([scores, np.full((len(scores), 1), -np.inf, scores.dtype)], axis=1)
        for size in np.unique(sizes).tolist():
            samples = np.flatnonzero(sizes == size)
            if size not in self._cells:
                self._cells[size] = _cell_members(*self.grid, size)
            cells = self._cells[size]
            best = padded[samples].take(cells, axis=1).argmax(axis=2)
            keep[samples[:, None], cells[np.arange(len(cells)), best]] = True
            left[samples] -= len(cells)
        return keep, left

    def plan(self, keep: Mask, bucket: Bucket | None = None, scores: np.ndarray | None = None) -> Plan:
        """Plan a keep mask [B, N]; with a bucket the arrays have exactly its sizes, otherwise the smallest that fit.

        `scores`: the router's scores, for planners that use more than the mask. Raises CheckFailedError if a sample
        keeps nothing, and UsageError if the mask has the wrong shape or does not fit the bucket.
        """
        keep = np.ascontiguousarray(keep, dtype=bool)
        laid = lay_out(keep, self.tokens, self.packing, bucket)
        (chunk_index, chunk_weight), (fill_index, fill_weight) = self._weighted_indices(keep, laid, scores)
        return Plan(
            keep,
            laid.counts,
            chunk_index,
            chunk_weight,
            laid.sample_ids,
            laid.grid_index,
            laid.packed_index,
            laid.row_lengths,
            laid.segment_ids,
            fill_index=fill_index.reshape(*keep.shape, -1),
            fill_weight=fill_weight.reshape(*keep.shape, -1),
        )

    def _weighted_indices(
        self, keep: Mask, laid: TokenLayout, scores: np.ndarray | None
    ) -> tuple[WeightedIndex, WeightedIndex]:
        """Ways in and out of the packed tokens: chunk_index and _weight, fill_index and _weight, as in `Plan`."""
        near = self._neighbourhood.nearest(keep, laid.counts, self.neighbours)
        into = self._chunks(laid.kept, laid.place, near, laid.sizes)
        return into, self._fill(laid.kept, laid.place, near, laid.counts)

    def _chunks(self, kept: Ints, place: Ints, near: Nearest, sizes: Bucket) -> tuple[Ints, Floats]:
        """Members and weights [G, L, M] of every packed token; pads repeat the batch's first kept token."""
        shape = (sizes.tokens // sizes.tile, sizes.tile, self.members)
        index = np.full((sizes.tokens, self.members), kept[0])
        index[place] = kept[:, None]
        weight = np.zeros((sizes.tokens, self.members), dtype=np.float32)
        weight[:, 0] = 1
        if self.members == 1 or len(near.sample) == 0:
            return index.reshape(shape), weight.reshape(shape)
        # One integer orders the dropped tokens by owner, then distance, then index, and holds all three.
        token_bits, distance_bits = self._neighbourhood.token_bits, self._neighbourhood.distance_bits
        owner = np.searchsorted(kept, near.sample * self.tokens + near.token[:, 0])
        keys = (((owner << distance_bits) | near.distance[:, 0]) << token_bits) | near.target
        keys.sort()
        owner = keys >> (token_bits + distance_bits)
        owned = np.bincount(owner, minlength=len(kept))
        rank = np.arange(1, len(keys) + 1) - (np.cumsum(owned) - owned)[owner]
        used = rank < self.members
        owner, rank, token = owner[used], rank[used], keys[used] & ((1 << token_bits) - 1)
        index[place[owner], rank] = kept[owner] // self.tokens * self.tokens + token
        share = (1 / np.minimum(owned + 1, self.members)).astype(np.float32)
        weight[place, 0] = share
        weight[place[owner], rank] = share[owner]
        return index.reshape(shape), weight.reshape(shape)

    def _fill(self, kept: Ints, place: Ints, near: Nearest, counts: Ints) -> tuple[Ints, Floats]:
        """Packed neighbours and weights [B*N, K] of every grid position."""
        total = len(counts) * self.tokens
        packed = np.zeros(total, dtype=np.int64)
        packed[kept] = place
        index = np.repeat(packed[:, None], self.neighbours, axis=1)
        weight = np.zeros((total, self.neighbours), dtype=np.float32)
        weight[kept, 0] = 1
        base = near.sample * self.tokens
        target = base + near.target
        index[target] = packed[base[:, None] + near.token]
        sigma = fill_sigma(self.tokens / counts)
        # Only samples that drop something are looked up here, and their sigma is positive.
        scale = np.divide(-0.5, sigma**2, out=np.zeros_like(sigma), where=sigma > 0).astype(np.float32)
        # Distances count from the nearest one, so that the weights cannot all underflow.
        further = (near.distance - near.distance[:, :1]).astype(np.float32)
        gauss = np.exp(further * scale[near.sample][:, None])
        gauss *= np.arange(self.neighbours) < counts[near.sample][:, None]
        weight[target] = gauss / gauss.sum(axis=1, keepdims=True)
        return index, weight


def fill_sigma(ratio: ArrayLike) -> NDArray[np.float64]:
    """Width of the dechunk Gaussian, in grid cells, for ``ratio`` = N / kept tokens of a sample.

    log2 of the spacing sqrt(ratio): 0 when everything is kept, 0.5 at 2x and 1 at 4x, the widths with the lowest
    one-step error on a small trained model. Beyond that, it is close to half the spacing (2 at 16x).
    """
    return 0.5 * np.log2(np.asarray(ratio, dtype=np.float64))


def _cell_sizes(height: int, width: int) -> Ints:
    """At index ``count``, the side of the smallest square cell of which there are at most ``count`` (0 is unused)."""
    sizes = np.full(height * width + 1, max(height, width), dtype=np.int64)
    for side in range(max(height, width), 0, -1):
        sizes[-(-height // side) * -(-width // side) :] = side
    return sizes


def _cell_members(height: int, width: int, side: int) -> Ints:
    """Tokens of every side x side cell [cells, side*side], in index order; N where a cell extends beyond the grid."""
    down, right = -(-height // side), -(-width // side)
    padded = np.full((down * side, right * side), height * width, dtype=np.int64)
    padded[:height, :width] = np.arange(height * width).reshape(height, width)
    return padded.reshape(down, side, right, side).swapaxes(1, 2).reshape(down * right, side * side)
