"""`dcconvert tune`: a run table fitted to the model of a bundle, for a budget and a guidance."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from dcconvert.commands.rewrite_bundle import FAILURES, old_figures, old_report
from dcconvert.environment import machine, set_threads
from dcconvert.evaluate.tuning import (
    CONVERGED,
    FittedStep,
    Images,
    StepTimes,
    Trial,
    Tuner,
    run_time,
    skip_cost,
    step_times,
)
from dcconvert.export.bundle import Bundle, read_bundle
from dcconvert.export.checks.flops import original_gmacs
from dcconvert.export.files import write_whole
from dcconvert.export.runtimes.ort import OrtModel
from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.report.conversion import page, report_json, without_nan
from dcconvert.report.stress import FAILURES_FIGURE
from dcconvert.report.tuning import Tuning, TuningRow
from dcconvert.sampling.bundle_runs import RUN, dit_config, run_planner
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Guidance, Sampler
from dcconvert.sampling.steps import OrtPair
from dcconvert.terminal import Stages

TIMED = 15  # calls of each kind of step
SEED = 4_000_000  # apart from the images that reports and evaluations are judged on


@dataclass(frozen=True)
class Settings:
    """What to tune for. `images`: fitted to, `fresh`: judged on; `polish`: rounds.

    At most one of `ratio`, `latency` (milliseconds of a whole run of `batch` images) and `psnr` (dB); with none of them
    the bundle's own ratio.
    """

    folder: Path
    ratio: float | None
    latency: float | None
    psnr: float | None
    batch: int
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

    UsageError for a bundle that is not in mode steps, for several goals, or for one that no run reaches;
    CheckFailedError if the model cannot be sampled.
    """
    if sum(goal is not None for goal in (settings.ratio, settings.latency, settings.psnr)) > 1:
        raise UsageError("--ratio, --latency and --psnr are three ways to say how much to compute: give one of them")
    bundle = read_bundle(settings.folder)
    check_bundle(bundle, settings.guidance)
    stages = Stages(Console(stderr=True))
    set_threads(settings.threads)
    with tempfile.TemporaryDirectory(prefix="dcconvert-") as scratch, torch.inference_mode():
        with stages.stage("measure steps") as tick:
            sampler, planner = run_planner(bundle, None)
            pair = OrtPair.open(bundle.model, planner, None, bundle.onnx, Path(scratch), settings.threads)
            times = step_times(
                pair, settings.batch * Guidance(settings.guidance).halves, TIMED, lambda: tick("taking turns")
            )
        tuner, budget = opened_tuner(settings, bundle, pair.converted, sampler, times)
        with stages.stage("draw the reference") as tick:
            first, counts = settings.seed, (settings.images, settings.fresh)
            seen = drawn(settings, bundle, tuner, first, counts[0], lambda: tick("steps"))
            fresh = drawn(settings, bundle, tuner, first + counts[0], counts[1], lambda: tick("steps"))
            converged = tuner.convergence(fresh, settings.reference_steps // 2, lambda: tick("half its steps"))
        with stages.stage("fit and compare") as tick:
            if settings.psnr is not None:
                budget, trials = tuner.least_budget(settings.psnr, sampler.steps, seen, fresh, tick)
            else:
                trials = tuner.trials(budget, seen, fresh, tick)
        best = next((trial for trial in trials if isinstance(trial.table, RunTable)), None)
        if best is None or not best.psnr.isfinite().all():
            raise CheckFailedError("the images of every candidate are not finite: the model cannot be sampled")
        found = described(settings, bundle, budget, trials, best, converged, times)
        if settings.psnr is not None:
            with stages.stage("confirm on further images") as tick:
                further = drawn(settings, bundle, tuner, first + sum(counts), counts[1], lambda: tick("steps"))
                confirmed = float(tuner.judged(best.table, further, lambda: tick("run")).mean())
            found = replace(found, confirmed_psnr=confirmed)
    store(bundle, best, found)
    console.print(found.for_terminal())
    for note in found.notes:
        console.print(note, highlight=False)
    places = f"Run table: {bundle.folder / RUN}\nReport: {bundle.folder / 'report.html'}"
    console.print(escape(places), highlight=False, soft_wrap=True)


def check_bundle(bundle: Bundle, guidance: float) -> None:
    """UsageError for a bundle that has no run table, or no unconditional class where there is guidance."""
    method = bundle.model.method
    if method.remembers != "updates":
        raise UsageError(
            f"{bundle.folder} is in mode {method.mode}, which has no run table: convert the model with --mode steps, "
            "or use 'dcconvert calibrate' for mode carry"
        )
    if guidance != 1 and not dit_config(bundle).null_class:
        raise UsageError("the model has no unconditional class: tune it without --guidance")


def opened_tuner(
    settings: Settings, bundle: Bundle, session: OrtModel, sampler: Sampler, times: StepTimes
) -> tuple[Tuner, float]:
    """A tuner on ONNX Runtime, and the budget in steps of the original: of their time, if a latency is asked for."""
    config = dit_config(bundle)
    timed = settings.latency is not None
    computed = times["computed"]["median"]
    tuner = Tuner(
        lambda: FittedStep(bundle.model, session, Guidance(settings.guidance).halves),
        sampler.prediction,
        times["skipped"]["median"] / computed if timed else skip_cost(bundle.model),
        settings.guidance,
        config.num_classes if config.null_class else None,
        settings.polish,
    )
    if settings.latency is None:
        return tuner, sampler.steps / (settings.ratio or bundle.model.schedule.ratio)
    budget = settings.latency / computed
    if budget < 2:
        raise UsageError(
            f"--latency {settings.latency:g}: a computed step of batch {settings.batch} takes {computed:.3g} ms, and a "
            f"run needs at least 2; ask for {math.ceil(2 * computed)} ms or more"
        )
    return tuner, budget


def drawn(settings: Settings, bundle: Bundle, tuner: Tuner, first: int, count: int, tick: Callable[[], None]) -> Images:
    return tuner.images(dit_config(bundle), SEED + first, count, settings.reference_steps, tick)


def described(
    settings: Settings,
    bundle: Bundle,
    budget: float,
    trials: list[Trial],
    best: Trial,
    converged: float,
    times: StepTimes,
) -> Tuning:
    """What was found, for the report."""
    per_step, skipped = original_gmacs(bundle.model, bundle.model.spec.example(2)), skip_cost(bundle.model)
    rows = [
        TuningRow(
            name=trial.name,
            steps=trial.table.steps,
            computed=trial.table.evaluations,
            gmacs=per_step * (trial.table.evaluations + skipped * (trial.table.steps - trial.table.evaluations)),
            psnr=finite(trial.mean),
            psnr_error=finite(trial.error),
            fitted=trial.fitted,
            latency_ms=run_time(trial.table.steps, trial.table.evaluations, times),
        )
        for trial in trials
    ]
    return Tuning(
        rows=tuple(rows),
        budget=budget,
        chosen=best.name,
        images=settings.images,
        fresh=settings.fresh,
        reference_steps=settings.reference_steps,
        guidance=settings.guidance,
        converged=converged >= CONVERGED,
        converged_db=converged,
        polish=settings.polish,
        latency=settings.latency,
        wanted_psnr=settings.psnr,
        batch=settings.batch,
        times_ms=times,
        seed=settings.seed,
        command=settings.command,
        machine=machine(),
    )


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def store(bundle: Bundle, best: Trial, found: Tuning) -> None:
    """Write the table and the report, each whole or not at all. A stress test was another table's and is removed."""
    assert isinstance(best.table, RunTable)
    report = {**old_report(bundle.folder), "tuning": found.to_json()}
    report.pop("stress", None)
    figures = old_figures(bundle.folder)
    figures.pop(FAILURES_FIGURE, None)
    write_whole(bundle.folder / RUN, report_json(best.table.to_dict()).encode())
    write_whole(bundle.folder / "report.json", report_json(report).encode())
    write_whole(bundle.folder / "report.html", page(without_nan(report), figures).encode())
    for name in (FAILURES, f"{FAILURES_FIGURE}.png"):
        (bundle.folder / name).unlink(missing_ok=True)
