"""Which steps are computed, in which slot their updates lie, and the lines through them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.runtime.update_history import UpdateHistory


def run(history: UpdateHistory, fraction: float, steps: int) -> list[bool]:
    """Which steps of one sample are computed."""
    found = []
    for step in range(steps):
        tau = np.array([1 - step / steps])
        full = history.due(np.array([fraction]))
        history.note(tau, full)
        found.append(bool(full[0]))
    return found


@pytest.mark.parametrize(("fraction", "every"), [(1, 1), (0.5, 2), (0.25, 4), (0.1, 10)])
def test_a_fraction_computes_evenly_spaced_steps(fraction, every):
    assert run(UpdateHistory(1, 3), fraction, 20) == [step % every == 0 for step in range(20)]


@given(st.floats(0.02, 1))
def test_about_as_many_steps_are_computed_as_asked_for(fraction):
    computed = sum(run(UpdateHistory(1, 3), fraction, 100))
    assert abs(computed - 100 * fraction) <= 1 + 1e-6


def test_the_first_step_after_a_restart_is_computed():
    history = UpdateHistory(2, 3)
    for _ in range(2):
        history.note(np.array([0.9, 0.9]), history.due(np.array([0.1, 0.1])))
    history.restart([1])
    assert history.due(np.array([0.1, 0.1])).tolist() == [False, True]


def test_noise_may_only_fall_and_a_restart_forgets_it():
    history = UpdateHistory(2, 3)
    history.note(np.array([0.5, 0.5]), np.array([True, True]))
    history.check(np.array([0.5, 0.4]))
    with pytest.raises(UsageError, match=r"noise level of sample 1 rose from 0\.5 to 0\.6"):
        history.check(np.array([0.5, 0.6]))
    history.restart([1])
    history.check(np.array([0.5, 0.6]))


def test_lines_by_hand():
    """One update is held; two give u_0 + (u_0 - u_1) * ahead, followed no further than twice their distance."""
    history = UpdateHistory(3, 3)
    history.note(np.array([0.8, 0.8, 0.8]), np.array([True, True, True]))
    history.note(np.array([0.6, 0.6, 0.6]), np.array([False, True, True]))
    found = history.line(np.array([0.5, 0.5, 0.1]))
    assert found[:, 0].tolist() == [1, 0, 0]
    assert found[:, 1].tolist() == pytest.approx([1.5, -0.5, 0])
    assert found[:, 2].tolist() == pytest.approx([3, -2, 0])


def test_weights_go_to_the_slots_that_hold_the_updates():
    history = UpdateHistory(2, 3)
    for full in ([True, True], [True, False], [True, False], [True, True]):
        history.note(np.array([0.5, 0.5]), np.array(full))
    assert history.newest.tolist() == [0, 1]  # of four and of two
    newest_first = np.array([[1.0, 1], [2, 2], [3, 3]])
    assert history.by_slot(newest_first).T.tolist() == [[1, 3, 2], [2, 1, 3]]
