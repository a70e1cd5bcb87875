"""Measure a converted model for its report: latency, memory, final images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcconvert.api import convert
from dcconvert.evaluate.comparison import BEST
from dcconvert.evaluate.image_fidelity import Contestant, Fidelity, compare_images, original_contestant
from dcconvert.evaluate.measure_steps import compute_section, latency_section, memory_section
from dcconvert.export.buckets import BucketSet, choose_buckets
from dcconvert.export.onnx.export import export_onnx, export_original
from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.sampling.default_tables import ADAMS, original_run
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Sampler, initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep, OrtPair
from dcconvert.terminal import Stages

LATENCY_RUNS = 9
OTHER_MODE_RUNS = 5
NO_SAMPLER = (
    "Images were not compared: sampling with this model needs its pipeline. Use the converted model there: see "
    "docs/pipelines.md."
)


@dataclass(frozen=True)
class Subject:
    """A converted model on disk, and how it is sampled. `original` is there while a checkpoint is being converted.

    `reference`: the run of the original that this one replaces.
    """

    model: DynamicModel
    planner: StepPlanner
    bucket_set: BucketSet
    onnx: Path
    sampler: Sampler | RunTable
    reference: Sampler
    config: DiTConfig | None
    original: DiT | None = None


@dataclass(frozen=True)
class Effort:
    """How much to measure. `image_budget_s`: images that would take longer are left out, and the report says so."""

    batch: int
    runs: int
    images: int
    reference_steps: int
    threads: int = 0
    seed: int = 0
    image_budget_s: float | None = None


@dataclass(frozen=True)
class Measured:
    """The measurements of a converted model, as sections of report.json; `limits` say what was left out and why."""

    latency: list[dict[str, Any]]
    memory: list[dict[str, Any]]
    limits: list[str]
    fidelity: Fidelity | None = None

    def added_to(self, report: dict[str, Any]) -> dict[str, Any]:
        """A report with these sections in it."""
        found = {**report, "latency": self.latency, "memory": self.memory}
        if self.limits:
            found["limits"] = [*report.get("limits", []), *self.limits]
        return found if self.fidelity is None else {**found, "fidelity": self.fidelity.section()}


def measure(subject: Subject, effort: Effort, scratch: Path, compute: dict[str, Any], stages: Stages) -> Measured:
    """Latency, memory and fidelity; `compute` is that section of the report.

    `scratch` is a folder for the original's ONNX file.
    """
    with stages.stage("export original"):
        export_original(subject.model, scratch / "original.onnx", subject.model.spec.example(3))
    parts = (subject.model, subject.planner, subject.bucket_set, subject.onnx, scratch, effort.threads)
    runtime = OrtPair.open(*parts)
    with stages.stage("measure latency") as tick:
        latency = latency_section(runtime, compute, effort.batch, effort.runs, tick=tick)
    with stages.stage("measure memory"):
        original = scratch / "original.onnx"
        memory = memory_section(runtime, compute, subject.onnx, original, effort.batch)
    if reason := no_images(subject, effort, latency[0]):
        return Measured(latency, memory, [reason])
    others, limits = [], []
    if subject.original is not None and subject.model.method.stateful:
        with stages.stage("convert in mode chunk, to compare") as tick:
            try:
                others.append(chunk_contestant(subject, effort, scratch, tick))
            except (UsageError, UnsupportedModelError) as error:
                limits.append(f"Mode chunk was not compared: {error}")
    with stages.stage("compare images") as tick:
        fidelity = image_fidelity(subject, effort, runtime, compute, latency[0], others, tick)
    return Measured(latency, memory, limits, fidelity)


def no_images(subject: Subject, effort: Effort, latency: dict[str, Any]) -> str:
    """Why images are not compared; empty if they are."""
    if subject.config is None:
        return NO_SAMPLER
    if effort.images < 1:
        return "Fidelity was not measured (--images 0)."
    passes = effort.reference_steps + 4 * subject.reference.steps
    needed = passes * effort.images / latency["batch"] * latency["original_ms"]["median"] / 1e3
    if effort.image_budget_s is None or needed <= effort.image_budget_s:
        return ""
    return (
        f"Fidelity was not measured: {effort.images} images would take about {needed / 60:.0f} minutes on "
        "this machine; run 'dcconvert evaluate' on the bundle with --images to do it."
    )


def image_fidelity(
    subject: Subject,
    effort: Effort,
    runtime: OrtPair,
    compute: dict[str, Any],
    row: dict[str, Any],
    others: list[Contestant],
    tick: Any,
) -> Fidelity:
    """The converted model beside the original with the same steps, and with fewer at equal latency and compute.

    `row`: the first one of the latency section.
    """
    config, sampler, before = subject.config, subject.sampler, subject.reference
    assert config is not None
    per_image = row["original_ms"]["median"] / row["batch"]
    steps = before.steps

    def original(count: int, solver: str = before.solver) -> Contestant:
        made, how = original_run(before.prediction, count, solver), "" if solver == before.solver else solver
        return original_contestant(runtime.original_step, made, compute["original_gmacs"], per_image, how)

    converted = Contestant(
        f"{subject.model.method.mode} {subject.planner.schedule.ratio:g}x, {sampler.steps} steps",
        sampler,
        lambda: ConvertedStep(subject.model, runtime.converted, by_table=isinstance(sampler, RunTable)),
        compute["run_gmacs"]["converted"],
        row["converted_ms"]["median"] / row["batch"] * sampler.steps,
        subject.model.method.mode,
    )
    at_latency = max(1, round(steps / row["speedup"]))
    at_compute = max(1, round(steps / compute["ratio"]))
    fewer = [original(count) for count in sorted({at_latency, at_compute} - {steps}, reverse=True)]
    equal = at_latency if at_latency < steps else at_compute
    if equal < steps:
        others = [*(original(equal, solver) for solver in BEST if solver != before.solver), *others]
    noise = initial_noise(effort.seed, effort.images, config.in_channels, config.image_size)
    labels = labels_for(effort.images, config.num_classes)
    reference = replace(
        original(effort.reference_steps, ADAMS), name=f"original, {effort.reference_steps} steps, reference"
    )
    size = min(max(subject.bucket_set.batches), effort.images)
    return compare_images(
        subject.model,
        runtime.converted,
        reference,
        original(steps),
        converted,
        [*fewer, *others],
        noise,
        labels,
        size,
        tick,
    )


def chunk_contestant(subject: Subject, effort: Effort, scratch: Path, tick: Any) -> Contestant:
    """The same checkpoint at the same ratio in mode chunk, exported and timed for the comparison."""
    assert subject.original is not None
    sampler = subject.reference
    method = method_of("chunk", seed=subject.model.method.seed)
    ratio = subject.planner.schedule.ratio
    model = convert(subject.original, ratio, schedule="constant", options=method)
    planner = StepPlanner(model.spec, method, model.schedule.fitted(sampler.taus))
    bucket_set = choose_buckets((effort.batch,), planner.bucket_counts(sampler.taus), model.spec.tokens)
    export_onnx(model, scratch / "chunk")
    compute = compute_section(model, planner.run_counts(sampler.taus), sampler.taus)
    runtime = OrtPair.open(model, planner, bucket_set, scratch / "chunk", scratch, effort.threads)
    row = latency_section(runtime, compute, effort.batch, OTHER_MODE_RUNS, in_torch=False, tick=tick)[0]
    return Contestant(
        f"chunk {ratio:g}x, {sampler.steps} steps",
        sampler,
        lambda: ConvertedStep(model, runtime.converted),
        compute["run_gmacs"]["converted"],
        row["converted_ms"]["median"] / row["batch"] * sampler.steps,
        "chunk",
    )
