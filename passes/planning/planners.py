"""Planners of the published methods, which pack tokens and restore the grid differently from `Planner`."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from dcconvert.passes.planning.chunk_plan import Planner, WeightedIndex
from dcconvert.passes.planning.layout import TokenLayout
from dcconvert.passes.planning.nearest_kept import Ints, Mask, Nearest
from dcconvert.passes.planning.pooled_planner import SizedPlanner

CERTAIN = 1e-4  # DC-DiT keeps p this far from 0 and 1
SCALES = (1, 2, 4)  # DDiT's patch sizes, in units of the model's


class MergePlanner(Planner):
    """Token merging (ToMe, arXiv 2210.09461): a token that is not kept joins the one it is most similar to.

    Scores are [B, N, 2], from `MergeRouter`: how badly a token is matched, and the grid index of its match. A packed
    token is the mean of a kept token and those that joined it (at most `members`); each of them gets its update. A
    token whose match is not kept uses the nearest kept token.
    """

    def select(self, scores: np.ndarray, counts: ArrayLike) -> Mask:
        return super().select(scores[..., 0], counts)

    def _weighted_indices(
        self, keep: Mask, laid: TokenLayout, scores: np.ndarray | None
    ) -> tuple[WeightedIndex, WeightedIndex]:
        near = self._neighbourhood.nearest(keep, laid.counts, 1)
        token, distance = near.token, near.distance
        if scores is not None:
            owner = scores[near.sample, near.target, 1].astype(np.int64)
            usable = keep[near.sample, owner]
            token = np.where(usable, owner, token[:, 0])[:, None]
            distance = np.where(usable[:, None], 0, distance)  # equal tokens are in grid order
        near = Nearest(near.sample, near.target, token, distance)
        into = self._chunks(laid.kept, laid.place, near, laid.sizes)
        return into, self._fill(laid.kept, laid.place, near, laid.counts)


class SmoothedPlanner(Planner):
    """DC-DiT's selection and dechunk (arXiv 2603.06351), on the trunk's update or its values.

    The first and the last token are always kept. With p the score of a kept token, its update becomes p times its own
    plus 1 - p times the mean of the kept ones around it, weighted by a Gaussian times their p. A dropped position takes
    the update of the nearest kept token. (Only the `neighbours` nearest tokens count, whereas DC-DiT sums over all.)
    Without scores, for example when a check keeps everything, p is 1.
    """

    @property
    def sigma(self) -> float:
        """Width of the Gaussian in grid cells: 1 up to 32 cells per side, 2 at 64, as in DC-DiT."""
        return max(1.0, max(self.grid) / 32)

    def select(self, scores: np.ndarray, counts: ArrayLike) -> Mask:
        return super().select(forced(scores), counts)

    def _weighted_indices(
        self, keep: Mask, laid: TokenLayout, scores: np.ndarray | None
    ) -> tuple[WeightedIndex, WeightedIndex]:
        nowhere = Nearest(*(np.empty(shape, np.int64) for shape in (0, 0, (0, 1), (0, 1))))
        into = self._chunks(laid.kept, laid.place, nowhere, laid.sizes)
        near = self._neighbourhood.nearest(keep, laid.counts, self.neighbours, everywhere=True)
        p = np.ones(keep.shape) if scores is None else np.clip(forced(scores), CERTAIN, 1 - CERTAIN)
        return into, self._smoothed(keep, laid, near, p)

    def _smoothed(self, keep: Mask, laid: TokenLayout, near: Nearest, p: np.ndarray) -> WeightedIndex:
        """Packed neighbours and weights [B, N, K] of every grid position."""
        shape = (*keep.shape, self.neighbours)
        token, distance = near.token.reshape(shape), near.distance.reshape(shape)
        packed = np.zeros(keep.size, np.int64)
        packed[laid.kept] = laid.place
        start = np.arange(len(keep))[:, None, None] * self.tokens
        around = p.ravel()[start + token] * np.exp(distance * (-0.5 / self.sigma**2))
        around *= np.arange(self.neighbours) < laid.counts[:, None, None]
        weight = (1 - p)[..., None] * around / np.maximum(around.sum(-1, keepdims=True), 1e-12)
        weight[..., 0] += p
        nearest = token[..., :1]  # of a kept token itself
        index = np.take_along_axis(packed[start + token], nearest, axis=1)
        return index, np.take_along_axis(weight, nearest, axis=1).astype(np.float32)

    def natural(self, scores: np.ndarray, drop: float) -> Ints:
        """Tokens per sample [B] with p > 0.5, minus the fraction `drop` of them (tail dropping); at least one."""
        chosen = (forced(scores) > 0.5).sum(1)
        return np.maximum(chosen - np.floor(drop * chosen + 1e-9), 1).astype(np.int64)


def forced(scores: np.ndarray) -> np.ndarray:
    """Scores [B, N] with the first and the last token certain to be kept."""
    scores = np.array(scores, np.float64)
    scores[:, [0, -1]] = 1.0
    return scores


class PatchPlanner(SizedPlanner):
    """DDiT (arXiv 2602.16968): each sample of a step is cut into patches of one size; it keeps N / scale^2 tokens.

    Packed tokens are taken from the tokens of all embeddings one after the other, N / scale^2 of each scale. For each
    packed token, the trunk returns `variants` values, scale^2 of each scale: one for every token of a patch.
    `chunk_index` [G, L, 1] points into B x sum of N / scale^2; `fill_index` [B, N, 2] into T x variants, and into B x N
    x scales (which scale it is).
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


def scales_of(grid: tuple[int, int]) -> tuple[int, ...]:
    """The patch sizes that tile a grid, in units of the model's."""
    return tuple(scale for scale in SCALES if grid[0] % scale == grid[1] % scale == 0)


def cells_of(grid: tuple[int, int], scale: int) -> tuple[Ints, Ints]:
    """For every token of the grid [N]: its patch of `scale` tokens a side, and its place in that patch."""
    y, x = np.indices(grid)
    return (y // scale * (grid[1] // scale) + x // scale).ravel(), (y % scale * scale + x % scale).ravel()
