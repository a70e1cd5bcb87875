"""Parts of `benchmarks.gpu`: what the device reaches at best, and steps that compute everything or skip the trunk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from benchmarks.common import SIZES, random_dit
from benchmarks.gpu_backend import Captured, Steps, in_runtime
from benchmarks.gpu_cases import (
    DTYPES,
    MEGABYTE,
    TOLERANCES,
    Case,
    Models,
    named_inputs,
    relative,
    synchronised,
    telling_std,
)
from dcconvert.export.checks.flops import GIGA, count_bytes, count_macs
from dcconvert.export.checks.latency import interleaved, spread
from dcconvert.passes.ir.spec import UPDATES


def ceilings(device: torch.device, runs: int) -> dict[str, Any]:
    """What the device reaches at best: bytes moved by a large copy, and products of large bf16 matrices."""
    large = device.type == "cuda"
    block = torch.empty((1 << 30) if large else (1 << 22), dtype=torch.uint8, device=device)
    other, side = torch.empty_like(block), 8192 if large else 512
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: other.copy_(block), "matmul": lambda: a @ b}
    times = interleaved({name: synchronised(call, device) for name, call in calls.items()}, runs, warm_up=3)
    seconds = {name: float(np.median(found)) for name, found in times.items()}
    return {
        "gb_per_s": round(2 * block.numel() / seconds["copy"] / 1e9, 3),
        "tflops_bf16": round(2 * side**3 / seconds["matmul"] / 1e12, 4),
    }


# Runs whose steps compute everything or skip the trunk


def step_parity(models: Models, size: str, pixels: int, batch: int = 3) -> dict[str, Any]:
    """Errors of full and skip steps on the device in every precision, against the original in the same precision.

    A skip step gets the update of the full step of the same call, so that it has to give the same output.
    """
    dit = random_dit(size, 2, pixels, depth=models.depth, std=telling_std(size)).to(models.made_on)
    inputs = named_inputs(dit, batch, "fp32", models.device)
    precisions = {}
    for name, dtype in DTYPES.items():
        steps = Steps.of(copy.deepcopy(dit)).moved(models.device, dtype)
        with torch.inference_mode():
            given = [inputs["x"].to(dtype), inputs["t"], inputs["y"]]
            [wanted] = steps.graphs["original"](*given)
            full, update = steps.graphs["full"](*given)
            [skip] = steps.graphs["skip"](*given, *skip_inputs(update))
        errors = {"full_error": relative(full, wanted), "skip_error": relative(skip, wanted)}
        within = max(errors.values()) <= TOLERANCES[name]
        precisions[name] = {**errors, "tolerance": TOLERANCES[name], "within": within}
    return {"precisions": precisions}


def skip_inputs(update: Tensor) -> list[Tensor]:
    """Weights that hold the last update, and the updates: this one, and others that must not matter."""
    weights = torch.zeros(UPDATES, len(update), dtype=update.dtype, device=update.device)
    weights[0] = 1
    return [weights, update, *(torch.randn_like(update) for _ in range(UPDATES - 1))]


def step_latency(
    models: Models, case: Case, dtype: str, batch: int, ratios: Sequence[float], runtime: str, runs: int
) -> dict[str, Any]:
    """A full and a skip step in turns with the original, and what runs of such steps gain at `ratios` of operations."""
    dit, steps = models.steps(case, dtype)
    device = models.device
    inputs = list(named_inputs(dit, batch, dtype, device).values())
    tokens, width = (case.pixels // 16) ** 2, SIZES[case.size][1]
    update = torch.randn(batch, tokens, width, device=device, dtype=DTYPES[dtype])
    given: dict[str, list[Tensor]] = {"original": inputs, "full": inputs, "skip": [*inputs, *skip_inputs(update)]}
    calls = {name: called(steps.graphs[name], args, runtime) for name, args in given.items()}
    with torch.inference_mode() if "compiled" not in runtime else torch.no_grad():
        times = interleaved({name: synchronised(call, device) for name, call in calls.items()}, runs, warm_up=3)
    gmacs = {name: count_macs(steps.graphs[name], tuple(args)) / batch / GIGA for name, args in given.items()}
    traffic = {name: count_bytes(steps.graphs[name], tuple(args)) for name, args in given.items()}
    return {
        "tokens": tokens,
        **figures_of_steps(times, gmacs, ratios),
        "bytes": {name: asdict(value) for name, value in traffic.items()},
        "state_mb": round(UPDATES * tokens * width * batch * DTYPES[dtype].itemsize / MEGABYTE, 1),
    }


def figures_of_steps(times: dict[str, list[float]], gmacs: dict[str, float], ratios: Sequence[float]) -> dict[str, Any]:
    """Times and operations of the original, a full and a skip step, and what runs of such steps gain at `ratios`."""
    seconds = {name: float(np.median(found)) for name, found in times.items()}
    return {
        **{f"{name}_ms": spread(found) for name, found in times.items()},
        "gmacs": {name: round(value, 3) for name, value in gmacs.items()},
        "full_speed": round(seconds["original"] / seconds["full"], 3),
        "runs": [run_speed(ratio, seconds, gmacs) for ratio in ratios],
    }


def run_speed(ratio: float, seconds: dict[str, float], gmacs: dict[str, float]) -> dict[str, float]:
    """How much faster steps are on average when just so many are full that operations fall to 1 / `ratio`."""
    full = max(0.0, (gmacs["original"] / ratio - gmacs["skip"]) / (gmacs["full"] - gmacs["skip"]))
    mean = full * seconds["full"] + (1 - full) * seconds["skip"]
    speedup = seconds["original"] / mean
    return {
        "ratio": ratio,
        "full_share": round(full, 4),
        "speedup": round(speedup, 3),
        "efficiency": round(speedup / ratio, 3),
    }


def called(graph: GraphModule, args: Sequence[Tensor], runtime: str) -> Callable[[], Any]:
    """A graph on fixed inputs in one of RUNTIMES."""
    function = in_runtime(graph, runtime)
    if runtime.endswith("CUDA graph"):
        with torch.no_grad():
            return Captured(function, args, [True] * len(args)).graph.replay
    return lambda: function(*args)
