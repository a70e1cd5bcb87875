"""Measurements of a converted model against the fixed-token original: compute, latency, memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.export.buckets import Ladder
from dcconvert.export.compute import converted_gmacs, original_gmacs, prepare_gmacs
from dcconvert.export.latency import interleaved, peak_memory, spread
from dcconvert.export.onnx_export import export_original
from dcconvert.export.parity import as_array
from dcconvert.export.session import CPU, OrtModel, make_session, pick
from dcconvert.passes.layout import Bucket
from dcconvert.passes.model import DynamicModel
from dcconvert.passes.run import Backend, Run
from dcconvert.passes.step_planner import StepPlanner

Tick = Callable[[str], None]


def silent(_: str) -> None:
    """Report progress to nobody."""


@dataclass
class Runtime:
    """Original and converted model on ONNX Runtime, with a step function each for the samplers."""

    model: DynamicModel
    converted: OrtModel
    original: Any  # an InferenceSession

    @classmethod
    def open(
        cls, model: DynamicModel, planner: StepPlanner, ladder: Ladder | None, onnx: Path, work: Path, threads: int = 0
    ) -> Runtime:
        """Sessions over a bundle's files; the original is exported to `work` if it is not there.

        Without a ladder every step has its own shape.
        """
        original = work / "original.onnx"
        if not original.exists():
            export_original(model, original, model.spec.example(3))
        return cls(model, OrtModel(onnx, planner, ladder, CPU, threads), make_session(original, CPU, threads))

    @property
    def name(self) -> str:
        return f"ONNX Runtime {self.converted.provider.removesuffix('ExecutionProvider')}"

    def original_step(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        feed = arrays_of(self.model, x, t, y)
        return torch.from_numpy(self.original.run(None, pick(self.original, feed))[0])


class ConvertedStep:
    """The step function of one sampling run of a converted model, on any runtime; made new for every run."""

    def __init__(self, model: DynamicModel, backend: Backend, groups: int = 1) -> None:
        self.model = model
        self.groups = groups
        self.backend = backend
        self.run: Run | None = None

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.run is None:
            self.run = Run(self.backend, len(x), self.groups)
        in_torch = isinstance(self.backend, DynamicModel)
        values = dict(zip(self.model.spec.inputs, (x, t, y), strict=True))
        output = self.run.step(values if in_torch else arrays_of(self.model, x, t, y))[0]
        return output if in_torch else torch.from_numpy(output)


def arrays_of(model: DynamicModel, *values: Tensor) -> dict[str, np.ndarray]:
    return {name: as_array(value) for name, value in zip(model.spec.inputs, values, strict=True)}


def compute_section(model: DynamicModel, planner: StepPlanner, taus: np.ndarray) -> dict[str, Any]:
    """GMACs a sample: of the original's forward, of every step of a run, and of the whole run."""
    inputs = model.spec.example(2)
    original = original_gmacs(model, inputs)
    counts = planner.run_counts(taus)
    per_count = {int(kept): converted_gmacs(model, inputs, int(kept)) for kept in np.unique(counts)}
    steps = [
        {"tau": float(tau), "kept": int(kept), "gmacs": per_count[int(kept)]}
        for tau, kept in zip(taus, counts, strict=True)
    ]
    total = sum(step["gmacs"] for step in steps) + prepare_gmacs(model, inputs)
    return {
        "original_gmacs": original,
        "per_step": steps,
        "run_gmacs": {"original": original * len(taus), "converted": total, "steps": len(taus)},
        "ratio": original * len(taus) / total,
    }


@dataclass(frozen=True)
class Timed:
    """What is timed in a runtime: its step with every token, and the converted step with so many kept."""

    name: str
    original: Callable[[], Any]
    converted: Callable[[np.ndarray], Run]


def latency_section(
    runtime: Runtime, compute: dict[str, Any], batch: int, runs: int, *, in_torch: bool = True, tick: Tick = silent
) -> list[dict[str, Any]]:
    """Step latency of original and converted, interleaved, in ONNX Runtime and in torch.

    Every bucket of a run is timed and weighted by the steps that use it: times are means over a run's steps.
    """
    spec, ladder = runtime.model.spec, runtime.converted.ladder
    if ladder is None:
        raise ValueError("latency is measured on a ladder of buckets")
    groups: dict[Bucket, list[dict[str, Any]]] = {}
    for step in compute["per_step"]:
        groups.setdefault(ladder.choose(batch, step["kept"]), []).append(step)
    # All at one timestep, where a run may be for as many steps as we like: the time does not depend on it.
    inputs = {**spec.example(batch), str(spec.timestep): torch.full((batch,), 0.5 * spec.timestep_scale)}
    feed = {name: as_array(value) for name, value in inputs.items()}
    with torch.inference_mode():
        rows = [timed_row(runtime, on_ort(runtime, feed, batch), groups, compute, batch, runs, tick)]
        if in_torch:
            rows.append(timed_row(runtime, on_torch(runtime, inputs, batch), groups, compute, batch, runs, tick))
    rows[0]["buckets"] = [asdict(bucket) for bucket in groups]
    return rows


def on_ort(runtime: Runtime, feed: dict[str, np.ndarray], batch: int) -> Timed:
    run = runtime.converted.start(batch)

    def converted(counts: np.ndarray) -> Run:
        run.step(feed, counts)
        return run

    return Timed(runtime.name, lambda: runtime.original.run(None, pick(runtime.original, feed)), converted)


def on_torch(runtime: Runtime, inputs: dict[str, Any], batch: int) -> Timed:
    run = Run(runtime.model, batch)
    flat = tuple(inputs[name] for name in runtime.model.spec.inputs)

    def converted(counts: np.ndarray) -> Run:
        run.step(inputs, counts)
        return run

    return Timed("torch CPU, eager", lambda: runtime.model.original_graph(*flat), converted)


def timed_row(
    runtime: Runtime,
    timed: Timed,
    groups: dict[Bucket, list[dict[str, Any]]],
    compute: dict[str, Any],
    batch: int,
    runs: int,
    tick: Tick,
) -> dict[str, Any]:
    """One row of the latency table: means over a run, weighted by how many steps use each bucket."""
    total = len(compute["per_step"])
    weights = {f"{bucket.row_tokens} tokens": len(steps) / total for bucket, steps in groups.items()}
    stages: dict[str, dict[str, list[float]]] = {n: {"route": [], "plan": [], "denoise": []} for n in weights}

    def candidate(name: str, kept: int) -> Callable[[], None]:
        def call() -> None:
            times = timed.converted(np.full(batch, kept)).last_times
            for stage, found in stages[name].items():
                found.append(getattr(times, stage) * 1e3)

        return call

    tick(timed.name)
    candidates: dict[str, Callable[[], Any]] = {"original": timed.original}
    candidates |= {n: candidate(n, b.row_tokens) for n, b in zip(weights, groups, strict=True)}
    times = interleaved(candidates, runs, tick=lambda: tick(timed.name))
    weighted = np.sum([np.asarray(times[name]) * weight for name, weight in weights.items()], axis=0)
    speedup = float(np.median(times["original"]) / np.median(weighted))
    return {
        "runtime": timed.name,
        "batch": batch,
        "original_ms": spread(times["original"]),
        "converted_ms": spread(list(weighted)),
        "by_bucket_ms": {name: spread(times[name]) for name in weights},
        "stages_ms": {
            stage: round(sum(float(np.median(stages[n][stage])) * w for n, w in weights.items()), 3)
            for stage in ("route", "plan", "denoise")
        },
        "speedup": speedup,
        "flop_ratio": float(compute["ratio"]),
        "efficiency": float(speedup / compute["ratio"]),
    }


def memory_section(
    runtime: Runtime, compute: dict[str, Any], onnx: Path, original: Path, batch: int
) -> list[dict[str, Any]]:
    """Peak resident memory of a fresh process that runs the step of a run that keeps most tokens, at the full batch."""
    model = runtime.model
    inputs = model.spec.example(batch)
    with torch.no_grad():
        scores, live = model.route(inputs)
    planner = runtime.converted.planner
    counts = np.full(batch, max(step["kept"] for step in compute["per_step"]))
    plan = planner.of_mask(planner.planner.select(scores.numpy(), counts))
    state = model.new_state(batch).tensors
    inputs = {**inputs, **model.prepare(inputs)}
    given = {name: as_array(value) for name, value in {**inputs, **live, **plan.arrays(), **state}.items()}
    sessions = (runtime.converted.route_session, runtime.converted.denoise_session)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        before = peak_memory([original], [pick(runtime.original, given)], folder)
        files = [onnx / "route.onnx", onnx / "denoise.onnx"]
        feeds = [pick(session, given) for session in sessions]
        if model.spec.constants:
            files.insert(0, onnx / "prepare.onnx")
            feeds.insert(0, {name: given[name] for name in model.spec.prepare_inputs})
        after = peak_memory(files, feeds, folder)
    name = f"{runtime.name}, batch {batch}"
    return [
        {"runtime": name, "model": "original", "peak_mb": before},
        {"runtime": name, "model": "converted", "peak_mb": after},
    ]
