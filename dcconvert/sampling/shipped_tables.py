"""Run tables that ship with dcconvert: fitted to the model that ships with it (benchmarks/fitted.py)."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from dcconvert.sampling.run_table import RunTable

TABLES = "run_tables.json"


@cache
def known_tables() -> dict[str, list[dict[str, Any]]]:
    """Tables by the hash of the checkpoint that they were fitted to."""
    path = resources.files("dcconvert") / "assets" / TABLES
    found: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def shipped_table(sha256: str, evaluations: int) -> RunTable | None:
    """The table for a checkpoint and a budget of so many computed steps; None if nothing was fitted for them.

    It computes that many; or one less, if it skips steps, since these cost something too.
    """
    tables = [RunTable.from_dict(entry) for entry in known_tables().get(sha256, [])]
    near = [table for table in tables if evaluations in (table.evaluations, table.evaluations + (table.updates > 0))]
    return max(near, key=lambda table: table.evaluations, default=None)
