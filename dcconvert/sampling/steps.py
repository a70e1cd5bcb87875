"""One step of a sampling run: of the original or the converted model, in torch or on ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.export.buckets import BucketSet
from dcconvert.export.checks.parity import as_array
from dcconvert.export.onnx.export import export_original
from dcconvert.export.runtimes.ort import CPU, OrtModel, make_session, pick
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.run import Run, Runtime
from dcconvert.passes.runtime.step_run import StepRun


def silent(_: str) -> None:
    """Report progress to nobody."""


@dataclass
class OrtPair:
    """Original and converted model on ONNX Runtime, with a step function each for the samplers."""

    model: DynamicModel
    converted: OrtModel
    original: Any  # an InferenceSession

    @classmethod
    def open(
        cls,
        model: DynamicModel,
        planner: StepPlanner,
        bucket_set: BucketSet | None,
        onnx: Path,
        work: Path,
        threads: int = 0,
    ) -> OrtPair:
        """Sessions over a bundle's files; the original is exported to `work` if it is not there.

        Without a bucket set every step has its own shape.
        """
        original = work / "original.onnx"
        if not original.exists():
            export_original(model, original, model.spec.example(3))
        return cls(model, OrtModel(onnx, planner, bucket_set, CPU, threads), make_session(original, CPU, threads))

    @property
    def name(self) -> str:
        return f"ONNX Runtime {self.converted.provider.removesuffix('ExecutionProvider')}"

    def original_step(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        feed = arrays_of(self.model, x, t, y)
        return torch.from_numpy(self.original.run(None, pick(self.original, feed))[0])


class ConvertedStep:
    """The step function of one sampling run of a converted model, on any runtime; made new for every run.

    `groups` as in `Run`. With `unconditional` the second half of the batch keeps what that planner says. `by_table`: a
    run table makes the run, so a step without weights is computed, whatever the schedule says.
    """

    def __init__(
        self,
        model: DynamicModel,
        runtime: Runtime,
        groups: int = 1,
        unconditional: StepPlanner | None = None,
        *,
        by_table: bool = False,
    ) -> None:
        self.model = model
        self.groups = groups
        self.unconditional = unconditional
        self.by_table = by_table
        self.runtime = runtime
        self.run: Run | None = None
        self.kept: list[np.ndarray] = []  # tokens of each sample at every step so far

    @property
    def planners(self) -> list[StepPlanner]:
        """Those of both halves of guidance, where they differ."""
        return [] if self.unconditional is None else [self.runtime.planner, self.unconditional]

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, weights: tuple[float, ...] | None = None) -> Tensor:
        """`weights`: what a run table says of a step (see `run_table.Model`); None: the schedule decides."""
        if self.run is None:
            self.run = self.runtime.start(len(x), self.groups)
        if weights is None and self.by_table:
            weights = ()
        in_torch = isinstance(self.runtime, DynamicModel)
        values = dict(zip(self.model.spec.inputs, (x, t, y), strict=True))
        inputs = values if in_torch else arrays_of(self.model, x, t, y)
        if weights is None:
            output = self.run.step(inputs, self.counts(self.run, inputs), self.planners)[0]
        else:
            assert isinstance(self.run, StepRun)
            tokens = 0 if weights else self.model.spec.tokens
            output = self.run.step(inputs, np.full(len(x), tokens), weights=weights)[0]
        self.kept.append(self.run.kept)
        return output if in_torch else torch.from_numpy(output)

    def counts(self, run: Run, inputs: dict[str, Any]) -> np.ndarray | None:
        """What the samples keep, if not what the runtime's own planner says."""
        if self.unconditional is None or self.unconditional.schedule.data_dependent:
            return None
        steps = None if run.history is None else run.history.steps[: run.batch]
        taus = self.unconditional.taus(inputs, run.batch)
        first, second = (p.counts(taus, steps) for p in (self.runtime.planner, self.unconditional))
        return np.where(np.arange(run.batch) < run.batch // 2, first, second)


def arrays_of(model: DynamicModel, *values: Tensor) -> dict[str, np.ndarray]:
    return {name: as_array(value) for name, value in zip(model.spec.inputs, values, strict=True)}
