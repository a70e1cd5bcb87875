"""The effect of a conversion on the final images, compared with fewer steps of the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from dcconvert.evaluate.measure_steps import Tick
from dcconvert.images.pixels import is_latent, psnr_mean
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.run import Runtime
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Sampler, Step
from dcconvert.sampling.steps import ConvertedStep, silent


@dataclass(frozen=True)
class Contestant:
    """A way to make the images: its name, sampler and step functions, and the cost of a run per image.

    `latency_ms`: measured step latency times steps, divided by the batch; None if it was not measured.
    """

    name: str
    sampler: Sampler | RunTable
    new_step: Callable[[], Step]  # a step function for one run of one batch
    gmacs: float
    latency_ms: float | None = None
    mode: str = "original"


@dataclass
class Fidelity:
    """Images and figures of the fidelity runs; `images` maps a row's name to samples [B, C, H, W]."""

    reference: str  # names of rows: the reference, and original and converted at the run's own steps
    original: str
    converted: str
    images: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    velocity_error: list[dict[str, float]] = field(default_factory=list)
    keep: list[np.ndarray] = field(default_factory=list)  # keep mask [B, H, W] of every step of the converted run
    mid: list[Tensor] = field(default_factory=list)  # what the model saw at those steps

    def section(self) -> dict[str, Any]:
        """The part of a report."""
        final = self.images[self.original]
        facts = {"reference": self.reference, "count": len(final), "latents": is_latent(final), "rows": self.rows}
        return {"velocity_error": self.velocity_error, "images": facts}


def original_contestant(
    step: Step, sampler: Sampler | RunTable, gmacs: float, latency_ms: float | None, how: str = ""
) -> Contestant:
    """The original with so many steps; `gmacs` and `latency_ms` are those of one step and image.

    `how`: the solver, if the row's name must mention it.
    """
    cost = None if latency_ms is None else latency_ms * sampler.steps
    name = f"original, {how}, {sampler.steps} steps" if how else f"original, {sampler.steps} steps"
    return Contestant(name, sampler, lambda: step, gmacs * sampler.steps, cost)


def compare_images(
    model: DynamicModel,
    runtime: Runtime,
    reference: Contestant,
    original: Contestant,
    converted: Contestant,
    others: list[Contestant],
    noise: Tensor,
    labels: Tensor,
    batch: int,
    tick: Tick = silent,
) -> Fidelity:
    """Final images of every contestant, `batch` at a time, against those of the reference.

    `runtime` is the converted model's, whose steps are recorded: its keep masks, and the error of one step, measured
    along the original's own trajectory (same input, relative L2).
    """
    result = Fidelity(reference.name, original.name, converted.name)
    probe, recorder = Probe(model, runtime, original), Recorder(model, runtime, result, converted)
    watched: dict[str, Callable[[], Step]] = {original.name: probe.new_step, converted.name: recorder.new_step}
    for contestant in (reference, original, *others, converted):
        name = contestant.name
        new_step = watched.get(name, contestant.new_step)
        images = result.images[name] = contestant.sampler.run_batches(
            new_step, noise, labels, batch, on_step=lambda _, name=name: tick(name)
        )
        result.rows.append(
            {
                "name": contestant.name,
                "mode": contestant.mode,
                "solver": contestant.sampler.solver,
                "steps": contestant.sampler.steps,
                "gmacs": contestant.gmacs,
                "latency_ms": contestant.latency_ms,
                "psnr": None if contestant is reference else psnr_mean(images, result.images[reference.name]),
            }
        )
    result.velocity_error = probe.curve()
    return result


class Probe:
    """Runs the converted model along the original's trajectory and records the errors of its steps."""

    def __init__(self, model: DynamicModel, runtime: Runtime, original: Contestant) -> None:
        self.model, self.runtime, self.original = model, runtime, original
        self.errors: dict[float, list[float]] = {}

    def new_step(self) -> Step:
        known, tried = self.original.new_step(), ConvertedStep(self.model, self.runtime)

        def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            wanted, found = known(x, t, y), tried(x, t, y)
            channels = x.shape[1]  # learned variances, which samplers ignore, come after the prediction
            error = (found - wanted)[:, :channels].norm() / wanted[:, :channels].norm()
            self.errors.setdefault(float(t[0]) / self.model.spec.timestep_scale, []).append(float(error))
            return wanted

        return step

    def curve(self) -> list[dict[str, float]]:
        return [{"tau": tau, "error": float(np.mean(parts))} for tau, parts in self.errors.items()]


class Recorder:
    """Runs the converted model and records what it saw and which tokens it kept, for the first batch only."""

    def __init__(self, model: DynamicModel, runtime: Runtime, result: Fidelity, contestant: Contestant) -> None:
        self.model, self.runtime, self.result = model, runtime, result
        self.by_table = isinstance(contestant.sampler, RunTable)

    def new_step(self) -> Step:
        converted = ConvertedStep(self.model, self.runtime, by_table=self.by_table)
        if self.result.keep:
            return converted

        def step(x: Tensor, t: Tensor, y: Tensor, weights: tuple[float, ...] | None = None) -> Tensor:
            output = converted(x, t, y, weights)
            assert converted.run is not None
            self.result.keep.append(converted.run.keep.reshape(len(x), *self.model.spec.grid))
            self.result.mid.append(x)
            return output

        return step
