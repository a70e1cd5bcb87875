"""Which runtimes compute the portable graphs rightly, and how fast OpenVINO is beside ONNX Runtime.

    python -m benchmarks.runtimes                 # installs every version into a folder of its own, with pip
    python -m benchmarks.runtimes --no-times      # results only

The shipped model in modes steps, carry and chunk, on plans whose samples keep different numbers of tokens, so that
there is padding. What torch computes is the reference. Each version runs in a process of its own (`runtime_worker`),
which knows nothing of dcconvert.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dcconvert
from benchmarks.common import write_result
from dcconvert.api import Converted
from dcconvert.export.checks.parity import mixed_plan, second_step
from dcconvert.export.onnx.export import export_onnx
from dcconvert.export.onnx.lowerings import FUSED, PORTABLE
from dcconvert.models.load import shipped_model
from dcconvert.passes.methods import method_of

MODES = ("steps", "carry", "chunk")
FORMS = {"portable": PORTABLE, "fused": FUSED}
VERSIONS = {
    "onnxruntime": ("1.20.1", "1.23.2", "1.24.4", "1.25.1", "1.28.0", "1.32.0"),
    "openvino": ("2025.4.0", "2026.1.0", "2026.4.1"),
}
BATCH = 3
TOLERANCE = 1e-4  # of the largest value
WORKER = Path(__file__).with_name("runtime_worker.py")


@torch.no_grad()
def write_cases(work: Path) -> None:
    """FORM/MODE/GRAPH.onnx, and MODE-GRAPH.npz with inputs ("in/NAME") and what torch returns ("out/PLACE")."""
    for mode in MODES:
        model = dcconvert.convert(dcconvert.load_checkpoint(shipped_model()), 4, steps=12, options=method_of(mode))
        for form, lowerings in FORMS.items():
            export_onnx(model, work / form / mode, lowerings)
        for graph, feed in feeds(model).items():
            outputs = model.graph(graph)(*feed.values())
            arrays: dict[str, Any] = {f"in/{name}": as_array(value) for name, value in feed.items()}
            arrays |= {f"out/{place}": as_array(value) for place, value in enumerate(outputs)}
            np.savez(work / f"{mode}-{graph}.npz", **arrays)


def feeds(model: Converted) -> dict[str, dict[str, Any]]:
    """Inputs of every graph; the samples of a step keep a half, an eighth and a third of their tokens."""
    inputs, tokens = model.spec.example(BATCH), model.spec.tokens
    if model.spec.updates:
        return {"full": {name: inputs[name] for name in model.spec.inputs_of("full")}, "skip": model.skip_feed(inputs)}
    scores, live, state = second_step(model, inputs)
    plan = mixed_plan(model, scores, np.array([tokens // 2, tokens // 8, tokens // 3]))
    return {"route": model.feed("route", inputs), "denoise": model.feed("denoise", inputs, live, plan, state)}


def as_array(value: Any) -> np.ndarray:
    return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def installed(name: str, version: str, work: Path) -> Path:
    """A folder that holds this version of a package alone."""
    folder = work / f"{name}-{version}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, f"{name}=={version}"], check=True, stderr=subprocess.DEVNULL)
    return folder


def worker(folders: list[Path], *args: object) -> Any:
    """What the worker prints, with these folders before everything else that Python imports from."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run(
        [sys.executable, str(WORKER), *map(str, args)], env=env, check=True, text=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout.splitlines()[-1])


def checked(work: Path) -> list[dict[str, Any]]:
    rows = []
    for name, versions in VERSIONS.items():
        for version in versions:
            folder = installed(name, version, work)
            for form in FORMS:
                found = worker([folder], "check", name, work, form)
                rows.append({"runtime": name, "version": version, "form": form, "graphs": found})
                print(name, version, form, found, flush=True)
    return rows


def timed(work: Path, runs: int, threads: int) -> list[dict[str, Any]]:
    """Milliseconds of a computed and a skipped step on the newest versions, taking turns in one process."""
    folders = [work / f"{name}-{versions[-1]}" for name, versions in VERSIONS.items()]
    return [
        {"graph": graph, **found}
        for graph in ("full", "skip")
        for found in worker(folders, "time", work / "portable" / "steps", work / f"steps-{graph}.npz", runs, threads)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the portable graphs on several runtimes and versions.")
    parser.add_argument("--no-times", action="store_true", help="do not measure latency")
    parser.add_argument("--runs", type=int, default=60, help="timed calls of each kind")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each runtime")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dcconvert-") as scratch:
        work = Path(scratch)
        write_cases(work)
        rows = checked(work)
        times = [] if args.no_times else timed(work, args.runs, args.threads)
    settings = {"batch": BATCH, "tolerance": TOLERANCE, "times": times, "runs": args.runs, "threads": args.threads}
    print(f"Results: {write_result('runtimes', settings, rows)}")


if __name__ == "__main__":
    main()
