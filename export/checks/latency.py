"""Latency and memory of the original and the converted model, interleaved in one run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

MEGABYTE = 1e6


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], runs: int, warm_up: int = 1, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of `runs` calls of every candidate, in turn, so that drift of the machine affects all equally."""
    for _ in range(warm_up):
        for call in candidates.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(runs):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        tick()
    return times


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and 10th/90th percentile in milliseconds."""
    low, median, high = np.percentile(np.asarray(seconds) * 1e3, [10, 50, 90])
    return {"median": round(median, 3), "p10": round(low, 3), "p90": round(high, 3), "runs": len(seconds)}


def peak_memory(onnx_files: list[Path], feeds: list[dict[str, np.ndarray]], folder: Path) -> float | None:
    """Peak resident megabytes of a fresh process that loads ONNX files and runs each once on its feed.

    The figure includes Python, numpy and ONNX Runtime. None if the process died (for example, out of memory).
    """
    for i, feed in enumerate(feeds):
        np.savez(folder / f"feed_{i}.npz", **feed)  # type: ignore[arg-type]  # may clash with allow_pickle
    command = [sys.executable, "-c", PROBE, str(folder), *map(str, onnx_files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    return round(float(json.loads(done.stdout)) / MEGABYTE, 1)


# The high-water mark of the process itself: getrusage would count the parent it was forked from.
PROBE = """
import json, sys
import numpy, onnxruntime
folder, *files = sys.argv[1:]
sessions = [onnxruntime.InferenceSession(f, providers=["CPUExecutionProvider"]) for f in files]
for i, session in enumerate(sessions):
    feed = dict(numpy.load(f"{folder}/feed_{i}.npz"))
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_cpu_input(name, array)
    for output in session.get_outputs():
        state = feed.get(output.name.removeprefix("next_")) if output.name.startswith("next_") else None
        if state is None:
            binding.bind_output(output.name)
        else:
            binding.bind_output(output.name, "cpu", 0, state.dtype, state.shape, state.ctypes.data)
    session.run_with_iobinding(binding)
try:
    lines = open("/proc/self/status").read().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
except OSError:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps(peak))
"""
