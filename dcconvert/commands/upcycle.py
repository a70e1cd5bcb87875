"""`dcconvert upcycle`: train a bundle with its original as the teacher, and rewrite it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dcconvert.commands.rewrite_bundle import FAILURES, Rescheduled, check_report, old_report
from dcconvert.environment import set_threads
from dcconvert.export.bundle import ONNX, write_model
from dcconvert.export.checks.parity import IDENTITY, Check, check_batch_invariance, check_isolation, require
from dcconvert.export.disk.targets import remove
from dcconvert.export.engines.build import ENGINES
from dcconvert.export.files import MANIFEST, new_folder, write_json
from dcconvert.export.onnx.export import export_onnx
from dcconvert.passes.ir.errors import StoppedError
from dcconvert.passes.methods.chunk import WHAT_CHUNK_NEEDS
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.report.conversion import FIGURES, without_nan, write_report
from dcconvert.report.stress import FAILURES_FIGURE
from dcconvert.sampling.fitting import fitted
from dcconvert.terminal import Stages, terminal
from dcconvert.train.distributed import Distributed
from dcconvert.train.loop import Settings, Task, Training, training_data


def upcycle_bundle(settings: Settings, console: Console) -> None:
    """Train, export, check, measure, and put the new bundle in place; resumes an unfinished run.

    Raises UsageError for a bundle, data or options that cannot be used, StoppedError for a run that was interrupted,
    CheckFailedError if the loss is not a number or ONNX Runtime and torch disagree.
    """
    set_threads(settings.threads)
    distributed = Distributed.start()
    distributed.check(settings.recipe.batch)
    task = Task.read(settings)
    settings = task.settings
    task.bundle.model.to(distributed.device)
    progress = terminal(stderr=True, quiet=not distributed.is_main)
    stages = Stages(progress)
    with place_for(settings) if distributed.is_main else nullcontext() as work:
        data = training_data(task, distributed, stages)
        training = Training(task, data, distributed)
        if training.restore():
            made = training.distillation
            stages.note(f"resuming at step {made.step} of {made.rounds * made.updates_a_round}")
        training.run(progress)
        if work is None:
            return
        model, found = training.model().to("cpu"), facts_of(task, training)
        del training, data  # their memory is wanted for export and measurement
        model = store(task, model, found, work, stages)
    remove(settings.state)
    for name in (FAILURES, ENGINES):
        if settings.in_place and (settings.folder / name).exists():
            stages.note(f"{settings.folder / name} is from before this training")
    first, last = found["log"][0], found["log"][-1]
    console.print(
        f"PSNR to the original at {task.sampler.steps} steps: {first['psnr']:.2f} dB before, {last['psnr']:.2f} dB "
        f"after {last['samples']} samples ({settings.images} images)",
        highlight=False,
    )
    if model.schedule.data_dependent:
        console.print(
            f"Its runs keep one token in {1 / model.schedule.expected:.2f}; the ratio is {model.schedule.ratio:g}x",
            highlight=False,
        )
    report = settings.out / "report.html"
    console.print(f"Bundle: {settings.out}\nReport: {report}", highlight=False, soft_wrap=True)


@contextmanager
def place_for(settings: Settings) -> Iterator[Path]:
    """Where the trained bundle is written; an interrupt says where the training is saved.

    In place, everything stays that the training does not make again. Variants of the graphs are of the old weights.
    """
    again = f"the training is saved in {settings.state}: run the same command to go on"
    old = {"onnx", *(f"{name}.png" for name in FIGURES if name != FAILURES_FIGURE)}
    place = new_folder(
        settings.out, force=settings.in_place, update=settings.in_place, without=old, after_failure=again
    )
    check_report(settings.folder)
    with place as work:
        try:
            yield work
        except KeyboardInterrupt:
            if not settings.state.exists():
                raise
            raise StoppedError(f"interrupted; {again}") from None


def store(task: Task, model: DynamicModel, found: dict[str, Any], work: Path, stages: Stages) -> DynamicModel:
    """Export, check and measure the trained model into the folder `work`; returns the model as it is stored."""
    settings, before = task.settings, task.bundle
    model = model.with_schedule(task.planner.schedule)
    if model.schedule.data_dependent:
        with stages.stage("measure what its runs keep") as tick:
            model = fitted(model, task.sampler, task.config, tick)
    bundle = replace(before, folder=work, model=model)
    with stages.stage("export ONNX"):
        write_model(bundle.model, work)
        export_onnx(bundle.model, work / ONNX)
    with stages.stage("verify in torch"):
        inputs = bundle.model.spec.example(2)
        checks = [check(bundle.model, inputs) for check in (check_isolation, check_batch_invariance)]
        require(checks)
    made = Rescheduled.of(bundle, model.schedule, task.sampler, stages)
    report = {**made.report(without_stale(old_report(before.folder), checks)), "upcycling": found}
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        figures = made.measure(
            bundle,
            report,
            task.config,
            Path(scratch),
            stages,
            reference_steps=settings.reference_steps,
            threads=settings.threads,
        )
    write_report(work, report, figures or {})
    manifest = {**made.manifest(before.manifest), "upcycling": found}
    manifest.pop("calibration", None)  # found with the weights from before
    manifest["parity"] = {name: value for name, value in manifest["parity"].items() if name != IDENTITY}
    manifest["parity"] |= {check.name: check.value for check in checks}
    write_json(without_nan(manifest), work / MANIFEST)
    return model


def facts_of(task: Task, training: Training) -> dict[str, Any]:
    """The facts of a training for manifest and report, with a summary of earlier trainings."""
    settings, before = task.settings, task.bundle.manifest.get("upcycling")
    earlier = []
    if before:
        short = {name: before[name] for name in ("train", "data", "samples", "ratios")}
        earlier = [*before.get("earlier", []), {**short, "psnr": before["log"][-1]["psnr"]}]
    return {
        **asdict(settings.recipe),
        "command": settings.command,
        "data": settings.data,
        "data_samples": 0 if training.data is None else len(training.data),
        "bf16": settings.bf16,
        "images": settings.images,
        "log": training.log,
        "earlier": earlier,
    }


def without_stale(report: dict[str, Any], checks: Sequence[Check]) -> dict[str, Any]:
    """A report without facts that hold only for the weights before a training, and with the new weights' checks."""
    names = {IDENTITY, *(check.name for check in checks)}
    kept = [check for check in report.get("checks", []) if check["name"] not in names]
    left = {name: value for name, value in report.items() if name != "calibration"}
    limits = [text for text in report.get("limits", []) if text != WHAT_CHUNK_NEEDS]
    return {**left, "checks": [*(check.as_dict() for check in checks), *kept], "limits": limits}
