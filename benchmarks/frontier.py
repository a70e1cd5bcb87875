"""The frontier of the shipped model: final images against compute and latency, for `carry` and for fewer steps.

    python -m benchmarks.frontier                    # 256 images, most of an hour on two cores
    python -m benchmarks.frontier --latency-only     # time the rows of the last run again
    python -m benchmarks.frontier --plot-only

Every row is a whole run on ONNX Runtime: PSNR of its final images relative to 400 Euler steps of the original from the
same seeds, GMACs per image, and latency per image. A latency is the sum of the single steps of a run; steps of the
original and with every number of kept tokens are timed in turn. The control is the original with fewer steps, with the
same solver and with a better one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

import dcconvert
from benchmarks.common import RESULTS, write_result
from dcconvert.evaluate.measure_steps import compute_section
from dcconvert.export.checks.latency import interleaved
from dcconvert.export.checks.parity import as_array
from dcconvert.export.onnx.export import export_onnx
from dcconvert.export.runtimes.ort import pick
from dcconvert.images.pixels import psnr
from dcconvert.models.load import shipped_model
from dcconvert.passes.methods import method_of
from dcconvert.passes.planning.schedule import AUTO, Policy, Timetable
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.report.plots import frontier, png
from dcconvert.sampling.samplers import Sampler, Step, initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep, OrtPair

NAME = "frontier"
BASE_STEPS = 50  # the run whose compute is 100 %
ORIGINAL_STEPS = (6, 8, 10, 13, 17, 20, 25, 34, 50)
BUDGETS = (0.15, 0.25, 0.375, 0.5)
KEPT = (0.25, 0.4, 0.6)  # mean kept fraction: a budget is spent on many sparse steps or on fewer, denser ones


def main() -> None:
    parser = argparse.ArgumentParser(description="Frontier of final images against compute and latency.")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="images at once while sampling")
    parser.add_argument("--latency-batch", type=int, default=8)
    parser.add_argument("--reference-steps", type=int, default=400)
    parser.add_argument("--solvers", nargs="+", default=["euler", "unipc"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--reference", type=Path, help="file that keeps the reference images between runs")
    parser.add_argument("--latency-only", action="store_true")
    parser.add_argument("--carry-only", action="store_true", help="keep the original's rows of the last run")
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    if args.plot_only:
        draw(json.loads((RESULTS / f"{NAME}.json").read_text()))
        return
    with tempfile.TemporaryDirectory() as tmp:
        bench = Bench(Path(tmp), args)
        known = RESULTS / f"{NAME}.json"
        rows = json.loads(known.read_text())["rows"] if args.latency_only or args.carry_only else []
        if not args.latency_only:
            rows = bench.quality([row for row in rows if row["mode"] == "original"])
        bench.latency(rows)
        settings = {
            name: value for name, value in vars(args).items() if name not in ("reference", "latency_only", "carry_only")
        }
        path = write_result(NAME, {"model": shipped_model().name, **settings, "runtime": "onnxruntime CPU, fp32"}, rows)
    draw(json.loads(path.read_text()))
    print(f"Results: {path}, docs/frontier.png")


class Bench:
    """The shipped model, original and converted, on ONNX Runtime."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.args = args
        dit = dcconvert.load_checkpoint(shipped_model())
        self.prediction = dit.checkpoint_info.prediction
        self.model = dcconvert.convert(dit, 4, options=method_of("carry"))
        export_onnx(self.model, folder)
        runtime = OrtPair.open(self.model, self.model.planner, None, folder, folder)
        self.original, self.converted, self.original_step = runtime.original, runtime.converted, runtime.original_step
        self.noise = initial_noise(0, args.images, dit.cfg.in_channels, dit.cfg.image_size)
        self.labels = labels_for(args.images, dit.cfg.num_classes)

    def sample(self, sampler: Sampler, new_step: Callable[[], Step], label: str) -> Tensor:
        pairs = list(zip(self.noise.split(self.args.batch), self.labels.split(self.args.batch), strict=True))
        return torch.cat([sampler.run(new_step(), x, y) for x, y in track(pairs, label)])

    def quality(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows without latency; the original's rows are those given, if there are any."""
        file = self.args.reference
        if file and file.exists():
            reference = torch.load(file, weights_only=True)[: self.args.images]
        else:
            sampler = Sampler(self.prediction, self.args.reference_steps)
            reference = self.sample(sampler, lambda: self.original_step, "reference")
            if file:
                torch.save(reference, file)
        if not rows:
            samplers = [Sampler(self.prediction, n, solver) for solver in self.args.solvers for n in ORIGINAL_STEPS]
            rows = [self.row(sampler, None, reference) for sampler in samplers]
        for solver in self.args.solvers:
            for budget in BUDGETS:
                rows += [self.row(*run, reference) for run in self.runs(solver, budget)]
        return rows

    def runs(self, solver: str, budget: float) -> list[tuple[Sampler, Timetable]]:
        """Ways to spend a budget, a fraction of BASE_STEPS full steps: sampler and schedule."""
        found = {}
        for kept in KEPT:
            steps = min(BASE_STEPS, round(budget * BASE_STEPS / kept))
            sampler = Sampler(self.prediction, steps, solver)
            found[steps] = (
                sampler,
                Policy("falling", steps / (budget * BASE_STEPS), warm_up=AUTO).timetable(sampler.taus),
            )
        return list(found.values())

    def row(self, sampler: Sampler, schedule: Timetable | None, reference: Tensor) -> dict[str, Any]:
        """One way of sampling; a schedule of None is the original."""
        planner = StepPlanner(self.model.spec, self.model.method, schedule or Policy("constant", 1).timetable())
        compute = compute_section(self.model, planner.run_counts(sampler.taus), sampler.taus)
        name = f"original, {sampler.solver}, {sampler.steps} steps"
        new_step: Callable[[], Step] = lambda: self.original_step  # noqa: E731
        if schedule is not None:
            name = f"carry {schedule.ratio:.3g}x, {sampler.solver}, {sampler.steps} steps"
            self.converted.planner = planner
            new_step = lambda: ConvertedStep(self.model, self.converted)  # noqa: E731
        values = psnr(self.sample(sampler, new_step, name), reference)
        counts = None if schedule is None else [step["kept"] for step in compute["per_step"]]
        gmacs = compute["run_gmacs"]["original" if schedule is None else "converted"]
        row = {
            "name": name,
            "mode": "original" if schedule is None else "carry",
            "solver": sampler.solver,
            "steps": sampler.steps,
            "warm_up": None if schedule is None else schedule.dense_first,
            "kept": counts,
            "gmacs": round(gmacs, 3),
            "share_of_base": round(gmacs / (compute["original_gmacs"] * BASE_STEPS), 4),
            "psnr": round(float(values.mean()), 3),
            "psnr_standard_error": round(float(values.std() / len(values) ** 0.5), 3),
        }
        print(f"{name}: {row['share_of_base']:.1%} of the compute, {row['psnr']:.2f} dB", flush=True)
        return row

    def latency(self, rows: list[dict[str, Any]]) -> None:
        """Fill in milliseconds per image: steps timed in turn, summed over each run."""
        batch, spec = self.args.latency_batch, self.model.spec
        feed = {name: as_array(value) for name, value in spec.example(batch).items()}
        feed[str(spec.timestep)] = np.full(batch, 0.5 * spec.timestep_scale, np.float32)
        run = self.converted.start(batch)
        calls: dict[str, Callable[[], Any]] = {"original": lambda: self.original.run(None, pick(self.original, feed))}
        for kept in sorted({count for row in rows for count in row["kept"] or ()}, reverse=True):
            calls[str(kept)] = lambda kept=kept: run.step(feed, np.full(batch, kept))  # type: ignore[misc]
        times = {name: float(np.median(v)) * 1e3 / batch for name, v in interleaved(calls, self.args.runs).items()}
        for row in rows:
            taken = ["original"] * row["steps"] if row["kept"] is None else map(str, row["kept"])
            row["latency_ms"] = round(sum(times[name] for name in taken), 2)


def draw(result: dict[str, Any]) -> None:
    """docs/frontier.png: the best carry row of every budget against the control."""
    path = Path(__file__).parent.parent / "docs" / "frontier.png"
    path.write_bytes(png(frontier(result["rows"])))


if __name__ == "__main__":
    main()
