"""Plans for SparseDiT's trunk: the grid pooled to a coarser one (arXiv 2412.06028)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcconvert.passes.planning.chunk_plan import Plan, Planner, WeightedIndex
from dcconvert.passes.planning.layout import Bucket, TokenLayout
from dcconvert.passes.planning.nearest_kept import Ints, Mask


@dataclass(frozen=True)
class Pooling:
    """Adaptive average pooling of an H x W grid to `size`, and nearest up-sampling back.

    index, weight [M, members]: tokens averaged into each cell; first [M]: the first of them; cell [N]: where each grid
    position is up-sampled from.
    """

    size: tuple[int, int]
    index: Ints
    weight: NDArray[np.float32]
    first: Ints
    cell: Ints


def windows(length: int, parts: int) -> list[range]:
    """The positions that adaptive average pooling averages into each of `parts`; they may overlap."""
    return [range(i * length // parts, -(-(i + 1) * length // parts)) for i in range(parts)]


def pooled_sizes(grid: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """Pooled grids of an H x W grid by number of tokens, ascending; one for every length of the long side."""
    longest = max(grid)
    shapes = [tuple(-(-side * part // longest) for side in grid) for part in range(1, longest + 1)]
    return {height * width: (height, width) for height, width in shapes}


class SizedPlanner(Planner):
    """Plans whose samples keep one of a few numbers of tokens, with the same tokens each time for each number.

    `sizes`: the value for each number of tokens; other numbers are rounded down to one of these. Subclasses set it.
    """

    sizes: dict[int, Any]

    def allowed(self, counts: ArrayLike) -> Ints:
        """For each of `counts`, the largest allowed number of tokens that does not exceed it, or else the smallest
        one."""
        known = np.array(sorted(self.sizes))
        return known[np.maximum(np.searchsorted(known, np.asarray(counts), side="right") - 1, 0)]

    def select(self, scores: np.ndarray, counts: ArrayLike) -> Mask:
        super().select(scores, counts)  # for its checks
        return self.mask(self.allowed(counts))

    def mask(self, counts: Ints) -> Mask:
        """Keep mask [B, N] with these numbers of tokens per sample (each in `sizes`): the first token of each cell."""
        return np.stack([self.first(count) for count in counts.tolist()])

    def first(self, count: int) -> Mask:
        """Which tokens [N] are the first of a cell if there are `count` cells."""
        raise NotImplementedError

    def plan(self, keep: Mask, bucket: Bucket | None = None, scores: np.ndarray | None = None) -> Plan:
        return super().plan(self.mask(self.allowed(np.maximum(keep.sum(1), 1))), bucket, scores)


class PooledPlanner(SizedPlanner):
    """Plans that keep the same cells of every sample, as many as a pooled grid has; scores are not used.

    `fewest`: the smallest fraction of the tokens that any step keeps; it bounds the tokens averaged into one.
    """

    def __init__(self, grid: tuple[int, int], fewest: float, packing: str = "rows") -> None:
        sizes = pooled_sizes(grid)
        tokens = grid[0] * grid[1]
        least = min(sizes, key=lambda count: (abs(count - fewest * tokens), count))
        self.sizes = {count: size for count, size in sizes.items() if count >= least}
        members = max(
            len(max(windows(grid[0], size[0]), key=len)) * len(max(windows(grid[1], size[1]), key=len))
            for size in self.sizes.values()
        )
        super().__init__(grid, members=members, neighbours=1, packing=packing, coverage=False)
        self._poolings: dict[int, Pooling] = {}

    def first(self, count: int) -> Mask:
        mask = np.zeros(self.tokens, bool)
        mask[self.pooling(count).first] = True
        return mask

    def pooling(self, count: int) -> Pooling:
        if count not in self._poolings:
            self._poolings[count] = self._pooling(self.sizes[count])
        return self._poolings[count]

    def _pooling(self, size: tuple[int, int]) -> Pooling:
        width, down, right = self.grid[1], windows(self.grid[0], size[0]), windows(self.grid[1], size[1])
        cells = [[y * width + x for y in rows for x in columns] for rows in down for columns in right]
        index = np.array([cell + cell[:1] * (self.members - len(cell)) for cell in cells])
        used = np.array([len(cell) for cell in cells])[:, None]
        weight = ((np.arange(self.members) < used) / used).astype(np.float32)
        y, x = (np.arange(side) * parts // side for side, parts in zip(self.grid, size, strict=True))
        return Pooling(size, index, weight, index[:, 0], (y[:, None] * size[1] + x).ravel())

    def _weighted_indices(
        self, keep: Mask, laid: TokenLayout, scores: np.ndarray | None
    ) -> tuple[WeightedIndex, WeightedIndex]:
        poolings = [self.pooling(count) for count in laid.counts.tolist()]
        index = np.concatenate([b * self.tokens + pooling.index for b, pooling in enumerate(poolings)])
        weight = np.concatenate([pooling.weight for pooling in poolings])
        first = np.cumsum(laid.counts) - laid.counts
        fill = np.stack([laid.place[start + pooling.cell] for start, pooling in zip(first, poolings, strict=True)])
        into = laid.spread(index), weight.take(laid.source, axis=0)
        return into, (fill[..., None], np.ones((*keep.shape, 1), np.float32))
