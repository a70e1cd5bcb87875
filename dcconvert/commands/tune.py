"""`dcconvert tune`: a run table fitted to the model of a bundle, for a budget and a guidance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from dcconvert.commands.rewrite_bundle import old_figures, old_report
from dcconvert.environment import machine, set_threads
from dcconvert.evaluate.tuning import CONVERGED, FittedStep, Images, Trial, Tuner, skip_cost
from dcconvert.export.bundle import Bundle, read_bundle
from dcconvert.export.checks.flops import original_gmacs
from dcconvert.export.files import write_whole
from dcconvert.export.runtimes.ort import CPU, OrtModel
from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.report.conversion import page, report_json, without_nan
from dcconvert.report.tuning import Tuning
from dcconvert.sampling.bundle_runs import RUN, dit_config, run_planner
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import initial_noise, labels_for
from dcconvert.terminal import Stages

SEED = 4_000_000  # apart from the images that reports and evaluations are judged on


@dataclass(frozen=True)
class Settings:
    """What to tune for. `ratio` None: the bundle's own; `images`: fitted to, `fresh`: judged on; `polish`: rounds."""

    folder: Path
    ratio: float | None
    guidance: float
    images: int
    fresh: int
    polish: int
    reference_steps: int
    seed: int
    threads: int
    command: str


def tune_bundle(settings: Settings, console: Console) -> None:
    """Fit, judge, store and print. The bundle's run table and report are replaced at the end, or stay what they were.

    UsageError for a bundle that is not in mode steps, or a budget that leaves nothing to fit; CheckFailedError if the
    model cannot be sampled.
    """
    bundle = read_bundle(settings.folder)
    tuner, budget = opened_tuner(settings, bundle)
    stages = Stages(Console(stderr=True))
    set_threads(settings.threads)
    with torch.inference_mode():
        with stages.stage("draw the reference") as tick:
            first, counts = settings.seed, (settings.images, settings.fresh)
            seen = drawn(settings, bundle, tuner, first, counts[0], lambda: tick("steps"))
            fresh = drawn(settings, bundle, tuner, first + counts[0], counts[1], lambda: tick("steps"))
            converged = tuner.convergence(fresh, settings.reference_steps // 2, lambda: tick("half its steps"))
        with stages.stage("fit and compare") as tick:
            trials = tuner.trials(budget, seen, fresh, tick)
    best = next((trial for trial in trials if isinstance(trial.table, RunTable)), None)
    if best is None or not best.psnr.isfinite().all():
        raise CheckFailedError("the images of every candidate are not finite: the model cannot be sampled")
    found = facts(settings, bundle, budget, trials, best, converged)
    store(bundle, best, found)
    shown = Tuning.from_json(found)
    console.print(shown.for_terminal())
    for note in shown.notes:
        console.print(note, highlight=False)
    places = f"Run table: {bundle.folder / RUN}\nReport: {bundle.folder / 'report.html'}"
    console.print(escape(places), highlight=False, soft_wrap=True)


def opened_tuner(settings: Settings, bundle: Bundle) -> tuple[Tuner, float]:
    """A tuner on ONNX Runtime, and the budget in steps of the original."""
    method = bundle.model.method
    if method.remembers != "updates":
        raise UsageError(
            f"{bundle.folder} is in mode {method.mode}, which has no run table: convert the model with --mode steps, "
            "or use 'dcconvert calibrate' for mode carry"
        )
    config = dit_config(bundle)
    if settings.guidance != 1 and not config.null_class:
        raise UsageError("the model has no unconditional class: tune it without --guidance")
    sampler, planner = run_planner(bundle, None)
    session = OrtModel(bundle.onnx, planner, None, CPU, settings.threads)
    tuner = Tuner(
        lambda: FittedStep(bundle.model, session, 1 if settings.guidance == 1 else 2),
        sampler.prediction,
        skip_cost(bundle.model),
        settings.guidance,
        config.num_classes if config.null_class else None,
        settings.polish,
    )
    return tuner, sampler.steps / (settings.ratio or bundle.model.schedule.ratio)


def drawn(settings: Settings, bundle: Bundle, tuner: Tuner, seed: int, count: int, tick: Any) -> Images:
    config = dit_config(bundle)
    noise = initial_noise(SEED + seed, count, config.in_channels, config.image_size)
    return tuner.images(noise, labels_for(count, config.num_classes), settings.reference_steps, tick)


def facts(
    settings: Settings, bundle: Bundle, budget: float, trials: list[Trial], best: Trial, converged: float
) -> dict[str, Any]:
    """What was found, for the report."""
    per_step = original_gmacs(bundle.model, bundle.model.spec.example(2))
    return {
        "command": settings.command,
        "budget": budget,
        "guidance": settings.guidance,
        "images": settings.images,
        "fresh": settings.fresh,
        "polish": settings.polish,
        "reference_steps": settings.reference_steps,
        "converged_db": converged,
        "converged": converged >= CONVERGED,
        "seed": settings.seed,
        "chosen": best.name,
        "rows": [
            {
                "name": trial.name,
                "steps": trial.table.steps,
                "computed": trial.table.evaluations,
                "gmacs": trial.cost * per_step,
                "fitted": trial.fitted,
                "psnr": trial.mean,
                "psnr_error": trial.error,
            }
            for trial in trials
        ],
        "machine": machine(),
    }


def store(bundle: Bundle, best: Trial, found: dict[str, Any]) -> None:
    """Write the table and the report, each whole or not at all."""
    assert isinstance(best.table, RunTable)
    report = {**old_report(bundle.folder), "tuning": found}
    write_whole(bundle.folder / RUN, report_json(best.table.to_dict()).encode())
    write_whole(bundle.folder / "report.json", report_json(report).encode())
    write_whole(bundle.folder / "report.html", page(without_nan(report), old_figures(bundle.folder)).encode())
