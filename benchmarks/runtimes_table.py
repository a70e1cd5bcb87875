"""Which runtimes are right, as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
GRAPHS = {"full": "computed step", "skip": "skipped step"}
HEADERS = ("largest error relative to torch", "portable", "fused")


def runtimes_table(result: dict[str, Any], markdown: Callable[..., str]) -> str:
    """A line for each version; "wrong" names the graphs beyond the tolerance. Below it, latencies side by side."""
    settings = result["settings"]
    rows: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        name = f"{NAMES[row['runtime']]} {row['version']}"
        rows.setdefault(name, {})[row["form"]] = verdict(row["graphs"], settings["tolerance"])
    text = markdown(HEADERS, [[name, found["portable"], found["fused"]] for name, found in rows.items()])
    if not settings["times"]:
        return text
    headers = ("shipped model, mode steps", "ONNX Runtime, ms", "OpenVINO, ms", "OpenVINO is faster by")
    times = [
        [
            f"{GRAPHS[row['graph']]}, batch {row['batch']}",
            f"{row['onnxruntime_ms']:.2f}",
            f"{row['openvino_ms']:.2f}",
            f"{row['speedup']:.2f}",
        ]
        for row in settings["times"]
    ]
    return f"{text}\n{markdown(headers, times)}"


def verdict(graphs: dict[str, Any], tolerance: float) -> str:
    refused = [graph for graph, found in graphs.items() if isinstance(found, str)]
    if len(refused) == len(graphs):
        return "refused"
    errors = {graph: found for graph, found in graphs.items() if graph not in refused}
    wrong = [f"**wrong: {graph} ({found:.0e})**" for graph, found in errors.items() if found > tolerance]
    notes = [*wrong, *(f"refused: {graph}" for graph in refused)]
    return "; ".join(notes) or f"{max(errors.values()):.0e}"
