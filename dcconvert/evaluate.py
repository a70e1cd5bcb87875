"""Measurements of a converted model against the fixed-token original: compute, latency, memory, fidelity."""

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
from dcconvert.export.compute import converted_gmacs, original_gmacs
from dcconvert.export.latency import interleaved, peak_memory, spread
from dcconvert.export.onnx_export import export_original
from dcconvert.export.parity import as_array
from dcconvert.export.session import CPU, OrtModel, make_session, pick
from dcconvert.images import is_latent, psnr_mean
from dcconvert.passes.model import ChunkedModel, StepPlanner
from dcconvert.sampling import Sampler, Step

Tick = Callable[[str], None]


def silent(_: str) -> None:
    """Report progress to nobody."""


@dataclass
class Runtime:
    """Original and converted model on ONNX Runtime, with a step function each for the samplers."""

    model: ChunkedModel
    converted: OrtModel
    original: Any  # an InferenceSession

    @classmethod
    def open(
        cls, model: ChunkedModel, planner: StepPlanner, ladder: Ladder, onnx: Path, work: Path, threads: int
    ) -> Runtime:
        """Sessions over a bundle's files; the original is exported to `work` if it is not there."""
        original = work / "original.onnx"
        if not original.exists():
            export_original(model, original, model.spec.example(3))
        return cls(model, OrtModel(onnx, planner, ladder, CPU, threads), make_session(original, CPU, threads))

    @property
    def name(self) -> str:
        return f"ONNX Runtime {self.converted.provider.removesuffix('ExecutionProvider')}"

    def original_step(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.from_numpy(self.original.run(None, pick(self.original, self.feed(x, t, y)))[0])

    def converted_step(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.from_numpy(self.converted(self.feed(x, t, y))[0])

    def feed(self, *values: Tensor) -> dict[str, np.ndarray]:
        return {name: as_array(value) for name, value in zip(self.model.spec.inputs, values, strict=True)}


def compute_section(model: ChunkedModel, planner: StepPlanner, taus: np.ndarray) -> dict[str, Any]:
    """GMACs a sample: of the original's forward, of every step of a run, and of the whole run."""
    inputs = model.spec.example(2)
    original = original_gmacs(model, inputs)
    counts = planner.schedule.counts(taus, model.spec.tokens)
    per_count = {int(kept): converted_gmacs(model, inputs, int(kept)) for kept in np.unique(counts)}
    steps = [
        {"tau": float(tau), "kept": int(kept), "gmacs": per_count[int(kept)]}
        for tau, kept in zip(taus, counts, strict=True)
    ]
    total = sum(step["gmacs"] for step in steps)
    return {
        "original_gmacs": original,
        "per_step": steps,
        "run_gmacs": {"original": original * len(taus), "converted": total, "steps": len(taus)},
        "ratio": original * len(taus) / total,
    }


def latency_section(
    runtime: Runtime, compute: dict[str, Any], batch: int, runs: int, *, in_torch: bool = True, tick: Tick = silent
) -> list[dict[str, Any]]:
    """Step latency of original and converted, interleaved, in ONNX Runtime and in torch.

    With a schedule that varies, every bucket of the run is timed and weighted by the steps that use it.
    """
    spec, ladder = runtime.model.spec, runtime.converted.ladder
    if ladder is None:
        raise ValueError("latency is measured on a ladder of buckets")
    inputs = spec.example(batch)
    groups: dict[Any, list[dict[str, Any]]] = {}
    for step in compute["per_step"]:
        groups.setdefault(ladder.choose(batch, step["kept"]), []).append(step)
    feed = {name: as_array(value) for name, value in inputs.items()}
    feeds, weights, gmacs = {}, {}, {}
    for bucket, steps in groups.items():
        middle = steps[len(steps) // 2]
        name = f"{bucket.row_tokens} tokens"
        feeds[name] = {**inputs, str(spec.timestep): torch.full((batch,), middle["tau"] * spec.timestep_scale)}
        weights[name] = len(steps) / len(compute["per_step"])
        gmacs[name] = float(np.mean([step["gmacs"] for step in steps]))
    stages: dict[str, list[float]] = {"route": [], "plan": [], "denoise": []}

    def converted(arrays: dict[str, np.ndarray]) -> None:
        runtime.converted(arrays)
        times = runtime.converted.last_times
        for stage, kept in stages.items():
            kept.append(getattr(times, stage) * 1e3)

    def on_ort(values: dict[str, Any]) -> Callable[[], Any]:
        arrays = {name: as_array(value) for name, value in values.items()}
        return lambda: converted(arrays)

    sections = []
    candidates: dict[str, Callable[[], Any]] = {
        "original": lambda: runtime.original.run(None, pick(runtime.original, feed))
    }
    candidates |= {name: on_ort(values) for name, values in feeds.items()}
    tick("ONNX Runtime")
    times = interleaved(candidates, runs, tick=lambda: tick("ONNX Runtime"))
    row = latency_row(runtime.name, batch, times, weights, gmacs, compute)
    row["stages_ms"] = {stage: round(float(np.median(kept)), 3) for stage, kept in stages.items()}
    row["buckets"] = [asdict(bucket) for bucket in groups]
    sections.append(row)
    if in_torch:
        flat = tuple(inputs[name] for name in spec.inputs)

        def on_torch(values: dict[str, Any]) -> Callable[[], Any]:
            return lambda: torch_step(runtime.model, runtime.converted.planner, values)

        with torch.inference_mode():
            candidates = {"original": lambda: runtime.model.original_graph(*flat)}
            candidates |= {name: on_torch(values) for name, values in feeds.items()}
            times = interleaved(candidates, runs, tick=lambda: tick("torch"))
        sections.append(latency_row("torch CPU, eager", batch, times, weights, gmacs, compute))
    return sections


def torch_step(model: ChunkedModel, planner: StepPlanner, inputs: dict[str, Any]) -> Any:
    """One eager step under a planner's schedule."""
    scores, live = model.route(inputs)
    counts = planner.counts(model.timesteps(inputs), len(scores))
    return model.denoise(inputs, live, planner.plan(scores.numpy(), counts))


def latency_row(
    runtime: str,
    batch: int,
    times: dict[str, list[float]],
    weights: dict[str, float],
    gmacs: dict[str, float],
    compute: dict[str, Any],
) -> dict[str, Any]:
    """One row of the latency table: run averages, weighted by how many steps use each bucket."""
    weighted = np.sum([np.asarray(times[name]) * weight for name, weight in weights.items()], axis=0)
    speedup = float(np.median(times["original"]) / np.median(weighted))
    flop_ratio = compute["original_gmacs"] / sum(gmacs[name] * weight for name, weight in weights.items())
    return {
        "runtime": runtime,
        "batch": batch,
        "original_ms": spread(times["original"]),
        "converted_ms": spread(list(weighted)),
        "by_bucket_ms": {name: spread(times[name]) for name in weights},
        "speedup": speedup,
        "flop_ratio": float(flop_ratio),
        "efficiency": float(speedup / flop_ratio),
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
    plan = planner.plan(scores.numpy(), np.full(batch, max(step["kept"] for step in compute["per_step"])))
    given = {name: as_array(value) for name, value in {**inputs, **live, **plan.arrays()}.items()}
    sessions = (runtime.converted.route_session, runtime.converted.denoise_session)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        before = peak_memory([original], [pick(runtime.original, given)], folder)
        files = [onnx / "route.onnx", onnx / "denoise.onnx"]
        after = peak_memory(files, [pick(session, given) for session in sessions], folder)
    name = f"{runtime.name}, batch {batch}"
    return [
        {"runtime": name, "model": "original", "peak_mb": before},
        {"runtime": name, "model": "converted", "peak_mb": after},
    ]


@dataclass
class Fidelity:
    """Images and figures of the fidelity runs; `images` maps a row's name to samples [B, C, H, W]."""

    velocity_error: list[dict[str, float]]
    rows: list[dict[str, Any]]
    images: dict[str, Tensor]
    reference: str  # names of rows: the reference, and original and converted at the run's own steps
    original: str
    converted: str
    keep: list[np.ndarray]  # keep mask [B, H, W] of every step of the converted run
    mid: list[Tensor]  # what the model saw at those steps

    def section(self) -> dict[str, Any]:
        """The part of a report."""
        final = self.images[self.original]
        facts = {"reference": self.reference, "count": len(final), "latents": is_latent(final), "rows": self.rows}
        return {"velocity_error": self.velocity_error, "images": facts}


def fidelity(
    runtime: Runtime,
    prediction: str,
    noise: Tensor,
    labels: Tensor,
    compute: dict[str, Any],
    reference_steps: int,
    tick: Tick = silent,
) -> Fidelity:
    """Final images against a long run of the original, beside the original with fewer steps at equal compute.

    The error of one step is measured along the original's own trajectory: same input, relative L2.
    """
    steps = len(compute["per_step"])
    equal = max(1, round(steps / compute["ratio"]))
    errors: dict[float, list[float]] = {}
    grid, ladder = runtime.model.spec.grid, runtime.converted.ladder
    size = max(ladder.batches) if ladder else len(noise)
    keep: list[np.ndarray] = []
    mid: list[Tensor] = []

    def probing(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        wanted = runtime.original_step(x, t, y)
        found = runtime.converted_step(x, t, y)
        tau = float(t[0]) / runtime.model.spec.timestep_scale
        channels = x.shape[1]  # learned variances, which samplers ignore, come after the prediction
        error = (found - wanted)[:, :channels].norm() / wanted[:, :channels].norm()
        errors.setdefault(tau, []).append(float(error))
        return wanted

    def recording(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = runtime.converted_step(x, t, y)
        plan = runtime.converted.last_plan
        if plan is not None and len(keep) < steps:  # the first part of the images is enough to show
            keep.append(plan.keep[: len(x)].reshape(len(x), *grid))
            mid.append(x)
        return out

    def run(step: Step, count: int, label: str) -> Tensor:
        parts = zip(noise.split(size), labels.split(size), strict=True)
        done = [Sampler(prediction, count).run(step, x, y, on_step=lambda _: tick(label)) for x, y in parts]
        return torch.cat(done)

    reference = f"original, {reference_steps} steps"
    images = {reference: run(runtime.original_step, reference_steps, reference)}
    same = f"original, {steps} steps"
    images[same] = run(probing, steps, same)
    few = f"original, {equal} steps"
    if equal != steps:
        images[few] = run(runtime.original_step, equal, few)
    name = f"converted, {steps} steps"
    images[name] = run(recording, steps, name)
    totals = {
        reference: compute["original_gmacs"] * reference_steps,
        same: compute["run_gmacs"]["original"],
        few: compute["original_gmacs"] * equal,
        name: compute["run_gmacs"]["converted"],
    }
    counts = {reference: reference_steps, same: steps, few: equal, name: steps}
    rows = [
        {
            "name": key,
            "steps": counts[key],
            "gmacs": totals[key],
            "psnr": None if key == reference else psnr_mean(image, images[reference]),
        }
        for key, image in images.items()
    ]
    curve = [{"tau": tau, "error": float(np.mean(parts))} for tau, parts in errors.items()]
    return Fidelity(curve, rows, images, reference, same, name, keep, mid)
