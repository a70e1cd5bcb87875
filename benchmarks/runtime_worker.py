"""Runs exported graphs with one runtime and nothing of dcconvert; `benchmarks.runtimes` starts it.

runtime_worker.py check RUNTIME WORK FORM            # prints {"MODE GRAPH": error, or why it does not load}
runtime_worker.py time FOLDER CASE RUNS THREADS      # prints milliseconds of ONNX Runtime and OpenVINO in turns
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[dict[str, Any]], list[Any]]


def on_onnxruntime(path: Path, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda feed: session.run(None, {name: feed[name] for name in names})


def on_openvino(path: Path, threads: int) -> Call:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().compile_model(str(path), "CPU", settings)
    names = [value.get_any_name() for value in model.inputs]
    return lambda feed: [np.array(value) for value in model({name: feed[name] for name in names}).values()]


LOADERS = {"onnxruntime": on_onnxruntime, "openvino": on_openvino}


def case(path: Path) -> tuple[dict[str, Any], list[Any]]:
    arrays = np.load(path)
    feed = {name.removeprefix("in/"): arrays[name] for name in arrays if name.startswith("in/")}
    return feed, [arrays[f"out/{place}"] for place in range(len(arrays) - len(feed))]


def check(runtime: str, work: Path, form: str) -> dict[str, Any]:
    """The largest difference to torch of every graph, relative to the largest value; or the error message."""
    found: dict[str, Any] = {}
    for path in sorted(work.glob("*.npz")):
        mode, graph = path.stem.split("-")
        feed, wanted = case(path)
        try:
            made = LOADERS[runtime](work / form / mode / f"{graph}.onnx", 1)(feed)
        except Exception as error:  # every runtime has its own
            found[f"{mode} {graph}"] = " ".join(str(error).replace(f"{work}/", "").split())[:200]
            continue
        pairs = zip(made, wanted, strict=True)
        found[f"{mode} {graph}"] = max(
            float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-9)) for one, other in pairs
        )
    return found


def times(folder: Path, path: Path, runs: int, threads: int) -> list[dict[str, Any]]:
    graph = path.stem.split("-")[1]
    calls = {name: loader(folder / f"{graph}.onnx", threads) for name, loader in LOADERS.items()}
    feed, found = case(path)[0], []
    for batch in (1, 8):
        given = {name: resized(name, value, batch) for name, value in feed.items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(runs + 3):
            for name, call in calls.items():
                start = time.perf_counter()
                call(given)
                if turn >= 3:
                    seconds[name].append(time.perf_counter() - start)
        medians = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()}
        found.append({"batch": batch, **medians, "speedup": medians["onnxruntime_ms"] / medians["openvino_ms"]})
    return found


def resized(name: str, value: Any, batch: int) -> Any:
    """The first samples again and again; the batch is the last axis of `weights` and the first of everything else."""
    axis = value.ndim - 1 if name == "weights" else 0
    return np.take(value, np.arange(batch) % value.shape[axis], axis=axis)


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "check":
        found: Any = check(rest[0], Path(rest[1]), rest[2])
    else:
        found = times(Path(rest[0]), Path(rest[1]), int(rest[2]), int(rest[3]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
