"""The tables that ship belong to the model that ships, and to no other."""

from __future__ import annotations

from dcconvert.export.files import file_sha256
from dcconvert.models.load import shipped_model
from dcconvert.sampling.default_tables import default_table
from dcconvert.sampling.shipped_tables import known_tables, shipped_table


def test_they_were_fitted_to_the_shipped_model():
    [sha256] = known_tables()
    assert sha256 == file_sha256([shipped_model()])
    table = shipped_table(sha256, 12)
    assert table is not None
    assert table.evaluations == 12
    assert table.guidance == 1
    assert table.fitted
    assert table != default_table("flow", 50, 4)


def test_half_the_steps_have_one_whose_skipped_steps_fit_the_budget_too():
    [sha256] = known_tables()
    table = shipped_table(sha256, 25)
    assert table is not None
    assert table.updates > 0
    assert table.evaluations == 24


def test_other_checkpoints_and_other_budgets_have_none():
    [sha256] = known_tables()
    assert shipped_table("0" * 64, 12) is None
    assert shipped_table(sha256, 9) is None  # the one of 8 steps skips none
    assert shipped_table(sha256, 999) is None
