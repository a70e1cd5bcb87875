"""The count of SparseDiT's operations, on a model small enough to run in a moment."""

from __future__ import annotations

import pytest

from benchmarks.sparsedit_cost import measured
from dcconvert.models.dit import DiTConfig

SMALL = DiTConfig(depth=8, width=32, heads=2, patch=2, image_size=16)


def test_a_row():
    """An 8x8 grid pooled to 6x6 below a quarter of the noise, then step by step to 3x3."""
    row = measured(16, 6, 3, 1.0, SMALL)
    assert (row["tokens"], row["most"]["tokens"], row["fewest"]["tokens"]) == (64, 36, 9)
    assert row["r_min"] == pytest.approx(1 - 36 / 64)
    assert row["r_max"] == pytest.approx(1 - 9 / 64)
    kept = 0.25 * 36 + 0.75 * (36 + 9) / 2
    assert kept - 8 < row["mean_tokens"] < kept  # each step takes the next smaller grid
    assert row["fewest"]["gmacs"] < row["gmacs"] < row["most"]["gmacs"] < row["original_gmacs"]
    assert row["difference"] == pytest.approx(row["gmacs"] - 1)
    # Linear in the tokens of the sparse blocks, but for attention: what a token costs is nearly the same throughout.
    slope = (row["most"]["gmacs"] - row["fewest"]["gmacs"]) / (36 - 9)
    assert row["gmacs"] == pytest.approx(row["fewest"]["gmacs"] + slope * (row["mean_tokens"] - 9), rel=0.02)
