"""Plans for DDiT's trunk: one patch size per sample and step, out of p, 2p and 4p (arXiv 2602.16968)."""

from __future__ import annotations

import numpy as np

from dcconvert.passes.planning.chunk_plan import WeightedIndex
from dcconvert.passes.planning.layout import TokenLayout
from dcconvert.passes.planning.nearest_kept import Ints, Mask
from dcconvert.passes.planning.pooled_planner import SizedPlanner

SCALES = (1, 2, 4)  # patch sizes, in those of the model


def scales_of(grid: tuple[int, int]) -> tuple[int, ...]:
    """The patch sizes that tile a grid, in units of the model's patch size."""
    return tuple(scale for scale in SCALES if grid[0] % scale == grid[1] % scale == 0)


def cells_of(grid: tuple[int, int], scale: int) -> tuple[Ints, Ints]:
    """For every token of the grid [N]: its patch of `scale` tokens per side, and its position in that patch."""
    y, x = np.indices(grid)
    return (y // scale * (grid[1] // scale) + x // scale).ravel(), (y % scale * scale + x % scale).ravel()


class PatchPlanner(SizedPlanner):
    """Plans in which each sample is cut into patches of one size: it keeps N / scale^2 tokens.

    Packed tokens are selected from the concatenation of all embeddings, N / scale^2 tokens of each scale. For a packed
    token, the trunk returns `variants` values, scale^2 of each scale: one for every token of a patch. `chunk_index` [G,
    L, 1] is in B x sum of N / scale^2; `fill_index` [B, N, 2] in T x variants, and in B x N x scales (which scale it
    is).
    """

    def __init__(self, grid: tuple[int, int], packing: str = "rows") -> None:
        super().__init__(grid, members=1, neighbours=2, packing=packing, coverage=False)
        self.scales = scales_of(grid)
        self.sizes = {self.tokens // scale**2: place for place, scale in reversed(list(enumerate(self.scales)))}
        self.embedded = sum(self.sizes)
        self.variants = sum(scale**2 for scale in self.scales)
        self._places = {place: cells_of(grid, scale) for place, scale in enumerate(self.scales)}

    def first(self, count: int) -> Mask:
        return np.asarray(self._places[self.sizes[count]][1] == 0)

    def _weighted_indices(
        self, keep: Mask, laid: TokenLayout, scores: np.ndarray | None
    ) -> tuple[WeightedIndex, WeightedIndex]:
        places = [self.sizes[count] for count in laid.counts.tolist()]
        before = np.cumsum([0, *(self.tokens // scale**2 for scale in self.scales)])  # tokens of the scales before
        values = np.cumsum([0, *(scale**2 for scale in self.scales)])
        index = np.concatenate(
            [b * self.embedded + before[p] + np.arange(laid.counts[b]) for b, p in enumerate(places)]
        )
        fill = np.empty((*keep.shape, 2), np.int64)
        first = np.cumsum(laid.counts) - laid.counts
        for b, p in enumerate(places):
            cell, within = self._places[p]
            fill[b, :, 0] = laid.place[first[b] + cell] * self.variants + values[p] + within
            fill[b, :, 1] = (b * self.tokens + np.arange(self.tokens)) * len(self.scales) + p
        weight = np.ones((*laid.packed_index.shape, 1), np.float32)
        return (laid.spread(index)[..., None], weight), (fill, np.ones(fill.shape, np.float32))
