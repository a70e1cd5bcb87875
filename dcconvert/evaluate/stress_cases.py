"""Cases of a stress test: noised images with a lot of fine detail, and sampling from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dcconvert.evaluate.detail_kinds import measured, on_tokens
from dcconvert.evaluate.measure_steps import Tick
from dcconvert.export.bundle import Bundle
from dcconvert.images.dataset import LabelledImages
from dcconvert.passes.ir.errors import UsageError
from dcconvert.sampling.bundle_runs import dit_config
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Sampler, Step, initial_noise, labels_for

BATCH = 16  # cases at a time
SAMPLE_STEPS, SAMPLE_SOLVER = 20, "unipc"
OTHERS = "give others with --data, or another --seed if the original draws them"


@dataclass(frozen=True)
class Cases:
    """Images with a lot of detail, where each came from, and what the original makes of them.

    `clean` and `noise` [n, C, H, W] are mixed at the first noise level of `part`, a run's tail. Without `clean`, runs
    begin at the noise itself, `part` is a whole run, and `guidance` holds the options of `run` for it. `wanted` [n, C,
    H, W] are the original's final images from there. `detail` [n, h, w]: the response of each case's own kind in
    `wanted`, summed over the cells of the token grid.
    """

    part: Sampler | RunTable
    clean: Tensor | None
    labels: Tensor
    noise: Tensor
    seeds: list[int]
    sources: list[int]
    kinds: list[str]
    wanted: Tensor
    detail: Tensor
    guidance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.noise)

    def run(self, part: Sampler | RunTable, new_step: Callable[[], Step], tick: Tick) -> Tensor:
        """Final images [n, C, H, W] of a run that begins like `self.part`; each batch has its own step function."""
        if self.clean is None:
            return whole_run(part, new_step, (self.noise, self.labels), self.guidance, tick)
        assert isinstance(part, Sampler)
        return noised_run(part, new_step, (self.clean, self.noise, self.labels), tick)

    def with_detail(self, grid: tuple[int, int]) -> tuple[Cases, list[str]]:
        """The cases whose detail the original draws, with `detail` found; a message says how many others there were.

        If the original's own image shows nothing of a case's kind of detail, there is no detail to lose. Raises
        UsageError if no case is left.
        """
        images = zip(self.wanted.split(1), self.kinds, strict=True)
        scores, responses = zip(*(measured(image, kind) for image, kind in images), strict=True)
        detail = on_tokens(torch.cat(responses), grid)
        there = [i for i in range(len(self)) if float(scores[i]) > 0 and float(detail[i].sum()) > 0]
        if not there:
            raise UsageError(f"the original draws none of the detail of these images: {OTHERS}")
        lost = len(self) - len(there)
        cases = Cases(
            self.part,
            None if self.clean is None else self.clean[there],
            self.labels[there],
            self.noise[there],
            [self.seeds[i] for i in there],
            [self.sources[i] for i in there],
            [self.kinds[i] for i in there],
            self.wanted[there],
            detail[there],
            self.guidance,
        )
        text = f"{lost} of {len(self)} cases were left out: the original draws none of their detail"
        return cases, [text] * (lost > 0)


def noised_run(part: Sampler, new_step: Callable[[], Step], given: tuple[Tensor, Tensor, Tensor], tick: Tick) -> Tensor:
    """Mix images and noise [n, C, H, W] at a run's first noise level, and sample from there with labels [n]."""
    found = []
    for clean, noise, labels in zip(*(values.split(BATCH) for values in given), strict=True):
        x = part.add_noise(clean, noise, torch.full((len(clean),), float(part.timesteps[0])))
        found.append(part.run(new_step(), x, labels, on_step=lambda _: tick(f"{part.steps} steps")))
    return torch.cat(found)


def whole_run(
    run: Sampler | RunTable,
    new_step: Callable[[], Step],
    given: tuple[Tensor, Tensor],
    guidance: dict[str, Any],
    tick: Tick,
) -> Tensor:
    """Sample from noise [n, C, H, W] with labels [n]; `guidance`: options of `run`."""
    return run.run_batches(new_step, *given, BATCH, on_step=lambda _: tick(f"{run.steps} steps"), **guidance)


def original_step(bundle: Bundle) -> Step:
    return lambda x, t, y: bundle.model.original_graph(x, t, y)[0]


def own_samples(bundle: Bundle, prediction: str, count: int, seed: int, tick: Tick, **guidance: Any) -> LabelledImages:
    """Samples of the original to choose from; sample i starts from the noise of seed + i. `guidance` as in `run`."""
    config = dit_config(bundle)
    noise = initial_noise(seed, count, config.in_channels, config.image_size)
    labels = labels_for(count, config.num_classes)
    many = Sampler(prediction, SAMPLE_STEPS, SAMPLE_SOLVER)
    images = whole_run(
        many, lambda: original_step(bundle), (noise, labels), guidance, lambda _: tick(f"batches of {BATCH}")
    )
    return LabelledImages(images, labels)


def places_of(chosen: Mapping[str, Sequence[int]]) -> tuple[list[str], list[int]]:
    """Kinds and places of chosen images, one after the other. Raises UsageError if there are none."""
    kinds = [kind for kind, places in chosen.items() for _ in places]
    if not kinds:
        raise UsageError(f"none of the images has any detail: {OTHERS}")
    return kinds, [place for places in chosen.values() for place in places]
