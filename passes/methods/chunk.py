"""Method `chunk`: dropped tokens are left out of the trunk and take the update of kept tokens near them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.pass_runner import Passes
from dcconvert.passes.methods.method import FRONTEND, Method
from dcconvert.passes.modules.routers import PLAIN_ROUTERS
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.layout import PACKINGS
from dcconvert.passes.rewrite.insert_router import InsertRouter
from dcconvert.passes.rewrite.pack_trunk import PackTrunk
from dcconvert.passes.rewrite.split_route import SplitRoute

WHAT_CHUNK_NEEDS = (
    "Mode chunk drops tokens without training: its images are worse than those of the original with fewer steps at "
    "equal compute. It is the starting point for upcycling, not a finished model."
)


@dataclass(frozen=True)
class Chunk(Method):
    """Each packed token is the mean of at most `members` tokens of the grid, and a token that is not kept takes the
    update of its `neighbours` nearest kept ones. `coverage`: the best token of every 2x2 cell comes first. `packing`:
    `rows` (one sample per row of attention), `bins` (several short ones), or `varlen` (torch on a GPU in half
    precision, through `torch.nn.attention.varlen`; it has no ONNX form).
    """

    members: int = 4
    neighbours: int = 4
    coverage: bool = True
    packing: str = "rows"

    name: ClassVar[str] = "chunk"
    title: ClassVar[str] = "dropped tokens are left out of the trunk; needs training"
    limits: ClassVar[tuple[str, ...]] = (WHAT_CHUNK_NEEDS,)
    routers: ClassVar[tuple[str, ...]] = PLAIN_ROUTERS

    def check(self) -> None:
        super().check()
        if self.packing not in PACKINGS:
            raise UsageError(f"unknown packing '{self.packing}': choose one of {', '.join(PACKINGS)}")
        if min(self.members, self.neighbours) < 1:
            raise UsageError(f"members ({self.members}) and neighbours ({self.neighbours}) must be at least 1")

    @property
    def row_packing(self) -> str:
        return self.packing

    def pipeline(self) -> Passes:
        return (
            *FRONTEND,
            InsertRouter(),  # h -> scores
            PackTrunk(),  #    h -> chunk -> packed trunk -> dechunk -> h'
            SplitRoute(),  #   route | plan on the host | denoise
        )

    def planner(self, grid: tuple[int, int]) -> Planner:
        return Planner(grid, self.members, self.neighbours, self.packing, self.coverage)
