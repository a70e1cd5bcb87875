"""Runs: what samples remember from step to step, and what they never learn of each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.carry_plan import CarryPlan
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.run import Run, fill_batch
from dcconvert.passes.runtime.state import TensorState
from tests.passes.carry_harness import CALLS, TAUS, SlowRun, at, carried, flat, plain, slow_step, tiny_call
from tests.passes.harness import BATCH, TOKENS, Call, InTorch, first_tensor, pick, relative

TOLERANCE = 1e-5
HALF = Policy("constant", 2).timetable()

every_model = pytest.mark.parametrize("name", CALLS)


def step(run: Run, model: DynamicModel, call: Call, counts: Sequence[int] | None = None) -> Tensor:
    with torch.no_grad():
        return first_tensor(run.step(flat(model, call), None if counts is None else np.array(counts)))


def kept(run: Run) -> list[int]:
    assert run.last_plan is not None
    return run.last_plan.counts.tolist()


def spoil(run: Run, value: float, samples: Sequence[int] = range(BATCH)) -> None:
    """Make what these samples remember this value everywhere."""
    assert isinstance(run.state, TensorState)
    for tensor in run.state.values.values():
        tensor[:, list(samples)] = value


class Counting(InTorch):
    """A converted model in larger batches and buckets, as exported ones run; counts what is computed once."""

    def __init__(self, model: DynamicModel, size: int = BATCH) -> None:
        super().__init__(model)
        self.size = size
        self.prepared = 0

    def padded(self, batch: int) -> int:
        return self.size

    def bucket(self, counts: np.ndarray) -> Bucket | None:
        return Bucket(self.size, self.size * self.spec.tokens, self.size, self.spec.tokens, 4)

    def call(self, graph: str, feed: Any, bucket: Bucket | None, into: Any) -> dict[str, Any]:
        self.prepared += graph == "prepare"
        return super().call(graph, feed, bucket, into)


# Steps


@every_model
def test_steps_against_the_definition(name):
    """The tokens are the planner's choice; what they give is by the definition."""
    model, call = carried(name)
    run, slow = model.start(BATCH), [SlowRun() for _ in range(BATCH)]
    for number, tau in enumerate(TAUS):
        now = at(model, call, tau, number)
        found = step(run, model, now, [model.spec.tokens // 2, 3, 1] if number % 2 else None)
        assert run.last_plan is not None
        assert relative(found, slow_step(slow, now, run.last_plan.keep, [tau] * BATCH)) < TOLERANCE
        assert run.history is not None
        distance = [[one.memory.moved(("update", n)) for n in range(model.spec.tokens)] for one in slow]
        np.testing.assert_allclose(run.history.distance, distance, rtol=1e-4, atol=1e-5)


@every_model
def test_everything_kept_is_the_original_at_every_step(name):
    model, call = carried(name)
    run = model.start(BATCH)
    for number, tau in enumerate(TAUS):
        now = at(model, call, tau, number)
        assert relative(step(run, model, now, [model.spec.tokens] * BATCH), plain(now)) < TOLERANCE


def test_the_first_step_keeps_everything_whatever_is_asked_for():
    model, call = carried("tiny")
    for counts in (None, [1, 1, 1]):
        run = model.start(BATCH)
        now = at(model, call, 0.4)
        assert relative(step(run, model, now, counts), plain(now)) < TOLERANCE
        assert kept(run) == [TOKENS] * BATCH
        step(run, model, at(model, call, 0.3), counts)
        assert kept(run) == (counts or [TOKENS // 2] * BATCH)


def test_the_schedule_counts_the_steps_of_each_sample():
    first, call = carried("tiny")
    model = first.with_schedule(Policy("falling", 2, warm_up=2, refresh=3).timetable())
    run, found = model.start(BATCH), []
    for number, tau in enumerate((1.0, 0.8, 0.5, 0.5, 0.3, 0.0)):
        if number == 2:
            run.restart([1])
        step(run, model, at(model, call, tau, number))
        found.append(kept(run))
    assert [counts[0] for counts in found] == [8, 8, 4, 4, 8, 2]
    assert [counts[1] for counts in found] == [8, 8, 8, 8, 3, 2]


def test_the_same_run_twice_is_the_same_bit_for_bit():
    model, call = carried("dit")
    runs = model.start(BATCH), model.start(BATCH)
    for number, tau in enumerate(TAUS):
        now = at(model, call, tau, number)
        first, second = (step(run, model, now) for run in runs)
        assert torch.equal(first, second)


def test_a_solver_that_looks_twice_at_a_noise_level():
    model, call = carried("dit")
    run, slow = model.start(BATCH), [SlowRun() for _ in range(BATCH)]
    for number, tau in enumerate((1.0, 0.7, 0.7, 0.4, 0.4)):
        now = at(model, call, tau, number)
        found = step(run, model, now)
        assert run.last_plan is not None
        assert relative(found, slow_step(slow, now, run.last_plan.keep, [tau] * BATCH)) < TOLERANCE


def test_times_and_plan_of_the_last_step():
    model, call = carried("tiny")
    run = model.start(BATCH)
    assert (run.last_plan, run.last_times) == (None, None)
    step(run, model, call)
    assert isinstance(run.last_plan, CarryPlan)
    assert run.last_times is not None
    times = run.last_times
    assert min(times.route, times.plan, times.denoise) > 0
    assert times.total == times.route + times.plan + times.denoise


def test_steps_of_mode_chunk_know_nothing_of_each_other():
    torch.manual_seed(0)
    call = tiny_call()
    model = rewrite(*call, method_of("chunk"), HALF, timestep_scale=1.0)
    run = model.start(BATCH)
    for number, tau in enumerate((0.3, 0.9, 0.3)):
        now = at(model, call, tau, number)
        assert torch.equal(step(run, model, now), step(model.start(BATCH), model, now))
        assert kept(run) == [TOKENS // 2] * BATCH
    run.restart()
    assert run.history is None
    assert run.state.values == {}
    step(run, model, now, [1, 2, 3])
    assert kept(run) == [1, 2, 3]


# Samples that come and go


@every_model
def test_after_a_restart_nothing_is_left_of_the_run_before(name):
    """Bit for bit, also when what was remembered is wild; the second run starts lower than the first ended."""
    model, call = carried(name)
    for wild in (None, 1e4, float("nan")):
        run, fresh = model.start(BATCH), model.start(BATCH)
        for number, tau in enumerate(TAUS):
            step(run, model, at(model, call, tau, number))
        if wild is not None:
            spoil(run, wild)
        run.restart()
        for number, tau in enumerate((0.2, 0.1, 0.05)):
            now = at(model, call, tau, 10 + number)
            assert torch.equal(step(run, model, now), step(fresh, model, now))


def test_a_restarted_sample_is_new_and_the_others_go_on():
    model, call = carried("dit")
    run, undisturbed, fresh = model.start(BATCH), model.start(BATCH), model.start(1)
    for number, tau in enumerate(TAUS):
        now = at(model, call, tau, number)
        if number == 3:
            spoil(run, 1e4, [1])
            run.restart([1])
        found, wanted = step(run, model, now), step(undisturbed, model, now)
        assert relative(found[[0, 2]], wanted[[0, 2]]) < 1e-6
        if number >= 3:
            assert relative(found[1], step(fresh, model, pick(now, [1]))[0]) < TOLERANCE
            assert relative(found[1], wanted[1]) > 1e-3


@every_model
def test_samples_that_start_at_different_times_give_what_they_give_alone(name):
    """Continuous batching: whenever an image is finished, the next one takes its place; each is run alone beside it."""
    first, call = carried(name)
    model = first.with_schedule(Policy("constant", 2, warm_up=2).timetable())
    run, alone = model.start(BATCH), [model.start(1) for _ in range(BATCH)]
    for number in range(11):
        local = [(number + 2 * sample) % len(TAUS) for sample in range(BATCH)]
        for sample in (i for i in range(BATCH) if local[i] == 0):
            run.restart([sample])
            alone[sample] = model.start(1)
        now = at(model, call, [TAUS[i] for i in local], number)
        found = step(run, model, now)
        for sample, single in enumerate(alone):
            wanted = step(single, model, pick(now, [sample]))
            assert relative(found[sample], wanted[0]) < TOLERANCE, (number, sample)
            assert kept(single) == [kept(run)[sample]]
    assert len(set(kept(run))) == 2  # dense and sparse steps in one batch


def test_rising_noise_is_refused_and_changes_nothing():
    model, call = carried("tiny")
    run, beside = model.start(BATCH), model.start(BATCH)
    for number, tau in enumerate((0.9, 0.6)):
        for each in (run, beside):
            step(each, model, at(model, call, tau, number))
    with pytest.raises(UsageError, match=r"sample 2 rose from 0\.6 to 0\.7 within a run"):
        step(run, model, at(model, call, [0.5, 0.6, 0.7], 2))
    now = at(model, call, 0.5, 3)
    assert torch.equal(step(run, model, now), step(beside, model, now))
    run.restart([2])
    step(run, model, at(model, call, [0.5, 0.5, 0.7], 4))


class Failing(Counting):
    """Runs out of memory when told to."""

    fails = False

    def call(self, graph: str, feed: Any, bucket: Bucket | None, into: Any) -> dict[str, Any]:
        if self.fails and graph == "denoise":
            raise MemoryError
        return super().call(graph, feed, bucket, into)


def test_after_a_step_that_failed_the_run_starts_anew():
    """Its history may note what its state never got; the first step of the failed run is made to be stale."""
    model, call = carried("dit")
    backend = Failing(model)
    run, fresh = Run(backend, BATCH), Run(backend, BATCH)
    step(run, model, at(model, call, 0.9))
    spoil(run, 1e4)
    backend.fails = True
    with pytest.raises(MemoryError):
        step(run, model, at(model, call, 0.8, 1))
    backend.fails = False
    for number, tau in enumerate((0.7, 0.6)):
        now = at(model, call, tau, number)
        assert torch.equal(step(run, model, now), step(fresh, model, now))


def test_a_non_finite_input_is_refused_and_the_run_starts_anew():
    model, call = carried("tiny")
    run, fresh = model.start(BATCH), model.start(BATCH)
    step(run, model, at(model, call, 0.9))
    bad = at(model, call, 0.8)
    bad[1][0][1, 0, 0, 0] = torch.nan
    with pytest.raises(CheckFailedError, match="sample 1 of the batch has non-finite values"):
        step(run, model, bad)
    now = at(model, call, 0.7, 1)
    assert torch.equal(step(run, model, now), step(fresh, model, now))


def test_steps_of_mode_carry_give_no_gradients():
    model, call = carried("tiny")
    run = model.start(BATCH)
    for tau in (0.9, 0.8):
        (found,) = run.step(flat(model, at(model, call, tau)))
        assert not found.requires_grad
    assert isinstance(run.state, TensorState)
    assert not any(value.requires_grad for value in run.state.values.values())


@pytest.mark.parametrize("samples", [[3], [0, -1]])
def test_only_its_own_samples_can_be_restarted(samples):
    with pytest.raises(UsageError, match="this run has samples 0 to 2"):
        carried("tiny")[0].start(BATCH).restart(samples)


def test_another_batch_is_refused():
    model, call = carried("tiny")
    run = model.start(BATCH)
    with pytest.raises(UsageError, match=r"this run has 3 samples, but the step got \[2\]: start another run"):
        step(run, model, pick(call, [0, 1]))
    x, t = call[1]
    with pytest.raises(UsageError, match=r"got \[2, 3\]"):
        run.step({"x": x, "t": t[:2]})


# What stays the same over a run


def test_constants_are_computed_once_in_a_run_and_again_after_a_restart():
    model, call = carried("pixart")
    backend = Counting(model)
    run = Run(backend, BATCH)
    for number, tau in enumerate(TAUS):
        step(run, model, at(model, call, tau, number))
    assert backend.prepared == 1
    run.restart([1])
    other = at(model, call, 0.2)
    text = other[2]["encoder_hidden_states"].clone()
    text[1] = torch.randn_like(text[1])
    other = (other[0], other[1], {**other[2], "encoder_hidden_states": text})
    found = step(run, model, other)
    assert backend.prepared == 2
    assert relative(found[1], plain(other)[1]) < TOLERANCE


@every_model
def test_a_batch_that_is_filled_up_gives_the_same(name):
    """With copies of its last sample, in a bucket with room to spare; through a restart of the copied sample."""
    model, call = carried(name)
    run, wanted = Run(Counting(model, 5), 2), model.start(2)
    for number, tau in enumerate(TAUS):
        if number == 3:
            for each in (run, wanted):
                each.restart([1])
        now = pick(at(model, call, tau, number), [0, 1])
        found = step(run, model, now, [5, 3] if number == 4 else None)
        assert len(found) == 2
        assert relative(found, step(wanted, model, now, [5, 3] if number == 4 else None)) < TOLERANCE
        counts = kept(run)
        assert counts[1:] == [counts[1]] * 4
    assert run.history is not None
    assert run.history.steps.tolist() == [5, 2, 2, 2, 2]


# Groups


def test_groups_compute_the_same_tokens():
    """Two halves with other images: left alone they choose otherwise; in groups each has its own value of the same."""
    model, call = carried("dit", router="predictability")
    four = (call[0], tuple(value[[0, 1, 2, 0]] for value in call[1]), call[2])
    run, separate, slow = Run(model, 4, groups=2), model.start(4), [SlowRun() for _ in range(4)]
    differed = False
    for number, tau in enumerate(TAUS):
        now = at(model, four, tau, number)
        found = step(run, model, now)
        step(separate, model, now)
        assert run.last_plan is not None
        assert separate.last_plan is not None
        np.testing.assert_array_equal(run.last_plan.keep[:2], run.last_plan.keep[2:])
        differed |= bool((separate.last_plan.keep[:2] != separate.last_plan.keep[2:]).any())
        wanted = [
            slow[i].step((now[0], tuple(v[[i]] for v in now[1]), now[2]), run.last_plan.keep[i], tau) for i in range(4)
        ]
        assert relative(found, torch.cat(wanted)) < TOLERANCE
    assert differed


def test_groups_choose_by_the_mean_of_their_urgencies():
    """After two steps of everything urgency goes with the root of the distance; the copy that fills up has its own."""
    model, call = carried("tiny")
    x, t = (value[[0, 1, 2, 0]] for value in at(model, call, 0.9)[1])
    run = Run(Counting(model, 5), 4, groups=2)
    for tau in (0.9, 0.8):
        run.step({"x": x, "t": torch.full_like(t, tau)}, np.full(4, TOKENS))
    assert run.history is not None
    up, down = np.arange(1.0, 9.0), np.arange(8.0, 0, -1)
    ends, middle = np.array([9.0, 1, 1, 1, 9, 1, 1, 1]), np.array([1.0, 9, 1, 1, 1, 9, 1, 1])
    run.history.distance = np.square([up, down, ends, middle, ends])
    run.step({"x": x, "t": torch.full_like(t, 0.7)}, np.full(4, 3))
    assert run.last_plan is not None
    kept = [np.flatnonzero(keep).tolist() for keep in run.last_plan.keep]
    assert kept[0] == kept[2] == [0, 4, 7]  # means: 5, 1.5, 2, 2.5, 7, 3.5, 4, 4.5
    assert kept[1] == kept[3] == [0, 1, 5]  # 4.5, 8, 3.5, 3, 2.5, 6, 1.5, 1
    assert {0, 4} < {*kept[4]}


@pytest.mark.parametrize(("sample", "left"), [(1, [3, 0, 3, 0]), (2, [0, 3, 0, 3])])
def test_restart_takes_the_partner_along(sample, left):
    run = Run(carried("tiny")[0], 4, groups=2)
    assert run.history is not None
    run.history.steps[:] = 3
    run.restart([sample])
    assert run.history.steps.tolist() == left


def test_groups_must_be_equal():
    with pytest.raises(UsageError, match="a batch of 3 cannot be split into 2 groups"):
        Run(carried("tiny")[0], 3, groups=2)


def test_filling_up_repeats_the_last():
    for value in (np.arange(6).reshape(3, 2), torch.arange(6).reshape(3, 2)):
        found = fill_batch(value, 5)
        assert type(found) is type(value)
        assert found.tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
