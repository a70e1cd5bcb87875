"""The stress set in all modes: `dcconvert stress` on the bundles that `benchmarks.upcycling` made, and mode steps.

    python -m benchmarks.upcycling --data runs/fashion-mnist --work runs/upcycling
    python -m benchmarks.stress --work runs/upcycling      # a few minutes: modes carry and chunk
    python -m benchmarks.stress --steps                    # half an hour: mode steps, on the shipped model

Each call writes its rows into results/stress.json and keeps the others. The first also writes the gallery of mode carry
to docs/failures.png. Mode steps needs no data. It runs the tables that a conversion at 4x and at 2x has, and the fitted
ones of results/fitted.json; among these are tables without skipped steps, so that the fit and the skipping can be told
apart.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import RESULTS, write_result
from benchmarks.upcycling import BUNDLES, dcconvert, folder_of
from dcconvert.commands.stress import SAMPLES
from dcconvert.commands.stress_steps import convergence, noise_cases, run_both, skipping_of
from dcconvert.environment import machine, set_threads
from dcconvert.evaluate.stress_cases import original_step
from dcconvert.evaluate.stress_metrics import judged, summary
from dcconvert.export.bundle import read_bundle
from dcconvert.models.load import shipped_model
from dcconvert.sampling.bundle_runs import run_planner
from dcconvert.sampling.default_tables import default_table
from dcconvert.sampling.run_table import RunTable
from dcconvert.terminal import Stages

NAMES = ("carry 4x", "chunk 4x, pool")
COUNT = 8  # cases of each kind
FULL_STEPS = 50  # of the original's own run, in mode steps
SKIPS, COMPUTES = "1 skipped after each, fitted", "all steps computed, fitted"  # in fitted.json


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the stress set in all modes.")
    parser.add_argument(
        "--work", type=Path, help="the bundle folder of benchmarks.upcycling, for modes carry and chunk"
    )
    parser.add_argument("--steps", action="store_true", help="run mode steps")
    parser.add_argument("--count", type=int, default=COUNT, help="cases of each kind, in mode steps")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the original to choose from, in mode steps")
    args = parser.parse_args()
    if not args.work and not args.steps:
        parser.error("say what to run: --work FOLDER, --steps, or both")
    before = json.loads((RESULTS / "stress.json").read_text())
    if args.work:
        settings, rows = in_tokens(args.work)
        settings |= {key: value for key, value in before["settings"].items() if key == "mode_steps"}
        rows += [row for row in before["rows"] if of_steps(row)]
        before = {"settings": settings, "rows": rows, "machine": machine()}
        write_result("stress", settings, rows)
    if args.steps:
        with torch.inference_mode():
            found, rows = in_steps(args.count, args.samples)
        settings = before["settings"] | {"mode_steps": found}
        rows = [row for row in before["rows"] if not of_steps(row)] + rows
        write_result("stress", settings, rows, made_on=before["machine"])
    print(f"Results: {RESULTS / 'stress.json'}")


def of_steps(row: dict[str, Any]) -> bool:
    return "computed" in row


def in_tokens(work: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and rows of modes carry and chunk."""
    made = {made.name: made for made in BUNDLES}
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {"count": COUNT, "data": "Fashion-MNIST test images"}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(shutil.copytree(folder_of(made[name], work), Path(tmp) / "bundle"))
            dcconvert("stress", str(folder), "--data", str(work / "test.npz"), "--count", str(COUNT))
            found = json.loads((folder / "report.json").read_text())["stress"]
            if name == NAMES[0]:
                shutil.copy(folder / "failures.png", Path(__file__).parent.parent / "docs" / "failures.png")
        levels = {key: found[key] for key in ("early", "late")}
        rows += [{"bundle": name, **levels, **row} for row in found["rows"]]
        settings |= {key: found[key] for key in ("start", "steps", "run_steps", "solver", "seed")}
    return settings, rows


def in_steps(count: int, samples: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and rows of mode steps: every table on the same cases."""
    stages, rows = Stages(Console(stderr=True)), []
    with tempfile.TemporaryDirectory() as tmp:
        dcconvert(
            str(shipped_model()), "--ratio", "4x", "--steps", str(FULL_STEPS), "--no-measure", "-o", f"{tmp}/bundle"
        )
        bundle = read_bundle(Path(tmp) / "bundle")
        sampler = run_planner(bundle, None)[0]
    set_threads(1)
    cases, _ = noise_cases(bundle, default_table(sampler.prediction, FULL_STEPS, 4), count, samples, 0, stages)
    with stages.stage("the reference's convergence, and the original in full") as tick:
        converged = convergence(bundle, cases, tick)
        in_full = cases.run(sampler, lambda: original_step(bundle), tick)
    for name, (ratio, table) in tables_of(sampler.prediction).items():
        with stages.stage(name) as tick:
            outcome = run_both(bundle, table, ratio, cases, in_full, tick)
        facts = {"bundle": name, "computed": table.evaluations, "skipped": table.steps - table.evaluations}
        rows += [{**facts, **row.to_json()} for row in summary(judged(cases, outcome, []), total=True)]
    found = skipping_of(table, sampler, converged).to_json()
    settings = {name: found[name] for name in ("full_steps", "full_solver", "reference_steps", "converged")}
    return {"count": count, "samples": samples, **settings, "machine": machine()}, rows


def tables_of(prediction: str) -> dict[str, tuple[float, RunTable]]:
    """Run tables and their ratios: not fitted, fitted, and fitted without a skip."""
    rows = json.loads((RESULTS / "fitted.json").read_text())["rows"]
    fitted = {
        (row["budget"], row["run"]): RunTable.from_dict(row["table"])
        for row in rows
        if row["guidance"] == 1 and row["table"]
    }
    found: dict[str, tuple[float, RunTable]] = {}
    for ratio, budget in ((4, 12.5), (2, 25)):
        found[f"{ratio}x, not fitted"] = (ratio, default_table(prediction, FULL_STEPS, ratio))
        found[f"{ratio}x, fitted"] = (ratio, fitted[budget, SKIPS])
        found[f"{ratio}x, no step skipped, fitted"] = (ratio, fitted[budget, COMPUTES])
    return found


if __name__ == "__main__":
    main()
