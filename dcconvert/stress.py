"""`dcconvert stress`: what a conversion does to images full of detail, where its router starves it, the worst cases."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from dcconvert.commands import dit_config, run_planner
from dcconvert.detail import KINDS, choose, on_tokens
from dcconvert.evaluate import ConvertedStep, compute_section
from dcconvert.export.bundle import Bundle, new_folder, read_bundle
from dcconvert.image_data import LabelledImages, read_images
from dcconvert.images import psnr
from dcconvert.passes.errors import UsageError
from dcconvert.passes.step_planner import StepPlanner
from dcconvert.progress import Stages
from dcconvert.reschedule import FAILURES, old_figures, old_report, write_rescheduled
from dcconvert.sampling import Sampler, Step, initial_noise, labels_for
from dcconvert.stress_report import failure_figure, stress_tables

START, EARLY, LATE = 0.7, 0.6, 0.2  # noise levels: where a case starts, and where the router is looked at
SAMPLES = 256  # images of the original to choose from, where no data are given
SAMPLE_STEPS, SAMPLE_SOLVER = 20, "unipc"
WORST = 12  # cases in failures.json


@dataclass(frozen=True)
class Settings:
    """What a stress test was asked for; the options of the command line."""

    folder: Path
    data: Path | None
    ratios: tuple[float, ...]
    count: int
    seed: int
    threads: int
    command: str


@dataclass(frozen=True)
class Cases:
    """Images with much detail: clean [n, C, H, W], labels [n], where each came from, and where its detail is.

    `detail` [n, h, w]: the response of each image's own kind, summed over the cells of the token grid.
    """

    clean: Tensor
    labels: Tensor
    noise: Tensor
    seeds: list[int]
    sources: list[int]
    kinds: list[str]
    detail: Tensor

    def __len__(self) -> int:
        return len(self.clean)


@dataclass
class Look:
    """What the converted model did at one step, for all cases: noise level, keep mask and error of the prediction.

    `keep` bool [n, h, w]; `error` [n, h, w]: squared, mean over the pixels of a token, relative to the mean square of
    the original's prediction for the same input.
    """

    tau: float
    keep: np.ndarray
    error: Tensor


@dataclass
class Outcome:
    """All cases at one ratio: final images of the converted model and of the control, and looks at two steps."""

    ratio: float
    images: Tensor
    control: Tensor
    control_steps: int
    looks: list[Look]


def stress_bundle(settings: Settings, console: Console) -> dict[str, Any]:
    """Run the stress set through a bundle, print the table, add it to the report and write failures.json."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    bundle = read_bundle(settings.folder)
    sampler, planner = run_planner(bundle, None)
    stages = Stages(Console(stderr=True))
    limits: list[str] = []
    planners = {}
    for ratio in settings.ratios:
        try:
            planners[ratio] = planner.at_ratio(ratio, sampler.taus)
        except UsageError as error:
            limits.append(f"Stress at {ratio:g}x was left out: {error}")
    if not planners:
        raise UsageError(limits[0])
    with torch.inference_mode():
        cases = make_cases(bundle, sampler, settings, stages)
        with stages.stage("run the cases through the original") as tick:
            wanted = partial_run(sampler, cases, original_step(bundle), lambda: tick("steps"))
        outcomes = []
        for ratio, made in planners.items():
            with stages.stage(f"run the cases at {ratio:g}x") as tick:
                outcomes.append(run_at(bundle, sampler, made, cases, lambda: tick("steps")))
    figures_of_cases = [facts for outcome in outcomes for facts in judged(bundle, sampler, cases, outcome, wanted)]
    worst = sorted(figures_of_cases, key=lambda facts: facts["detail_psnr"])[:WORST]
    found = {
        "command": settings.command,
        "source": str(settings.data) if settings.data else f"{SAMPLES} samples of the original",
        "start": sampler.taus[start_of(sampler)],
        "steps": sampler.steps,
        "solver": sampler.solver,
        "cases": len(cases),
        "rows": summary(figures_of_cases),
        "worst": [{k: v for k, v in facts.items() if k not in ("looks", "case")} for facts in worst],
    }
    picture = failure_figure(worst, cases, wanted, outcomes)
    store(bundle, found, [public(facts) for facts in worst], picture, limits)
    for table in stress_tables(found):
        console.print(table)
    for line in (*limits, f"Cases: {settings.folder / FAILURES}", f"Report: {settings.folder / 'report.html'}"):
        console.print(escape(line), highlight=False, soft_wrap=True)
    return found


def make_cases(bundle: Bundle, sampler: Sampler, settings: Settings, stages: Stages) -> Cases:
    """Choose the images and noise them; UsageError for data that do not fit or hold no detail."""
    config = dit_config(bundle)
    if settings.data:
        source = read_images(settings.data, config)
    else:
        with stages.stage("draw images from the original") as tick:
            source = own_samples(bundle, sampler, settings.seed, lambda: tick("batches"))
    chosen = choose(source.images, settings.count)
    if not any(chosen.values()):
        raise UsageError("none of the images has any detail: give others with --data")
    kinds = [kind for kind, places in chosen.items() for _ in places]
    sources = [place for places in chosen.values() for place in places]
    seeds = [settings.seed + place for place in sources]
    clean, labels = source.images[sources], source.labels[sources]
    g = clean.float().mean(1)
    responses = {kind: measure(g)[1] for kind, measure in KINDS.items()}
    response = torch.stack([responses[kind][i] for i, kind in enumerate(kinds)])
    noise = torch.cat([initial_noise(seed, 1, config.in_channels, config.image_size) for seed in seeds])
    return Cases(clean, labels, noise, seeds, sources, kinds, on_tokens(response, bundle.model.spec.grid))


def own_samples(bundle: Bundle, sampler: Sampler, seed: int, tick: Callable[[], None]) -> LabelledImages:
    config = dit_config(bundle)
    noise = initial_noise(seed, SAMPLES, config.in_channels, config.image_size)
    labels = labels_for(SAMPLES, config.num_classes)
    many = Sampler(sampler.prediction, SAMPLE_STEPS, SAMPLE_SOLVER)
    parts = []
    for x, y in zip(noise.split(32), labels.split(32), strict=True):
        parts.append(many.run(original_step(bundle), x, y))
        tick()
    return LabelledImages(torch.cat(parts), labels)


def original_step(bundle: Bundle) -> Step:
    return lambda x, t, y: bundle.model.original_graph(x, t, y)[0]


def nearest(sampler: Sampler, level: float) -> int:
    """The step of a run whose noise level is nearest."""
    return int(np.abs(sampler.taus - level).argmin())


def start_of(sampler: Sampler) -> int:
    return nearest(sampler, START)


def partial_run(sampler: Sampler, cases: Cases, step: Step, tick: Callable[[], None]) -> Tensor:
    """Final images of the cases noised to the start and sampled from there on, as in SDEdit (arXiv 2108.01073)."""
    first = start_of(sampler)
    t = torch.full((len(cases),), float(sampler.timesteps[first]))
    noised = sampler.add_noise(cases.clean, cases.noise, t)
    return sampler.run(step, noised, cases.labels, start=first, on_step=lambda _: tick())


def run_at(bundle: Bundle, sampler: Sampler, planner: StepPlanner, cases: Cases, tick: Callable[[], None]) -> Outcome:
    """The cases through the converted model at one ratio, and through the original with the steps that cost as much."""
    model = bundle.model.with_schedule(planner.schedule)
    converted, original = ConvertedStep(model, model), original_step(bundle)
    where = [sampler.taus[nearest(sampler, level)] for level in (EARLY, LATE)]
    looks: list[Look] = []

    def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        output = converted(x, t, y)
        tau = float(t[0]) / model.spec.timestep_scale
        if any(abs(tau - level) < 1e-6 for level in where):
            channels = x.shape[1]
            wanted = original(x, t, y)[:, :channels]
            error = (output[:, :channels] - wanted).square().mean(1) / wanted.square().mean((1, 2, 3))[:, None, None]
            assert converted.run is not None
            assert converted.run.last_plan is not None
            keep = converted.run.last_plan.keep.reshape(len(x), *model.spec.grid)
            looks.append(Look(tau, keep, on_tokens(error, model.spec.grid) / patch_area(error, model.spec.grid)))
        return output

    images = partial_run(sampler, cases, step, tick)
    ratio = compute_section(bundle.model, planner, sampler.taus)["ratio"]
    fewer = Sampler(sampler.prediction, max(1, round(sampler.steps / ratio)), sampler.solver)
    control = partial_run(fewer, cases, original, tick)
    return Outcome(planner.schedule.ratio, images, control, fewer.steps, looks)


def patch_area(pixels: Tensor, grid: tuple[int, int]) -> int:
    return pixels.shape[1] // grid[0] * (pixels.shape[2] // grid[1])


def judged(bundle: Bundle, sampler: Sampler, cases: Cases, outcome: Outcome, wanted: Tensor) -> list[dict[str, Any]]:
    """The figures of every case at one ratio."""
    names = bundle.manifest.get("sampler", {}).get("class_names") or []
    values = {name: psnr(images, wanted) for name, images in both(outcome).items()}
    inside = {name: detail_psnr(images, wanted, cases.detail) for name, images in both(outcome).items()}
    result = []
    for i in range(len(cases)):
        label = int(cases.labels[i])
        result.append(
            {
                "case": i,
                "kind": cases.kinds[i],
                "seed": cases.seeds[i],
                "source_index": cases.sources[i],
                "class": label,
                "class_name": names[label] if label < len(names) else None,
                "ratio": outcome.ratio,
                "psnr": float(values["converted"][i]),
                "detail_psnr": float(inside["converted"][i]),
                "control_steps": outcome.control_steps,
                "control_psnr": float(values["control"][i]),
                "control_detail_psnr": float(inside["control"][i]),
                "looks": [look_at(look, i, cases.detail[i], sampler) for look in outcome.looks],
            }
        )
    return result


def both(outcome: Outcome) -> dict[str, Tensor]:
    return {"converted": outcome.images, "control": outcome.control}


def detail_psnr(found: Tensor, wanted: Tensor, detail: Tensor) -> Tensor:
    """PSNR [n] in which every token's squared error weighs as much as its detail [n, h, w]."""
    count, height, width = detail.shape
    error = on_tokens((found - wanted).square().mean(1), (height, width)) / patch_area(found[:, 0], (height, width))
    weighted = (error * detail).sum((1, 2)) / detail.sum((1, 2)).clamp_min(1e-12)
    # The peak of the plain PSNR, out of what it says of a known error.
    peak = psnr(wanted + 0.5, wanted) if wanted.shape[1] > 3 else None
    base = torch.full((count,), 10 * np.log10(4.0)) if peak is None else peak + 10 * np.log10(0.25)
    return base - 10 * torch.log10(weighted.clamp_min(1e-12))


def look_at(look: Look, i: int, detail: Tensor, sampler: Sampler) -> dict[str, Any]:
    """One case at one step: which tokens were kept, how much of the detail they hold, where the error is.

    `attention_to_detail`: share of the detail in kept tokens over the share of tokens that were kept; 1 is chance, less
    means that detail is starved. `dropped_error`: error of dropped tokens over that of kept ones.
    """
    keep, error = torch.from_numpy(look.keep[i]), look.error[i]
    share = float(keep.float().mean())
    held = float(detail[keep].sum() / detail.sum().clamp_min(1e-12))
    dropped = float(error[~keep].mean() / error[keep].mean().clamp_min(1e-12)) if share < 1 else None
    return {
        "noise_level": look.tau,
        "timestep": round(float(sampler.timesteps[nearest(sampler, look.tau)]), 3),
        "kept_tokens": int(keep.sum()),
        "kept": [int(token) for token in keep.flatten().nonzero()],
        "detail_kept": held,
        "attention_to_detail": held / share,
        "one_step_error": float(error.mean()),
        "dropped_error": dropped,
    }


def summary(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each ratio and kind: means over its cases."""
    rows = []
    for ratio, kind in dict.fromkeys((facts["ratio"], facts["kind"]) for facts in cases):
        some = [facts for facts in cases if (facts["ratio"], facts["kind"]) == (ratio, kind)]
        row: dict[str, Any] = {"ratio": ratio, "kind": kind, "cases": len(some)}
        for name in ("psnr", "detail_psnr", "control_steps", "control_psnr", "control_detail_psnr"):
            row[name] = float(np.mean([facts[name] for facts in some]))
        for number, when in enumerate(("early", "late")):
            for name in ("attention_to_detail", "one_step_error", "dropped_error"):
                values = [facts["looks"][number][name] for facts in some]
                row[f"{name}_{when}"] = None if None in values else float(np.mean(values))
        rows.append(row)
    return rows


def public(facts: dict[str, Any]) -> dict[str, Any]:
    """A case as failures.json lists it."""
    return {name: value for name, value in facts.items() if name != "case"}


def store(
    bundle: Bundle, found: dict[str, Any], worst: list[dict[str, Any]], picture: bytes, limits: Sequence[str]
) -> None:
    """Put the section, the picture and failures.json into the bundle; all or nothing."""
    before = old_report(bundle.folder)
    kept = [text for text in before.get("limits", []) if not text.startswith("Stress at ")]
    report = {**before, "stress": found, "limits": [*kept, *limits]}
    figures = {**old_figures(bundle.folder), "failures": picture}
    with new_folder(bundle.folder, force=True) as work:
        write_rescheduled(bundle, bundle.model, bundle.manifest, report, figures, work)
        (work / FAILURES).write_text(json.dumps(worst, indent=1, allow_nan=False) + "\n")
