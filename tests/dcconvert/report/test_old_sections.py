"""Sections that were written before they had records: keys, their order and values stay what they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dcconvert.evaluate.stress_metrics import CaseFigures, StressRow
from dcconvert.records import Record
from dcconvert.report.calibration import Calibration, CalibrationRow
from dcconvert.report.conversion import page
from dcconvert.report.stress import Stress

OLD = json.loads((Path(__file__).parent / "old_sections.json").read_text())
RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
KINDS: dict[str, type[Record]] = {"stress": Stress, "failures": CaseFigures, "calibration": Calibration}


def rewritten(kind: type[Record], old: Any) -> Any:
    return [rewritten(kind, item) for item in old] if isinstance(old, list) else kind.from_json(old).to_json()


@pytest.mark.parametrize("name", KINDS)
def test_a_section_is_written_as_it_was(name):
    assert json.dumps(rewritten(KINDS[name], OLD[name])) == json.dumps(OLD[name])


@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [("stress", StressRow, ("bundle", "early", "late", "computed", "skipped")),
     ("calibrated", CalibrationRow, ("asked", "budget", "candidates"))],
)  # fmt: skip
def test_the_rows_of_results_are_those_of_the_sections(name, kind, more):
    for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]:
        old = {key: value for key, value in row.items() if key not in more}
        assert json.dumps(kind.from_json(row).to_json()) == json.dumps(old)


def test_older_sections_with_fewer_keys_are_shown():
    stress, calibration = dict(OLD["stress"]), dict(OLD["calibration"])
    stress["rows"] = [
        {key: value for key, value in row.items() if "error" not in key and "age" not in key and key != "cases"}
        for row in stress["rows"]
    ]
    calibration["candidates"] = [{"steps": trial["steps"]} for trial in calibration["candidates"]]
    for section in (stress, calibration):
        for key in ("command", "seed"):
            section.pop(key)
    calibration.pop("run_steps")
    text = page({"stress": stress, "calibration": calibration}, {})
    assert "<h2>Stress set</h2>" in text
    assert "<h2>Calibration</h2>" in text
