"""The GPU's tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

GIGA, TERA = 1e9, 1e12
CAPTURED = {"dtype": "bf16", "runtime": "CUDA graph"}

Row = dict[str, Any]


def gpu_table(result: dict[str, Any], markdown: Callable[..., str]) -> str:
    """One line a model, size and batch: the original, a full and a skip step, and both ways to run at 4x."""
    measured = [row for row in result["rows"] if "skipped" not in row]
    [ceiling] = [row for row in measured if row["part"] == "ceilings"]
    lines = [table_row(row, measured, ceiling) for row in measured if row["part"] == "steps" and captured(row)]
    headers = ["bf16, CUDA graphs", "original, ms", "bound, ms", "full step, ms", "skip step, ms"]
    headers += ["4x by steps, times faster", "4x by tokens, times faster", "state by steps, MB", "by tokens, MB"]
    facts = result["machine"]
    skipped = sum("skipped" in row for row in result["rows"])
    rates = f"{ceiling['tflops_bf16']:.0f} TFLOP/s", f"{ceiling['gb_per_s'] / 1000:.1f} TB/s"
    note = (
        f"\nMeasured on a GPU: {facts['gpu']}; torch {facts['torch']}, random weights; {skipped} cases were skipped "
        f"because time ran out. Bound: the time that the original's operations take at {rates[0]}, or its weights, "
        f"inputs and outputs at {rates[1]}, whichever is longer; both rates were measured in the same run, with a "
        "large matrix product and a large copy.\n"
    )
    return markdown(headers, lines) + note


def onnx_table(result: dict[str, Any], markdown: Callable[..., str]) -> str:
    """One line a way to run steps on ONNX Runtime: the original, a full and a skip step, and runs at 2x, 4x and 8x."""
    headers = ["ONNX Runtime, fp16", "original, ms", "full step, ms", "skip step, ms"]
    headers += ["2x, times faster", "4x, times faster", "8x, times faster"]
    lines = [
        [
            f"{row['model']}, {row['pixels']} px, batch {row['batch']}, {row['runtime']}",
            *(f"{row[f'{name}_ms']['median']:.2f}" for name in ("original", "full", "skip")),
            *(f"{run['speedup']:.2f}" for run in row["runs"]),
        ]
        for row in result["rows"]
        if row["part"] == "onnxruntime" and row["form"] == "steps" and "skipped" not in row
    ]
    facts = result["machine"]
    return markdown(headers, lines) + f"\nMeasured on a GPU: {facts['gpu']}; random weights.\n"


def chunk_table(result: dict[str, Any], markdown: Callable[..., str]) -> str:
    """One line per model, size and batch: mode chunk at 4x in both packings, beside what operations allow."""
    headers = [
        "bf16, CUDA graphs",
        "original, ms",
        "operations ratio",
        "4x by chunks, times faster",
        "varlen attention",
    ]
    rows = [row for row in result["rows"] if row["part"] == "latency" and "skipped" not in row and captured(row)]
    lines = []
    for row in [row for row in rows if row["form"] == "chunk" and row["ratio"] == 4]:
        place = {name: row[name] for name in ("model", "pixels", "batch", "ratio")}
        varlen = next((other for other in rows if {**place, "form": "chunk, varlen"}.items() <= other.items()), None)
        lines.append(
            [
                f"{row['model']}, {row['pixels']} px, batch {row['batch']}",
                f"{row['original_ms']['median']:.2f}",
                f"{row['flop_ratio']:.2f}",
                f"{row['speedup']:.2f}",
                f"{varlen['speedup']:.2f}" if varlen else "",
            ]
        )
    facts = result["machine"]
    skipped = sum("skipped" in row for row in result["rows"])
    note = f"torch {facts['torch']}, random weights; {skipped} cases were skipped because time ran out."
    return markdown(headers, lines) + f"\nMeasured on a GPU: {facts['gpu']}; {note}\n"


def captured(row: Row) -> bool:
    return CAPTURED.items() <= row.items()


def table_row(row: Row, measured: list[Row], ceiling: Row) -> list[str]:
    place = {name: row[name] for name in ("model", "pixels", "batch")}
    wanted = {**CAPTURED, **place, "part": "latency", "form": "carry", "ratio": 4}
    carry = next((other for other in measured if wanted.items() <= other.items()), None)
    [by_steps] = [run for run in row["runs"] if run["ratio"] == 4]
    return [
        f"{row['model']}, {row['pixels']} px, batch {row['batch']}",
        f"{row['original_ms']['median']:.2f}",
        f"{bound(row, ceiling):.2f}",
        f"{row['full_ms']['median']:.2f}",
        f"{row['skip_ms']['median']:.2f}",
        f"{by_steps['speedup']:.2f}",
        f"{carry['speedup']:.2f}" if carry else "",
        f"{row['state_mb']:,.0f}",
        f"{carry['state_mb']:,.0f}" if carry else "",
    ]


def bound(row: Row, ceiling: Row, graph: str = "original") -> float:
    """The least milliseconds of a graph by operations and by bytes, at the rates that were measured."""
    operations = 2 * row["gmacs"][graph] * row["batch"] * GIGA / (ceiling["tflops_bf16"] * TERA)
    moved = row["bytes"][graph]["least"] / (ceiling["gb_per_s"] * GIGA)
    return 1e3 * max(operations, moved)
