"""Method `sparsedit`: groups of sparse blocks on pooled grids and dense blocks (SparseDiT, arXiv 2412.06028)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.pass_runner import Passes
from dcconvert.passes.methods.chunk import WHAT_CHUNK_NEEDS
from dcconvert.passes.methods.method import FRONTEND, Method
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.pooled_planner import PooledPlanner
from dcconvert.passes.planning.schedule import CURVE, Policy
from dcconvert.passes.rewrite.insert_router import InsertRouter
from dcconvert.passes.rewrite.sparse_dense import RECOVERY, SparseDense
from dcconvert.passes.rewrite.split_projections import SplitProjections
from dcconvert.passes.rewrite.split_route import SplitRoute

# Pruning rates (r_min, r_max) of the published models.
PRUNING = ((0.44, 0.61), (0.61, 0.86), (0.90, 0.96))
WARM_END = 0.25  # up to this noise level the rate stays at r_min


@dataclass(frozen=True)
class SparseDiT(Method):
    """`fewest` is the smallest fraction of the tokens that any step keeps; it decides the coarsest grid."""

    fewest: float = 0.25

    name: ClassVar[str] = "sparsedit"
    title: ClassVar[str] = (
        "SparseDiT (arXiv 2412.06028): pooled grids in groups of sparse and dense blocks, more tokens at cleaner steps"
    )
    limits: ClassVar[tuple[str, ...]] = (
        WHAT_CHUNK_NEEDS,
        "SparseDiT changes the blocks: with every token kept it is not the original, and before training its images "
        "are not usable; 'dcconvert upcycle' trains it.",
    )
    blocks: ClassVar[int] = 2
    routers: ClassVar[tuple[str, ...]] = ("pool",)
    new_weights: ClassVar[str] = RECOVERY
    drops_tokens: ClassVar[bool] = False
    original_trunk: ClassVar[bool] = False
    learns_router: ClassVar[bool] = False

    def check(self) -> None:
        super().check()
        if not 0 < self.fewest <= 1:
            raise UsageError(f"fewest {self.fewest:g} is out of range: give a fraction above 0 and at most 1")

    @classmethod
    def for_ratio(cls, ratio: float, **given: Any) -> Self:
        return cls(**{"fewest": float(cls.policy(ratio).timetable().fraction(np.linspace(0, 1, 101)).min()), **given})

    @property
    def keeps_original(self) -> bool:
        return False

    def pipeline(self) -> Passes:
        return (
            *FRONTEND,
            SplitProjections(),  # separate queries, keys and values
            InsertRouter(),  #      h -> scores
            SparseDense(),  #       pooled grids in groups of blocks
            SplitRoute(),  #        route | plan on the host | denoise
        )

    def planner(self, grid: tuple[int, int]) -> Planner:
        return PooledPlanner(grid, self.fewest)

    @classmethod
    def policy(cls, ratio: float) -> Policy:
        """r(t) is r_min up to a quarter of the noise, then rises linearly to r_max; the kept fraction is 1 - r.

        Uses the published pair with the mean nearest to 1/ratio, scaled to that mean.
        """
        if ratio == 1:
            return super().policy(ratio)

        def mean(pair: tuple[float, float]) -> float:
            low, high = (1 - rate for rate in pair)
            return WARM_END * low + (1 - WARM_END) * (low + high) / 2

        low, high = min(PRUNING, key=lambda pair: abs(np.log(mean(pair) * ratio)))
        knots = ((0.0, 1 - low), (WARM_END, 1 - low), (1.0, 1 - high))
        return Policy(CURVE, ratio, knots=knots).timetable(np.linspace(0, 1, 1001)).policy
