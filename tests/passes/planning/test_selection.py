"""Which tokens are kept: coverage first, then the best scores, always exactly as many as asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.planning.chunk_plan import Planner


def test_selection_covers_the_grid_first():
    scores = np.zeros((1, 16), dtype=np.float32)
    scores[0, [0, 1, 4, 5]] = [4, 3, 2, 1]  # all in the first 2x2 cell
    scores[0, [7, 13, 10]] = 0.5
    planner = Planner((4, 4))
    assert np.flatnonzero(planner.select(scores, [4])).tolist() == [0, 7, 10, 13]
    assert np.flatnonzero(planner.select(scores, [6])).tolist() == [0, 1, 4, 7, 10, 13]
    assert np.flatnonzero(Planner((4, 4), coverage=False).select(scores, [4])).tolist() == [0, 1, 4, 5]


def test_equal_scores_go_by_index():
    assert np.flatnonzero(Planner((4, 4)).select(np.zeros((1, 16)), [5])).tolist() == [0, 1, 2, 8, 10]
    assert np.flatnonzero(Planner((4, 4), coverage=False).select(np.zeros((1, 16)), [3])).tolist() == [0, 1, 2]


@settings(max_examples=60)
@given(
    st.sampled_from([(1, 1), (1, 7), (3, 5), (8, 8), (6, 10)]),
    st.booleans(),
    st.sampled_from([np.float32, np.float64, np.float16]),
    st.data(),
)
def test_selection_keeps_the_counts_and_is_deterministic(grid, coverage, dtype, data):
    planner = Planner(grid, coverage=coverage)
    counts = data.draw(st.lists(st.integers(1, planner.tokens), min_size=1, max_size=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    scores = rng.integers(0, 5, (len(counts), planner.tokens)).astype(dtype)  # many ties
    keep = planner.select(scores, counts)
    assert keep.sum(axis=1).tolist() == counts
    np.testing.assert_array_equal(keep, Planner(grid, coverage=coverage).select(scores.copy(), counts))
    np.testing.assert_array_equal(keep[::-1], planner.select(scores[::-1], counts[::-1]))
    if not coverage:
        for mask, row in zip(keep, scores, strict=True):
            assert mask.all() or row[mask].min() >= row[~mask].max()


@pytest.mark.parametrize("grid", [(8, 8), (5, 9)])
def test_every_cell_has_a_token(grid):
    planner = Planner(grid)
    scores = np.random.default_rng(0).random((1, planner.tokens))
    for count in range(1, planner.tokens + 1):
        side = next(c for c in range(1, 20) if -(-grid[0] // c) * -(-grid[1] // c) <= count)
        y, x = np.divmod(np.flatnonzero(planner.select(scores, [count])), grid[1])
        cells = set(zip((y // side).tolist(), (x // side).tolist(), strict=True))
        assert len(cells) == -(-grid[0] // side) * -(-grid[1] // side)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_name_the_sample(bad):
    scores = np.zeros((3, 4))
    scores[1, 2] = bad
    with pytest.raises(CheckFailedError, match="sample 1 has a non-finite keep score"):
        Planner((2, 2)).select(scores, [1, 1, 1])


def test_select_refuses():
    planner = Planner((2, 2))
    for scores in (np.zeros(4), np.zeros((1, 5)), np.zeros((0, 4))):
        with pytest.raises(UsageError, match=r"expected \[batch, 4\]"):
            planner.select(scores, [1])
    for counts in ([0], [5], [1, 1], 1):
        with pytest.raises(UsageError, match="each from 1 to 4"):
            planner.select(np.zeros((1, 4)), counts)
