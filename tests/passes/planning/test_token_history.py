"""The bookkeeping of mode carry: slots, ages and weights, without any model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.spec import SLOTS
from dcconvert.passes.planning.token_history import REACH, History
from tests.passes.carry_harness import Memory

EVERY = np.ones((1, 4), bool)
NONE = np.zeros((1, 4), bool)


def only(*tokens: int) -> np.ndarray:
    return np.isin(np.arange(4), tokens)[None]


def level(tau: float, batch: int = 1) -> np.ndarray:
    return np.full(batch, tau)


def after(*steps: tuple[float, np.ndarray]) -> History:
    """A history of one sample with 4 tokens that made these steps."""
    history = History(1, 4)
    for tau, keep in steps:
        history.write(keep, level(tau))
    return history


def test_what_was_just_computed_is_read_as_it_is():
    history = after((1.0, EVERY), (0.8, only(1, 2)), (0.3, only(0, 2)))
    weights = history.weights(level(0.3))
    for token in (0, 2):
        newest = history.newest[0, token]
        assert weights[newest, 0, token] == 1
        assert weights[1 - newest, 0, token] == 0


def test_a_token_computed_once_is_read_as_it_was():
    history = after((1.0, EVERY), (0.5, only(0)), (0.1, only(0)))
    weights = history.weights(level(0.1))
    newest = history.newest[0, 1:]
    assert (np.take_along_axis(weights[:, 0, 1:], newest[None], 0) == 1).all()
    assert (np.take_along_axis(weights[:, 0, 1:], 1 - newest[None], 0) == 0).all()


def test_a_line_goes_on_and_stops_at_its_reach():
    history = after((1.0, EVERY), (0.8, EVERY))
    newer = history.newest[0, 0]

    def found(tau: float) -> list[float]:
        weights = history.weights(level(tau))[:, 0, 0]
        return [float(weights[newer]), float(weights[1 - newer])]

    assert found(0.7) == pytest.approx([1.5, -0.5])  # half a gap on
    assert found(0.8 - 0.2 * REACH) == pytest.approx([1 + REACH, -REACH])
    assert found(0.0) == pytest.approx([1 + REACH, -REACH])


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps of two samples with their own falling noise (some levels twice) and random keep masks, the first full."""
    count = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gaps = rng.choice([0.0, 0.01, 0.05, 0.2], (count, 2))
    taus = 1 - np.cumsum(gaps, 0)
    keeps = rng.random((count, 2, 4)) < rng.random()
    keeps[0] = True
    return list(zip(taus, keeps, strict=True))


def with_values(steps: list[tuple[np.ndarray, np.ndarray]], value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What slots and weights give after each step [steps, B, N], and what the definition gives.

    value [steps, B, N] is what every token would be if it were computed.
    """
    history, slots, memory = History(2, 4), np.zeros((SLOTS, 2, 4)), Memory()
    found, wanted = [], []
    for (taus, keep), now in zip(steps, value, strict=True):
        slot = history.write(keep, taus)
        for b, n in np.argwhere(keep).tolist():
            slots[slot[b, n], b, n] = now[b, n]
            memory.write((b, n), taus[b], now[b, n])
        found.append((history.weights(taus) * slots).sum(0))
        wanted.append([[memory.read((b, n), taus[b]) for n in range(4)] for b in range(2)])
    return np.array(found), np.array(wanted)


@given(runs(), st.integers(0, 1000))
def test_slots_and_weights_against_the_definition(steps, seed):
    found, wanted = with_values(steps, np.random.default_rng(seed).normal(size=(len(steps), 2, 4)))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@given(runs())
def test_weights_sum_to_one(steps):
    found, _ = with_values(steps, np.ones((len(steps), 2, 4)))
    np.testing.assert_allclose(found, 1, atol=1e-5)


@given(st.lists(st.floats(0.01, 0.1), min_size=3, max_size=6), st.integers(0, 1000))
def test_values_on_a_line_are_recalled_exactly(gaps, seed):
    """Each token changes linearly with the noise, at its own speed; computed twice, it may then be dropped."""
    levels = 1 - np.cumsum([0.0, *gaps])
    rng = np.random.default_rng(seed)
    keeps = rng.random((len(levels), 2, 4)) < 0.5
    keeps[:2] = True
    steps = [(np.full(2, tau), keep) for tau, keep in zip(levels, keeps, strict=True)]
    value = rng.normal(size=(2, 4)) + rng.normal(size=(2, 4)) * levels[:, None, None]
    found, _ = with_values(steps, value)
    computed: dict[tuple[int, int], list[float]] = {}
    for step, (tau, keep) in enumerate(zip(levels.tolist(), keeps, strict=True)):
        for b, n in np.ndindex(2, 4):
            past = computed.setdefault((b, n), [])
            past.extend([tau] if keep[b, n] else [])
            if step and past[-1] - tau <= REACH * (past[-2] - past[-1]):
                assert found[step, b, n] == pytest.approx(value[step, b, n], abs=1e-5)


def test_the_same_noise_level_twice_overwrites_the_newest():
    history = after((1.0, EVERY), (0.8, EVERY))
    before, gaps = history.newest.copy(), history.gaps()
    slot = history.write(only(0, 3), level(0.8))
    np.testing.assert_array_equal(slot, before)
    np.testing.assert_array_equal(history.gaps(), gaps)
    np.testing.assert_allclose(gaps, 0.2)
    assert history.written.tolist() == [[2, 2, 2, 2]]
    assert history.age.tolist() == [[0, 1, 1, 0]]
    assert history.write(only(1), level(0.7))[0, 1] == 1 - before[0, 1]


def test_the_same_noise_level_twice_writes_what_the_first_look_left_out():
    history = after((1.0, EVERY), (0.8, only(0)))
    slot = history.write(only(0, 1), level(0.8))
    assert history.written.tolist() == [[2, 2, 1, 1]]
    np.testing.assert_allclose(history.gaps(), [[0.2, 0.2, 0, 0]])
    assert slot[0, 0] == slot[0, 1] != slot[0, 2]


def test_a_computed_token_goes_to_the_older_slot_and_others_stay():
    history = History(1, 4)
    first = history.write(EVERY, level(1.0))
    second = history.write(only(1), level(0.9))
    third = history.write(only(1, 2), level(0.8))
    assert (second != first).tolist() == [[False, True, False, False]]
    assert (third != second).tolist() == [[False, True, True, False]]
    assert set(first.ravel().tolist()) <= set(range(SLOTS))


def test_ages_steps_and_times():
    history = after((1.0, EVERY), (0.75, only(1)), (0.25, only(2)))
    assert history.age.tolist() == [[2, 1, 0, 2]]
    assert history.written.tolist() == [[1, 2, 2, 1]]
    assert history.steps.tolist() == [3]
    assert history.tau.tolist() == [0.25]
    np.testing.assert_allclose(history.elapsed(level(0.25)), [[0.75, 0.5, 0, 0.75]])
    np.testing.assert_allclose(history.gaps(), [[0, 0.25, 0.75, 0]])


def test_drift_is_distance_by_noise_level_and_that_of_the_fastest_where_unknown():
    history = after((1.0, EVERY), (0.75, only(1, 2)))
    history.distance = np.array([[9.0, 0.5, 2.0, 9.0]])
    np.testing.assert_allclose(history.drift(), [[8, 2, 8, 8]])


def test_drift_is_one_as_long_as_nothing_was_computed_twice():
    history = after((1.0, EVERY))
    np.testing.assert_array_equal(history.drift(), np.ones((1, 4)))


def test_restart_forgets_these_samples_and_no_others():
    rng = np.random.default_rng(0)
    history, fresh = History(3, 4), History(3, 4)
    for tau in (1.0, 0.8, 0.5):
        history.write(rng.random((3, 4)) < 0.6, level(tau, 3))
        history.distance = rng.random((3, 4))
    arrays = ("steps", "tau", "latest", "before", "newest", "written", "age", "distance")
    before = {name: getattr(history, name).copy() for name in arrays}
    history.restart([0, 2])
    for name in arrays:
        for sample, wanted in ((0, getattr(fresh, name)), (1, before[name]), (2, getattr(fresh, name))):
            np.testing.assert_array_equal(getattr(history, name)[sample], wanted[sample], f"{name} of {sample}")
    for name in arrays:
        assert (before[name][2] != getattr(fresh, name)[2]).any(), name  # there was something to forget


def test_rising_noise_is_refused_and_the_sample_named():
    history = History(3, 4)
    history.check(np.array([1.0, 0.5, 0.0]))
    history.write(np.ones((3, 4), bool), np.array([0.9, 0.5, 0.2]))
    history.check(np.array([0.9, 0.5 + 1e-7, 0.0]))  # rounding
    with pytest.raises(UsageError, match=r"noise level of sample 1 rose from 0\.5 to 0\.6 .*start a new run"):
        history.check(np.array([0.9, 0.6, 0.1]))
    history.restart([1])
    history.check(np.array([0.9, 0.6, 0.1]))


def test_a_written_noise_level_is_a_copy():
    history, taus = History(1, 4), level(0.5)
    history.write(EVERY, taus)
    taus[:] = 0.1
    assert history.tau.tolist() == [0.5]


def test_a_step_that_computes_nothing_of_a_token_changes_no_slot_of_it():
    history = after((1.0, EVERY), (0.9, EVERY))
    times, newest = history.latest.copy(), history.newest.copy()
    history.write(NONE, level(0.6))
    np.testing.assert_array_equal(history.latest, times)
    np.testing.assert_array_equal(history.newest, newest)
