"""From scores and timesteps to a plan: how many tokens a step keeps, and which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.ir.spec import StateSpec
from dcconvert.passes.methods import method_of
from dcconvert.passes.modules.routers import CARRY_ROUTERS, PLAIN_ROUTERS
from dcconvert.passes.planning.carry_plan import CarryPlan
from dcconvert.passes.planning.chunk_plan import Plan
from dcconvert.passes.planning.schedule import NATURAL, Policy, Timetable
from dcconvert.passes.planning.step_planner import StepPlanner, most_urgent
from dcconvert.passes.planning.token_history import History
from tests.passes.carry_harness import carried, roomy
from tests.passes.harness import TOKENS, random_keep

HALF = Policy("constant", 2).timetable()
SCORES = np.linspace(1, 0.1, TOKENS)[None]  # as a router gives: distinct, from 0 to 1


def planner(schedule: Timetable = HALF, **options: object) -> StepPlanner:
    return StepPlanner(carried("tiny")[0].spec, method_of(**{"mode": "carry", **options}), schedule)  # type: ignore[arg-type]


def history_of(*steps: tuple[float, list[int]], batch: int = 1) -> History:
    """A history whose samples all computed these tokens at these noise levels, everything first."""
    history = History(batch, TOKENS)
    for number, (tau, kept) in enumerate(steps):
        keep = np.isin(np.arange(TOKENS), kept) if number else np.ones(TOKENS, bool)
        history.write(np.tile(keep, (batch, 1)), np.full(batch, tau))
    return history


def chosen(given: StepPlanner, history: History, tau: float, count: int, scores: np.ndarray = SCORES) -> list[int]:
    urgency = given.method.urgency(history, scores, np.array([count]), np.array([tau]))
    return np.flatnonzero(most_urgent(urgency, np.array([count]))[0]).tolist()


# Which


def test_age_takes_the_longest_uncomputed():
    history = history_of((1.0, []), (0.9, [0, 1, 2, 3]), (0.8, [4, 5]))
    assert chosen(planner(router="age"), history, 0.7, 2) == [6, 7]
    assert chosen(planner(router="age"), history, 0.7, 6) == [0, 1, 2, 3, 6, 7]


def test_age_counts_noise_levels_not_steps():
    """Token 0 waited one long step, token 1 two short ones."""
    history = history_of((1.0, []), (0.99, list(range(2, 8))), (0.98, [0, *range(2, 8)]))
    assert chosen(planner(router="age"), history, 0.5, 1) == [1]
    history = history_of((1.0, []), (0.6, list(range(TOKENS))), (0.59, [1, *range(2, 8)]))
    assert chosen(planner(router="age"), history, 0.58, 1) == [0]


def test_drift_is_elapsed_noise_times_the_root_of_the_speed():
    history = history_of((1.0, []), (0.8, [0, 1, 2, 3]), (0.6, [4, 5, 6, 7]))
    rng = np.random.default_rng(0)
    history.distance = rng.random((1, TOKENS))
    gaps = np.array([0.2] * 4 + [0.4] * 4)
    elapsed = np.array([0.3] * 4 + [0.1] * 4)
    level = elapsed * np.sqrt(history.distance[0] / gaps)
    found = planner(router="drift").method.urgency(history, SCORES, np.array([4]), np.array([0.5]))
    np.testing.assert_allclose(found[0], level, atol=1e-5)
    assert chosen(planner(router="drift"), history, 0.5, 3) == sorted(np.argsort(-level)[:3].tolist())


def test_drift_of_tokens_computed_once_is_one():
    history = history_of((1.0, []))
    found = planner().method.urgency(history, np.zeros((1, TOKENS)), np.array([4]), np.array([0.75]))
    np.testing.assert_allclose(found, 0.25, rtol=1e-5)


@pytest.mark.parametrize("router", PLAIN_ROUTERS)
def test_other_routers_multiply_elapsed_noise_by_their_scores(router):
    history = history_of((1.0, []), (0.8, [0, 1, 2, 3]))
    scores = np.random.default_rng(1).random((1, TOKENS))
    wanted = np.array([0.2] * 4 + [0.4] * 4) * scores[0]
    found = planner(router=router).method.urgency(history, scores, np.array([4]), np.array([0.6]))
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)
    assert chosen(planner(router=router), history, 0.6, 3, scores) == sorted(np.argsort(-wanted)[:3].tolist())


@pytest.mark.parametrize("router", ["drift", "age"])
def test_ties_go_by_scores_then_by_index(router):
    history = history_of((1.0, []))
    scores = np.array([[0.1, 0.5, 0.5, 0.9, 0.5, 0.2, 0.3, 0.5]])
    assert chosen(planner(router=router), history, 0.9, 1, scores) == [3]
    assert chosen(planner(router=router), history, 0.9, 3, scores) == [1, 2, 3]
    assert chosen(planner(router=router), history, 0.9, 3, np.full((1, TOKENS), 0.5)) == [0, 1, 2]
    assert chosen(planner(router=router), history, 1.0, 3, scores) == [1, 2, 3]  # no noise passed: a second look


def waits(max_staleness: float, count: int, steps: int = 40) -> int:
    """The longest that token 0, whose update never moves, waits between computations; the others race."""
    given = planner(max_staleness=max_staleness)
    history, longest = history_of((1.0, []), (0.99, list(range(TOKENS)))), 0
    history.distance = np.ones((1, TOKENS))
    for step in range(steps):
        history.distance[0, 0] = 0
        taus = np.array([0.98 - step * 0.02])
        given.carry(history, SCORES[:, ::-1], np.array([count]), taus)
        longest = max(longest, int(history.age[0, 0]))
    return longest


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_starving_token_is_computed_however_still_it_is(count):
    """It comes before all others once it waited `max_staleness` times the round-robin interval (N / count steps)."""
    assert waits(max_staleness=1e9, count=count) == 40
    for max_staleness in (1.5, 3):
        assert waits(max_staleness, count) == max_staleness * TOKENS / count


def computed(router: str, max_staleness: float, count: int, steps: int) -> list[list[int]]:
    """The tokens that each step of a run computes; tokens 0 to 3 are still and score lowest, the others race."""
    given, history = (
        planner(router=router, max_staleness=max_staleness),
        history_of((1.0, []), (0.99, list(range(TOKENS)))),
    )
    scores, found = np.array([[1e-6, 2e-6, 3e-6, 4e-6, 0.7, 0.8, 0.9, 1.0]]), []
    for step in range(steps):
        history.distance = np.where(np.arange(TOKENS) < 4, 0.0, 1.0)[None]
        plan = given.carry(history, scores, np.array([count]), np.array([0.98 - step * 0.9 / steps]))
        found.append(np.flatnonzero(plan.keep[0]).tolist())
    return found


@pytest.mark.parametrize("router", ["drift", *PLAIN_ROUTERS])
@pytest.mark.parametrize(("max_staleness", "count"), [(1.5, 2), (2, 4), (3, 1)])
def test_every_token_is_computed_again_in_time(router, max_staleness, count):
    """None waits longer than `max_staleness` allows, plus the turns of those that starve with it, at any score."""
    found = computed(router, max_staleness, count, 60)
    allowed = int(np.ceil(max_staleness * TOKENS / count)) + TOKENS // count
    for token in range(TOKENS):
        last = [-1, *(step for step, kept in enumerate(found) if token in kept), len(found)]
        assert max(np.diff(last)) <= allowed, token


@pytest.mark.parametrize("router", CARRY_ROUTERS)
def test_of_several_starving_tokens_the_one_that_waited_longest_goes_first(router):
    """In the order of their ages, one after the other, though younger ones moved faster and score higher."""
    given, rest = planner(router=router, max_staleness=1.0), [4, 5, 6, 7]
    looks = [[0, 1, 2, *rest], [0, 2, *rest], [2, *rest], *[rest] * TOKENS]  # at one noise level: 3 is left out first
    history = history_of((1.0, []), (0.9, list(range(TOKENS))), *[(0.9, kept) for kept in looks])
    better = np.array([2, 1, 3, 0, 4, 4, 4, 4])  # the younger
    order = []
    for step in range(4):
        history.distance = 10.0 ** better[None]
        plan = given.carry(history, 0.1 + 0.2 * better[None], np.array([1]), np.array([0.8 - step * 0.001]))
        order += np.flatnonzero(plan.keep[0]).tolist()
    assert order == [3, 1, 0, 2]


@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([2, 5, 1000]))
def test_most_urgent_against_sorting(seed, batch, levels):
    rng = np.random.default_rng(seed)
    urgency = rng.integers(0, levels, (batch, TOKENS)).astype(float)  # ties
    counts = rng.integers(1, TOKENS + 1, batch)
    keep = most_urgent(urgency, counts)
    for row, mask, count in zip(urgency.tolist(), keep, counts.tolist(), strict=True):
        assert np.flatnonzero(mask).tolist() == sorted(sorted(range(TOKENS), key=lambda n: (-row[n], n))[:count])


@pytest.mark.parametrize("router", CARRY_ROUTERS)
def test_a_choice_is_deterministic_and_a_sample_is_alone(router):
    rng = np.random.default_rng(2)
    counts, scores = np.array([3, 5, 1]), rng.random((3, TOKENS))

    def plans(samples: list[int]) -> list[np.ndarray]:
        given = planner(router=router)
        history, found = History(len(samples), TOKENS), []
        noise = np.random.default_rng(3)
        for step, tau in enumerate((1.0, 0.9, 0.6, 0.5)):
            wanted = counts if step else np.full(3, TOKENS)
            found.append(given.carry(history, scores[samples], wanted[samples], np.full(len(samples), tau)).keep)
            history.distance = noise.random((3, TOKENS))[samples]
        return found

    everyone, again = plans([0, 1, 2]), plans([0, 1, 2])
    np.testing.assert_array_equal(everyone, again)
    np.testing.assert_array_equal([keep[1:2] for keep in everyone], plans([1]))
    np.testing.assert_array_equal([keep[[2, 0, 1]] for keep in everyone], plans([2, 0, 1]))
    assert [keep.sum(1).tolist() for keep in everyone[1:]] == [[3, 5, 1]] * 3


def test_urgency_may_be_adjusted():
    seen: list[np.ndarray] = []

    def backwards(urgency: np.ndarray) -> np.ndarray:
        seen.append(urgency)
        return -urgency

    history = history_of((1.0, []), (0.9, [0, 1, 2]))
    plan = planner(router="age").carry(history, SCORES, np.array([3]), np.array([0.8]), None, backwards)
    assert plan.keep[0].tolist() == [True] * 3 + [False] * 5
    assert seen[0].shape == (1, TOKENS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_before_anything_is_noted(bad):
    history, scores = history_of((1.0, []), batch=3), np.tile(SCORES, (3, 1))
    scores[1, 4] = bad
    counts, taus = np.array([2, 2, 2]), np.full(3, 0.5)
    with pytest.raises(CheckFailedError, match="sample 1 of the batch has non-finite values"):
        planner().carry(history, scores, counts, taus)
    assert history.steps.tolist() == [1, 1, 1]
    with pytest.raises(CheckFailedError, match="sample 1 of the batch has non-finite values"):
        planner(mode="chunk").plan(scores, counts)


@pytest.mark.parametrize(("dtype", "named"), [("float16", True), ("float32", False)])
def test_a_state_in_half_precision_is_named_as_the_cause(dtype, named):
    """Values beyond 65504 are infinite in it, and show in the input of the next step."""
    given = planner()
    given.spec = replace(given.spec, states=(StateSpec("keys", 1, 2, dtype),))
    with pytest.raises(CheckFailedError) as caught:
        given.carry(history_of((1.0, []), batch=1), SCORES * np.nan, np.array([2]), np.array([0.5]))
    assert ("convert with --state fp32" in str(caught.value)) is named


# How many


def test_noise_levels_are_timesteps_by_their_scale():
    given = planner()
    np.testing.assert_allclose(given.taus({"t": torch.tensor([0.25, 1.0])}, 2), [0.25, 1])
    assert given.taus({"t": torch.tensor(0.5)}, 3).tolist() == [0.5] * 3
    of_tokens = torch.tensor([[0.0, 0.9, 0.9], [0.5, 0.0, 0.2]])
    assert given.taus({"t": of_tokens}, 2).tolist() == pytest.approx([0.9, 0.5])  # the highest of a sample's tokens
    assert given.taus({"t": torch.tensor([-1e-6, 1 + 1e-6])}, 2).tolist() == [0, 1]  # rounding is forgiven
    given.spec = replace(given.spec, timestep_scale=1000.0)
    assert given.taus({"t": torch.tensor([250])}, 2).tolist() == [0.25, 0.25]
    assert given.taus({"t": np.array([750])}, 1).tolist() == [0.75]


@pytest.mark.parametrize("timestep", [-1.0, -0.05, 1.05, 1.5, 500.0])
def test_timesteps_of_another_scale_are_refused(timestep):
    with pytest.raises(UsageError, match=f"timestep {timestep:g} is outside 0 to 1: .*timestep_scale"):
        planner().taus({"t": torch.tensor([0.5, timestep])}, 2)


def test_without_a_timestep_only_a_schedule_that_needs_none_works():
    for schedule in (HALF, Policy("falling", 1).timetable()):
        given = planner(schedule, mode="chunk")
        given.spec = replace(given.spec, timestep=None)
        assert given.taus({}, 2).tolist() == [0.5, 0.5]
    given = planner(Policy("falling", 2).timetable(), mode="chunk")
    given.spec = replace(given.spec, timestep=None)
    with pytest.raises(UsageError, match=r"schedule 'falling' needs the timestep.*timestep=\.\.\."):
        given.taus({}, 2)


def test_counts_follow_noise_level_and_step():
    given = planner(Policy("falling", 4, warm_up=2, refresh=3).timetable())
    taus = np.array([1.0, 0.0])
    assert given.counts(taus).tolist() == [3, 1]
    assert given.counts(taus, np.array([1, 2])).tolist() == [8, 1]
    assert given.counts(taus, np.array([2, 4])).tolist() == [3, 8]


def test_counts_of_a_run_and_the_first_step_of_carry():
    taus = np.linspace(1, 0.1, 5)
    assert planner().run_counts(taus).tolist() == [8, 4, 4, 4, 4]
    assert planner(mode="chunk").run_counts(taus).tolist() == [4] * 5
    assert planner(Policy("constant", 2, warm_up=2).timetable()).run_counts(taus).tolist() == [8, 8, 4, 4, 4]


def test_counts_that_a_step_finds_become_the_next_level_up_and_a_level_itself_stays():
    given = planner(Timetable(Policy(NATURAL, 2, base=2), 0.5, levels=(3, 5, 8)), mode="dc-dit")
    scores = np.where(np.arange(TOKENS) <= np.arange(7)[:, None], 0.9, 0.1)  # 2 to 8 chosen: the last token always is
    assert given.found_counts(scores, None).tolist() == [3, 3, 5, 5, 8, 8, 8]


def test_a_ratio_beyond_the_tokens_is_refused_at_once():
    with pytest.raises(UsageError, match="8x"):
        planner(Policy("constant", 9).timetable())


# Plans


@pytest.mark.parametrize(("mode", "kind"), [("carry", CarryPlan), ("chunk", Plan)])
def test_plans_of_a_mask_in_either_mode(mode, kind):
    given = planner(mode=mode)
    assert given.carries == (mode == "carry")
    keep = random_keep((3, 5), TOKENS)
    for bucket in (None, roomy(keep)):
        plan = given.of_mask(keep, bucket)
        assert isinstance(plan, kind)
        np.testing.assert_array_equal(plan.keep, keep)
        assert bucket is None or plan.packed_index.size == bucket.tokens
    full = given.full_plan(2)
    assert isinstance(full, kind)
    assert full.keep.shape == (2, TOKENS)
    assert full.keep.all()


def test_a_carry_plan_is_noted_in_the_history():
    history = history_of((1.0, []), batch=2)
    keep = random_keep((3, 5), TOKENS)
    bucket = roomy(keep)
    plan = planner().carry(history, np.tile(SCORES, (2, 1)), np.array([3, 5]), np.array([0.5, 0.4]), bucket)
    assert history.tau.tolist() == [0.5, 0.4]
    np.testing.assert_array_equal(history.age == 0, plan.keep)
    assert plan.packed_index.size == bucket.tokens
