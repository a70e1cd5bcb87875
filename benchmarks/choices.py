"""What training-free choices of mode chunk cost in fidelity: router, chunk, dechunk, schedule, head and tail blocks.

    python -m benchmarks.choices              # the shipped model, a few minutes on two cores

Each row converts the shipped model, samples it, and compares the final images with those of a long run of the original
from the same seeds (PSNR). It also has the error of one step along the original's trajectory and the GMACs of the whole
run. The rows named `original` are the control: fewer steps of the original.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import dcconvert
from benchmarks.common import write_result
from dcconvert.api import Converted
from dcconvert.evaluate.measure_steps import compute_section
from dcconvert.images.pixels import psnr_mean
from dcconvert.models.load import shipped_model
from dcconvert.passes.methods import method_of
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.sampling.samplers import Sampler, Step, initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep

BASE = method_of("chunk", router="predictability")
ONE_AT_A_TIME: tuple[dict[str, Any], ...] = (
    {},
    {"router": "cosine"},
    {"router": "pool"},
    {"router": "random"},
    {"coverage": False},
    {"router": "random", "coverage": False},
    {"members": 1},
    {"neighbours": 1},
    {"members": 1, "neighbours": 1},
    {"schedule": "rising"},
    {"schedule": "falling"},
    {"ratio": 2.0},
    {"ratio": 16.0},
    {"head_blocks": 2, "tail_blocks": 2},
    {"head_blocks": 2, "tail_blocks": 2, "ratio": 2.0},
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fidelity of training-free choices on the shipped model.")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--reference-steps", type=int, default=200)
    parser.add_argument("--ratio", type=float, default=4.0)
    args = parser.parse_args()
    dit = dcconvert.load_checkpoint(shipped_model())
    noise = initial_noise(0, args.images, dit.cfg.in_channels, dit.cfg.image_size)
    labels = labels_for(args.images, dit.cfg.num_classes)
    sampler = Sampler(dit.checkpoint_info.prediction, args.steps)

    def images(step: Step, steps: int) -> Tensor:
        return Sampler(dit.checkpoint_info.prediction, steps).run(step, noise, labels)

    with torch.inference_mode():
        reference = images(dit, args.reference_steps)
        control_steps = [args.steps, args.steps // 2, args.steps // 3, args.steps // 4]
        unchanged = dcconvert.convert(dit, 1, options=BASE)
        gmacs = compute_section(unchanged, planner_of(unchanged, sampler).run_counts(sampler.taus), sampler.taus)
        one_step = gmacs["original_gmacs"]
        rows: list[dict[str, Any]] = [
            {"name": "original", "steps": n, "gmacs": n * one_step, "psnr": psnr_mean(images(dit, n), reference)}
            for n in control_steps
        ]
        for change in ONE_AT_A_TIME:
            row = measure(dit, change, args, sampler, reference, noise, labels)
            rows.append(row)
            print(f"{row['name']:60s} {row['psnr']:6.2f} dB, one step {row['one_step_error']:.3f}", flush=True)
    print(f"Results: {write_result('choices', {'model': shipped_model().name, **vars(args), **BASE.as_dict()}, rows)}")


def planner_of(model: Converted, sampler: Sampler) -> StepPlanner:
    return StepPlanner(model.spec, model.method, model.schedule.fitted(sampler.taus))


def measure(
    dit: dcconvert.DiT,
    change: dict[str, Any],
    args: argparse.Namespace,
    sampler: Sampler,
    reference: Tensor,
    noise: Tensor,
    labels: Tensor,
) -> dict[str, Any]:
    """One row: the defaults with one change."""
    chosen = dict(change)
    ratio, schedule = chosen.pop("ratio", args.ratio), chosen.pop("schedule", "constant")
    model = dcconvert.convert(dit, ratio, schedule=schedule, options=replace(BASE, **chosen))
    planner = planner_of(model, sampler)
    errors: list[float] = []

    scheduled = model.with_schedule(planner.schedule)
    step = ConvertedStep(scheduled, scheduled)

    def probe(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        wanted = dit(x, t, y)
        errors.append(float((step(x, t, y) - wanted).norm() / wanted.norm()))
        return wanted

    sampler.run(probe, noise, labels)
    result = sampler.run(step, noise, labels)
    return {
        "name": ", ".join(f"{key} {value}" for key, value in {"ratio": ratio, **change}.items()),
        "steps": args.steps,
        "gmacs": compute_section(model, planner.run_counts(sampler.taus), sampler.taus)["run_gmacs"]["converted"],
        "psnr": psnr_mean(result, reference),
        "one_step_error": sum(errors) / len(errors),
    }


if __name__ == "__main__":
    main()
