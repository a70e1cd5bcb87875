"""Fit what a method finds at every step to the ratio that was asked for, on sampling runs of a few images.

DC-DiT's router is trained until it scores one token in `ratio` above 0.5, and DDiT's threshold was published for one
model and sampler. Before training, and for another model, both have to be found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dcconvert.models.dit import DiTConfig
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.sampling.samplers import Sampler, Step, initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep

Model = TypeVar("Model", bound=DynamicModel)

IMAGES = 32  # patch sizes differ much from image to image
SEED = 3_000_000  # apart from those that images are judged by


@dataclass(frozen=True)
class SamplingRuns:
    """Sampling runs of a few images, always from the same noise; the `Runs` of `dcconvert.passes.methods.runs`."""

    sampler: Sampler
    noise: Tensor
    labels: Tensor
    tick: Callable[[str], None] = lambda _: None

    @property
    def taus(self) -> np.ndarray:
        return self.sampler.taus

    def __call__(self, step: Step) -> Tensor:
        with torch.inference_mode():
            return self.sampler.run(step, self.noise, self.labels, on_step=lambda _: self.tick("steps"))

    def step_of(self, model: DynamicModel) -> ConvertedStep:
        return ConvertedStep(model, model)


def fitted(model: Model, sampler: Sampler, config: DiTConfig, tick: Callable[[str], None] = lambda _: None) -> Model:
    """The model whose runs with this sampler keep as many tokens as the ratio says; itself if nothing is found.

    What is expected is what its own runs keep, which are not the original's. UsageError for a ratio that cannot be had.
    """
    noise = initial_noise(SEED, IMAGES, config.in_channels, config.image_size)
    return fitted_on(model, SamplingRuns(sampler, noise, labels_for(IMAGES, config.num_classes), tick))


def fitted_on(model: Model, runs: SamplingRuns) -> Model:
    """`fitted` on other images."""
    if not model.schedule.data_dependent or model.schedule.ratio == 1:
        return model
    found: Model = model.method.fitted(model, runs)
    return found
