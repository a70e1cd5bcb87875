"""Ratio parsing and the kept-fraction schedules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcconvert.passes.errors import UsageError
from dcconvert.passes.schedule import KINDS, Schedule, parse_ratio


@pytest.mark.parametrize(
    ("text", "ratio"), [("4x", 4), ("4", 4), ("2.5x", 2.5), (" 4X ", 4), (4, 4), (1, 1), ("1x", 1)]
)
def test_parse_ratio_accepts(text, ratio):
    assert parse_ratio(text) == ratio


@pytest.mark.parametrize(
    "text", [0, "0", "0x", -4, "-4x", "nan", float("nan"), "inf", "abc", "", "x", "4xx", 0.5, None]
)
def test_parse_ratio_refuses(text):
    with pytest.raises(UsageError, match="not a number of at least 1"):
        parse_ratio(text)


def test_directions_and_ends():
    ends = [0.0, 0.5, 1.0]
    np.testing.assert_allclose(Schedule("constant", 4).fraction(ends), [0.25, 0.25, 0.25])
    np.testing.assert_allclose(Schedule("rising", 4).fraction(ends), [0.375, 0.25, 0.125])
    np.testing.assert_allclose(Schedule("falling", 4).fraction(ends), [0.125, 0.25, 0.375])


def test_low_ratio_stops_at_everything_and_keeps_its_mean():
    np.testing.assert_allclose(Schedule("falling", 1.25).fraction([0.0, 0.5, 1.0]), [0.6, 0.8, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_ratio_one_keeps_everything(kind):
    taus = np.linspace(0, 1, 11)
    assert (Schedule(kind, 1).counts(taus, 256) == 256).all()
    assert (Schedule(kind, 1).centred(taus[3:]).counts(taus, 256) == 256).all()


@given(st.sampled_from(KINDS), st.floats(1, 64), st.integers(1, 250), st.booleans())
def test_mean_over_a_run_is_the_inverse_ratio(kind, ratio, steps, from_noise):
    # The tau before each Euler step, so their mean is not 0.5.
    taus = 1 - np.arange(steps) / steps if from_noise else (np.arange(steps) + 0.5) / steps
    schedule = Schedule(kind, ratio).centred(taus)
    assert schedule.mean_fraction(taus) == pytest.approx(1 / ratio, rel=1e-9)
    fraction = schedule.fraction(np.linspace(0, 1, 50))
    assert (fraction <= 1).all()
    assert (fraction >= 0.5 / ratio - 1e-12).all()
    counts = schedule.counts(taus, 256)
    assert counts.dtype == np.int64
    assert np.abs(counts - schedule.fraction(taus) * 256).max() <= 0.5 + 1e-9 or counts.min() == 1
    assert abs(counts.mean() - 256 / ratio) <= 0.5 + 1e-9


def test_counts_keep_at_least_one():
    assert Schedule("falling", 16).counts([0.0, 1.0], 16).tolist() == [1, 2]


def test_scalar_tau():
    assert Schedule("constant", 4).counts(0.3, 64) == 16


def test_float32_times_may_overshoot_the_ends():
    taus = np.array([1 + 1e-7, -1e-8], np.float32)
    np.testing.assert_allclose(Schedule("rising", 2).fraction(taus), [0.25, 0.75])


def test_ratio_that_leaves_no_tokens():
    schedule = Schedule("constant", 1000)
    with pytest.raises(UsageError, match=r"1000x leaves less than one of the 256 tokens.*largest ratio.*256x"):
        schedule.check(256)
    with pytest.raises(UsageError, match="256x"):
        schedule.counts(0.5, 256)
    Schedule("constant", 256).check(256)


def test_bad_arguments():
    with pytest.raises(UsageError, match="constant, rising, falling"):
        Schedule("sideways", 4)
    with pytest.raises(UsageError, match="not a number"):
        Schedule("constant", 0)
    with pytest.raises(UsageError, match="outside"):
        Schedule("constant", 4, centre=2)
    outside: list[float | list[float]] = [1.5, -0.1, float("nan"), []]
    for tau in outside:
        with pytest.raises(UsageError, match="outside"):
            Schedule("rising", 4).fraction(tau)
