"""`dcconvert sample`: draws images with a bundle, optionally beside the original's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from dcconvert.export.bundle import read_bundle
from dcconvert.export.files import PNG, writable
from dcconvert.passes.ir.errors import UsageError
from dcconvert.report.figures import save_comparison
from dcconvert.report.notes import state_note
from dcconvert.sampling.bundle_runs import bundle_run, dit_config, opened, replaced_note, run_planner
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Guidance, Sampler, Step, initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep
from dcconvert.terminal import Stages, terminal


def sample_bundle(
    folder: Path,
    console: Console,
    *,
    runtime: str,
    count: int,
    steps: int | None,
    solver: str | None,
    guidance: Guidance,
    separate_halves: bool,
    seed: int,
    labels: tuple[int, ...],
    compare: bool,
    vae: Path | None,
    out: Path,
) -> None:
    """Sample a bundle, optionally also the original, and write a PNG grid."""
    writable(out, PNG)
    bundle = read_bundle(folder)
    config = dit_config(bundle)
    sampler, planner = bundle_run(bundle, steps, solver, guidance.scale)
    noise = initial_noise(seed, count, config.in_channels, config.image_size)
    classes = torch.tensor(labels).repeat(count)[:count] if labels else labels_for(count, config.num_classes)
    if int(classes.max()) >= config.num_classes or int(classes.min()) < 0:
        raise UsageError(f"--label must be from 0 to {config.num_classes - 1}")
    null_class = config.unconditional_class
    stages = Stages(terminal(stderr=True))
    images: dict[str, Tensor] = {}

    model = bundle.model
    groups = 1 if separate_halves else guidance.halves
    if guidance.ratio is not None and isinstance(sampler, RunTable):
        raise UsageError(
            f"{folder} is in mode steps, where both halves of guidance use the same steps: leave out --lite-cfg"
        )
    by_table = isinstance(sampler, RunTable)
    lite = None if guidance.ratio is None else planner.at_ratio(guidance.ratio, sampler.taus)
    name = f"{model.method.mode}, {model.schedule.ratio:g}x"
    if isinstance(sampler, RunTable) and (note := sampler.guidance_note(guidance.scale, folder)):
        stages.note(note)
    if note := replaced_note(bundle, sampler):
        stages.note(note)
    if model.method.stateful:
        console.print(state_note(model.spec.state_bytes, (count * guidance.halves,)), highlight=False)
    with tempfile.TemporaryDirectory(prefix="dcconvert-") as scratch:
        backend, original, batch = opened(runtime, bundle, planner, Path(scratch) if compare else None)
    if batch is not None and batch < guidance.halves:
        raise UsageError(f"{folder} has no bucket for the two halves of guidance: convert with --batch 2 or more")

    def draw(name: str, run: Sampler | RunTable, new_step: Callable[[], Step]) -> None:
        with stages.stage(f"sample {name}") as tick, torch.inference_mode():
            images[name] = run.run_batches(
                new_step,
                noise,
                classes,
                count if batch is None else batch // guidance.halves,
                guidance=guidance.scale,
                null_class=null_class,
                on_step=lambda *_: tick("steps"),
            )

    draw(name, sampler, lambda: ConvertedStep(model, backend, groups, lite, by_table=by_table))
    if compare:
        draw("original", run_planner(bundle, steps, solver)[0], lambda: original)
    save_comparison(dict(reversed(images.items())), out, vae)
    console.print(f"Images: {out}", highlight=False, soft_wrap=True)
