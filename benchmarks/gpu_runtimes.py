"""Parts of `benchmarks.gpu` that need another runtime: ONNX Runtime and TensorRT, in the variants that they are given.

Matrix products and attention are in fp16, of the original as of the converted model, everything else in fp32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dcconvert
from benchmarks.common import random_dit
from benchmarks.gpu_cases import FORMS, TOLERANCES, kept_tokens, synchronised, telling_std
from benchmarks.gpu_steps import figures_of_steps
from dcconvert.api import Converted
from dcconvert.commands.build import find_device
from dcconvert.export.buckets import choose_buckets
from dcconvert.export.checks.flops import converted_gmacs, original_gmacs
from dcconvert.export.checks.latency import interleaved, spread
from dcconvert.export.checks.parity import as_array
from dcconvert.export.engines.build import (
    MODULES,
    Engine,
    build_engine,
    file_hash,
    full_buckets,
    input_shapes,
    plan_engines,
    profile,
)
from dcconvert.export.engines.index import Index, write_index
from dcconvert.export.onnx.export import export_onnx, export_original
from dcconvert.export.onnx.mixed_precision import in_precision
from dcconvert.export.runtimes.ort import CPU, CUDA, device_of, make_session, on_device
from dcconvert.export.runtimes.ort_static import BoundStep, StaticModel, bound
from dcconvert.export.runtimes.trt import LoadedEngine, TrtModel, backend_module, load_engine
from dcconvert.export.variants import VARIANTS
from dcconvert.passes.ir.spec import UPDATE, WEIGHTS, update_name
from dcconvert.passes.methods import method_of

Array = np.ndarray
CAPTURED = {"enable_cuda_graph": "1"}
STEPS = ("original", "full", "skip")  # graphs of mode steps
Steps = dict[str, BoundStep]


class Exported:
    """A model converted in one of FORMS or mode steps, and its ONNX files in some variants, in a folder of its own."""

    def __init__(self, size: str, pixels: int, form: str, depth: int = 0) -> None:
        dit = random_dit(size, 2, pixels, depth=depth, std=telling_std(size))
        self.model: Converted = dcconvert.convert(dit, 4, options=FORMS.get(form) or method_of(form))
        self._folder = tempfile.TemporaryDirectory()

    def folder(self, variant: str) -> Path:
        """Route, denoise and original in a variant, exported when they are first wanted."""
        folder = Path(self._folder.name) / variant
        if not folder.exists():
            changed, lowerings = in_precision(self.model, VARIANTS[variant].precision), VARIANTS[variant].lowerings
            export_onnx(changed, folder, lowerings)
            export_original(changed, folder / "original.onnx", changed.spec.example(3))
        return folder

    def feed(self, batch: int) -> dict[str, Array]:
        return {name: as_array(value) for name, value in self.model.spec.example(batch).items()}

    def measure(
        self, backend: Any, original: Callable[[dict[str, Array]], Array], batch: int, ratio: float, runs: int
    ) -> dict[str, Any]:
        """Steps of a backend and of the original in turns, and how far they are apart with everything kept."""
        kept, feed, run, noise = kept_tokens(self.model, ratio), self.feed(batch), backend.start(batch), [1.0]

        def step(count: int) -> Array:
            noise[0] -= 1e-3
            return run.step({**feed, "t": np.full_like(feed["t"], 1000 * noise[0])}, np.full(batch, count))[0]

        wanted = original({**feed, "t": np.full_like(feed["t"], 999)})
        error = relative_error(step(self.model.spec.tokens), wanted)
        calls: dict[str, Callable[[], Any]] = {"original": lambda: original(feed), "converted": lambda: step(kept)}
        times = interleaved(calls, runs, warm_up=3)
        inputs = self.model.spec.example(2)
        flop_ratio = original_gmacs(self.model, inputs) / converted_gmacs(self.model, inputs, kept)
        speedup = float(np.median(times["original"]) / np.median(times["converted"]))
        return {
            "kept": kept,
            "original_ms": spread(times["original"]),
            "converted_ms": spread(times["converted"]),
            "speedup": round(speedup, 3),
            "flop_ratio": round(flop_ratio, 3),
            "efficiency": round(speedup / flop_ratio, 3),
            "all_kept_error": error,
            "tolerance": TOLERANCES["fp16"],
        }


def onnx_runtime(exported: Exported, batch: int, ratio: float, on_gpu: bool, runs: int) -> dict[str, Any]:
    """A step on ONNX Runtime, as CUDA graphs where there is CUDA; only images and plans pass the host."""
    model, provider = exported.model, CUDA if on_gpu else CPU
    folder, tokens = exported.folder("ort-cuda"), model.spec.tokens
    session = StaticModel(
        folder, model.planner, choose_buckets((batch,), [kept_tokens(model, ratio)], tokens), provider
    )
    feed = exported.feed(batch)
    settings = CAPTURED if on_gpu else None
    original = bound(make_session(folder / "original.onnx", provider, settings=settings), feed, batch, on_gpu)

    def call(values: dict[str, Array]) -> Array:
        original(values)
        return np.array(original.outputs["output"].numpy())

    return {"provider": provider, **exported.measure(session, call, batch, ratio, runs)}


# Mode steps on ONNX Runtime


def resident_steps(folder: Path, feed: dict[str, Array], model: Converted, provider: str, graphs: bool) -> Steps:
    """Each of STEPS on values that stay on the device; the skip step's last update is the full step's output."""
    sessions = {
        name: make_session(folder / f"{name}.onnx", provider, settings=CAPTURED if graphs else None) for name in STEPS
    }
    batch, random = len(feed[model.spec.image]), np.random.default_rng(0)
    weights = np.zeros((model.spec.updates, batch), np.float32)
    weights[0] = 1  # the other updates must not matter
    arrays = {**feed, WEIGHTS: weights}
    for name, (shape, dtype) in model.spec.state_shapes(batch).items():
        arrays[name] = random.standard_normal(shape).astype(dtype)
    values = {name: on_device(array, device_of(sessions["full"])) for name, array in arrays.items()}
    steps: Steps = {}
    for name, session in sessions.items():
        given = {node.name: values[node.name] for node in session.get_inputs()}
        steps[name] = bound(session, given, batch, graphs)
        values[update_name(0)] = steps[name].outputs.get(UPDATE, values[update_name(0)])
    return steps


def onnx_steps(
    exported: Exported, batch: int, ratios: Sequence[float], device: torch.device, graphs: bool, runs: int
) -> dict[str, Any]:
    """A full and a skip step in turns with the original, as in `gpu_steps.step_latency`; nothing passes the host.

    Errors are those of the original against torch in float32, and of both steps against the original.
    """
    model, feed = exported.model, exported.feed(batch)
    provider = CUDA if device.type == "cuda" else CPU
    steps = resident_steps(exported.folder("ort-cuda"), feed, model, provider, graphs)
    calls = {name: partial(step, step.inputs) for name, step in steps.items()}
    found = {}
    for name, call in calls.items():
        call()
        found[name] = np.array(steps[name].outputs["output"].numpy())
    with torch.inference_mode():
        exact = as_array(model.original_graph(*model.spec.example(batch).values())[0])
    return {
        "provider": provider,
        "original_error": relative_error(found["original"], exact),
        "all_kept_error": relative_error(found["full"], found["original"]),
        "skip_error": relative_error(found["skip"], found["full"]),
        "tolerance": TOLERANCES["fp16"],
        **step_times(model, {name: synchronised(call, device) for name, call in calls.items()}, ratios, runs),
    }


def onnx_runs(exported: Exported, batch: int, ratios: Sequence[float], on_gpu: bool, runs: int) -> dict[str, Any]:
    """The same for steps as users make them, by `StaticModel`: with its plans, and images pass the host."""
    model, feed, noise = exported.model, exported.feed(batch), [1.0]
    provider, folder, tokens = CUDA if on_gpu else CPU, exported.folder("ort-cuda"), model.spec.tokens
    run = StaticModel(folder, model.planner, choose_buckets((batch,), [tokens], tokens), provider).start(batch)
    session = make_session(folder / "original.onnx", provider, settings=CAPTURED if on_gpu else None)
    original = bound(session, feed, batch, on_gpu)

    def at(fall: float) -> dict[str, Array]:
        noise[0] -= fall
        return {**feed, "t": np.full_like(feed["t"], 1000 * noise[0])}

    def whole(fall: float = 1e-3) -> Array:
        original(at(fall))
        return np.array(original.outputs["output"].numpy())

    def step(count: int, fall: float = 1e-3, **weights: Any) -> Array:
        return run.step(at(fall), np.full(batch, count), **weights)[0]

    wanted = whole()
    full, skip = step(tokens, 0), step(0, 0, weights=(1.0,))
    calls: dict[str, Callable[[], Array]] = {
        "original": whole,
        "full": partial(step, tokens),
        "skip": partial(step, 0),
    }
    return {
        "provider": provider,
        "all_kept_error": relative_error(full, wanted),
        "skip_error": relative_error(skip, full),
        "tolerance": TOLERANCES["fp16"],
        **step_times(model, calls, ratios, runs),
    }


def step_times(
    model: Converted, calls: dict[str, Callable[[], Any]], ratios: Sequence[float], runs: int
) -> dict[str, Any]:
    """Times of STEPS in turns, and what runs of such steps gain at `ratios` of operations."""
    inputs, tokens = model.spec.example(2), model.spec.tokens
    gmacs = {"original": original_gmacs(model, inputs)}
    gmacs |= {name: converted_gmacs(model, inputs, kept) for name, kept in (("full", tokens), ("skip", 0))}
    return {"tokens": tokens, **figures_of_steps(interleaved(calls, runs, warm_up=3), gmacs, ratios)}


def relative_error(found: Array, wanted: Array) -> float:
    """Of the whole output in the Euclidean norm."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def tensorrt_module() -> str:
    """The TensorRT that is installed; ImportError if none is."""
    for name in MODULES.values():
        try:
            __import__(name)
        except ImportError:
            continue
        return name
    raise ImportError("neither tensorrt nor tensorrt_rtx can be imported")


def tensorrt(exported: Exported, batch: int, ratio: float, runs: int) -> dict[str, Any]:
    """A step as engines, built as `dcconvert build` does; the state stays on the GPU, images pass the host."""
    model, folder, device = exported.model, exported.folder("trt"), find_device(None)
    buckets = choose_buckets((batch,), [kept_tokens(model, ratio)], model.spec.tokens).buckets
    [full] = full_buckets(buckets)
    path = folder / "original.onnx"
    shapes = profile(input_shapes(path), full, full)
    whole = Engine("original", path, file_hash(path), (full,), (shapes,), "fp16", device)
    with tempfile.TemporaryDirectory() as work:
        engines = Path(work)
        planned = plan_engines(folder, model.spec.graphs, buckets, "fp16", device)
        *built, _ = entries = [build_engine(engine, engines) for engine in (*planned, whole)]
        write_index(engines, Index(device, False, tuple(built)))
        backend = TrtModel(engines, folder.parent, model.planner)
        trt = backend_module(device, engines)
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        original = LoadedEngine(load_engine(runtime, engines / whole.file), trt, "cuda")
    call = partial(first_output, original)
    return {
        "builder": device.folder,
        "build_seconds": sum(entry.seconds for entry in entries),
        **exported.measure(backend, call, batch, ratio, runs),
    }


def first_output(engine: LoadedEngine, feed: dict[str, Array]) -> Array:
    return np.array(engine(0, feed, {})["output"].cpu().numpy())
