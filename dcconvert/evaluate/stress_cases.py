"""Cases of a stress test: noised images with a lot of fine detail, and sampling from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dcconvert.evaluate.measure_steps import Tick
from dcconvert.sampling.samplers import Sampler, Step

BATCH = 16  # cases at a time


@dataclass(frozen=True)
class Cases:
    """Images with a lot of detail, where each came from, and what the original makes of them.

    `clean` and `noise` [n, C, H, W] are mixed at the first noise level of `part`, a run's tail; `wanted` [n, C, H, W]
    are the original's final images from there. `detail` [n, h, w]: the response of each case's own kind in `wanted`,
    summed over the cells of the token grid.
    """

    part: Sampler
    clean: Tensor
    labels: Tensor
    noise: Tensor
    seeds: list[int]
    sources: list[int]
    kinds: list[str]
    wanted: Tensor
    detail: Tensor

    def __len__(self) -> int:
        return len(self.clean)

    def run(self, part: Sampler, new_step: Callable[[], Step], tick: Tick) -> Tensor:
        """Final images [n, C, H, W] of a run that begins like `self.part`; each batch has its own step function."""
        return noised_run(part, new_step, (self.clean, self.noise, self.labels), tick)


def noised_run(part: Sampler, new_step: Callable[[], Step], given: tuple[Tensor, Tensor, Tensor], tick: Tick) -> Tensor:
    """Mix images and noise [n, C, H, W] at a run's first noise level, and sample from there with labels [n]."""
    found = []
    for clean, noise, labels in zip(*(values.split(BATCH) for values in given), strict=True):
        x = part.add_noise(clean, noise, torch.full((len(clean),), float(part.timesteps[0])))
        found.append(part.run(new_step(), x, labels, on_step=lambda _: tick(f"{part.steps} steps")))
    return torch.cat(found)
