"""Ratio parsing and the kept-fraction schedules."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.schedule import (
    AUTO,
    CURVE,
    DIFFERENCE,
    KINDS,
    LEVELS,
    NATURAL,
    Policy,
    Timetable,
    parse_ratio,
)


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
    np.testing.assert_allclose(Policy("constant", 4).timetable().fraction(ends), [0.25, 0.25, 0.25])
    np.testing.assert_allclose(Policy("rising", 4).timetable().fraction(ends), [0.375, 0.25, 0.125])
    np.testing.assert_allclose(Policy("falling", 4).timetable().fraction(ends), [0.125, 0.25, 0.375])


def test_low_ratio_stops_at_everything_and_keeps_its_mean():
    np.testing.assert_allclose(Policy("falling", 1.25).timetable().fraction([0.0, 0.5, 1.0]), [0.6, 0.8, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_ratio_one_keeps_everything(kind):
    taus = np.linspace(0, 1, 11)
    assert (Policy(kind, 1).timetable().counts(taus, 256) == 256).all()
    assert (Policy(kind, 1).timetable(taus[3:]).counts(taus, 256) == 256).all()


def test_a_curve_at_ratio_one_keeps_everything():
    taus = np.linspace(0, 1, 11)
    assert (Policy(CURVE, 1, knots=((0.1, 0.2), (0.5, 1.0))).timetable(taus).counts(taus, 256) == 256).all()


@given(st.sampled_from(KINDS), st.floats(1, 64), st.integers(1, 250), st.booleans())
def test_mean_over_a_run_is_the_inverse_ratio(kind, ratio, steps, from_noise):
    # The tau before each Euler step, so their mean is not 0.5.
    taus = 1 - np.arange(steps) / steps if from_noise else (np.arange(steps) + 0.5) / steps
    schedule = Policy(kind, ratio).timetable(taus)
    assert np.mean(schedule.fraction(taus)) == pytest.approx(1 / ratio, rel=1e-9)
    fraction = schedule.fraction(np.linspace(0, 1, 50))
    assert (fraction <= 1).all()
    assert (fraction >= 0.5 / ratio - 1e-12).all()
    counts = schedule.counts(taus, 256)
    assert counts.dtype == np.int64
    assert np.abs(counts - schedule.fraction(taus) * 256).max() <= 0.5 + 1e-9 or counts.min() == 1
    assert abs(counts.mean() - 256 / ratio) <= 0.5 + 1e-9


def test_counts_keep_at_least_one():
    assert Policy("falling", 16).timetable().counts([0.0, 1.0], 16).tolist() == [1, 2]


def test_scalar_tau():
    assert Policy("constant", 4).timetable().counts(0.3, 64) == 16


def test_float32_times_may_overshoot_the_ends():
    taus = np.array([1 + 1e-7, -1e-8], np.float32)
    np.testing.assert_allclose(Policy("rising", 2).timetable().fraction(taus), [0.25, 0.75])


def test_ratio_that_leaves_no_tokens():
    policy = Policy("constant", 1000)
    with pytest.raises(UsageError, match=r"1000x leaves less than one of the 256 tokens.*largest ratio.*256x"):
        policy.check(256)
    with pytest.raises(UsageError, match="256x"):
        policy.timetable().counts(0.5, 256)
    Policy("constant", 256).check(256)


# Dense steps


def test_warm_up_and_refresh_steps_keep_everything():
    steps = np.arange(10)
    plain = Policy("constant", 4).timetable()
    assert plain.counts(np.full(10, 0.5), 64, steps).tolist() == [16] * 10

    def dense(**options: Any) -> list[int]:
        counts = Policy("constant", 4, **options).timetable().counts(np.full(10, 0.5), 64, steps)
        assert set(counts.tolist()) <= {16, 64}
        return np.flatnonzero(counts == 64).tolist()

    assert dense(warm_up=3) == [0, 1, 2]
    assert dense(refresh=3) == [2, 5, 8]
    assert dense(refresh=1) == list(range(10))
    assert dense(warm_up=2, refresh=4) == [0, 1, 5, 9]
    assert dense(warm_up=AUTO) == []  # not fitted to a run


def test_steps_may_differ_from_sample_to_sample():
    schedule = Policy("falling", 4, warm_up=2).timetable()
    assert schedule.counts([1.0, 0.5, 0.5, 0.0], 64, [1, 1, 2, 7]).tolist() == [64, 64, 16, 8]
    assert schedule.counts([1.0, 0.5, 0.5, 0.0], 64).tolist() == [24, 16, 16, 8]


@pytest.mark.parametrize(
    ("steps", "ratio", "first"), [(100, 4, 3), (50, 4, 3), (20, 4, 2), (20, 2, 3), (8, 4, 1), (7, 4, 1), (100, 20, 2)]
)
def test_automatic_warm_up(steps, ratio, first):
    """Three, but no more than half of what the run may cost; one in any case."""
    schedule = Policy("constant", ratio, warm_up=AUTO).timetable(1 - np.arange(steps) / steps)
    assert schedule.dense_first == first
    counts = schedule.run_counts(1 - np.arange(steps) / steps, 1000)
    assert (counts == 1000).sum() == first
    assert counts[:first].tolist() == [1000] * first


KNOTS = ((0.1, 0.2), (0.5, 1.0), (0.8, 0.4))


def test_a_curve_goes_through_its_knots_and_is_level_beyond():
    curve = Policy(CURVE, 2, knots=KNOTS).timetable()
    np.testing.assert_allclose(curve.fraction([0, 0.1, 0.3, 0.5, 0.65, 0.8, 1]), [0.2, 0.2, 0.6, 1, 0.7, 0.4, 0.4])
    assert Policy(CURVE, 2, knots=((0.5, 3.0),)).timetable().fraction(0.2) == 1  # cut off
    from_json: Any = [[0.5, 0.25]]
    assert Policy(CURVE, 2, knots=from_json).knots == ((0.5, 0.25),)


@given(
    st.sampled_from([*KINDS, CURVE]),
    st.floats(1.01, 8),
    st.integers(4, 120),
    st.integers(-1, 4),
    st.sampled_from([0, 0, 4, 10]),
)
def test_a_fitted_run_costs_the_inverse_ratio(kind, ratio, steps, warm_up, refresh):
    taus = 1 - np.arange(steps) / steps
    policy = Policy(kind, ratio, warm_up=warm_up, refresh=refresh, knots=KNOTS if kind == CURVE else ())
    try:
        fitted = policy.timetable(taus)
    except UsageError:
        first = warm_up if warm_up >= 0 else min(3, max(1, int(steps / ratio / 2)))
        dense = sum(i < first or (refresh and (i - first + 1) % refresh == 0) for i in range(steps))
        assert dense in (steps, *range(int(np.ceil(steps / ratio)), steps))
        return
    tokens = 100_000
    counts = fitted.run_counts(taus, tokens)
    assert counts.mean() == pytest.approx(tokens / ratio, rel=1e-4)
    assert (counts <= tokens).all()
    assert fitted.fitted(taus).run_counts(taus, tokens).tolist() == pytest.approx(counts.tolist(), abs=1)


def test_fitting_keeps_the_shape_of_a_curve():
    taus = np.linspace(1, 0, 21)
    gentle = Policy(CURVE, 8, knots=KNOTS).timetable(taus)
    levels = np.array([kept for _, kept in gentle.knots])
    np.testing.assert_allclose(levels / levels[1], [0.2, 1, 0.4])
    cut = Policy(CURVE, 1.5, knots=KNOTS).timetable(taus)
    assert cut.fraction(0.5) == 1 < dict(cut.knots)[0.5]
    assert np.mean(cut.fraction(taus)) == pytest.approx(1 / 1.5)


def test_dense_steps_that_cost_more_than_the_run_are_refused():
    taus = np.linspace(1, 0.1, 10)
    bad: list[dict[str, Any]] = [{"warm_up": 5}, {"warm_up": 10}, {"refresh": 2}, {"refresh": 1}]
    for options in bad:
        with pytest.raises(UsageError, match="steps that keep everything, of 10, leave nothing for the others at 2x"):
            Policy("constant", 2, **options).timetable(taus)
    Policy("constant", 2, warm_up=4).timetable(taus)
    for options in bad[1::2]:
        assert (Policy("constant", 1, **options).timetable(taus).run_counts(taus, 64) == 64).all()


def test_bad_arguments():
    with pytest.raises(UsageError, match="constant, rising, falling"):
        Policy("sideways", 4)
    with pytest.raises(UsageError, match="not a number"):
        Policy("constant", 0)
    with pytest.raises(UsageError, match="outside"):
        Timetable(Policy("constant", 4), 0.25, centre=2)
    outside: list[float | list[float]] = [1.5, -0.1, float("nan"), []]
    for tau in outside:
        with pytest.raises(UsageError, match="outside"):
            Policy("rising", 4).timetable().fraction(tau)
    bad: list[dict[str, Any]] = [{"warm_up": -2}, {"refresh": -1}]
    for options in bad:
        with pytest.raises(UsageError, match="must not be negative"):
            Policy("constant", 4, **options)
    for mean, first in ((-0.1, 0), (0, 0), (1.5, 0), (0.25, -1)):
        with pytest.raises(UsageError, match="must not be negative"):
            Timetable(Policy("constant", 4), mean, dense_first=first)
    with pytest.raises(UsageError, match="no other schedule has them"):
        Timetable(Policy("constant", 4), 0.25, seen=KNOTS)


@pytest.mark.parametrize(
    ("kind", "knots", "message"),
    [
        (CURVE, (), "a curve needs knots"),
        ("constant", KNOTS, "no other schedule has them"),
        (CURVE, ((0.5, 0.0),), "positive kept fractions"),
        (CURVE, ((0.5, float("nan")),), "positive kept fractions"),
        (CURVE, ((0.5, float("inf")),), "positive kept fractions"),
        (CURVE, ((0.5, 0.5), (0.5, 0.6)), "rising noise levels"),
        (CURVE, ((0.8, 0.5), (0.5, 0.6)), "rising noise levels"),
        (CURVE, ((0.5, 0.5), (1.5, 0.6)), "outside"),
    ],
)
def test_bad_knots(kind, knots, message):
    with pytest.raises(UsageError, match=message):
        Policy(kind, 4, knots=knots)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [1, 2, 4, 16])
@pytest.mark.parametrize("warm_up", [0, AUTO])
def test_a_levelled_run_has_few_lengths_and_the_same_mean(kind, ratio, warm_up):
    taus = 1 - np.arange(50) / 50
    free = Policy(kind, ratio, warm_up=warm_up).timetable(taus)
    levelled = free.levelled(taus, 256)
    counts = levelled.run_counts(taus, 256)
    assert set(counts.tolist()) <= set(levelled.levels)
    assert levelled.levels[-1] == 256
    assert len(levelled.levels) <= LEVELS
    assert abs(counts.mean() - free.run_counts(taus, 256).mean()) <= 0.5
    assert np.array_equal(counts == 256, free.run_counts(taus, 256) == 256)  # dense steps stay what they are
    few = free.levelled(taus, 256, most=2)
    assert len(few.levels) <= 2


def test_levels_hold_for_other_noise_levels_too():
    taus = 1 - np.arange(50) / 50
    levelled = Policy("falling", 4).timetable(taus).levelled(taus, 256)
    others = levelled.fitted(1 - np.arange(33) / 33)
    assert set(others.run_counts(1 - np.arange(33) / 33, 256).tolist()) <= set(levelled.levels)


@pytest.mark.parametrize("levels", [(0, 4), (4, 4), (8, 4)])
def test_levels_that_do_not_rise_are_refused(levels):
    with pytest.raises(UsageError, match="must be positive and rising"):
        Timetable(Policy("constant", 4), 0.25, levels=levels)


def test_found_schedules_expect_what_was_seen():
    knots = ((0.0, 0.5), (1.0, 0.25))
    seen = Timetable(Policy(NATURAL, 4, base=4), 0.3, levels=(10, 40, 64), seen=knots)
    fitted = seen.fitted([1.0, 0.5])
    assert (fitted.knots, fitted.mean, fitted.expected) == (knots, 0.3, 0.3)
    assert fitted.run_counts([1.0, 0.5, 0.0], 64).tolist() == [16, 24, 32]  # means over samples: no levels
    fewer = seen.dropping(8)
    assert (fewer.ratio, fewer.expected, fewer.policy.dropped) == (8, 0.15, 0.5)
    assert fewer.knots == ((0.0, 0.25), (1.0, 0.125))
    assert fewer.levels == (5, 20, 64)  # or the dropped tokens would be filled up again
    assert Policy(NATURAL, 4, base=4).timetable().expected == 0.25
    with pytest.raises(UsageError, match="found for 4x: convert again for 8x"):
        Policy(DIFFERENCE, 4).timetable().dropping(8)


@pytest.mark.parametrize(
    ("kind", "more"),
    [(NATURAL, {}), (NATURAL, {"base": -3.0}), (NATURAL, {"base": math.nan}), (DIFFERENCE, {"threshold": math.nan})],
)
def test_found_schedules_need_what_they_find_by(kind, more):
    with pytest.raises(UsageError, match="needs the base that its router was made for"):
        Policy(kind, 4, **more)


def test_expected_sizes_are_spread_over_the_steps():
    """Steps of 4, 16 or 64 tokens that add up to a mean between them."""
    schedule = Timetable(Policy(DIFFERENCE, 2), 0.5, levels=(4, 16, 64), seen=((0.0, 0.5), (1.0, 0.5)))
    counts = schedule.run_counts(np.linspace(1, 0.05, 20), 64)
    assert set(counts.tolist()) <= {4, 16, 64}
    assert counts.mean() == pytest.approx(32, abs=1.5)


def test_levels_of_found_schedules():
    taus = np.linspace(1, 0.1, 10)
    assert Policy(DIFFERENCE, 4).timetable().levelled(taus, 64, 6, sizes=(64, 4, 16)).levels == (4, 16, 64)
    even = Policy(NATURAL, 4, base=4).timetable().levelled(taus, 64, 6).levels
    assert (even[0], even[-1], len(even)) == (8, 64, 6)


def test_levels_are_among_the_sizes_that_a_model_can_keep():
    taus = np.linspace(1, 0.02, 50)
    levels = Policy("falling", 4).timetable().levelled(taus, 64, 6, sizes=(4, 9, 16, 25, 36, 49, 64)).levels
    assert {*levels} <= {4, 9, 16, 25, 36, 49, 64}
    assert levels[-1] == 64


# Bundles


RUN = 1 - np.arange(20) / 20


@pytest.mark.parametrize(
    "made",
    [
        Policy("falling", 2).timetable(),
        Policy("rising", 2, warm_up=AUTO, refresh=5).timetable(RUN),
        Policy("constant", 1, warm_up=3).timetable(RUN),
        Policy(CURVE, 2, warm_up=1, knots=KNOTS).timetable(RUN).levelled(RUN, 64),
        Policy(CURVE, 1, knots=KNOTS).timetable(RUN),
        Policy(NATURAL, 4, base=2).timetable(),
        Timetable(Policy(NATURAL, 4, base=4), 0.3, levels=(10, 64), seen=((0.0, 0.5), (1.0, 0.25))),
        Policy(DIFFERENCE, 4, threshold=0.1).timetable(RUN),
    ],
)
def test_a_timetable_comes_back_from_json(made):
    stored = made.as_dict()
    assert Timetable.from_dict(json.loads(json.dumps(stored))) == made
    assert {*stored} == {*UNFITTED}


UNFITTED: dict[str, Any] = {  # as bundles before had it: zeros until it was fitted
    "kind": "falling",
    "ratio": 4.0,
    "centre": 0.5,
    "warm_up": 2,
    "refresh": 0,
    "mean": 0.0,
    "dense_first": 0,
    "knots": [],
    "levels": [],
    "base": 0.0,
    "threshold": 0.0,
}


def test_a_schedule_that_was_stored_before_it_was_fitted():
    assert Timetable.from_dict(UNFITTED) == Policy("falling", 4, warm_up=2).timetable()
    assert Timetable.from_dict({"kind": "constant", "ratio": 2}) == Policy("constant", 2).timetable()
    seen = {**UNFITTED, "kind": NATURAL, "warm_up": 0, "base": 4.0, "knots": [[0.0, 0.5], [1.0, 0.25]], "mean": 0.3}
    assert Timetable.from_dict(seen) == Timetable(Policy(NATURAL, 4, base=4), 0.3, seen=((0.0, 0.5), (1.0, 0.25)))
    with pytest.raises(TypeError, match="a schedule has no centred"):
        Timetable.from_dict({**UNFITTED, "centred": 1})
