"""Method `carry`: tokens that a step does not compute are extrapolated linearly from their last computed values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.pass_runner import Passes
from dcconvert.passes.ir.spec import STATE_DTYPES
from dcconvert.passes.methods.method import FRONTEND, Method
from dcconvert.passes.modules.routers import CARRY_ROUTERS
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.planning.token_history import Doubles, History
from dcconvert.passes.rewrite.carry_trunk import CarryTrunk
from dcconvert.passes.rewrite.hoist_constants import HoistConstants
from dcconvert.passes.rewrite.insert_router import InsertRouter
from dcconvert.passes.rewrite.split_route import SplitRoute

TIE = 1e-6  # weight of the scores between tokens of equal urgency


@dataclass(frozen=True)
class Carry(Method):
    """No training needed. `max_staleness`: a token that was not computed for this many times the round-robin interval
    is computed next. `state_dtype`: the precision of what is remembered, one of STATE_DTYPES."""

    max_staleness: float = 3.0
    state_dtype: str = "model"

    name: ClassVar[str] = "carry"
    mode: ClassVar[str] = "carry"
    remembers: ClassVar[str] = "tokens"
    title: ClassVar[str] = "tokens that a step does not compute are carried over from earlier steps; no training"
    limits: ClassVar[tuple[str, ...]] = (
        "Mode carry needs the steps of one image in order: a run keeps a state for every sample, and a sampler that "
        "goes back to more noise has to start another run.",
    )
    blocks: ClassVar[int] = 0
    routers: ClassVar[tuple[str, ...]] = CARRY_ROUTERS
    schedule: ClassVar[str] = "falling"
    learning_rate: ClassVar[float] = 3e-5
    learns_router: ClassVar[bool] = False

    def check(self) -> None:
        super().check()
        if self.state_dtype not in STATE_DTYPES:
            raise UsageError(f"unknown state dtype '{self.state_dtype}': choose one of {', '.join(STATE_DTYPES)}")
        if not 0 < self.max_staleness < math.inf:
            raise UsageError(f"max_staleness {self.max_staleness:g} is out of range: give a number above 0")

    @property
    def remembered_as(self) -> str:
        return self.state_dtype

    def pipeline(self) -> Passes:
        return (
            *FRONTEND,
            InsertRouter(),  #    h -> scores
            CarryTrunk(),  #      h -> kept tokens -> packed trunk -> state -> h'
            SplitRoute(),  #      route | plan on the host | denoise
            HoistConstants(),  #  what stays the same over a run, out of denoise
        )

    def planner(self, grid: tuple[int, int]) -> Planner:
        return Planner(grid, members=1, neighbours=1)

    def run_counts(self, planner: StepPlanner, taus: np.ndarray) -> np.ndarray:
        counts = super().run_counts(planner, taus)
        counts[0] = planner.spec.tokens  # there is nothing to carry over yet
        return counts

    def urgency(self, history: History, scores: np.ndarray, counts: np.ndarray, taus: Doubles) -> Doubles:
        """How urgently each token should be computed [B, N]: noise levels since the last time, times the router's
        factor.

        For `drift`, the factor is the square root of the speed at which the token's update changed; for `age`, it is 1.
        With these two, the scores break ties and cover the grid evenly. The scores of any other router are the factor.
        A token that was not computed for `max_staleness` times the round-robin interval comes before all others.
        """
        elapsed = history.elapsed(taus)
        router = self.router
        if router == "drift":
            factor = np.sqrt(history.drift())
        else:
            factor = np.ones_like(elapsed) if router == "age" else scores.astype(np.float64)
        level = elapsed * (factor + 1e-6)
        starving = history.age * counts[:, None] >= self.max_staleness * scores.shape[1]
        return level + TIE * scores + np.where(starving, 1e6 * (1 + history.age), 0.0)
