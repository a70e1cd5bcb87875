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
    """The table with so many computed steps for a checkpoint; None for one that nothing was fitted to."""
    tables = [RunTable.from_dict(entry) for entry in known_tables().get(sha256, [])]
    return next((table for table in tables if table.evaluations == evaluations), None)
