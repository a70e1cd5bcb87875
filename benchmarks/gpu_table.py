"""The GPU's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def gpu_table(result: dict[str, Any], markdown: Callable[..., str]) -> str:
    """Batch 8 at 4x, everything that was measured."""
    found = [row for row in result["rows"] if row["part"] in ("latency", "onnxruntime", "tensorrt")]
    wanted = {"batch": 8, "ratio": 4, "pixels": 256}
    shown = [row for row in found if "skipped" not in row and wanted.items() <= row.items()]
    rows = [
        [
            f"{row['model']}, {row['form']}, {row.get('runtime', row['part'])}, {row['dtype']}",
            f"{row['original_ms']['median']:.2f}",
            f"{row['converted_ms']['median']:.2f}",
            f"{row['speedup']:.2f}",
            f"{row['flop_ratio']:.2f}",
            f"{row['efficiency']:.2f}",
            megabytes(row, "original_peak_mb"),
            megabytes(row, "converted_peak_mb"),
        ]
        for row in shown
    ]
    headers = ["batch 8, 256 px, 4x", "original, ms", "converted, ms", "times faster", "fewer operations"]
    headers += ["share reached", "original, MB", "converted, MB"]
    facts = result["machine"]
    skipped = sum("skipped" in row for row in result["rows"])
    note = (
        f"\nMeasured on a GPU: {facts['gpu']}; torch {facts['torch']}. Random weights; {skipped} cases were skipped.\n"
    )
    return markdown(headers, rows) + note


def megabytes(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:,.0f}" if row.get(key) else ""
