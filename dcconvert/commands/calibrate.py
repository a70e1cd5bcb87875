"""`dcconvert calibrate`: the kept-fraction curve and number of steps that give the best images at a given compute."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from dcconvert.commands.rewrite_bundle import Rescheduled, Rewrite, old_figures, old_report, rewritten
from dcconvert.environment import set_threads
from dcconvert.evaluate.measure_steps import Tick
from dcconvert.evaluate.schedule_search import KNOTS, Search, Trial, step_counts
from dcconvert.export.bundle import Bundle, read_bundle
from dcconvert.export.checks.flops import converted_gmacs, original_gmacs
from dcconvert.images.pixels import psnr
from dcconvert.models.dit import DiTConfig
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.schedule import Timetable
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.report.calibration import Calibration, CalibrationRow, KeptStep, TriedSchedule
from dcconvert.sampling.bundle_runs import dit_config, run_planner
from dcconvert.sampling.samplers import Sampler, Step, initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep, OrtPair, silent
from dcconvert.terminal import Stages, terminal

SHOWN = 5  # candidates in the table
FINALISTS = 10  # candidates that are compared on all images
SCREEN = 8  # images, or a quarter of them if that is more, on which the finalists are chosen
Figures = tuple[float, float, float | None]  # mean PSNR in dB: on the first images of the search, on all, on fresh ones


@dataclass(frozen=True)
class Settings:
    """The settings of a calibration; for None and 0, the bundle's own value is used."""

    folder: Path
    ratio: float | None
    solver: str | None
    images: int
    reference_steps: int
    seed: int
    threads: int
    batch: int
    command: str


@dataclass(frozen=True)
class Task:
    """A bundle and the task: to find a schedule for `solver` that costs `budget` full steps."""

    settings: Settings
    bundle: Bundle
    config: DiTConfig
    budget: float
    most: int  # sampling steps that a run may have
    solver: str
    sampler: Sampler  # the present one
    schedule: Timetable  # the present one, fitted to its sampler
    same_compute: bool  # whether the present run costs the budget

    @classmethod
    def read(cls, settings: Settings) -> Task:
        """Raises UsageError if the bundle cannot be calibrated or the budget leaves nothing to search."""
        bundle = read_bundle(settings.folder)
        if bundle.model.method.remembers != "tokens":
            raise UsageError(
                f"{bundle.folder} is in mode {bundle.model.method.mode}: calibrate is for mode carry, and tune is for "
                "mode steps; to calibrate, convert the checkpoint again with --mode carry"
            )
        sampler, planner = run_planner(bundle, None)
        own = sampler.steps / planner.schedule.ratio
        # The ratio refers to the run that the bundle was made for, even if an earlier calibration chose fewer steps.
        try:
            most = int(bundle.manifest.get("calibration", {}).get("run_steps", sampler.steps))
        except (AttributeError, TypeError, ValueError) as error:
            raise UsageError(
                f"{bundle.folder} has a damaged calibration entry: convert the checkpoint again"
            ) from error
        budget = most / settings.ratio if settings.ratio else own
        step_counts(budget, most)  # raises before anything is exported
        solver, same = settings.solver or sampler.solver, math.isclose(budget, own)
        return cls(
            settings, bundle, dit_config(bundle), budget, most, solver, sampler, planner.schedule, same_compute=same
        )

    @property
    def batch(self) -> int:
        return self.settings.batch or max(self.bundle.bucket_set.batches)

    def images(self, seed: int) -> ImageSet:
        """A set of samples with consecutive seeds from `seed` on."""
        count = self.settings.images
        noise = initial_noise(seed, count, self.config.in_channels, self.config.image_size)
        return ImageSet(noise, labels_for(count, self.config.num_classes), self.batch)


class ImageSet:
    """Noise and labels of some samples, and the images that the original draws from them in many steps."""

    def __init__(self, noise: Tensor, labels: Tensor, batch: int) -> None:
        self.noise, self.labels, self.batch = noise, labels, batch
        self.reference: Tensor | None = None

    def draw(self, sampler: Sampler, new_step: Callable[[], Step], tick: Tick = silent, note: str = "") -> Tensor:
        """Samples [B, C, H, W], `batch` at a time, each batch with a step function of its own."""
        parts = zip(self.noise.split(self.batch), self.labels.split(self.batch), strict=True)
        return torch.cat([sampler.run(new_step(), x, y, on_step=lambda _: tick(note)) for x, y in parts])

    def psnr(self, sampler: Sampler, new_step: Callable[[], Step]) -> Tensor:
        """PSNR of each sample to the reference in dB, [B]."""
        assert self.reference is not None
        return psnr(self.draw(sampler, new_step), self.reference)

    @property
    def screen(self) -> ImageSet:
        """The first samples: enough to tell good candidates from bad ones."""
        count = max(SCREEN, len(self.noise) // 4)
        assert self.reference is not None
        part = ImageSet(self.noise[:count], self.labels[:count], self.batch)
        part.reference = self.reference[:count]
        return part


class Bench:
    """A bundle and its original on ONNX Runtime. The bundle runs without buckets, under any schedule."""

    def __init__(self, task: Task, scratch: Path) -> None:
        self.model = task.bundle.model
        parts = (self.model, self.model.planner, None, task.bundle.onnx, scratch, task.settings.threads)
        self.runtime = OrtPair.open(*parts)
        self.sampler = cache(lambda steps, solver: Sampler(task.sampler.prediction, steps, solver))
        inputs = self.model.spec.example(2)
        self.original_gmacs = original_gmacs(self.model, inputs)
        self.gmacs = cache(lambda kept: converted_gmacs(self.model, inputs, kept))  # of one step of one sample

    def run_gmacs(self, sampler: Sampler, schedule: Timetable | None) -> float:
        """GMACs of a sample's run under a fitted schedule or, without one, of the original's."""
        if schedule is None:
            return sampler.steps * self.original_gmacs
        return sum(self.gmacs(int(kept)) for kept in schedule.run_counts(sampler.taus, self.model.spec.tokens))

    def converted(self, schedule: Timetable) -> Callable[[], Step]:
        """Step functions of the converted model under a fitted schedule, until another one is asked for."""
        self.runtime.converted.planner = StepPlanner(self.model.spec, self.model.method, schedule)
        return lambda: ConvertedStep(self.model, self.runtime.converted)

    def original(self) -> Step:
        """The original's step function, which has no state."""
        return self.runtime.original_step

    def refer(self, images: ImageSet, steps: int, tick: Tick) -> None:
        """Draw the reference. Euler is of first order, but with enough steps it is exact."""
        images.reference = images.draw(self.sampler(steps, "euler"), self.original, tick, f"original, {steps} steps")

    def search(self, task: Task, images: ImageSet, tick: Tick) -> list[Trial]:
        """Try all candidates on the first images; the best trial comes first."""
        screen = images.screen

        def taus(steps: int) -> np.ndarray:
            return self.sampler(steps, task.solver).taus

        def score(steps: int, schedule: Timetable) -> float:
            tick("candidates")
            return mean(screen.psnr(self.sampler(steps, task.solver), self.converted(schedule)))

        return Search(task.budget, task.most, self.model.spec.tokens, taus, score).run()

    def finalists(self, task: Task, trials: list[Trial], images: ImageSet, tick: Tick) -> list[Finalist]:
        """Run the best trials on all images; the best finalist comes first."""
        found = []
        for trial in trials[:FINALISTS]:
            tick("finalists")
            sampler = self.sampler(trial.candidate.steps, task.solver)
            found.append(Finalist(trial, sampler, mean(images.psnr(sampler, self.converted(trial.schedule)))))
        return sorted(found, key=lambda finalist: finalist.psnr, reverse=True)


@dataclass(frozen=True)
class Finalist:
    """A trial with its sampler and its mean PSNR on all images of the search."""

    trial: Trial
    sampler: Sampler
    psnr: float


def calibrate_bundle(settings: Settings, console: Console) -> None:
    """Search, check, store and print. The bundle is replaced as a whole at the end, or stays as it was.

    Raises UsageError if the bundle or the settings leave nothing to search, and CheckFailedError if ONNX Runtime and
    torch disagree in the buckets of the new schedule.
    """
    task = Task.read(settings)
    stages = Stages(terminal(stderr=True))
    set_threads(settings.threads)
    with rewritten(settings.folder) as made, tempfile.TemporaryDirectory(dir=made.work) as scratch:
        with stages.stage("export original"):
            bench = Bench(task, Path(scratch))
        best, found = calibrate(task, bench, stages)
        store(task, best, found, made, Path(scratch), stages)
    console.print(found.for_terminal())
    if best is None:
        console.print(
            "No candidate beat the present schedule on the search images: it was not changed.", highlight=False
        )
    places = f"Bundle: {settings.folder}\nReport: {settings.folder / 'report.html'}"
    console.print(places, highlight=False, soft_wrap=True)


def calibrate(task: Task, bench: Bench, stages: Stages) -> tuple[Finalist | None, Calibration]:
    """The best finalist, or None if the present schedule is as good, and the record for manifest and report.

    The finalist is chosen on one set of images. The record also has figures for as many fresh images.
    """
    settings, tokens = task.settings, bench.model.spec.tokens
    seen, fresh = task.images(settings.seed), task.images(settings.seed + settings.images)
    with stages.stage("draw the reference") as tick:
        for images in (seen, fresh):
            bench.refer(images, settings.reference_steps, tick)
    with stages.stage("search") as tick:
        trials = bench.search(task, seen, tick)
        finalists = bench.finalists(task, trials, seen, tick)
    with stages.stage("compare on fresh images") as tick:
        rows = compared(task, bench, finalists, (seen, fresh), tick)
    present = next(row.psnr for row in rows if row.kind == "present")
    assert present is not None
    best = None if task.same_compute and present >= finalists[0].psnr else finalists[0]
    curves = {"before": curve(task.sampler, task.schedule.run_counts(task.sampler.taus, tokens), tokens)}
    if best is not None:
        curves["after"] = curve(best.sampler, best.trial.counts, tokens)
    return best, Calibration(
        command=settings.command,
        budget=task.budget,
        run_steps=task.most,
        solver=task.solver,
        images=settings.images,
        screen_images=len(seen.screen.noise),
        reference_steps=settings.reference_steps,
        seed=settings.seed,
        changed=best is not None,
        rows=tuple(rows),
        curves=curves,
        candidates=tuple(tried(trial, tokens) for trial in trials),
    )


def compared(
    task: Task, bench: Bench, finalists: list[Finalist], sets: tuple[ImageSet, ImageSet], tick: Tick
) -> list[CalibrationRow]:
    """Rows of the table: the best candidates, the present schedule, and the original with fewer steps.

    Every row except those of the candidates after the first also has a figure for fresh images.
    """
    rows = []
    for place, finalist in enumerate(finalists[:SHOWN], 1):
        figures: Figures = (finalist.trial.score, finalist.psnr, None)
        name = f"candidate {place}"
        rows.append(row_of(bench, "candidate", name, finalist.sampler, finalist.trial.schedule, figures))
    best = finalists[0]
    tick("candidate 1")
    rows[0] = replace(rows[0], psnr_fresh=mean(sets[1].psnr(best.sampler, bench.converted(best.trial.schedule))))
    tick("present schedule")
    figures = all_figures(sets, task.sampler, bench.converted(task.schedule))
    rows.append(row_of(bench, "present", "present schedule", task.sampler, task.schedule, figures))
    # The budget is seldom a whole number of steps, so one control is just below it and one is at or above it.
    equal = rows[0].gmacs / bench.original_gmacs
    fewer = [(math.ceil(equal), task.solver), (math.floor(equal), task.solver), (math.ceil(equal), "euler")]
    for steps, solver in dict.fromkeys(fewer):
        tick(f"original, {steps} steps")
        sampler = bench.sampler(steps, solver)
        figures = all_figures(sets, sampler, bench.original)
        rows.append(row_of(bench, "control", "original, fewer steps", sampler, None, figures))
    return rows


def row_of(
    bench: Bench, kind: str, name: str, sampler: Sampler, schedule: Timetable | None, figures: Figures
) -> CalibrationRow:
    """A run of the converted model under a fitted schedule or, without one, of the original."""
    screen, seen, fresh = figures
    return CalibrationRow(
        kind=kind,
        name=name,
        solver=sampler.solver,
        steps=sampler.steps,
        warm_up=None if schedule is None else schedule.dense_first,
        kept=None if schedule is None else tuple(schedule.fraction(KNOTS).tolist()),
        gmacs=bench.run_gmacs(sampler, schedule),
        psnr_screen=screen,
        psnr=seen,
        psnr_fresh=fresh,
    )


def all_figures(sets: tuple[ImageSet, ImageSet], sampler: Sampler, new_step: Callable[[], Step]) -> Figures:
    seen, fresh = sets
    found = seen.psnr(sampler, new_step)
    return mean(found[: len(seen.screen.noise)]), mean(found), mean(fresh.psnr(sampler, new_step))


def mean(figures: Tensor) -> float:
    """The mean; minus infinity, which is worse than any other value, if it is not finite."""
    value = float(figures.mean())
    return value if math.isfinite(value) else -math.inf


def curve(sampler: Sampler, counts: Iterable[int], tokens: int) -> tuple[KeptStep, ...]:
    """Kept fraction at every step of a run."""
    return tuple(KeptStep(float(tau), int(kept) / tokens) for tau, kept in zip(sampler.taus, counts, strict=True))


def tried(trial: Trial, tokens: int) -> TriedSchedule:
    return TriedSchedule(
        steps=trial.candidate.steps,
        warm_up=trial.candidate.warm_up,
        knots=trial.schedule.knots,
        cost=sum(trial.counts) / tokens,
        psnr_screen=trial.score,
    )


def store(task: Task, best: Finalist | None, found: Calibration, into: Rewrite, scratch: Path, stages: Stages) -> None:
    """Write the calibrated bundle. If the present schedule stays, only the record is new.

    If the report has measurements of latency, memory and images, they are repeated, on fresh images.
    """
    bundle, settings = task.bundle, task.settings
    report, figures = old_report(bundle.folder), old_figures(bundle.folder)
    section = {"calibration": found.to_json()}
    if best is None:
        into.write_rescheduled(bundle.model, bundle.manifest | section, report | section, figures)
        return
    made = Rescheduled.of(bundle, best.trial.schedule, best.sampler, stages)
    report = made.report(report)
    again = made.measure(
        bundle,
        report,
        task.config,
        scratch,
        stages,
        reference_steps=settings.reference_steps,
        threads=settings.threads,
        seed=settings.seed + settings.images,
    )
    figures = figures if again is None else again
    manifest = made.manifest(bundle.manifest) | section
    into.write_rescheduled(made.model, manifest, report | section, figures)
