"""The packing benchmark, small: every algorithm on every batch, and what its figures have to obey."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import packing

pytestmark = pytest.mark.slow

pytest.importorskip("scipy", reason="scipy does the fit of NNLSHP")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("results") / "packing.json"
    words = ("--batches", 4, "--runs", 1, "--capacity", 48, "--threads", 1, "--steps", 9, "--output", output)
    packing.main([*map(str, words)])
    found = json.loads(output.read_text())["rows"]
    assert isinstance(found, list)
    return found


def test_the_data_set_is_packed_ever_better(rows):
    share = [row["efficiency"] for row in rows if row["kind"] == "data set"]
    assert share[0] == pytest.approx(0.5, abs=0.02)
    assert share[0] < share[1] < share[2] <= 1
    assert share[1] < share[3] <= 1


def test_every_algorithm_packs_every_batch(rows):
    batches = [row for row in rows if row["kind"] == "batch"]
    assert len(batches) == 2 * len(packing.PACKERS)
    for row in batches:
        assert row["efficiency"] == pytest.approx(sum(row["kept"]) / (row["rows"] * max(row["kept"])))
        assert ("step_ms" in row) == (row["name"] in ("one a row", "SPFHP"))
    assert {row["rows"] for row in batches if row["name"] == "one a row"} == {4}


def test_the_plan_is_a_part_of_the_step(rows):
    planned = [row for row in rows if row["kind"] == "plan"]
    assert [row["name"] for row in planned] == ["carry, drift", "chunk, pool", "chunk, predictability"]
    assert all(0 < row["plan_share"] < 1 for row in planned)
