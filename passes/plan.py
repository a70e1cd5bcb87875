"""The packing plan: from keep scores to the index arrays that chunk, packed attention and dechunk take.

All of it runs on the host in numpy, once a denoising step. Packed tokens are ordered by sample, then by grid index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcconvert.passes.errors import CheckFailedError, UsageError
from dcconvert.passes.neighbourhood import Ints, Mask, Nearest, Neighbourhood

Floats = NDArray[np.float32]

PLAN_ARRAYS = (
    "chunk_index",
    "chunk_weight",
    "sample_ids",
    "grid_index",
    "packed_index",
    "row_lengths",
    "segment_ids",
    "fill_index",
    "fill_weight",
)
PACKINGS = ("rows", "bins")

# Tile length when samples keep different numbers of tokens: on average half a tile a sample is padding.
MIXED_TILE = 8


class BucketShape(Protocol):
    """Anything with the five static sizes of a bucket."""

    @property
    def batch(self) -> int:
        """Samples (B)."""

    @property
    def tokens(self) -> int:
        """Packed tokens (T)."""

    @property
    def rows(self) -> int:
        """Rows of the attention grid."""

    @property
    def row_tokens(self) -> int:
        """Slots a row (S)."""

    @property
    def tile(self) -> int:
        """Packed tokens a tile (L)."""


@dataclass(frozen=True, order=True)
class Bucket:
    """Static shapes of one profile: ``batch`` samples, ``tokens`` packed tokens (T), ``rows`` x ``row_tokens`` slots.

    The packed tokens come in tiles of ``tile`` (L), each tile of one sample. UsageError for a size below 1 or a T that
    is not a multiple of L.
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
        """Whether samples with these kept counts, the last repeated up to ``batch``, fit with one sample a row."""
        kept = np.asarray(counts)
        spare = self.batch - len(kept)
        if len(kept) == 0 or spare < 0:
            return False
        tiled = -(-kept // self.tile) * self.tile
        total = int(tiled.sum()) + spare * int(tiled[-1])
        return self.rows >= self.batch and self.row_tokens >= int(kept.max()) and self.tokens >= total


@dataclass(frozen=True)
class Plan:
    """Index arrays of one step, int64 (weights float32), and the keep mask they were made from.

    T = G x L packed tokens in tiles, M members of a chunk, R x S slots of the attention grid, B x N token grid,
    K neighbours:

    - chunk_index, chunk_weight [G, L, M]: flat b*N+n of the tokens averaged into each packed token, the kept one first;
      rows of weights sum to 1, unused slots repeat the kept token with weight 0.
    - sample_ids [G]: sample of each tile.
    - grid_index [R, S]: packed token in each slot; an unused slot repeats the first of its row, or token 0.
    - packed_index [G, L]: flat slot r*S+s of each packed token.
    - row_lengths [R]: used slots, a prefix of the row; 1 for a row without a sample, so no softmax is over nothing.
    - segment_ids [R, S]: sample of each slot, -1 for unused. A slot attends to the slots of its row with the same id,
      and -1 is an id like any other: no slot is ever without keys.
    - fill_index, fill_weight [B, N, K]: the kept tokens of the same sample nearest to each position, as packed
      indices, and their normalised Gaussian weights; a kept position has itself, weight 1.

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
    """Makes plans for one token grid; everything that depends only on the grid is computed here, once.

    ``grid``: (H, W). ``members``: M, tokens averaged into a packed one; 1 selects it unchanged. ``neighbours``: K.
    ``packing``: ``rows`` puts sample b in row b (what cross-attention needs); ``bins`` lets short samples share a row.
    ``coverage``: keep the best token of every cell of the grid before filling up by score.
    UsageError for sizes below 1 or an unknown packing.
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

    def __call__(self, scores: np.ndarray, counts: ArrayLike, bucket: BucketShape | None = None) -> Plan:
        """Select ``counts`` [B] tokens a sample by ``scores`` [B, N] and plan them; errors as in those two."""
        return self.plan(self.select(scores, counts), bucket)

    def full_plan(self, batch: int, bucket: BucketShape | None = None) -> Plan:
        """Plan that keeps every token of ``batch`` samples."""
        return self.plan(np.ones((batch, self.tokens), dtype=bool), bucket)

    def select(self, scores: np.ndarray, counts: ArrayLike) -> Mask:
        """Keep mask [B, N] with exactly ``counts`` [B] tokens a sample, best scores first, ties by lower index.

        With coverage, the best token of every square cell comes before all others; the cells are the smallest of which
        there are no more than the count. CheckFailedError names a sample with a non-finite score; UsageError for shapes
        that do not match the grid or a count outside 1..N.
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
        """Mask of the best token of every cell, and how many tokens each sample is still to keep."""
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

    def plan(self, keep: Mask, bucket: BucketShape | None = None) -> Plan:
        """Plan a keep mask [B, N]; with a bucket the arrays have exactly its sizes, else the smallest that do.

        CheckFailedError if a sample keeps nothing; UsageError if the mask is misshapen or does not fit the bucket.
        """
        keep = np.ascontiguousarray(keep, dtype=bool)
        if keep.ndim != 2 or len(keep) == 0 or keep.shape[1] != self.tokens:
            raise UsageError(f"keep mask has shape {list(keep.shape)}: expected [batch, {self.tokens}]")
        counts = keep.sum(axis=1, dtype=np.int64)
        if counts.min() == 0:
            raise CheckFailedError(f"sample {int(counts.argmin())} keeps no token: every sample needs at least one")
        row, start, sizes = self._layout(counts, bucket)
        kept = np.flatnonzero(keep)
        place = _places(counts, sizes.tile)
        near = self._neighbourhood.nearest(keep, counts, self.neighbours)
        chunk_index, chunk_weight = self._chunks(kept, place, near, sizes)
        fill_index, fill_weight = self._fill(kept, place, near, counts)
        return Plan(
            keep,
            counts,
            chunk_index,
            chunk_weight,
            *_grid(counts, place, row, start, sizes),
            fill_index=fill_index.reshape(*keep.shape, -1),
            fill_weight=fill_weight.reshape(*keep.shape, -1),
        )

    def _layout(self, counts: Ints, bucket: BucketShape | None) -> tuple[Ints, Ints, Bucket]:
        """Row and first slot of each sample, and the sizes of the plan: the bucket's, or the smallest possible."""
        row, start = np.arange(len(counts)), np.zeros(len(counts), dtype=np.int64)
        longest = int(counts.max())
        if self.packing == "bins":
            row, start = shortest_pack_first(counts, max(longest, bucket.row_tokens if bucket else 0))
        even = int(counts.min()) == longest
        tile = bucket.tile if bucket else longest if even else MIXED_TILE
        tiled = int((-(-counts // tile)).sum()) * tile
        need = Bucket(len(counts), tiled, int(row.max()) + 1, longest, tile)
        if bucket is None:
            return row, start, need
        given = Bucket(bucket.batch, bucket.tokens, bucket.rows, bucket.row_tokens, bucket.tile)
        if given.batch != need.batch:
            raise UsageError(f"a batch of {need.batch} cannot run in a bucket of batch {given.batch}: pad it first")
        if given.tokens < need.tokens or given.rows < need.rows or given.row_tokens < need.row_tokens:
            raise UsageError(f"the kept tokens need {need} and do not fit {given}: choose a larger bucket")
        return row, start, given

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

    log2 of the spacing sqrt(ratio): 0 when everything is kept, 0.5 at 2x and 1 at 4x, the widths that gave the lowest
    one-step error on a small trained model; close to half the spacing from there on (2 at 16x).
    """
    return 0.5 * np.log2(np.asarray(ratio, dtype=np.float64))


def shortest_pack_first(lengths: Sequence[int] | Ints, capacity: int) -> tuple[Ints, Ints]:
    """Row and first slot of every sample: longest first, each into the row with the most room left, else a new one.

    SPFHP of Krell et al. (arXiv 2107.02027) without its histogram, which pays only for far larger batches. Ties go to
    the lower sample and the lower row. UsageError if a sample is longer than ``capacity``.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.max() > capacity:
        raise UsageError(f"a sample keeps {lengths.max()} tokens and rows hold {capacity}: choose longer rows")
    row, start, used = np.zeros_like(lengths), np.zeros_like(lengths), [0]
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        best = used.index(min(used))
        if used[best] + length > capacity:
            best = len(used)
            used.append(0)
        row[sample], start[sample] = best, used[best]
        used[best] += length
    return row, start


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


def _cell_sizes(height: int, width: int) -> Ints:
    """Side of the smallest square cell of which there are at most ``count``, at index ``count`` (0 is unused)."""
    sizes = np.full(height * width + 1, max(height, width), dtype=np.int64)
    for side in range(max(height, width), 0, -1):
        sizes[-(-height // side) * -(-width // side) :] = side
    return sizes


def _cell_members(height: int, width: int, side: int) -> Ints:
    """Tokens of every side x side cell [cells, side*side], in index order; N where a cell sticks out of the grid."""
    down, right = -(-height // side), -(-width // side)
    padded = np.full((down * side, right * side), height * width, dtype=np.int64)
    padded[:height, :width] = np.arange(height * width).reshape(height, width)
    return padded.reshape(down, side, right, side).swapaxes(1, 2).reshape(down * right, side * side)
