"""Packing of samples that keep different numbers of tokens into attention rows: fill, packing time and step time.

    pip install scipy
    python -m benchmarks.packing            # a few minutes on two cores

There are two kinds of lengths. `batch`: what samples of the shipped model keep when they are at different steps of
their runs, or when a natural threshold (p > 0.5 of the predictability router) decides. Every algorithm packs each
batch, and ONNX Runtime runs one sample per row and shared rows in turn. `data set`: 100,000 lengths up to 512, a
stand-in for those of Krell et al. (arXiv 2107.02027), which are not available. A quarter of them fill a row, and the
others become linearly rarer with length, so that without packing half of all slots are padding, as in the paper.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import dcconvert
from benchmarks.common import write_result
from dcconvert.api import Converted
from dcconvert.export.buckets import choose_buckets
from dcconvert.export.checks.latency import interleaved, spread
from dcconvert.export.checks.parity import as_array
from dcconvert.export.onnx.export import export_onnx, export_original
from dcconvert.export.runtimes.ort import CPU, OrtModel, make_session, pick
from dcconvert.models.load import shipped_model
from dcconvert.passes.methods import method_of
from dcconvert.passes.methods.chunk import Chunk
from dcconvert.passes.planning.bin_packing import PACKERS, Packer, efficiency, nnlshp, spfhp
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.planning.step_planner import StepPlanner

CAPACITY, SAMPLES, DEPTH = 512, 100_000, 3
PLANNED = (("carry", "drift"), ("chunk", "pool"), ("chunk", "predictability"))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Packing of variable lengths into attention rows.")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--runs", type=int, default=15, help="timed steps of each form")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help="longest length of the data set")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50, help="steps of the runs that plans and lengths are taken from")
    parser.add_argument("--output", type=Path, default=None, help="[benchmarks/results/packing_cpu.json]")
    args = parser.parse_args(words)
    rows = [*data_set(args.capacity), *(row for batch in args.batches for row in measured(batch, args))]
    rows += [planning(mode, router, min(args.batches), args) for mode, router in PLANNED]
    asked = {name: value for name, value in vars(args).items() if name != "output"}
    settings = {"model": shipped_model().name, "runtime": "onnxruntime CPUExecutionProvider, fp32", **asked}
    print(f"Results: {write_result('packing_cpu', settings, rows, args.output)}")


def data_set(capacity: int) -> list[dict[str, Any]]:
    """Both histogram algorithms on lengths of which, without packing, half of all slots would be padding."""
    lengths = stand_in(capacity)
    histogram = Counter(lengths.tolist())
    alone = float(lengths.mean() / capacity)
    rows = [{"kind": "data set", "name": "one a row", "efficiency": alone, "seconds": 0.0, "speedup_bound": 1.0}]
    makers: dict[str, Callable[[], Any]] = {
        f"SPFHP, up to {DEPTH}": lambda: spfhp(histogram, capacity, DEPTH),
        "SPFHP, any number": lambda: spfhp(histogram, capacity),
        f"NNLSHP, up to {DEPTH}": lambda: nnlshp(histogram, capacity, DEPTH),
    }
    for name, make in makers.items():
        start = time.perf_counter()
        packs = make()
        taken = time.perf_counter() - start
        found = efficiency(packs, capacity)
        facts = {"efficiency": found, "seconds": round(taken, 4), "speedup_bound": found / alone}
        rows.append({"kind": "data set", "name": name, **facts})
        print(f"data set, {name}: {found:.1%} in {taken:.2f} s", flush=True)
    return rows


def stand_in(capacity: int) -> np.ndarray:
    """Lengths [SAMPLES]: a quarter fill a row, the others have a linearly falling density; the mean is one half."""
    rng = np.random.default_rng(0)
    shorter = np.clip(np.rint(capacity * (1 - np.sqrt(rng.random(SAMPLES)))), 1, capacity)
    return np.where(rng.random(SAMPLES) < 0.25, capacity, shorter).astype(np.int64)


def measured(batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every algorithm on batches of the shipped model, and the step latency with shared rows and with one sample per
    row."""
    dit = dcconvert.load_checkpoint(shipped_model())
    models = {
        packing: dcconvert.convert(dit, 4, options=method_of("chunk", router="predictability", packing=packing))
        for packing in ("rows", "bins")
    }
    model = models["rows"]
    feed = {key: as_array(value) for key, value in model.spec.example(batch).items()}
    cases = {
        f"falling 4x, {batch} samples at different steps": staggered(model, batch, args.steps),
        f"natural threshold, {batch} samples": natural(model, batch),
    }
    with tempfile.TemporaryDirectory() as tmp:
        sessions = {}
        for packing, other in models.items():
            export_onnx(other, Path(tmp) / packing)
            sessions[packing] = OrtModel(Path(tmp) / packing, other.planner, threads=args.threads)
        export_original(model, Path(tmp) / "original.onnx", model.spec.example(3))
        original = make_session(Path(tmp) / "original.onnx", CPU, args.threads)
        rows = []
        for name, counts in cases.items():
            runs = {packing: session.start(batch) for packing, session in sessions.items()}
            calls: dict[str, Callable[[], Any]] = {"original": lambda: original.run(None, pick(original, feed))}
            calls |= {p: lambda run=run, counts=counts: run.step(feed, counts) for p, run in runs.items()}  # type: ignore[misc]
            times = interleaved(calls, args.runs, warm_up=2)
            rows += [packed(name, counts, label, packer, model, times) for label, packer in PACKERS.items()]
    return rows


def packed(
    case: str, counts: np.ndarray, label: str, packer: Packer, model: Converted, times: dict[str, list[float]]
) -> dict[str, Any]:
    """One row: how full the rows are, how long packing takes and, for the two forms that run, how long a step takes."""
    capacity = int(counts.max())
    row, _ = packer(counts, capacity)
    taken = timed(lambda: packer(counts, capacity))
    facts = {
        "kind": "batch",
        "case": case,
        "name": label,
        "kept": counts.tolist(),
        "rows": int(row.max()) + 1,
        "efficiency": float(counts.sum() / (capacity * (row.max() + 1))),
        "pack_us": round(taken * 1e6, 1),
    }
    form = {"one a row": "rows", "SPFHP": "bins"}.get(label)
    if form:
        method = model.method
        assert isinstance(method, Chunk)
        planner = replace(method, packing=form).planner(model.spec.grid)
        scores = np.random.default_rng(0).random((len(counts), model.spec.tokens), np.float32)
        plan = timed(lambda: planner.plan(planner.select(scores, counts)))
        step = float(np.median(times[form]))
        facts |= {
            "plan_us": round(plan * 1e6, 1),
            "plan_share": plan / step,
            "step_ms": spread(times[form]),
            "original_ms": spread(times["original"]),
            "speedup": float(np.median(times["original"]) / step),
        }
    print(f"{case}, {label}: {facts['efficiency']:.1%}, {facts['pack_us']:.0f} us", flush=True)
    return facts


def planning(mode: str, router: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: how long the plan takes in a run of the shipped model at 4x, with one sample a row."""
    dit = dcconvert.load_checkpoint(shipped_model())
    model = dcconvert.convert(dit, 4, steps=args.steps, options=method_of(mode, router=router))
    taus = 1 - np.arange(args.steps) / args.steps
    planner = StepPlanner(model.spec, model.method, model.schedule.fitted(taus))
    feed = {key: as_array(value) for key, value in model.spec.example(batch).items()}
    with tempfile.TemporaryDirectory() as tmp:
        export_onnx(model, Path(tmp))
        bucket_set = choose_buckets((batch,), planner.run_counts(taus), model.spec.tokens)
        session = OrtModel(Path(tmp), planner, bucket_set, threads=args.threads)
        stages: dict[str, list[float]] = {"route": [], "plan": [], "denoise": []}
        for warm in (True, False):
            run = session.start(batch)
            for tau in taus:
                run.step({**feed, "t": np.full(batch, 1000 * tau, np.float32)})
                for stage, kept in stages.items():
                    kept += [] if warm else [getattr(run.last_times, stage)]
    means = {f"{stage}_ms": float(np.mean(kept)) * 1e3 for stage, kept in stages.items()}
    share = means["plan_ms"] / sum(means.values())
    print(f"{mode}, {router}: plan {share:.1%} of the step", flush=True)
    return {"kind": "plan", "name": f"{mode}, {router}", "batch": batch, **means, "plan_share": share}


def timed(call: Callable[[], Any], least: int = 20) -> float:
    """Median seconds of a call."""
    found = []
    for _ in range(least):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def staggered(model: Converted, batch: int, steps: int) -> np.ndarray:
    """Kept tokens of samples whose runs of a falling schedule began one after the other."""
    taus = 1 - np.arange(steps) / steps
    counts = Policy("falling", 4).timetable(taus).run_counts(taus, model.spec.tokens)
    return counts[np.arange(batch) * steps // batch]


def natural(model: Converted, batch: int) -> np.ndarray:
    """Tokens with p > 0.5 in samples of noise at different levels, as the router of the shipped model sees them."""
    scores, _ = model.route(model.spec.example(batch))
    return np.maximum((scores > 0.5).sum(1).numpy(), 1)


if __name__ == "__main__":
    main()
