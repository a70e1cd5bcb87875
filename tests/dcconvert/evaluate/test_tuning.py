"""What a tuner searches for, with trials whose quality is made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dcconvert.evaluate.tuning import CLOSE, Gain, Trial, Tuner, run_time
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
    assert run_time(7, 7, times, original=True) == 70
    assert run_time(7, 7, times) == 77
    assert run_time(4, 3, times) == 33.5


def test_a_pattern_is_as_long_as_its_cost_allows():
    """With costly skipped steps, as on a slow host, fewer of them fit."""
    cheap, dear = (Tuner(NOTHING, "flow", cost).affordable(9, 1) for cost in (0.01, 0.5))
    assert cheap is not None
    assert dear is not None
    assert len(dear) < len(cheap)
    for full, cost in ((cheap, 0.01), (dear, 0.5)):
        assert sum(full) + cost * (len(full) - sum(full)) <= 9 * CLOSE
    assert sum(cheap) == 9  # as many as without skipped steps, which cost next to nothing here


def test_a_limit_is_not_exceeded_by_cheap_skipped_steps():
    full = Tuner(NOTHING, "flow", 0.01, tolerance=1.0).affordable(9, 1)
    assert full is not None
    assert sum(full) == 8
    assert sum(full) + 0.01 * (len(full) - sum(full)) <= 9


@pytest.mark.parametrize(("better", "enough"), [((1, 1, 1), True), ((-3, 1, 1), True), ((-1.1, -1, -0.9), False)])
def test_a_table_is_good_enough_unless_images_show_that_it_is_worse(better, enough):
    """The gain is that of each image: how much images differ from each other does not matter."""
    base = torch.tensor([20.0, 40.0, 60.0])
    given, default = (Trial("", NOTHING, 0.0, psnr) for psnr in (base + torch.tensor(better), base))
    assert Gain.of(given, default).enough is enough


def test_a_table_is_good_enough_where_the_default_has_no_images():
    given, default = (Trial("", NOTHING, 0.0, torch.full((3,), psnr)) for psnr in (30.0, float("nan")))
    assert Gain.of(given, default).enough
