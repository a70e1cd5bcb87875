"""The few numbers of kept tokens that a run uses."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dcconvert.passes.planning.levels import diffused, levels_of, nearest, nearest_levels


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 4))
def test_levels_are_the_nearest_there_are(counts, most):
    """Against every way of cutting the sorted counts into groups."""
    found = nearest_levels(np.array(counts), most)
    assert 1 <= len(found) <= most
    assert list(found) == sorted(set(found))
    values = np.unique(counts)

    def cost(ends: tuple[int, ...]) -> float:
        groups = np.split(values, ends)
        return sum(float(np.var(c) * len(c)) for g in groups if len(c := [n for n in counts if n in g]))

    parts = min(most, len(values))
    best = min(cost(ends) for ends in itertools.combinations(range(1, len(values)), parts - 1))
    rounded = sum(float(np.square(found - count).min()) for count in counts)
    assert rounded <= best + len(counts) * 0.25 + 1e-9  # a rounded mean is half a token off at most


def test_hand_computed_levels():
    assert nearest_levels(np.array([10, 11, 30, 32, 50]), 3).tolist() == [10, 31, 50]
    assert nearest_levels(np.array([7, 7]), 5).tolist() == [7]


def test_nearest_levels_of_counts():
    assert nearest((4, 16, 64), np.array([[1, 10], [11, 100]])).tolist() == [[4, 4], [16, 64]]
    assert int(nearest((4, 16), 9.5)) == 4


def test_rounding_is_carried_to_the_next_step():
    assert diffused(np.full(6, 64), (4, 16, 64)).tolist() == [64] * 6
    assert diffused(np.full(6, 10), (4, 16)).tolist() == [4, 16, 4, 16, 4, 16]


def test_levels_of_a_run():
    counts = np.array([64, 30, 29, 10, 9])
    assert levels_of(counts, 64, 3) == (10, 30, 64)
    assert levels_of(counts, 64, 3, sizes=(64, 4, 36)) == (4, 36, 64)
    assert levels_of(np.array([64, 64]), 64, 3) == (64,)
