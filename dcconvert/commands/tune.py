"""`dcconvert tune`: a run table fitted to the model of a bundle, or taken from another bundle and checked."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console

from dcconvert.commands.rewrite_bundle import Rewrite, old_figures, old_report, rewritten
from dcconvert.environment import machine, set_threads
from dcconvert.evaluate.tuning import (
    CLOSE,
    CONVERGED,
    PRESENT,
    FittedStep,
    Gain,
    Images,
    StepTimes,
    Trial,
    Tuner,
    best_first,
    run_time,
    skip_cost,
    step_times,
)
from dcconvert.export.bundle import Bundle, read_bundle
from dcconvert.export.checks.flops import original_gmacs
from dcconvert.export.runtimes.ort import OrtModel
from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.report.tuning import Tuning, TuningRow
from dcconvert.sampling.bundle_runs import RUN, dit_config, read_table, run_planner, stored_table, write_table
from dcconvert.sampling.default_tables import LEAST
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Guidance, Sampler
from dcconvert.sampling.steps import OrtPair
from dcconvert.terminal import Stages, terminal

TIMED = 15  # calls of each kind of step
SEED = 4_000_000  # apart from the images that reports and evaluations are judged on
GIVEN_SEED = 5_000_000  # of images that a given table is judged on: wherever it comes from, it was not fitted to them


@dataclass(frozen=True)
class Settings:
    """What to tune for. `images`: fitted to, `fresh`: judged on; `polish`: rounds.

    At most one of `ratio`, `latency` (milliseconds of a whole run of `batch` images) and `psnr` (dB); with none of them
    the bundle's own ratio. With `table`, a bundle or a run.json, none of them: nothing is fitted.
    """

    folder: Path
    ratio: float | None
    latency: float | None
    psnr: float | None
    batch: int
    guidance: float
    table: Path | None
    images: int
    fresh: int
    polish: int
    reference_steps: int
    seed: int
    threads: int
    command: str


@dataclass(frozen=True)
class Work:
    """A bundle opened on ONNX Runtime, with the times of its steps."""

    settings: Settings
    bundle: Bundle
    stages: Stages
    sampler: Sampler
    session: OrtModel
    times: StepTimes

    @classmethod
    def open(cls, settings: Settings, bundle: Bundle, scratch: Path) -> Work:
        stages = Stages(terminal(stderr=True))
        with stages.stage("measure steps") as tick:
            sampler, planner = run_planner(bundle, None)
            pair = OrtPair.open(bundle.model, planner, None, bundle.onnx, scratch, settings.threads)
            halves = Guidance(settings.guidance).halves
            times = step_times(pair, settings.batch * halves, TIMED, lambda: tick("taking turns"))
        return cls(settings, bundle, stages, sampler, pair.converted, times)

    @cached_property
    def skip_cost(self) -> float:
        """Operations of a skipped step, in steps of the original."""
        return skip_cost(self.bundle.model)

    @cached_property
    def tuner(self) -> Tuner:
        settings, config = self.settings, dit_config(self.bundle)
        skipped, computed = self.times["skipped"]["median"], self.times["computed"]["median"]
        return Tuner(
            lambda: FittedStep(self.bundle.model, self.session, Guidance(settings.guidance).halves),
            self.sampler.prediction,
            self.skip_cost if settings.latency is None else skipped / computed,
            settings.guidance,
            config.unconditional_class,
            settings.polish,
            CLOSE if settings.latency is None else 1.0,  # a time that was asked for is a limit
        )

    @property
    def budget(self) -> float:
        """In steps of the original; of their time, if a latency is asked for. UsageError for less than two steps."""
        latency, computed = self.settings.latency, self.times["computed"]["median"]
        if latency is None:
            return self.sampler.steps / (self.settings.ratio or self.bundle.model.schedule.ratio)
        if latency < 2 * computed:
            raise UsageError(
                f"--latency {latency:g}: a computed step of batch {self.settings.batch} takes {computed:.3g} ms, and a "
                f"run needs at least 2; ask for {math.ceil(2 * computed)} ms or more"
            )
        return latency / computed

    def drawn(self, first: int, count: int, tick: Callable[[str], None]) -> Images:
        """Images of so many seeds from `settings.seed` + `first` on, with their reference."""
        first, steps = self.settings.seed + first, self.settings.reference_steps
        return self.tuner.images(dit_config(self.bundle), first, count, steps, lambda: tick("steps"))

    def converged(self, images: Images, tick: Callable[[str], None]) -> float:
        """PSNR in dB of half as many steps to the reference."""
        return self.tuner.convergence(images, self.settings.reference_steps // 2, lambda: tick("half its steps"))


def tune_bundle(settings: Settings, console: Console) -> None:
    """Fit or take over a table, judge, store and print. The bundle's run table and report are replaced at the end, or
    stay what they were.

    UsageError for a bundle that is not in mode steps, for several goals, for one that no run reaches, or for a given
    table that the bundle cannot run; CheckFailedError if the model cannot be sampled, or if a given table is not as
    good as the unfitted default.
    """
    check_goals(settings)
    bundle = read_bundle(settings.folder)
    check_bundle(bundle, settings.guidance)
    given = None if settings.table is None else given_table(settings.table, bundle, settings.guidance)
    set_threads(settings.threads)
    with rewritten(settings.folder) as made:
        with tempfile.TemporaryDirectory(prefix="dcconvert-") as scratch, torch.inference_mode():
            work = Work.open(settings, bundle, Path(scratch))
            best, found = best_fit(work) if given is None else judged(work, given, console)
        store(bundle, best, found, made)
    console.print(found.for_terminal())
    for note in found.notes:
        console.print(note, highlight=False)
    places = f"Run table: {bundle.folder / RUN}\nReport: {bundle.folder / 'report.html'}"
    console.print(places, highlight=False, soft_wrap=True)


def check_goals(settings: Settings) -> None:
    """UsageError for several goals, or for one beside a given table."""
    goals = sum(goal is not None for goal in (settings.ratio, settings.latency, settings.psnr))
    if settings.table is not None and (goals or settings.polish):
        raise UsageError(
            "--table takes a table as it is, with its own steps: leave out --ratio, --latency, --psnr and --polish"
        )
    if goals > 1:
        raise UsageError("--ratio, --latency and --psnr are three ways to say how much to compute: give one of them")


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


def given_table(path: Path, bundle: Bundle, guidance: float) -> RunTable:
    """The table of another bundle, or of a file; UsageError for one that this bundle cannot run."""
    file = path / RUN if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"--table: {file} is not there: give a bundle in mode steps, or a {RUN}")
    table = read_table(file)
    prediction, updates = run_planner(bundle, None)[0].prediction, bundle.model.spec.updates
    if table.evaluations < LEAST:
        raise UsageError(f"{file} computes one step: it needs {LEAST} to be compared with the default table")
    if table.prediction != prediction:
        raise UsageError(f"{file} is for a model that predicts {table.prediction}, and this one predicts {prediction}")
    if table.updates > updates:
        raise UsageError(f"{file} forecasts from the last {table.updates} updates, and this model keeps {updates}")
    if table.fitted and table.guidance != guidance:
        raise UsageError(f"{file} was fitted for guidance {table.guidance:g}: tune with --guidance {table.guidance:g}")
    return table if table.fitted else replace(table, guidance=guidance)


def name_of(path: Path) -> str:
    """What a report calls the source of a given table: the name of the bundle, or of a file outside one."""
    path = path.resolve()
    return path.parent.name if path.name == RUN else path.name


def best_fit(work: Work) -> tuple[Trial, Tuning]:
    """The best table for the budget, fitted or not, and what was found on the way."""
    settings, tuner, budget = work.settings, work.tuner, work.budget
    first, second = SEED, SEED + settings.images
    with work.stages.stage("draw the reference") as tick:
        seen, fresh = work.drawn(first, settings.images, tick), work.drawn(second, settings.fresh, tick)
        converged = work.converged(fresh, tick)
    with work.stages.stage("fit and compare") as tick:
        if settings.psnr is not None:
            budget, trials = tuner.least_budget(settings.psnr, work.sampler.steps, seen, fresh, tick)
        else:
            trials = tuner.trials(budget, seen, fresh, tick)
        trials = with_present(work, trials, budget, fresh, tick)
    best = next((trial for trial in trials if isinstance(trial.table, RunTable)), None)
    if best is None or not best.psnr.isfinite().all():
        raise CheckFailedError("the images of every candidate are not finite: the model cannot be sampled")
    found = described(work, budget, trials, best, converged)
    if settings.psnr is None:
        return best, found
    with work.stages.stage("confirm on further images") as tick:
        further = work.drawn(second + settings.fresh, settings.fresh, tick)
        confirmed = float(tuner.judged(best.table, further, lambda: tick("run")).mean())
    return best, replace(found, confirmed_psnr=confirmed)


def with_present(
    work: Work, trials: list[Trial], cost: float, fresh: Images, tick: Callable[[str], None]
) -> list[Trial]:
    """The trials, best first, and that of the bundle's present table if it costs as much: what is good stays."""
    present = stored_table(work.bundle)
    if present is None or not work.tuner.comparable(present, cost):
        return trials
    return best_first([*trials, work.tuner.trial(PRESENT, present, fresh, tick)])


def judged(work: Work, table: RunTable, console: Console) -> tuple[Trial, Tuning]:
    """A table from elsewhere beside the unfitted default, the bundle's own and the original, on images that no fit saw.

    If it is not as good as the first two, this is shown, and CheckFailedError raised.
    """
    with work.stages.stage("draw the reference") as tick:
        fresh = work.drawn(GIVEN_SEED, work.settings.fresh, tick)
        converged = work.converged(fresh, tick)
    with work.stages.stage("compare") as tick:
        given, default, trials = work.tuner.beside(table, fresh, tick)
        trials = with_present(work, trials, given.cost, fresh, tick)
    if not given.psnr.isfinite().all():
        raise CheckFailedError("the images of the given table are not finite: it is of no use for this model")
    rival = max((trial for trial in trials if trial is default or trial.name == PRESENT), key=lambda trial: trial.mean)
    gain = Gain.of(given, rival)
    assert work.settings.table is not None
    found = replace(
        described(work, given.cost, trials, given, converged),
        images=0,
        given=name_of(work.settings.table),
        gain=finite(gain.mean),
        gain_error=finite(gain.error),
    )
    if not gain.enough:
        console.print(found.for_terminal())
        against = "the unfitted default of as many computed steps" if rival is default else PRESENT
        raise CheckFailedError(
            f"the given table is {-gain.mean:.2f} ± {gain.error:.2f} dB worse than {against}; nothing was changed: "
            f"'dcconvert tune {work.bundle.folder}' fits one to this model"
        )
    return given, found


def described(work: Work, budget: float, trials: list[Trial], best: Trial, converged: float) -> Tuning:
    """What was found, for the report."""
    settings, model = work.settings, work.bundle.model
    per_step, skipped = original_gmacs(model, model.spec.example(2)), work.skip_cost
    rows = [
        TuningRow(
            name=trial.name,
            steps=trial.table.steps,
            computed=trial.table.evaluations,
            gmacs=per_step * (trial.table.evaluations + skipped * (trial.table.steps - trial.table.evaluations)),
            psnr=finite(trial.mean),
            psnr_error=finite(trial.error),
            fitted=trial.fitted,
            latency_ms=run_time(
                trial.table.steps, trial.table.evaluations, work.times, isinstance(trial.table, Sampler)
            ),
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
        times_ms=work.times,
        seed=settings.seed,
        command=settings.command,
        machine=machine(),
    )


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def store(bundle: Bundle, best: Trial, found: Tuning, made: Rewrite) -> None:
    """Write the table and the report. A stress test was another table's and is dropped."""
    assert isinstance(best.table, RunTable)
    report = {**old_report(bundle.folder), "tuning": found.to_json()}
    report.pop("stress", None)
    write_table(best.table, made.work)
    made.write_report(report, old_figures(bundle.folder))
