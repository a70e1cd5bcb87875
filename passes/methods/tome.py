"""Method `tome`: similar tokens are merged (arXiv 2210.09461; for diffusion, 2303.17604)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.pass_runner import Passes
from dcconvert.passes.methods.chunk import WHAT_CHUNK_NEEDS
from dcconvert.passes.methods.method import FRONTEND, Method
from dcconvert.passes.modules.routers import MergeRouter, merge_cell
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.planners import MergePlanner
from dcconvert.passes.rewrite.insert_router import InsertRouter
from dcconvert.passes.rewrite.pack_trunk import PackTrunk
from dcconvert.passes.rewrite.split_route import SplitRoute


@dataclass(frozen=True)
class ToMe(Method):
    """The training-free control. A packed token is the mean of at most `members` tokens; `fewest` is the smallest
    fraction of the tokens that any step keeps, which bounds the distance between the tokens that are always kept."""

    members: int = 8
    fewest: float = 0.25

    name: ClassVar[str] = "tome"
    title: ClassVar[str] = "token merging (arXiv 2210.09461, 2303.17604) around the trunk: the training-free control"
    limits: ClassVar[tuple[str, ...]] = (
        WHAT_CHUNK_NEEDS,
        "Tokens are merged once around the trunk, where ToMe does it in every block.",
    )
    routers: ClassVar[tuple[str, ...]] = ("merge",)
    plain_plan: ClassVar[bool] = False
    learns_router: ClassVar[bool] = False

    def check(self) -> None:
        super().check()
        if self.members < 1 or not 0 < self.fewest <= 1:
            raise UsageError(f"members {self.members} must be at least 1, fewest {self.fewest:g} above 0 and at most 1")

    @classmethod
    def for_ratio(cls, ratio: float, **given: Any) -> Self:
        return cls(**{"fewest": 1 / ratio, **given})

    def router_module(self, grid: tuple[int, int]) -> nn.Module:
        return MergeRouter(grid, merge_cell(self.fewest))

    def pipeline(self) -> Passes:
        return (
            *FRONTEND,
            InsertRouter(),  # h -> scores and matches
            PackTrunk(),  #    h -> means of matched tokens -> packed trunk -> their updates -> h'
            SplitRoute(),  #   route | plan on the host | denoise
        )

    def planner(self, grid: tuple[int, int]) -> Planner:
        return MergePlanner(grid, members=self.members, neighbours=1, coverage=False)
