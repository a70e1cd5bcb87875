"""Distillation in mode carry: the model learns on its own sampling runs, what it remembers included."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.run import Run
from dcconvert.passes.runtime.state import TensorState
from dcconvert.passes.trained.weight_sets import plainly_named
from dcconvert.sampling.samplers import Sampler
from dcconvert.train.distillation import Distillation, Recipe
from dcconvert.train.distributed import Distributed

FLOOR = 1e-6  # relative squared error below which nothing is learned: the first steps have none at all


class Steps(nn.Module):
    """The next step of a run as a module: the model's output."""

    def __init__(self, model: DynamicModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor], run: Run) -> Tensor:
        output: Tensor = run.step(inputs)[0]
        return output


class RunDistillation(Distillation):
    """Mode carry: a round is a batch of whole sampling runs of the student, from noise to images.

    At every step the original sees what the student sees. The errors of `unroll` steps in a row are added up before
    they are squared: what would cancel over a run costs nothing, what would pile up costs most. (Trained on the error
    of single steps the model learns to shrink towards old values, and final images become worse.) The loss is the mean
    over the samples of the logarithm, so that good samples count as much as bad ones; gradients reach back through the
    state to the start of the window.
    """

    def __init__(
        self, model: DynamicModel, recipe: Recipe, sampler: Sampler, distributed: Distributed | None = None
    ) -> None:
        student = Steps(plainly_named(model))
        super().__init__(model, student, recipe, sampler.taus, distributed or Distributed())
        self.sampler = sampler
        self.updates_a_round = math.ceil(sampler.steps / recipe.unroll)
        self.students = [Steps(student.model.with_schedule(planner.schedule)) for planner in self.planners]
        self.original = model.original_graph

    @property
    def samples_a_round(self) -> int:
        return self.recipe.batch * self.sampler.steps

    def train(self, noise: Tensor, labels: Tensor, which: int) -> dict[str, float]:
        """One round from `noise` [B, C, H, W] under the planner of this number; mean losses and gradient norm."""
        student, names, channels = self.students[which], self.model.spec.inputs, noise.shape[1]
        run = Run(student.model, len(noise), gradients=True)
        state = cast(TensorState, run.state)
        window: list[Tensor] = []
        errors, drifts, norms = [], [], []

        def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            values = dict(zip(names, (x, t, y), strict=True))
            with torch.no_grad():
                wanted = self.original(x, t, y)[0][:, :channels]
            found = torch.func.functional_call(student, self.trained(), (values, run))[:, :channels]
            size = wanted.square().mean().clamp_min(1e-12)
            window.append((found - wanted) / size.sqrt())
            errors.append(float(window[-1].detach().square().mean()))
            if len(window) == self.recipe.unroll or len(errors) == self.sampler.steps:
                drift = torch.stack(window).mean(0).square().flatten(1).mean(1)
                norms.append(self.update((drift + FLOOR).log().mean()))
                drifts.append(float(drift.detach().mean()))
                window.clear()
                state.detach()
            return found.detach()

        self.sampler.run(step, noise, labels)
        self.round += 1
        return {"output": float(np.mean(errors)), "drift": float(np.mean(drifts)), "norm": float(np.mean(norms))}
