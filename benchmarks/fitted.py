"""Run tables of a model: the original with few steps, skipped steps, and both fitted to the model.

    python -m benchmarks.fitted                  # an hour on two cores -> benchmarks/results/fitted.json
    python -m benchmarks.fitted --budgets 12.5   # one budget
    python -m benchmarks.fitted --model cifar --device cuda    # on a GPU -> fitted_cifar.json
    python -m benchmarks.fitted --model cifar --times          # add the times, on the machine they are for
    python -m benchmarks.fitted --ship                         # store the shipped model's best tables with the package

For every budget, in steps of the original: PSNR of the final images to a converged run from the same seeds (Adams of
second order; how far half its steps are from it stands beside). Tables are fitted to 16 images, those of small budgets
are polished on them too, and every row is judged on others. Times of whole runs are computed from those of original,
computed and skipped steps, which take turns in one process on ONNX Runtime. With `--device`, torch makes the images
there, and no time is measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.common import MODELS, RESULTS, in_steps, write_result
from benchmarks.torch_device import TorchDevice
from dcconvert.commands.tune import SEED
from dcconvert.evaluate.tuning import FittedStep, Gain, Images, StepTimes, Trial, Tuner, run_time, skip_cost, step_times
from dcconvert.export.files import file_sha256
from dcconvert.export.onnx.export import export_onnx
from dcconvert.models.load import shipped_model
from dcconvert.passes.runtime.run import Runtime
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Guidance
from dcconvert.sampling.shipped_tables import TABLES
from dcconvert.sampling.steps import OrtPair

NAME = "fitted"
STEPS = 50  # of the run that budgets are shares of
BUDGETS = (4, 6, 8, 12.5, 18.75, 25)
GUIDED_BUDGETS = (12.5,)
ASSET = Path(__file__).parent.parent / "dcconvert" / "assets" / TABLES


def main() -> None:
    parser = argparse.ArgumentParser(description="Fitted run tables of a model.")
    parser.add_argument("--model", choices=MODELS, default="shipped")
    parser.add_argument("--device", help="of torch, that makes the images; ONNX Runtime on the CPU without it")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--guidance", type=float, default=4.0, help="the second scale, beside 1")
    parser.add_argument("--guided-budgets", type=float, nargs="*", default=GUIDED_BUDGETS, help="budgets at that scale")
    parser.add_argument("--images", type=int, default=16, help="that tables are fitted to")
    parser.add_argument("--fresh", type=int, default=48, help="that every run is judged on")
    parser.add_argument("--polish", type=int, default=2, help="rounds of Gauss-Newton after the fit, at guidance 1")
    parser.add_argument("--polish-up-to", type=float, default=12.5, help="the largest budget that is polished")
    parser.add_argument("--reference-steps", type=int, default=200)
    parser.add_argument("--latency-batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument(
        "--times", action="store_true", help="measure times only, and put them into the result there is"
    )
    parser.add_argument("--ship", action="store_true", help="only store the best tables of the result with the package")
    parser.add_argument("--out", type=Path, help="result file")
    args = parser.parse_args()
    args.out = args.out or RESULTS / ("fitted.json" if args.model == "shipped" else f"fitted_{args.model}.json")
    if args.ship:
        ship(json.loads(args.out.read_text())["rows"])
        print(f"Shipped tables: {ASSET}")
    else:
        (measure_times if args.times else measure)(args)


def measure(args: argparse.Namespace) -> None:
    """Fit, judge, and write the result after each guidance; times too, unless a device makes the images."""
    runtime = f"torch {args.device}, fp32" if args.device else "onnxruntime CPU, fp32"
    settings = {**vars(args), "runtime": runtime, "steps": STEPS}
    del settings["times"], settings["ship"], settings["out"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as tmp, torch.inference_mode(), Progress() as progress:
        bench = Bench(Path(tmp), args, progress)
        times = None if args.device else step_times(bench.pair, args.latency_batch, args.runs)
        for guidance, budgets in ((1.0, args.budgets), (args.guidance, args.guided_budgets)):
            for tried in bench.tried(guidance, budgets) if budgets else ():
                rows += [row(tried, trial, times) for trial in tried.trials]
                write_result(NAME, {**settings, "times_ms": times}, rows, args.out)
    print(f"Results: {args.out}")


def measure_times(args: argparse.Namespace) -> None:
    """Times of the same runs, on a machine that does nothing else. The machine of the images is kept beside."""
    result = json.loads(args.out.read_text())
    settings, rows = result["settings"], result["rows"]
    args.device = None
    with tempfile.TemporaryDirectory() as tmp, torch.inference_mode(), Progress() as progress:
        times = step_times(Bench(Path(tmp), args, progress).pair, args.latency_batch, args.runs)
    for one in rows:
        one["speedup"] = speedup(one["run"], one["steps"], one["computed"], times)
    settings = {"images_made_on": result["machine"], **settings, "times_ms": times}
    settings |= {"latency_batch": args.latency_batch, "runs": args.runs}
    print(f"Results: {write_result(NAME, settings, rows, args.out)}")


def ship(rows: Sequence[dict[str, Any]]) -> None:
    """Write the best fitted table of every budget without guidance, for the shipped model."""
    best: dict[float, dict[str, Any]] = {}
    for row in rows:
        if row["guidance"] == 1 and row["table"] and row["psnr"] > best.get(row["budget"], {"psnr": 0})["psnr"]:
            best[row["budget"]] = row
    tables = {file_sha256([shipped_model()]): [row["table"] for _, row in sorted(best.items())]}
    ASSET.write_text(json.dumps(tables, separators=(",", ":")) + "\n")


@dataclass(frozen=True)
class Tried:
    """The runs of one budget, best first, and how far half the reference's steps are from it, in dB."""

    guidance: float
    budget: float
    trials: list[Trial]
    converged: float


class Bench:
    """A model in mode steps, on ONNX Runtime or in torch on a device."""

    def __init__(self, folder: Path, args: argparse.Namespace, progress: Progress) -> None:
        self.args, self.progress = args, progress
        dit, self.model = in_steps(args.model, folder)
        self.cfg, self.prediction = dit.cfg, dit.checkpoint_info.prediction
        self.skip_cost = skip_cost(self.model)
        if args.device:
            self.runtime: Runtime = TorchDevice(self.model, args.device)
        else:
            export_onnx(self.model, folder)
            self.pair = OrtPair.open(self.model, self.model.planner, None, folder, folder)
            self.runtime = self.pair.converted
        self.told: set[str] = set()

    def note(self, what: str) -> None:
        """Show what is being tried."""
        if what not in self.told:
            self.told.add(what)
            self.progress.console.print(what, highlight=False)

    def drawn(self, tuner: Tuner, first: int, count: int, name: str) -> Images:
        task = self.progress.add_task(name, total=self.args.reference_steps)
        return tuner.images(self.cfg, first, count, self.args.reference_steps, lambda: self.progress.advance(task))

    def tried(self, guidance: float, budgets: Sequence[float]) -> Iterator[Tried]:
        tuner = Tuner(
            lambda: FittedStep(self.model, self.runtime, Guidance(guidance).halves),
            self.prediction,
            self.skip_cost,
            guidance,
            self.cfg.num_classes,
        )
        seen = self.drawn(tuner, SEED, self.args.images, f"guidance {guidance:g}: reference to fit to")
        fresh = self.drawn(tuner, 0, self.args.fresh, f"guidance {guidance:g}: reference to judge by")
        converged = tuner.convergence(fresh, self.args.reference_steps // 2, lambda: None)
        task = self.progress.add_task(f"guidance {guidance:g}: budgets", total=len(budgets))
        for budget in budgets:
            rounds = self.args.polish if guidance == 1 and budget <= self.args.polish_up_to else 0
            trials = replace(tuner, polish=rounds).trials(budget, seen, fresh, self.note)
            yield Tried(guidance, budget, trials, converged)
            self.progress.advance(task)


def speedup(name: str, steps: int, computed: int, times: StepTimes) -> float:
    """Of a whole run, over STEPS steps of the original; the known solvers run the original, too."""
    whole = run_time(STEPS, STEPS, times, original=True)
    return round(whole / run_time(steps, computed, times, original=name.startswith("original")), 3)


def row(tried: Tried, trial: Trial, times: StepTimes | None) -> dict[str, Any]:
    """A run in figures. "behind_best": how much better the best run of its budget is, image by image."""
    behind = Gain.of(tried.trials[0], trial)
    return {
        "guidance": tried.guidance,
        "budget": tried.budget,
        "run": trial.name,
        "fitted": trial.fitted,
        "steps": trial.table.steps,
        "computed": trial.table.evaluations,
        "cost": round(trial.cost, 4),
        "speedup": speedup(trial.name, trial.table.steps, trial.table.evaluations, times) if times else None,
        "psnr": round(trial.mean, 3),
        "psnr_error": round(trial.error, 3),
        "behind_best": round(behind.mean, 3),
        "behind_best_error": round(behind.error, 3),
        "reference_converged_db": round(tried.converged, 1),
        "table": trial.table.to_dict() if isinstance(trial.table, RunTable) and trial.fitted else None,
    }


if __name__ == "__main__":
    main()
