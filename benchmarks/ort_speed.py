"""Step latency of mode chunk on ONNX Runtime, CPU: converted and fixed-token original, interleaved in one run.

    python -m benchmarks.ort_speed                      # DiT-S/2 and DiT-B/2, 256 px, batch 8, 1x 4x 16x
    python -m benchmarks.ort_speed --sizes S --runs 5

A step is route, plan and denoise; weights are random. Besides equal lengths at each ratio, it times a batch whose
samples keep different numbers of tokens with the same mean, which packing should not slow down.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dcconvert
from benchmarks.common import random_dit, write_result
from dcconvert.api import Converted
from dcconvert.export.checks.flops import converted_gmacs, original_gmacs
from dcconvert.export.checks.latency import interleaved, spread
from dcconvert.export.checks.parity import as_array
from dcconvert.export.onnx.export import export_onnx, export_original
from dcconvert.export.runtimes.ort import CPU, OrtModel, make_session, pick
from dcconvert.passes.methods import method_of


def main() -> None:
    parser = argparse.ArgumentParser(description="Step latency of converted models on ONNX Runtime, CPU.")
    parser.add_argument("--sizes", nargs="+", default=["S", "B"], choices=["S", "B", "L", "XL"])
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--ratios", nargs="+", type=float, default=[1, 4, 16])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--head-blocks", type=int, default=1)
    parser.add_argument("--tail-blocks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="ort_speed_cpu", help="result file, without .json")
    args = parser.parse_args()
    rows = [row for size in args.sizes for row in measure_size(size, args)]
    path = write_result(args.name, {"runtime": "onnxruntime CPUExecutionProvider, fp32", **vars(args)}, rows)
    print(f"Results: {path}")


def measure_size(size: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    dit = random_dit(size, args.patch, args.pixels)
    options = method_of("chunk", head_blocks=args.head_blocks, tail_blocks=args.tail_blocks)
    model = dcconvert.convert(dit, 4, options=options)
    tokens, batch = model.spec.tokens, args.batch
    cases = {f"{ratio:g}x": np.full(batch, round(tokens / ratio)) for ratio in args.ratios}
    half = round(tokens / 4 / 2)
    cases["4x, mixed lengths"] = np.where(np.arange(batch) % 2, half, 3 * half)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        export_onnx(model, folder)
        export_original(model, folder / "original.onnx", model.spec.example(3))
        session = OrtModel(folder, model.planner, threads=args.threads)
        original = make_session(folder / "original.onnx", CPU, args.threads)
        return [measure_case(size, name, counts, model, session, original, args) for name, counts in cases.items()]


def measure_case(
    size: str,
    name: str,
    counts: np.ndarray,
    model: Converted,
    session: OrtModel,
    original: Any,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One row: every sample of the batch keeps its count of tokens."""
    feed = {key: as_array(value) for key, value in model.spec.example(args.batch).items()}
    stages: dict[str, list[float]] = {"route": [], "plan": [], "denoise": []}
    run = session.start(args.batch)

    def step() -> None:
        run.step(feed, counts)
        for stage, kept in stages.items():
            kept.append(getattr(run.last_times, stage))

    calls = {"original": lambda: original.run(None, pick(original, feed)), "converted": step}
    times = interleaved(calls, args.runs, warm_up=2)
    inputs = model.spec.example(2)
    gmacs = [converted_gmacs(model, inputs, int(count)) for count in counts[:2]]
    flop_ratio = original_gmacs(model, inputs) / float(np.mean(gmacs))
    speedup = float(np.median(times["original"]) / np.median(times["converted"]))
    row = {
        "model": f"DiT-{size}/{args.patch}",
        "tokens": model.spec.tokens,
        "case": name,
        "kept": [int(count) for count in counts],
        "original_ms": spread(times["original"]),
        "converted_ms": spread(times["converted"]),
        "stages_ms": {stage: round(float(np.median(kept)) * 1e3, 3) for stage, kept in stages.items()},
        "speedup": round(speedup, 3),
        "flop_ratio": round(flop_ratio, 3),
        "efficiency": round(speedup / flop_ratio, 3),
    }
    print(
        f"{row['model']} {name}: {speedup:.2f} times faster, {speedup / flop_ratio:.2f} of the FLOP ratio", flush=True
    )
    return row


if __name__ == "__main__":
    main()
