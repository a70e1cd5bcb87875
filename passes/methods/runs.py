"""Fitting a method to its ratio on sampling runs, for methods whose steps decide how many tokens they keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from dcconvert.passes.methods.method import Model
from dcconvert.passes.planning.schedule import Timetable
from dcconvert.passes.runtime.model import DynamicModel

Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, t, y -> the model's output


class Runs(Protocol):
    """Sampling runs of a few images, always from the same noise."""

    @property
    def taus(self) -> np.ndarray:
        """Noise levels of the steps."""

    def __call__(self, step: Step) -> Tensor:
        """The images [B, C, H, W] of one run."""

    def step_of(self, model: DynamicModel) -> Any:
        """A step of a converted model; its `kept` lists the tokens [B] that each call kept."""


def kept(model: DynamicModel, runs: Runs) -> np.ndarray:
    """Tokens [steps, B] that a model keeps in a run."""
    step = runs.step_of(model)
    runs(step)
    return np.stack(step.kept)


def expecting(model: Model, runs: Runs, schedule: Timetable) -> Model:
    """The model with a schedule that stores how many tokens its runs keep."""
    fractions = kept(model.with_schedule(schedule), runs).mean(1) / model.spec.tokens
    order = np.argsort(runs.taus)
    knots = tuple((float(runs.taus[i]), float(fractions[i])) for i in order)
    return model.with_schedule(  # type: ignore[return-value]
        replace(schedule, seen=knots, mean=float(fractions.mean()))
    )
