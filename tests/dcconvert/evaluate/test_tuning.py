"""What a tuner searches for, with trials whose quality is made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dcconvert.evaluate.tuning import Trial, Tuner, run_time
from dcconvert.passes.ir.errors import UsageError
from dcconvert.sampling.default_tables import original_run
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Sampler

NOTHING: Any = None


class Rising(Tuner):
    """Every step that a budget has more is worth a decibel; the original's own solver is better still."""

    def trials(self, budget: float, seen: Any, fresh: Any, tick: Callable[[str], None]) -> list[Trial]:
        tick("tried")
        table = original_run("flow", int(budget), "graded")
        rows: list[tuple[str, RunTable | Sampler, float]] = [
            ("original, unipc", Sampler("flow", int(budget), "unipc"), budget + 5),
            ("graded", table, budget),
        ]
        return [Trial(name, run, budget, torch.full((3,), float(psnr))) for name, run, psnr in rows]


@pytest.mark.parametrize("wanted", [1.5, 2, 7.5, 31, 49.5])
def test_the_least_budget_is_the_one_before_which_quality_is_missed(wanted):
    """Only tables count: they are what is stored."""
    tried: list[str] = []
    budget, trials = Rising(NOTHING, "flow", 0.0).least_budget(wanted, 50, NOTHING, NOTHING, tried.append)
    assert budget == max(2, -(-wanted // 1))
    assert trials[1].mean == budget
    assert len(tried) <= 7


def test_a_quality_that_no_budget_reaches_is_one_line():
    with pytest.raises(UsageError, match=r"no run of up to 20 computed steps reaches 30 dB: the best has 20\.0 dB"):
        Rising(NOTHING, "flow", 0.0).least_budget(30, 20, NOTHING, NOTHING, lambda _: None)


def test_the_time_of_a_run_is_that_of_its_steps():
    times = {name: {"median": value} for name, value in (("original", 10.0), ("computed", 11.0), ("skipped", 0.5))}
    assert run_time(7, 7, times) == 70
    assert run_time(4, 3, times) == 33.5


def test_a_pattern_is_as_long_as_its_cost_allows():
    """With costly skipped steps, as on a slow host, fewer of them fit."""
    cheap, dear = (Tuner(NOTHING, "flow", cost).affordable(9, 1) for cost in (0.01, 0.5))
    assert cheap is not None
    assert dear is not None
    assert len(dear) < len(cheap)
    for full, cost in ((cheap, 0.01), (dear, 0.5)):
        assert sum(full) + cost * (len(full) - sum(full)) <= 9
