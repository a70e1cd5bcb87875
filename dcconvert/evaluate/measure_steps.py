"""Measurements of a converted model against the fixed-token original: compute, latency, memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcconvert.export.buckets import BucketSet
from dcconvert.export.checks.flops import converted_gmacs, original_gmacs, prepare_gmacs
from dcconvert.export.checks.latency import interleaved, peak_memory, spread
from dcconvert.export.checks.parity import as_array
from dcconvert.export.runtimes.ort import pick
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.run import Run
from dcconvert.sampling.steps import OrtPair, silent

Tick = Callable[[str], None]


def compute_section(
    model: DynamicModel, counts: np.ndarray, taus: np.ndarray, original_steps: int | None = None
) -> dict[str, Any]:
    """GMACs a sample: of the original's forward, of every step of a run, and of the whole run.

    `counts`: kept tokens at each step [steps], at noise levels `taus`. `original_steps`: the steps of the original's
    run that this one replaces, if different.
    """
    inputs = model.spec.example(2)
    original = original_gmacs(model, inputs)
    before = original_steps or len(taus)
    per_count = {int(kept): converted_gmacs(model, inputs, int(kept)) for kept in np.unique(counts)}
    steps = [
        {"tau": float(tau), "kept": int(kept), "gmacs": per_count[int(kept)]}
        for tau, kept in zip(taus, counts, strict=True)
    ]
    total = sum(step["gmacs"] for step in steps) + prepare_gmacs(model, inputs)
    return {
        "original_gmacs": original,
        "per_step": steps,
        "run_gmacs": {"original": original * before, "converted": total, "steps": len(taus), "original_steps": before},
        "ratio": original * before / total,
    }


@dataclass(frozen=True)
class Shape:
    """A bucket of a run: its name, kept tokens [rows] that fill it, and the share of the run's steps that use it."""

    name: str
    bucket: Bucket
    counts: np.ndarray
    weight: float


def shapes_of(bucket_set: BucketSet, counts: np.ndarray) -> list[Shape]:
    """The buckets that a run of kept tokens [steps, rows] uses."""
    used: dict[tuple[Bucket, bool], list[np.ndarray]] = {}
    for row in counts:
        skipped = not row.any()
        used.setdefault((bucket_set.choose(len(row), bucket_set.tokens if skipped else row), skipped), []).append(row)
    return [
        Shape(
            "skipped" if skipped else f"{bucket.row_tokens} tokens",
            bucket,
            np.max(rows, axis=0),
            len(rows) / len(counts),
        )
        for (bucket, skipped), rows in used.items()
    ]


@dataclass(frozen=True)
class Timed:
    """What is timed in a runtime: the original's step, and the converted step that keeps so many tokens."""

    name: str
    original: Callable[[], Any]
    converted: Callable[[np.ndarray], Run]


@dataclass(frozen=True)
class RunTimes:
    """Seconds of a step in each turn, as the mean over a run and by shape; and the median ms of each stage."""

    weighted: list[float]
    by_shape: dict[str, list[float]]
    stages_ms: dict[str, float]


def take_turns(
    original: Callable[[], Any],
    converted: Mapping[str, tuple[Callable[[np.ndarray], Run], Sequence[Shape]]],
    runs: int,
    tick: Callable[[], None],
) -> tuple[list[float], dict[str, RunTimes]]:
    """Seconds of the original's step and of those of converted models, by their names, interleaved in one run."""
    stages: dict[str, dict[str, list[float]]] = {}

    def candidate(name: str, step: Callable[[np.ndarray], Run], counts: np.ndarray) -> Callable[[], None]:
        found = stages[name] = {"route": [], "plan": [], "denoise": []}

        def call() -> None:
            times = step(counts).last_times
            for stage, values in found.items():
                values.append(getattr(times, stage) * 1e3)

        return call

    def name_of(model: str, shape: Shape) -> str:
        return ", ".join(filter(None, (model, shape.name)))

    candidates: dict[str, Callable[[], Any]] = {"original": original}
    for model, (step, shapes) in converted.items():
        candidates |= {name_of(model, s): candidate(name_of(model, s), step, s.counts) for s in shapes}
    times = interleaved(candidates, runs, tick=tick)
    result = {}
    for model, (_, shapes) in converted.items():
        names = [(name_of(model, shape), shape) for shape in shapes]
        weighted = np.sum([np.asarray(times[name]) * shape.weight for name, shape in names], axis=0)
        medians = {
            stage: round(sum(float(np.median(stages[name][stage])) * shape.weight for name, shape in names), 3)
            for stage in ("route", "plan", "denoise")
        }
        result[model] = RunTimes(list(weighted), {shape.name: times[name] for name, shape in names}, medians)
    return times["original"], result


def latency_section(
    runtime: OrtPair, compute: dict[str, Any], batch: int, runs: int, *, in_torch: bool = True, tick: Tick = silent
) -> list[dict[str, Any]]:
    """Step latency of original and converted, interleaved, in ONNX Runtime and in torch.

    Every bucket of a run is timed and weighted by the steps that use it: times are means over a run's steps.
    """
    bucket_set = runtime.converted.bucket_set
    if not isinstance(bucket_set, BucketSet):
        raise ValueError("measuring latency needs a bucket set")
    shapes = shapes_of(bucket_set, np.array([[step["kept"]] * batch for step in compute["per_step"]]))
    inputs = timing_inputs(runtime.model, batch)
    feed = {name: as_array(value) for name, value in inputs.items()}
    with torch.inference_mode():
        rows = [timed_row(on_ort(runtime, feed, batch), shapes, compute, batch, runs, tick)]
        if in_torch:
            rows.append(timed_row(on_torch(runtime, inputs, batch), shapes, compute, batch, runs, tick))
    rows[0]["buckets"] = [asdict(shape.bucket) for shape in shapes]
    return rows


def timing_inputs(model: DynamicModel, batch: int) -> dict[str, Any]:
    """Inputs of a step, all at a timestep at which a run may repeat steps; the time does not depend on it."""
    spec = model.spec
    given = spec.example(batch)
    if spec.timestep is None:
        return given
    halfway = torch.full((batch,), 0.5 * spec.timestep_scale)
    return {**given, spec.timestep: halfway.to(given[spec.timestep].dtype)}


def on_ort(runtime: OrtPair, feed: dict[str, np.ndarray], batch: int) -> Timed:
    run = runtime.converted.start(batch)

    def converted(counts: np.ndarray) -> Run:
        run.step(feed, counts)
        return run

    return Timed(runtime.name, lambda: runtime.original.run(None, pick(runtime.original, feed)), converted)


def on_torch(runtime: OrtPair, inputs: dict[str, Any], batch: int) -> Timed:
    run = runtime.model.start(batch)
    flat = tuple(inputs[name] for name in runtime.model.spec.inputs)

    def converted(counts: np.ndarray) -> Run:
        run.step(inputs, counts)
        return run

    return Timed("torch CPU, eager", lambda: runtime.model.original_graph(*flat), converted)


def timed_row(
    timed: Timed, shapes: Sequence[Shape], compute: dict[str, Any], batch: int, runs: int, tick: Tick
) -> dict[str, Any]:
    """One row of the latency table: means over a run, weighted by how many steps use each bucket."""
    tick(timed.name)
    converted = {"": (timed.converted, shapes)}
    original, found = take_turns(timed.original, converted, runs, lambda: tick(timed.name))
    times = found[""]
    run = compute["run_gmacs"]
    speedup = float(np.median(original) * run["original_steps"] / (np.median(times.weighted) * run["steps"]))
    return {
        "runtime": timed.name,
        "batch": batch,
        "original_ms": spread(original),
        "converted_ms": spread(times.weighted),
        "by_bucket_ms": {name: spread(values) for name, values in times.by_shape.items()},
        "stages_ms": times.stages_ms,
        "speedup": speedup,
        "flop_ratio": float(compute["ratio"]),
        "efficiency": float(speedup / compute["ratio"]),
    }


def memory_section(
    runtime: OrtPair, compute: dict[str, Any], onnx: Path, original: Path, batch: int
) -> list[dict[str, Any]]:
    """Peak resident memory of a fresh process that runs, at the full batch, the step that keeps the most tokens."""
    counts = np.full(batch, max(step["kept"] for step in compute["per_step"]))
    name = f"{runtime.name}, batch {batch}"
    return [
        {"runtime": name, "model": "original", "peak_mb": original_memory(runtime, original, batch)},
        {"runtime": name, "model": "converted", "peak_mb": converted_memory(runtime, onnx, counts)},
    ]


def original_memory(runtime: OrtPair, original: Path, batch: int) -> float | None:
    """Peak megabytes of a fresh process that runs the original's step once."""
    given = {name: as_array(value) for name, value in runtime.model.spec.example(batch).items()}
    with tempfile.TemporaryDirectory() as tmp:
        return peak_memory([original], [pick(runtime.original, given)], Path(tmp))


def converted_memory(runtime: OrtPair, onnx: Path, counts: np.ndarray, bucket: Bucket | None = None) -> float | None:
    """Peak megabytes of a fresh process that runs one step of a bundle whose samples keep `counts` [B] tokens."""
    model, batch = runtime.model, len(counts)
    inputs = model.spec.example(batch)
    if model.spec.updates:
        feeds = {"full": model.feed("full", inputs), "skip": model.skip_feed(inputs)}
        return feeds_memory(runtime, onnx, feeds)
    with torch.no_grad():
        scores, live = model.route(inputs)
    planner = runtime.converted.planner
    plan = planner.of_mask(planner.planner.select(scores.numpy(), counts), bucket)
    state = model.empty_state(batch)
    return feeds_memory(runtime, onnx, {g: model.feed(g, inputs, live, plan, state) for g in model.spec.graphs})


def feeds_memory(runtime: OrtPair, onnx: Path, feeds: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Peak megabytes of a fresh process that runs each of a bundle's graphs once on its inputs."""
    arrays = [
        pick(runtime.converted.sessions[graph], {name: as_array(value) for name, value in feed.items()})
        for graph, feed in feeds.items()
    ]
    files = [onnx / f"{graph}.onnx" for graph in feeds]
    with tempfile.TemporaryDirectory() as tmp:
        return peak_memory(files, arrays, Path(tmp))
