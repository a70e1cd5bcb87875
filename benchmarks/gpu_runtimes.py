"""Parts of `benchmarks.gpu` that need another runtime: ONNX Runtime and TensorRT, both from the exported graphs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dcconvert
from benchmarks.common import random_dit
from benchmarks.gpu_cases import FORMS, TOLERANCES, kept_tokens, telling_std
from dcconvert.api import Converted
from dcconvert.export.compute import converted_gmacs, original_gmacs
from dcconvert.export.latency import interleaved, spread
from dcconvert.export.onnx_export import export_onnx, export_original
from dcconvert.export.parity import as_array
from dcconvert.export.session import CPU, CUDA, OrtModel, make_session, pick

Array = np.ndarray


class Exported:
    """A converted model in float32 and its ONNX files, in a folder that goes with it."""

    def __init__(self, size: str, pixels: int, form: str, depth: int = 0) -> None:
        dit = random_dit(size, 2, pixels, depth=depth, std=telling_std(size))
        self.model: Converted = dcconvert.convert(dit, 4, options=FORMS[form])
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        export_onnx(self.model, self.folder)
        export_original(self.model, self.folder / "original.onnx", self.model.spec.example(3))

    def feed(self, batch: int) -> dict[str, Array]:
        return {name: as_array(value) for name, value in self.model.spec.example(batch).items()}

    def row(self, times: dict[str, list[float]], kept: int) -> dict[str, Any]:
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
        }


def onnx_runtime(exported: Exported, batch: int, ratio: float, on_gpu: bool, runs: int) -> dict[str, Any]:
    """A step on ONNX Runtime in float32, state and hidden values on the device; images come from and go to the host."""
    model, provider = exported.model, CUDA if on_gpu else CPU
    session = OrtModel(exported.folder, model.step_planner, provider=provider)
    original = make_session(exported.folder / "original.onnx", provider)
    feed, kept = exported.feed(batch), kept_tokens(model, ratio)
    run, noise = session.start(batch), [1.0]

    def step(count: int) -> Array:
        noise[0] -= 1e-3
        return run.step({**feed, "t": np.full_like(feed["t"], 1000 * noise[0])}, np.full(batch, count))[0]

    (wanted,) = original.run(None, pick(original, {**feed, "t": np.full_like(feed["t"], 999)}))
    error = float(np.linalg.norm(step(model.spec.tokens) - wanted) / np.linalg.norm(wanted))
    calls: dict[str, Callable[[], Any]] = {
        "original": lambda: original.run(None, pick(original, feed)),
        "converted": lambda: step(kept),
    }
    row = exported.row(interleaved(calls, runs, warm_up=3), kept)
    return {"provider": provider, **row, "all_kept_error": error, "tolerance": TOLERANCES["fp32"]}


def tensorrt_module() -> str:
    """The TensorRT that is installed; ImportError if none is."""
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            __import__(name)
        except ImportError:
            continue
        return name
    raise ImportError("neither tensorrt nor tensorrt_rtx can be imported")


def tensorrt(exported: Exported, batch: int, ratio: float, runs: int) -> dict[str, Any]:
    """A step as engines for one bucket, built and run through polygraphy; all inputs and outputs pass the host.

    The state of mode carry would pass it too, so that only mode chunk is of interest.
    """
    import os

    name = tensorrt_module()
    if name == "tensorrt_rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when polygraphy is imported
    from polygraphy.backend.trt import CreateConfig, EngineFromNetwork, NetworkFromOnnxPath, Profile, TrtRunner

    model, feed, kept = exported.model, exported.feed(batch), kept_tokens(exported.model, ratio)
    with torch.no_grad():
        scores, live = model.route({n: torch.from_numpy(v) for n, v in feed.items()})
    plan = model.step_planner.plan(scores.numpy(), np.full(batch, kept))
    given = {**feed, **{n: as_array(v) for n, v in live.items()}, **plan.arrays()}
    started = time.perf_counter()
    runners = {}
    for part in ("original", "route", "denoise"):
        path = exported.folder / f"{part}.onnx"
        profile, names = Profile(), [node.name for node in make_session(path, CPU).get_inputs()]
        for name_ in names:
            profile.add(name_, given[name_].shape, given[name_].shape, given[name_].shape)
        config = CreateConfig(profiles=[profile])
        runners[part] = (TrtRunner(EngineFromNetwork(NetworkFromOnnxPath(str(path)), config=config)), names)
    for runner, _ in runners.values():
        runner.activate()
    built = time.perf_counter() - started

    def infer(part: str, values: dict[str, Array]) -> dict[str, Array]:
        runner, names = runners[part]
        return dict(runner.infer({n: values[n] for n in names}, copy_outputs_to_host=True))

    def step() -> dict[str, Array]:
        made = infer("route", feed)
        found = model.step_planner.plan(made["scores"], np.full(batch, kept))
        return infer("denoise", {**feed, **made, **found.arrays()})

    try:
        (wanted,) = make_session(exported.folder / "denoise.onnx", CPU).run(
            None, pick_names(given, runners["denoise"][1])
        )
        found = infer("denoise", given)["output"]
        times = interleaved({"original": lambda: infer("original", feed), "converted": step}, runs, warm_up=3)
    finally:
        for runner, _ in runners.values():
            runner.deactivate()
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    return {
        "builder": name,
        "build_seconds": round(built, 1),
        **exported.row(times, kept),
        "onnxruntime_error": error,
        "tolerance": TOLERANCES["fp32"],
    }


def pick_names(given: dict[str, Array], names: list[str]) -> dict[str, Array]:
    return {name: given[name] for name in names}
