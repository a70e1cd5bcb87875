"""The stress set in mode steps: what the skipped steps of a bundle's run lose in fine detail.

A run table begins at noise alone, so a case is noise from which the original draws an image full of detail. No step
chooses tokens, so there are no figures of a router.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dcconvert.evaluate.detail_kinds import choose
from dcconvert.evaluate.measure_steps import Tick
from dcconvert.evaluate.stress_cases import Cases, original_step, own_samples, places_of, whole_run
from dcconvert.evaluate.stress_metrics import Outcome, Skipping, Tested, detail_psnr
from dcconvert.evaluate.tuning import skip_cost
from dcconvert.export.bundle import Bundle
from dcconvert.sampling.bundle_runs import bundle_run, dit_config, run_planner, stored_table
from dcconvert.sampling.default_tables import ADAMS, GRADED, original_run
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Guidance, Sampler, initial_noise
from dcconvert.sampling.steps import ConvertedStep
from dcconvert.terminal import Stages

REFERENCE_STEPS = 200  # of the original's run that is taken as converged


def tested_in_steps(bundle: Bundle, count: int, samples: int, seed: int, stages: Stages) -> Tested:
    """Run `count` cases of each kind, chosen from so many samples of the original, at the guidance of the run table.

    Raises UsageError if no image has any detail, or if the bundle does not say how to sample it.
    """
    table, sampler = stored_table(bundle) or bundle_run(bundle)[0], run_planner(bundle, None)[0]
    assert isinstance(table, RunTable)
    cases, lost = noise_cases(bundle, table, count, samples, seed, stages)
    with stages.stage("run the cases in half the reference's steps") as tick:
        converged = convergence(bundle, cases, tick)
    with stages.stage("run the cases in all steps, in fewer, and with skipped ones") as tick:
        in_full = cases.run(sampler, lambda: original_step(bundle), tick)
        ratio = ratio_of(table, bundle.model.schedule.ratio, sampler.steps)
        outcome = run_both(bundle, table, ratio, cases, in_full, tick)
    return Tested(table, cases, [outcome], lost, skipping_of(table, sampler, converged))


def skipping_of(table: RunTable, sampler: Sampler, converged: float) -> Skipping:
    """The facts of a run table beside those of the original's own run; `converged` in dB."""
    return Skipping(
        computed=table.evaluations,
        skipped=table.steps - table.evaluations,
        fitted=table.fitted,
        guidance=table.guidance,
        full_steps=sampler.steps,
        full_solver=sampler.solver,
        reference_steps=REFERENCE_STEPS,
        converged=converged if math.isfinite(converged) else None,
    )


def convergence(bundle: Bundle, cases: Cases, tick: Tick) -> float:
    """Mean PSNR in the detail, in dB, between the reference and a run of half as many steps."""
    many = original_run(cases.part.prediction, REFERENCE_STEPS // 2, ADAMS)
    half = cases.run(many, lambda: original_step(bundle), tick)
    return float(detail_psnr(half, cases.wanted, cases.detail).mean())


def noise_cases(
    bundle: Bundle, table: RunTable, count: int, samples: int, seed: int, stages: Stages
) -> tuple[Cases, list[str]]:
    """Choose the noise by what the original draws from it, and run it to convergence."""
    config = dit_config(bundle)
    guidance: dict[str, Any] = {"guidance": table.guidance, "null_class": config.unconditional_class}
    with stages.stage("draw images from the original") as tick:
        source = own_samples(bundle, table.prediction, samples, seed, tick, **guidance)
    with stages.stage("choose the images"):
        chosen = choose(source.images, count)
    kinds, places = places_of(chosen)
    seeds, labels = [seed + place for place in places], source.labels[places]
    noise = torch.cat([initial_noise(each, 1, config.in_channels, config.image_size) for each in seeds])
    with stages.stage("run the cases through the original") as tick:
        many, step = original_run(table.prediction, REFERENCE_STEPS, ADAMS), original_step(bundle)
        wanted = whole_run(many, lambda: step, (noise, labels), guidance, tick)
    cases = Cases(table, None, labels, noise, seeds, places, kinds, wanted, torch.zeros(0), guidance)
    return cases.with_detail(bundle.model.spec.grid)


def run_both(
    bundle: Bundle, table: RunTable, ratio: float, cases: Cases, in_full: Tensor | None, tick: Tick
) -> Outcome:
    """Run the cases by the table, and by the original on the graded grid at the same cost.

    `in_full`: images of the original's own run, or None.
    """
    halves = Guidance(table.guidance).halves
    images = cases.run(table, lambda: ConvertedStep(bundle.model, bundle.model, halves, by_table=True), tick)
    cost = table.cost(skip_cost(bundle.model))
    controls = {
        steps: cases.run(original_run(table.prediction, steps, GRADED), lambda: original_step(bundle), tick)
        for steps in sorted({math.floor(cost), math.ceil(cost)})
    }
    return Outcome(ratio, cost, images, controls, [], in_full)


def ratio_of(table: RunTable, asked: float, steps: int) -> float:
    """The ratio that the bundle was converted for, unless `tune` gave it a table for another."""
    return asked if round(steps / asked) == table.evaluations else round(steps / table.evaluations, 2)
