"""Threads that share a converted model: each has its own runs, and a run is stepped by one thread only."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.threads import OneThread, PerThread
from tests.passes.carry_harness import carried, tiny_call
from tests.passes.harness import BATCH

HALF = Policy("constant", 2).timetable()


def elsewhere(work: Callable[[], Any]) -> Any:
    """What a call gives or raises in another thread, which has ended."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="another")
    thread.start()
    thread.join()
    return found[0]


class Own(list):
    """A value that can be referred to weakly."""


def test_a_value_for_each_thread_that_is_freed_with_it():
    values: PerThread[Own] = PerThread(Own)
    values.own.append(1)
    assert elsewhere(lambda: (values.own, len(values.all()))) == ([], 2)
    assert values.own == [1]
    assert values.all() == [[1]]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda values: pickle.loads(pickle.dumps(values))])
def test_a_copy_has_no_values(copied):
    values: PerThread[list] = PerThread(Own)
    values.own.append(1)
    assert copied(values).own == []


def test_another_thread_may_take_over_when_the_first_has_ended_or_let_go():
    guard = OneThread()
    assert elsewhere(guard.__enter__) is None
    guard._lock.release()
    with guard:
        pass
    error = elsewhere(guard.__enter__)
    assert isinstance(error, UsageError)
    assert "thread another steps a run that thread MainThread began" in str(error)
    guard.release()
    assert elsewhere(guard.__enter__) is None
    with pytest.raises(UsageError, match="another thread is stepping"), guard:
        pytest.fail("it must not be entered twice")


def test_a_run_refuses_the_step_of_a_second_thread():
    model, _ = carried("tiny")
    x, t = torch.randn(BATCH, 2, 4, 8), torch.ones(BATCH)
    run = model.start(BATCH)
    first = run.step({"x": x, "t": t})
    assert isinstance(elsewhere(lambda: run.step({"x": x, "t": t * 0.9})), UsageError)
    run.restart()
    assert torch.equal(elsewhere(lambda: run.step({"x": x, "t": t}))[0], first[0])


@pytest.mark.parametrize("method", ["carry", "steps"])
def test_steps_take_turns_in_a_runtime_whose_runs_share_buffers(method):
    model = rewrite(*tiny_call(), method_of(method), HALF, timestep_scale=1.0)
    model.turn, free = threading.Lock(), []
    for graph in model.graphs.named().values():
        graph.register_forward_pre_hook(lambda *_: free.append(model.turn.acquire(blocking=False)))
    model.start(BATCH).step({"x": torch.randn(BATCH, 2, 4, 8), "t": torch.ones(BATCH)})
    assert free
    assert not any(free)


@torch.no_grad()
def image_of(model: Any, seed: int, barrier: threading.Barrier | None = None) -> torch.Tensor:
    """What a sampling loop of plain calls gets; with a barrier, threads call in turn."""
    generator, found = torch.Generator().manual_seed(seed), []
    x = torch.randn(BATCH, 2, 4, 8, generator=generator)
    for number in range(6):
        if barrier is not None:
            barrier.wait()
        found.append(model(x, torch.full((BATCH,), 1 - number / 6)))
        x = x + 0.1 * torch.randn(x.shape, generator=generator)
    return torch.stack(found)


def test_threads_that_call_one_model_do_not_disturb_each_other():
    model = carried("tiny")[0].with_schedule(HALF)
    wanted = [image_of(model.with_schedule(HALF), seed) for seed in (1, 2)]
    found: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(2, timeout=10)
    jobs = [threading.Thread(target=lambda s=s: found.update({s: image_of(model, s, barrier)})) for s in (1, 2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [torch.equal(found[seed], want) for seed, want in zip((1, 2), wanted, strict=True)] == [True, True]


def test_two_threads_can_convert_at_once():
    made: list[Any] = []
    call = tiny_call()

    def convert() -> None:
        try:
            made.append(rewrite(*call, method_of("chunk"), HALF, timestep_scale=1.0))
        except Exception as error:
            made.append(error)

    jobs = [threading.Thread(target=convert) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [type(model).__name__ for model in made] == ["DynamicModel"] * 2


def test_forget_reaches_all_threads():
    model = carried("tiny")[0].with_schedule(HALF)
    x, t = torch.randn(BATCH, 2, 4, 8), torch.ones(BATCH)
    called, done, runs = threading.Event(), threading.Event(), []

    def call() -> None:
        model(x, t)
        runs.append(model.followed)
        called.set()
        done.wait(10)

    job = threading.Thread(target=call)
    job.start()
    called.wait(10)
    assert len(runs[0].tracks) == 1
    model.forget()
    assert runs[0].tracks == []
    done.set()
    job.join()
