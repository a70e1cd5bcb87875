"""Classifier-free guidance in mode carry: the two halves of a batch choose their tokens together, or separately.

    python -m benchmarks.guidance                    # 32 images, minutes

Errors of the two halves are multiplied by guidance and guidance - 1 and subtracted. If both halves compute the same
tokens, the errors of the other tokens are similar in both and partly cancel. PSNR is relative to 200 Euler steps of the
original from the same seeds; the control is the original with fewer steps.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

import dcconvert
from benchmarks.common import write_result
from dcconvert.evaluate.measure_steps import compute_section
from dcconvert.export.onnx.export import export_onnx
from dcconvert.images.pixels import psnr_mean
from dcconvert.models.load import shipped_model
from dcconvert.passes.methods import method_of
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.sampling.samplers import Sampler, Step, initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep, OrtPair

ORIGINAL_STEPS = (6, 9, 13, 25)
RUNS = ((50, 4.0, 5), (25, 3.0, 3))  # steps, ratio, warm-up steps


def score(images: Tensor, reference: Tensor) -> float:
    return round(psnr_mean(images, reference), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare shared and separate choice of tokens under guidance.")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.5, 2.5, 4.0])
    parser.add_argument("--reference-steps", type=int, default=200)
    args = parser.parse_args()
    dit = dcconvert.load_checkpoint(shipped_model())
    prediction, null_class = dit.checkpoint_info.prediction, dit.cfg.num_classes
    model = dcconvert.convert(dit, 4, options=method_of("carry"))
    noise = initial_noise(0, args.images, dit.cfg.in_channels, dit.cfg.image_size)
    labels = labels_for(args.images, dit.cfg.num_classes)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as tmp:
        export_onnx(model, Path(tmp))
        runtime = OrtPair.open(model, model.planner, None, Path(tmp), Path(tmp))
        for guidance in args.guidance:

            def draw(sampler: Sampler, step: Step, guidance: float = guidance) -> Any:
                return sampler.run(step, noise, labels, guidance=guidance, null_class=null_class)

            reference = draw(Sampler(prediction, args.reference_steps), runtime.original_step)
            for steps in ORIGINAL_STEPS:
                images = draw(Sampler(prediction, steps), runtime.original_step)
                row = {"name": f"original, {steps} steps", "full_steps": steps, "psnr": score(images, reference)}
                rows.append({"guidance": guidance, **row})
                print(rows[-1], flush=True)
            for steps, ratio, warm_up in RUNS:
                sampler = Sampler(prediction, steps)
                schedule = Policy("constant", ratio, warm_up=warm_up).timetable(sampler.taus)
                planner = runtime.converted.planner = StepPlanner(model.spec, model.method, schedule)
                full_steps = round(
                    steps / compute_section(model, planner.run_counts(sampler.taus), sampler.taus)["ratio"], 2
                )
                for groups, choice in ((1, "separate"), (2, "shared")):
                    images = draw(sampler, ConvertedStep(model, runtime.converted, groups))
                    name = f"carry {ratio:g}x, {steps} steps, {choice}"
                    row = {"name": name, "full_steps": full_steps, "psnr": score(images, reference)}
                    rows.append({"guidance": guidance, **row})
                    print(rows[-1], flush=True)
    print(f"Results: {write_result('guidance', {'model': shipped_model().name, **vars(args)}, rows)}")


if __name__ == "__main__":
    main()
