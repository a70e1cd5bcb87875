"""Fit what a preset finds at every step to the ratio that was asked for, on runs of a few images.

DC-DiT's router is trained until it scores one token in `ratio` above 0.5, and DDiT's threshold was published for one
model and sampler. Before training, and for another model, both have to be found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dcconvert.models.dit import DiTConfig
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.spec import ROUTER
from dcconvert.passes.modules.patch_resize import enlarging, reducing
from dcconvert.passes.modules.routers import OWN
from dcconvert.passes.planning.latent_difference import ORDER, patch_spread, third_difference
from dcconvert.passes.planning.patch_planner import scales_of
from dcconvert.passes.planning.schedule import LEVELS, NATURAL, Schedule, nearest_levels
from dcconvert.passes.rewrite.patch_sizes import NAME
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.serialise.graph_json import attributes
from dcconvert.passes.trained.weight_sets import original_name
from dcconvert.sampling.samplers import Sampler, Step, initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep

Model = TypeVar("Model", bound=DynamicModel)

EVERYTHING = 1e12  # a threshold that all patches are below
SEARCH = 8  # runs in search of the threshold
MORE = 1.4
WIDER = 3.0  # how far above the original's spread, in logarithms, it may lie
BIASES = (f"{ROUTER}.score.bias", "router.router.residual_scorer.3.bias")  # of an adapter; of DC-DiT's own router
SHIFTS = 3  # each changes what the model's runs come by
IMAGES = 32  # patch sizes differ much from image to image
SEED = 3_000_000  # apart from those that images are judged by


def settle(
    model: Model,
    sampler: Sampler,
    noise: Tensor,
    labels: Tensor,
    tick: Callable[[str], None] = lambda _: None,
) -> Model:
    """The model with threshold and expected numbers of tokens for runs of this sampler; itself if it needs none.

    `noise` [B, C, H, W] and `labels` [B] begin the runs. What is expected is what its own runs keep, which are not the
    original's. The router of a DC-DiT checkpoint stays as it is. UsageError for a ratio that cannot be had.
    """
    if not model.schedule.found or model.schedule.ratio == 1:
        return model
    runs = Runs(sampler, noise, labels, lambda: tick("steps"))
    if model.schedule.kind == NATURAL:
        if model.options.router != OWN or model.options.refined:
            shift(model, runs)
        return settle_natural(model, runs)
    return settle_difference(model, runs)


def starts(config: DiTConfig) -> tuple[Tensor, Tensor]:
    """Noise and labels of the runs that a preset is fitted on."""
    noise = initial_noise(SEED, IMAGES, config.in_channels, config.image_size)
    return noise, labels_for(IMAGES, config.num_classes)


@dataclass(frozen=True)
class Runs:
    """Sampling runs of a few images."""

    sampler: Sampler
    noise: Tensor
    labels: Tensor
    tick: Callable[[], None]

    def __call__(self, step: Step) -> Tensor:
        with torch.inference_mode():
            return self.sampler.run(step, self.noise, self.labels, on_step=lambda _: self.tick())

    def kept(self, model: DynamicModel) -> np.ndarray:
        """Tokens [steps, B] that a model keeps."""
        step = ConvertedStep(model, model)
        self(step)
        return np.stack(step.kept)


def shift(model: DynamicModel, runs: Runs) -> None:
    """Shift the router's logits until one token in `base` is kept by its threshold, on runs of the model itself."""
    names, tokens = model.spec.inputs, model.spec.tokens
    unrounded = model.with_schedule(replace(model.schedule, levels=()))
    wanted = (tokens / model.schedule.base - 2) / (tokens - 2)  # the first and the last token are always kept
    for _ in range(SHIFTS):
        scores: list[np.ndarray] = []
        converted = ConvertedStep(unrounded, unrounded)

        def step(x: Tensor, t: Tensor, y: Tensor, found: list[np.ndarray], own: ConvertedStep) -> Tensor:
            found.append(model.route(dict(zip(names, (x, t, y), strict=True)))[0].float().cpu().numpy())
            return own(x, t, y)

        runs(partial(step, found=scores, own=converted))
        free = np.delete(np.stack(scores), [0, -1], axis=2)
        level = np.clip(np.quantile(free, np.clip(1 - wanted, 0, 1)), 1e-4, 1 - 1e-4)
        with torch.no_grad():
            bias_of(model).sub_(float(np.log(level / (1 - level))))


def settle_natural(model: Model, runs: Runs) -> Model:
    """Levels that the natural numbers of tokens are rounded up to, and what a run then keeps."""
    tokens = model.spec.tokens
    natural = runs.kept(model.with_schedule(replace(model.schedule, levels=())))
    most = int(natural.max())
    chosen = nearest_levels(np.quantile(natural, np.linspace(0.5, 1, 64)).round().astype(int), LEVELS - 3)
    more = min(tokens, round(MORE * most))  # for samples that keep more than any of these
    levels = tuple(sorted({*chosen[chosen < most].tolist(), most, more, tokens}))
    return expecting(model, runs, replace(model.schedule, levels=levels))


def settle_difference(model: Model, runs: Runs) -> Model:
    """The threshold with which the model's own runs keep one token in `ratio`, and the detail that images have.

    Larger patches change how the latents move, and with it what the criterion says, so that it is searched for on runs
    of the model itself.
    """
    latents: list[Tensor] = []

    def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        latents.append(x)
        found: Tensor = model.original_graph(x, t, y)[0]
        return found

    images = runs(step)
    if len(latents) <= ORDER:
        raise UsageError(f"patch sizes are chosen from the fourth step on: more than {ORDER} sampling steps are needed")
    set_detail(model, images)
    patches, tokens, ratio = model.step_planner.patches, model.spec.tokens, model.schedule.ratio

    def fraction(threshold: float) -> float:
        return float(runs.kept(model.with_schedule(replace(model.schedule, threshold=threshold))).mean()) / tokens

    least = fraction(EVERYTHING)
    if least > 1 / ratio + 1e-9:
        raise UsageError(
            f"patches of {patches[-1]} pixels from the fourth of {len(latents)} steps on give {1 / least:.1f}x at "
            f"most: ask for less than {ratio:g}x, or more steps"
        )
    windows = [latents[i : i + ORDER + 1] for i in range(len(latents) - ORDER)]
    spread = np.stack([patch_spread(third_difference(window), patches) for window in windows])
    low, high = np.log(max(float(spread.min()), 1e-12)), np.log(max(float(spread.max()), 1e-12)) + WIDER
    best = (np.inf, 0.0)
    for _ in range(SEARCH):
        middle = (low + high) / 2
        kept = fraction(float(np.exp(middle)))
        best = min(best, (abs(kept - 1 / ratio), float(np.exp(middle))))
        low, high = (middle, high) if kept > 1 / ratio else (low, middle)
    return expecting(model, runs, replace(model.schedule, threshold=best[1]))


def expecting(model: Model, runs: Runs, schedule: Schedule) -> Model:
    """The model under a schedule that says what its runs keep."""
    kept = runs.kept(model.with_schedule(schedule)).mean(1) / model.spec.tokens
    order = np.argsort(runs.sampler.taus)
    knots = tuple((float(runs.sampler.taus[i]), float(kept[i])) for i in order)
    return model.with_schedule(replace(schedule, knots=knots, mean=float(kept.mean())))  # type: ignore[return-value]


def bias_of(model: DynamicModel) -> Tensor:
    """The bias of a router's last layer."""
    return next(v for name, v in attributes(model.route_graph).items() if original_name(name) in BIASES)


def set_detail(model: DynamicModel, images: Tensor) -> None:
    """Tell the skip how much detail images have that patches of each size lose: its variance."""
    found: dict[str, Any] = attributes(model.denoise_graph)
    name = f"{NAME}.skip.detail"
    if name not in found:
        return
    first = model.step_planner.patches[0]
    for place, scale in enumerate(scales_of(model.spec.grid)[1:], 1):
        side = scale * first
        batch, channels, height, width = images.shape
        cells = images.double().reshape(batch, channels, height // side, side, width // side, side)
        flat = cells.permute(0, 1, 2, 4, 3, 5).flatten(-2)
        lost = flat - flat @ (enlarging(first, scale) @ reducing(first, scale)).T
        found[name][place] = float(lost.square().mean()) * scale**2 / (scale**2 - 1)
