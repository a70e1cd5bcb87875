"""The support matrix as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

MODES = ("carry", "chunk", "sparsedit", "ddit")
HEADERS = ("models", "tested as", *MODES, "all tokens kept", "ONNX Runtime")
LONGEST = 150  # characters of a reason


def family_table(result: dict[str, Any], markdown: Callable[..., str]) -> str:
    """The matrix and, below it, why some families are not converted."""
    return f"{markdown(HEADERS, family_rows(result['rows']))}\n{reasons(result['rows'])}"


def family_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line for each family; errors are relative, and the largest of all modes."""
    found = []
    for name in dict.fromkeys(row["family"] for row in rows):
        modes = {row["mode"]: row for row in rows if row["family"] == name}
        first = next(iter(modes.values()))
        marks = [mark(modes[mode]) for mode in MODES]
        errors = [worst(modes.values(), key) for key in ("identity", "onnxruntime")]
        found.append([first["models"], first["class"], *marks, *errors])
    return found


def mark(row: dict[str, Any]) -> str:
    if "reason" in row:
        return "no"
    return "fails" if row["failed"] else "yes"


def worst(rows: Any, key: str) -> str:
    values = [row[key] for row in rows if key in row]
    return f"{max(values):.0e}" if values else ""


def reasons(rows: Sequence[dict[str, Any]]) -> str:
    """Why families are not converted, one line each."""
    told = {row["models"]: row["reason"] for row in rows if "reason" in row and row["mode"] == "carry"}
    return "".join(f"- {models}: {shortened(reason)}\n" for models, reason in told.items())


def shortened(reason: str) -> str:
    reason = reason.replace("|", "/")
    if "longest alive is" in reason:
        return f"long skips: {reason.split('longest alive is ')[1].removesuffix(')')}"
    return reason if len(reason) <= LONGEST else reason[:LONGEST].rsplit(" ", 1)[0] + " ..."
