"""SparseDiT's rates, and the options that a ratio decides."""

from __future__ import annotations

import pytest

from dcconvert.passes.methods import method_of
from dcconvert.passes.methods.sparsedit import PRUNING, SparseDiT
from dcconvert.passes.planning.pooled_planner import PooledPlanner
from dcconvert.passes.planning.schedule import CURVE


@pytest.mark.parametrize(("low", "high"), PRUNING)
def test_the_published_rates_at_their_mean(low, high):
    """r(t) is r_min up to T/4 and (4T-4t)/(3T) r_min + (4t-T)/(3T) r_max from there on."""
    mean = 1 - (low / 4 + 3 / 4 * (low + high) / 2)
    schedule = SparseDiT.policy(1 / mean).timetable()
    assert schedule.kind == CURVE
    for t in (0.0, 0.1, 0.25, 0.4, 0.75, 1.0):
        rate = low if t < 0.25 else (4 - 4 * t) / 3 * low + (4 * t - 1) / 3 * high
        assert 1 - float(schedule.fraction(t)) == pytest.approx(rate, abs=1e-3)


def test_the_coarsest_grid_is_that_of_the_noisiest_step():
    made = method_of("sparsedit", 4)
    assert isinstance(made, SparseDiT)
    assert made.fewest == pytest.approx(float(SparseDiT.policy(4).timetable().fraction(1.0)))
    assert (made.head_blocks, made.tail_blocks) == (2, 2)
    assert isinstance(made.planner((8, 8)), PooledPlanner)
    assert not made.keeps_original
