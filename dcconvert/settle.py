"""Fit what a preset finds at every step to the ratio that was asked for, on runs of the original.

DC-DiT's router is trained until it scores one token in `ratio` above 0.5, and DDiT's threshold was published for one
model and sampler. Before training, and for another model, both have to be found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.api import Converted
from dcconvert.passes.adapters import ROUTER
from dcconvert.passes.difference import ORDER, largest_below, patch_spread, third_difference
from dcconvert.passes.errors import UsageError
from dcconvert.passes.patch_planner import scales_of
from dcconvert.passes.patch_sizes import NAME
from dcconvert.passes.planners import SmoothedPlanner
from dcconvert.passes.routers import OWN
from dcconvert.passes.schedule import LEVELS, NATURAL, nearest_levels
from dcconvert.passes.serialise import attributes
from dcconvert.sampling import Sampler

OWN_BIAS = "router.router.residual_scorer.3.bias"
IMAGES = 8
SEED = 3_000_000  # apart from those that images are judged by


def settle(
    model: Converted, sampler: Sampler, noise: Tensor, labels: Tensor, tick: Callable[[str], None] = lambda _: None
) -> Converted:
    """The model with threshold and expected numbers of tokens for runs of this sampler; itself if it needs none.

    `noise` [B, C, H, W] and `labels` [B] begin the runs of the original. UsageError for a ratio that cannot be had.
    """
    if not model.schedule.found:
        return model
    latents: list[Tensor] = []
    scores: list[np.ndarray] = []
    names = model.spec.inputs

    def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        inputs = dict(zip(names, (x, t, y), strict=True))
        latents.append(x)
        if model.schedule.kind == NATURAL:
            scores.append(model.route(inputs)[0].float().cpu().numpy())
        found: Tensor = model.original_graph(x, t, y)[0]
        tick("steps")
        return found

    with torch.inference_mode():
        images = sampler.run(step, noise, labels)
    if model.schedule.kind == NATURAL:
        return settle_natural(model, np.stack(scores), sampler.taus)
    return settle_difference(model, [*latents, images], sampler.taus)


def settle_natural(model: Converted, scores: np.ndarray, taus: np.ndarray) -> Converted:
    """Shift the router's logits so that one token in `base` is scored above 0.5; scores [steps, B, N] before that.

    The shift is the bias of the learned part of the router.
    """
    schedule, planner = model.schedule, model.step_planner.planner
    assert isinstance(planner, SmoothedPlanner)
    level = float(np.quantile(np.delete(scores, [0, -1], axis=2), 1 - 1 / schedule.base))
    level = min(max(level, 1e-4), 1 - 1e-4)
    with torch.no_grad():
        if model.options.router != OWN or model.options.refined:  # what the checkpoint's router says stands
            attributes(model.route_graph)[bias_of(model)] -= float(np.log(level / (1 - level)))
        else:
            level = 0.5
    moved = np.where(scores > level, 0.75, 0.25)  # on the right side of 0.5 is all that counts
    counts = np.stack([planner.natural(part, schedule.dropped) for part in moved])
    levels = (*nearest_levels(np.quantile(counts, np.linspace(0.5, 1, 64)).round().astype(int), LEVELS - 2).tolist(),)
    top = int(counts.max())
    levels = tuple(sorted({level for level in levels if level < top} | {top, model.spec.tokens}))
    up = np.array(levels)[np.searchsorted(levels, counts)]
    knots = rising(taus, up.mean(1) / model.spec.tokens)
    return model.with_schedule(replace(schedule, knots=knots, levels=levels, mean=float(up.mean()) / model.spec.tokens))


def bias_of(model: Converted) -> str:
    """The name of the bias of a router's last layer."""
    return OWN_BIAS if model.options.router == OWN else f"{ROUTER}.score.bias"


def settle_difference(model: Converted, latents: list[Tensor], taus: np.ndarray) -> Converted:
    """The threshold that gives the ratio on these latents (of all steps, then the images), and the detail of images."""
    schedule, planner, tokens = model.schedule, model.step_planner, model.spec.tokens
    sizes = np.array(sorted(planner.sizes, reverse=True))
    first = np.full((ORDER, len(latents[0]), len(sizes)), np.inf)
    windows = (latents[i : i + ORDER + 1] for i in range(len(taus) - ORDER))
    later = [patch_spread(third_difference(window), planner.patches) for window in windows]
    if not later:
        raise UsageError(f"patch sizes are chosen from the fourth step on: more than {ORDER} sampling steps are needed")
    spread = np.concatenate([first, np.stack(later)])

    def kept(threshold: float) -> np.ndarray:
        flat = spread.reshape(-1, len(sizes))
        return sizes[largest_below(flat, threshold)].reshape(spread.shape[:2])

    least, choices = kept(np.inf).mean() / tokens, np.unique(spread[np.isfinite(spread)])
    if least > 1 / schedule.ratio + 1e-9:
        raise UsageError(
            f"patches of {planner.patches[-1]} pixels from the fourth of {len(taus)} steps on give {1 / least:.1f}x at "
            f"most: ask for less than {schedule.ratio:g}x, or more steps"
        )
    low, high = 0, len(choices)  # the largest threshold that keeps enough
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if kept(choices[middle - 1]).mean() * schedule.ratio >= tokens else (low, middle - 1)
    threshold = float(choices[low - 1]) if low else 0.0
    fractions = kept(threshold).mean(1) / tokens
    set_detail(model, latents[-1])
    return model.with_schedule(
        replace(schedule, threshold=threshold, knots=rising(taus, fractions), mean=float(fractions.mean()))
    )


def set_detail(model: Converted, images: Tensor) -> None:
    """Tell the skip how much detail images have that patches of each size lose: its variance."""
    from dcconvert.passes.patch_resize import enlarging, reducing

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


def rising(taus: np.ndarray, values: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Knots by rising noise level, of steps in the order of a run."""
    return tuple((float(tau), float(value)) for tau, value in sorted(zip(taus, values, strict=True)))
