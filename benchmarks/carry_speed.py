"""Whole-run speed of mode carry on ONNX Runtime, CPU, against the fixed-token original, interleaved in one run.

    python -m benchmarks.carry_speed                  # DiT-S/2 and DiT-B/2, 256 px, batch 8, 2x 4x 8x

Weights are random. The steps of a run keep everything during warm-up and a constant number of tokens afterwards. Each
kind of step is timed in turn with the original and counted as often as it occurs in the run. The cost of handling the
state is the difference between a step that keeps everything and a step of the original. The memory table is computed
without a run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import dcconvert
from benchmarks.common import SIZES, random_dit, write_result
from dcconvert.evaluate.measure_steps import compute_section, latency_section
from dcconvert.export.buckets import choose_buckets
from dcconvert.export.onnx.export import export_onnx
from dcconvert.passes.ir.spec import SLOTS
from dcconvert.passes.methods import method_of
from dcconvert.passes.planning.schedule import AUTO, Policy, noise_levels
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.sampling.steps import OrtPair


def main() -> None:
    parser = argparse.ArgumentParser(description="Whole-run speed of mode carry on ONNX Runtime, CPU.")
    parser.add_argument("--sizes", nargs="+", default=["S", "B"], choices=list(SIZES))
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--ratios", nargs="+", type=float, default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="carry_speed_cpu", help="result file, without .json")
    args = parser.parse_args()
    rows = [row for size in args.sizes for row in measure_size(size, args)]
    memory = [state_memory("XL", pixels, batch) for pixels in (256, 512) for batch in (1, 8)]
    settings = {"runtime": "onnxruntime CPUExecutionProvider, fp32", **vars(args), "state_memory": memory}
    print(f"Results: {write_result(args.name, settings, rows)}")


def measure_size(size: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    model = dcconvert.convert(random_dit(size, 2, args.pixels), 4, options=method_of("carry"))
    taus = noise_levels(args.steps)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        export_onnx(model, folder)
        rows = []
        for ratio in args.ratios:
            schedule = Policy("falling", ratio, warm_up=AUTO).timetable(taus)
            planner = StepPlanner(model.spec, model.method, schedule)
            compute = compute_section(model, planner.run_counts(taus), taus)
            bucket_set = choose_buckets((args.batch,), planner.run_counts(taus), model.spec.tokens)
            runtime = OrtPair.open(model, planner, bucket_set, folder, folder, args.threads)
            row = latency_section(runtime, compute, args.batch, args.runs, in_torch=False)[0]
            dense = row["by_bucket_ms"][f"{model.spec.tokens} tokens"]["median"]
            state = dense - row["original_ms"]["median"]
            del row["buckets"]
            rows.append(
                {
                    "model": f"DiT-{size}/2",
                    "tokens": model.spec.tokens,
                    "ratio": ratio,
                    "steps": args.steps,
                    "warm_up": schedule.dense_first,
                    "kept": int(planner.run_counts(taus)[-1]),
                    **row,
                    "state_ms": round(state, 3),
                    "state_share": round(state / row["converted_ms"]["median"], 4),
                    "state_mb_a_sample": round(model.spec.state_bytes / 1e6, 2),
                }
            )
            print(
                f"DiT-{size}/2 {ratio:g}x: {row['speedup']:.2f} times faster, {row['efficiency']:.2f} of the FLOP "
                f"ratio; the state takes {rows[-1]['state_share']:.0%} of a step",
                flush=True,
            )
        return rows


def state_memory(size: str, pixels: int, batch: int) -> dict[str, Any]:
    """The state of mode carry for a DiT with patch 2 and no head or tail blocks, in MB."""
    depth, width, _ = SIZES[size]
    tokens = (pixels // 16) ** 2
    values = SLOTS * (2 * depth + 1) * tokens * width * batch
    return {
        "model": f"DiT-{size}/2",
        "pixels": pixels,
        "batch": batch,
        "fp16_mb": values * 2 / 1e6,
        "fp32_mb": values * 4 / 1e6,
    }


if __name__ == "__main__":
    main()
