"""Which transformer classes of diffusers convert, as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

HEADERS = ("class", "attention ops in the trunk", "operations that can shrink", "all tokens kept")
LONGEST = 230  # characters of a reason


def coverage_table(result: dict[str, Any], markdown: Callable[..., str]) -> str:
    """A line for each class that converts; below it, why the others do not."""
    rows = [row for row in result["rows"] if row["mode"] == "carry"]
    done = [row for row in rows if "reason" not in row]
    lines = [
        [
            row["class"],
            f"{row['attentions'][0]} of {row['attentions'][1]}",
            f"{row['share']:.0%}",
            f"{row['identity']:.0e}",
        ]
        for row in done
    ]
    refused = [row for row in rows if "reason" in row]
    said = f"{len(done)} of {len(rows)} configurations convert.\n\n{markdown(HEADERS, lines)}\nThe others:\n\n"
    return f"{said}{''.join(map(why, refused))}{untried(result['settings']['not tried'])}"


def why(row: dict[str, Any]) -> str:
    reason = row["reason"].replace("|", "/").replace("<", "").replace(">", "")
    reason = reason if len(reason) <= LONGEST else reason[:LONGEST].rsplit(" ", 1)[0] + " ..."
    return f"- {row['class']}: {reason}\n"


def untried(reasons: dict[str, str]) -> str:
    def listed(items: Sequence[tuple[str, str]]) -> str:
        return "; ".join(f"{name} ({reason})" for name, reason in items)

    return f"\nNot tried: {listed(sorted(reasons.items()))}.\n"
