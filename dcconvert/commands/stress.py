"""`dcconvert stress`: what a conversion does to images full of detail, where its router starves it, and worst cases.

Mode steps, which has no router, is in `stress_steps`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from dcconvert.commands.rewrite_bundle import FAILURES, Rewrite, old_figures, old_report, rewritten
from dcconvert.commands.stress_steps import tested_in_steps
from dcconvert.environment import set_threads
from dcconvert.evaluate.detail_kinds import choose, on_tokens
from dcconvert.evaluate.measure_steps import Tick, compute_section
from dcconvert.evaluate.stress_cases import Cases, noised_run, original_step, own_samples, places_of
from dcconvert.evaluate.stress_metrics import CaseFigures, Look, Outcome, Tested, judged, summary, worst_of
from dcconvert.export.bundle import Bundle, read_bundle
from dcconvert.export.files import write_json
from dcconvert.images.dataset import LabelledImages, read_images
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.report.conversion import without_nan
from dcconvert.report.stress import FAILURES_FIGURE, Stress, failure_figure
from dcconvert.sampling.bundle_runs import dit_config, run_planner
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Sampler, Step, initial_noise
from dcconvert.sampling.steps import ConvertedStep
from dcconvert.terminal import Stages, terminal

START, EARLY, LATE = 0.7, 0.6, 0.2  # noise levels: where a case starts, and where the router is examined
SAMPLES = 256  # images that the original draws to choose from, if no data are given
RATIOS = (4.0, 16.0)  # if none are given


@dataclass(frozen=True)
class Settings:
    """The settings of a stress test: the options of the command line; no ratios stand for `RATIOS`."""

    folder: Path
    data: Path | None
    ratios: tuple[float, ...]
    count: int
    seed: int
    threads: int
    command: str
    samples: int = SAMPLES


def stress_bundle(settings: Settings, console: Console) -> None:
    """Run the stress set through a bundle, print the table, add it to the report and write failures.json.

    Raises UsageError if the bundle, the data or the ratios leave nothing to run.
    """
    set_threads(settings.threads)
    bundle = read_bundle(settings.folder)
    stages = Stages(terminal(stderr=True))
    with rewritten(settings.folder) as made:
        with torch.inference_mode():
            if bundle.model.method.remembers == "updates":
                check_steps(settings)
                tested = tested_in_steps(bundle, settings.count, settings.samples, settings.seed, stages)
            else:
                tested = tested_in_tokens(bundle, settings, stages)
        cases, outcomes = tested.cases, tested.outcomes
        class_names = bundle.manifest.get("sampler", {}).get("class_names") or []
        figures = [case for outcome in outcomes for case in judged(cases, outcome, class_names)]
        worst, found = worst_of(figures), described(settings, tested, figures)
        store(bundle, found, worst, failure_figure(worst, cases, outcomes), made)
    console.print(found.for_terminal())
    places = (f"Cases: {settings.folder / FAILURES}", f"Report: {settings.folder / 'report.html'}")
    for line in (*found.left_out, *places):
        console.print(line, highlight=False, soft_wrap=True)


def check_steps(settings: Settings) -> None:
    """UsageError for options that mode steps has no use for."""
    if settings.data:
        raise UsageError(
            f"{settings.folder} is in mode steps, and its run table begins at noise alone, not at an image: leave out "
            "--data, and the cases will be images that the original draws"
        )
    if settings.ratios:
        raise UsageError(f"{settings.folder} is in mode steps, and its run table is for one ratio: leave out --ratio")


def tested_in_tokens(bundle: Bundle, settings: Settings, stages: Stages) -> Tested:
    """A stress test of a mode that chooses tokens. Raises UsageError as `stress_bundle` does."""
    if not bundle.model.method.drops_tokens or bundle.model.schedule.data_dependent:
        raise UsageError(
            f"{bundle.folder} was made with method {bundle.model.method.name}: stress is for bundles in mode steps, "
            "and for those whose router and schedule say which tokens are dropped (methods carry, chunk and tome)"
        )
    sampler, planner = run_planner(bundle, None)
    planners, left_out = planners_of(planner, settings.ratios or RATIOS, sampler)
    cases, lost = make_cases(bundle, sampler, settings, stages)
    where = looked_at(cases.part, list(planners.values()))
    outcomes = []
    for ratio, made in planners.items():
        with stages.stage(f"run the cases at {ratio:g}x") as tick:
            outcomes.append(run_at(bundle, made, cases, where, tick))
    return Tested(sampler, cases, outcomes, [*left_out, *lost])


def described(settings: Settings, tested: Tested, figures: Sequence[CaseFigures]) -> Stress:
    """What was found, for the report."""
    part, levels = tested.cases.part, [look.tau for look in tested.outcomes[0].looks]
    early, late = levels or (None, None)
    return Stress(
        command=settings.command,
        source=str(settings.data) if settings.data else f"{settings.samples} samples of the original",
        seed=settings.seed,
        start=float(part.taus[0]),
        early=early,
        late=late,
        steps=part.steps,
        run_steps=tested.run.steps,
        solver=tested.run.solver,
        cases=len(tested.cases),
        left_out=tuple(tested.left_out),
        rows=tuple(summary(figures, total=tested.skipping is not None)),
        skipping=tested.skipping,
    )


def planners_of(
    planner: StepPlanner, ratios: Sequence[float], sampler: Sampler
) -> tuple[dict[float, StepPlanner], list[str]]:
    """Planners for the ratios that the bundle's run can have, and a message for each of the others.

    Raises UsageError if the run can have none of the ratios.
    """
    found, left_out = {}, []
    for ratio in ratios:
        try:
            found[ratio] = planner.at_ratio(ratio, sampler.taus)
        except UsageError as error:
            left_out.append(f"{ratio:g}x was left out: {error}")
    if not found:
        raise UsageError(left_out[0])
    return found, left_out


def make_cases(bundle: Bundle, sampler: Sampler, settings: Settings, stages: Stages) -> tuple[Cases, list[str]]:
    """Choose the images and run them through the original; messages as in `Cases.with_detail`.

    Raises UsageError if the data do not fit the model or hold no detail.
    """
    config = dit_config(bundle)
    source = source_images(bundle, sampler, settings, stages)
    with stages.stage("choose the images"):
        chosen = choose(source.images, settings.count)
    kinds, sources = places_of(chosen)
    seeds = [settings.seed + place for place in sources]
    noise = torch.cat([initial_noise(seed, 1, config.in_channels, config.image_size) for seed in seeds])
    clean, labels = source.images[sources], source.labels[sources]
    part = sampler.tail(int(np.abs(sampler.taus - START).argmin()))
    with stages.stage("run the cases through the original") as tick:
        wanted = noised_run(part, lambda: original_step(bundle), (clean, noise, labels), tick)
    cases = Cases(part, clean, labels, noise, seeds, sources, kinds, wanted, torch.zeros(0))
    return cases.with_detail(bundle.model.spec.grid)


def source_images(bundle: Bundle, sampler: Sampler, settings: Settings, stages: Stages) -> LabelledImages:
    """The images to choose from: those of `--data`, or samples of the original."""
    if settings.data:
        return read_images(settings.data, dit_config(bundle))
    with stages.stage("draw images from the original") as tick:
        return own_samples(bundle, sampler.prediction, settings.samples, settings.seed, tick)


def run_at(bundle: Bundle, planner: StepPlanner, cases: Cases, where: tuple[int, int], tick: Tick) -> Outcome:
    """Run the cases through the converted model at one ratio, and through the original with steps that cost as much.

    `where`: the steps that are examined.
    """
    part = cases.part
    assert isinstance(part, Sampler)
    watcher = Watcher(bundle, planner, where)
    images = cases.run(part, watcher.new_step, tick)
    compute = compute_section(bundle.model, planner.run_counts(part.taus), part.taus)
    cost = compute["run_gmacs"]["converted"] / compute["original_gmacs"]
    fewer = sorted({min(part.steps, max(1, steps)) for steps in (math.floor(cost), math.ceil(cost))})
    controls = {n: cases.run(part.tail(0, n), lambda: original_step(bundle), tick) for n in fewer}
    return Outcome(planner.schedule.ratio, cost, images, controls, watcher.looks(part))


def looked_at(part: Sampler | RunTable, planners: Sequence[StepPlanner]) -> tuple[int, int]:
    """The steps to examine: those nearest to an early and a late noise level at which tokens are dropped.

    Only steps at which every planner drops tokens are considered; planners that never drop any do not count.
    """
    counts = np.stack([planner.run_counts(part.taus) for planner in planners])
    drops = counts < planners[0].spec.tokens
    steps = np.flatnonzero(drops[drops.any(1)].all(0))  # all steps, if no planner drops anything
    steps = steps if len(steps) else np.arange(part.steps)
    early, late = (int(steps[np.abs(part.taus[steps] - level).argmin()]) for level in (EARLY, LATE))
    return early, late


class Watcher:
    """Runs the converted model and, at the steps that are examined, also the original on the same input."""

    def __init__(self, bundle: Bundle, planner: StepPlanner, where: tuple[int, int]) -> None:
        self.model = bundle.model.with_schedule(planner.schedule)
        self.original = original_step(bundle)
        self.where = where
        self.seen: dict[int, list[Look]] = {step: [] for step in where}

    def new_step(self) -> Step:
        converted, number = ConvertedStep(self.model, self.model), -1

        def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            nonlocal number
            number += 1
            output = converted(x, t, y)
            if number in self.seen:
                wanted = self.original(x, t, y)
                self.seen[number].append(look_of(self.model, converted, output, wanted, x, float(t[0])))
            return output

        return step

    def looks(self, part: Sampler) -> list[Look]:
        """What was seen at the two steps, with all batches joined."""
        found = []
        for step in self.where:
            batches = self.seen[step]
            ages = [look.age for look in batches if look.age is not None]
            found.append(
                replace(
                    batches[0],
                    tau=float(part.taus[step]),
                    keep=np.concatenate([look.keep for look in batches]),
                    error=torch.cat([look.error for look in batches]),
                    age=np.concatenate(ages) if ages else None,
                )
            )
        return found


def look_of(model: DynamicModel, step: ConvertedStep, output: Tensor, wanted: Tensor, x: Tensor, t: float) -> Look:
    """What a converted step has just done to a batch x; `wanted` is the original's output for it."""
    run, grid, channels = step.run, model.spec.grid, x.shape[1]  # learned variances come after the prediction
    assert run is not None
    assert run.last_plan is not None
    error = (output - wanted)[:, :channels].square().mean(1)
    size = wanted[:, :channels].square().mean((1, 2, 3)).clamp_min(1e-12)
    area = x.shape[2] // grid[0] * (x.shape[3] // grid[1])
    shape = (len(x), *grid)
    age = None if run.history is None else run.history.age[: len(x)].reshape(shape).copy()
    keep = run.last_plan.keep[: len(x)].reshape(shape)
    return Look(t / model.spec.timestep_scale, t, keep, on_tokens(error / size[:, None, None], grid) / area, age)


def store(bundle: Bundle, found: Stress, worst: Sequence[CaseFigures], picture: bytes, made: Rewrite) -> None:
    """Write the section, the picture and failures.json."""
    report = {**old_report(bundle.folder), "stress": found.to_json()}
    made.write_report(report, {**old_figures(bundle.folder), FAILURES_FIGURE: picture})
    write_json(without_nan([case.to_json() for case in worst]), made.work / FAILURES)
