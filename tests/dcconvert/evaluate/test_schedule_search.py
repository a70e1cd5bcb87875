"""The search of `calibrate`, on scores that are known beforehand."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from dcconvert.evaluate.schedule_search import CONSTANT, KNOTS, WARM_UPS, Candidate, Search, step_counts
from dcconvert.passes.ir.errors import UsageError
from dcconvert.sampling.samplers import Sampler
from tests.dcconvert.harness import TOKENS

BUDGET, MOST = 12.5, 50


def evenly(steps):
    return 1 - np.arange(steps) / steps


def search(score, budget=BUDGET, most=MOST, taus=evenly):
    return Search(budget, most, TOKENS, taus, score)


def shape_of(schedule):
    levels = np.array([kept for _, kept in schedule.knots])
    return levels / levels.max()


def closeness(steps, warm_up, shape):
    """A score that is highest at exactly these."""

    def score(tried, schedule):
        off = math.log(tried / steps) ** 2 + 0.01 * (schedule.policy.warm_up - warm_up) ** 2
        return 40 - off - 0.05 * float(np.square(np.log(shape_of(schedule) / shape)).sum())

    return score


@pytest.mark.parametrize(
    ("steps", "warm_up", "shape"),
    [(50, 5, (1, 1, 1)), (25, 3, (0.3, 0.6, 1)), (15, 2, (1, 0.7, 0.4)), (35, 6, (0.05, 0.3, 1)), (21, 1, (1, 0.2, 1))],
)
def test_the_best_of_known_scores_is_found(steps, warm_up, shape):
    best, *others = search(closeness(steps, warm_up, np.array(shape))).run()
    assert (best.candidate.steps, best.candidate.warm_up) == (steps, warm_up)
    assert best.candidate.shape == pytest.approx(shape, rel=0.25)
    scores = [best.score, *(trial.score for trial in others)]
    assert scores == sorted(scores, reverse=True)


def test_steps_and_shape_may_depend_on_each_other():
    """The best constant curve has few steps, the best of all is steep and has many."""

    def score(steps, schedule):
        steepness = 1 - shape_of(schedule)[0]
        return 30 + 10 * steepness * math.log(steps / 20) - 3 * math.log(steps / 20) ** 2

    best = search(score).run()[0]
    assert best.candidate.steps == MOST
    assert best.candidate.shape[0] < 0.2


@pytest.mark.parametrize("solver", ["euler", "dpm++", "unipc"])
@pytest.mark.parametrize(("budget", "most"), [(50 / 3, 50), (2, 20)])
def test_every_candidate_costs_the_budget(solver, budget, most):
    taus_of = cache(lambda steps: Sampler("flow", steps, solver).taus)
    trials = search(lambda steps, schedule: -steps, budget, most, taus_of).run()
    assert len(trials) > 5
    for trial in trials:
        assert len(trial.counts) == trial.candidate.steps <= most
        assert sum(trial.counts) / TOKENS == pytest.approx(budget, abs=trial.candidate.steps / 2 / TOKENS)
        assert trial.counts[: trial.candidate.warm_up] == (TOKENS,) * trial.candidate.warm_up
        assert trial.candidate.warm_up in WARM_UPS
        assert trial.schedule.ratio == pytest.approx(trial.candidate.steps / budget)
        taus = taus_of(trial.candidate.steps)
        again = trial.schedule.fitted(taus)  # as `sample` and `load` do with a stored one
        assert tuple(again.run_counts(taus, TOKENS)) == trial.counts


def test_no_counts_are_scored_twice():
    seen = []

    def score(steps, schedule):
        seen.append(tuple(schedule.run_counts(evenly(steps), TOKENS)))
        return len(seen) % 7

    assert len(search(score).run()) == len(seen) == len(set(seen)) < 150


def test_a_score_that_is_not_finite_never_wins():
    best, *others = search(lambda steps, schedule: 20.0 if steps == 25 else math.nan).run()
    assert (best.candidate.steps, best.score) == (25, 20.0)
    assert min(trial.score for trial in others) == -math.inf


def test_a_constant_curve_is_a_curve_at_one_level():
    schedule = Candidate(25, 3).schedule(BUDGET, evenly(25))
    assert Candidate(25, 3).shape == CONSTANT
    assert [tau for tau, _ in schedule.knots] == list(KNOTS)
    assert schedule.fraction(evenly(25)[3:]) == pytest.approx((BUDGET - 3) / 22)


@pytest.mark.parametrize(("budget", "most"), [(12.5, 50), (2, 4), (20, 24), (3.3, 1000)])
def test_numbers_of_steps_go_from_the_budget_to_the_most(budget, most):
    counts = step_counts(budget, most)
    assert counts == sorted(set(counts))
    assert counts[0] == math.ceil(1.2 * budget)
    assert counts[-1] == most
    assert all(after <= 1.35 * before + 1 for before, after in pairwise(counts))


@pytest.mark.parametrize(
    ("budget", "most", "message"),
    [(1.9, 50, "1.9 full steps are too few"), (12.5, 14, "leaves nothing to choose"), (20, 20, "at least 1.2x")],
)
def test_a_budget_that_leaves_nothing_to_search(budget, most, message):
    with pytest.raises(UsageError, match=message):
        step_counts(budget, most)
