"""Method `steps`: some steps are computed in full, and the others forecast the trunk's update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dcconvert.passes.ir.pass_runner import Passes
from dcconvert.passes.ir.spec import UPDATES
from dcconvert.passes.methods.method import FRONTEND, Method
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.rewrite.split_steps import SplitSteps
from dcconvert.passes.runtime.run import Run
from dcconvert.passes.runtime.step_run import StepRun
from dcconvert.passes.runtime.update_history import UpdateHistory


@dataclass(frozen=True)
class Steps(Method):
    """No training needed. A run carries the trunk's last three updates and no keys and values."""

    name: ClassVar[str] = "steps"
    mode: ClassVar[str] = "steps"
    remembers: ClassVar[str] = "updates"
    run: ClassVar[type[Run]] = StepRun
    title: ClassVar[str] = "each step computes the whole trunk or forecasts it from the last updates; no training"
    limits: ClassVar[tuple[str, ...]] = (
        "Mode steps needs the steps of one image in order: a run keeps the last updates of every sample, and a sampler "
        "that goes back to more noise has to start another run.",
    )
    blocks: ClassVar[int] = 0
    routers: ClassVar[tuple[str, ...]] = ("none",)
    drops_tokens: ClassVar[bool] = False
    trains: ClassVar[tuple[str, ...]] = ()
    learns_router: ClassVar[bool] = False

    def pipeline(self) -> Passes:
        return (*FRONTEND, SplitSteps())

    def run_counts(self, planner: StepPlanner, taus: np.ndarray) -> np.ndarray:
        history, counts = UpdateHistory(1, UPDATES), []
        for tau in np.asarray(taus, np.float64)[:, None]:
            full = history.due(planner.fraction(tau, history.steps))
            history.note(tau, full)
            counts.append(planner.spec.tokens if full[0] else 0)
        return np.array(counts)

    def planner(self, grid: tuple[int, int]) -> Planner:
        return Planner(grid, members=1, neighbours=1)
