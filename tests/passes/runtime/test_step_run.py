"""Runs whose steps are computed or skipped: exact where they must be, and every sample on its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.step_run import StepRun
from tests.passes.harness import InTorch, dit_call

TOKENS, BATCH = 16, 3


@pytest.fixture(scope="module")
def model() -> DynamicModel:
    return rewrite(*dit_call(), method_of("steps"), Policy("constant", 2).timetable())


def at(model: DynamicModel, tau: float | list[float], seed: int = 0, batch: int = BATCH) -> dict[str, Any]:
    """A step's inputs; every sample and step has another image."""
    found = model.spec.example(batch, seed)
    found["t"] = torch.as_tensor(tau, dtype=torch.float32).expand(batch) * 1000
    return found


def step(run: StepRun, inputs: dict[str, Any], *kept: int, **options: Any) -> torch.Tensor:
    found: torch.Tensor = run.step(inputs, np.array(kept) * run.runtime.spec.tokens if kept else None, **options)[0]
    return found


def original(model: DynamicModel, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.original_graph(*inputs.values())[0]
    return found


def start(model: DynamicModel, batch: int = BATCH, groups: int = 1) -> StepRun:
    run = model.start(batch, groups)
    assert isinstance(run, StepRun)
    return run


def test_computed_steps_are_the_originals(model):
    run = start(model)
    for number in range(4):
        inputs = at(model, 0.9 - 0.1 * number, number)
        torch.testing.assert_close(step(run, inputs, 1, 1, 1), original(model, inputs), rtol=1e-5, atol=1e-6)
    assert run.kept.tolist() == [model.spec.tokens] * BATCH


def test_a_skipped_step_with_its_own_update_is_the_original(model):
    run, inputs = start(model), at(model, 0.5)
    step(run, inputs, 1, 1, 1)
    found = step(run, inputs, 0, 0, 0, weights=(1.0,))
    torch.testing.assert_close(found, original(model, inputs), rtol=1e-5, atol=1e-5)
    assert run.kept.tolist() == [0] * BATCH
    assert not run.keep.any()


def test_the_schedule_decides_without_counts(model):
    run, kept = start(model), []
    for number in range(6):
        step(run, at(model, 0.9 - 0.1 * number, number))
        kept.append(run.kept.tolist()[0] > 0)
    assert kept == [True, False, True, False, True, False]
    counts = model.planner.run_counts(np.linspace(0.9, 0.4, 6))
    assert (counts > 0).tolist() == kept


def test_a_line_through_updates_that_lie_on_one_is_exact(model):
    """With the same inputs all updates are equal, and every line through them is too."""
    run = start(model)
    for number in range(2):
        step(run, at(model, 0.9 - 0.1 * number), 1, 1, 1)
    inputs = at(model, 0.8)  # the conditioning of the last computed step
    torch.testing.assert_close(
        step(run, inputs, 0, 0, 0, weights=(1.0,)), original(model, inputs), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("pattern", [(1, 0, 0), (0, 1, 1), (1, 1, 0)])
def test_samples_at_different_steps_run_together_as_they_run_alone(model, pattern):
    """Some computed, others skipped, at noise levels of their own."""
    runs, whole = [start(model, 1) for _ in range(BATCH)], start(model)
    for number, kept in enumerate([(1, 1, 1), pattern, (1, 1, 1), pattern[::-1], (0, 0, 0), pattern]):
        inputs = at(model, [0.9 - 0.1 * number, 0.8 - 0.07 * number, 0.7 - 0.05 * number], number)
        together = step(whole, inputs, *kept)
        for i, run in enumerate(runs):
            alone = {name: value[i : i + 1] for name, value in inputs.items()}
            torch.testing.assert_close(together[i : i + 1], step(run, alone, kept[i]), rtol=1e-4, atol=1e-5)
    assert whole.kept.tolist() == [16 * k * model.spec.tokens // 16 for k in pattern]


def test_an_update_never_leaks_into_another_image(model):
    """After a restart a skipped step cannot be: the next one is computed, and the one after reads its update alone."""
    run, fresh = start(model), start(model)
    for number in range(3):
        step(run, at(model, 0.9 - 0.1 * number, number), 1, 1, 1)
    run.restart()
    for number, kept in enumerate([(0, 0, 0), (0, 0, 0), (0, 0, 0)]):
        inputs = at(model, 0.9 - 0.1 * number, 10 + number)
        torch.testing.assert_close(step(run, inputs, *kept), step(fresh, inputs, *kept), rtol=1e-6, atol=1e-6)
    assert run.updates.computed.tolist() == fresh.updates.computed.tolist() == [1] * BATCH


def test_one_sample_restarts_and_the_others_go_on(model):
    run, beside = start(model), start(model)
    for number in range(3):
        for each in (run, beside):
            step(each, at(model, 0.9 - 0.1 * number, number), 1, 1, 1)
    run.restart([1])
    inputs = at(model, [0.6, 0.95, 0.6], 7)
    found = step(run, inputs, 0, 0, 0)
    assert run.kept.tolist() == [0, model.spec.tokens, 0]
    torch.testing.assert_close(found[1], original(model, inputs)[1], rtol=1e-5, atol=1e-5)
    wanted = step(beside, {**inputs, "t": torch.full((BATCH,), 600.0)}, 0, 0, 0)
    torch.testing.assert_close(found[[0, 2]], wanted[[0, 2]], rtol=1e-5, atol=1e-5)


def test_halves_of_guidance_restart_together(model):
    run = start(model, 4, 2)
    step(run, at(model, 0.9, batch=4), 1, 1, 1, 1)
    run.restart([0])
    assert run.updates.computed.tolist() == [0, 1, 0, 1]


def test_noise_that_rises_is_refused(model):
    run = start(model)
    step(run, at(model, 0.5))
    with pytest.raises(UsageError, match="noise level of sample 0 rose"):
        step(run, at(model, 0.6))


def test_too_many_weights_are_refused(model):
    run = start(model)
    step(run, at(model, 0.5))
    with pytest.raises(UsageError, match="4 weights: a skipped step needs one for each of the last 3 updates"):
        step(run, at(model, 0.4), 0, 0, 0, weights=(1.0, 1, 1, 1))


class Failing(InTorch):
    """Runs out of memory in the middle of a step when told to."""

    fails = False

    def call(self, graph: str, feed: Any, bucket: Bucket | None, into: Any) -> dict[str, Any]:
        if self.fails:
            raise MemoryError
        return super().call(graph, feed, bucket, into)


def test_after_a_step_that_failed_the_run_starts_anew(model):
    runtime = Failing(model)
    run = StepRun(runtime, BATCH)
    step(run, at(model, 0.9))
    runtime.fails = True
    with pytest.raises(MemoryError):
        step(run, at(model, 0.8))
    runtime.fails = False
    step(run, at(model, 0.95), 0, 0, 0)
    assert run.kept.tolist() == [model.spec.tokens] * BATCH


def test_plain_calls_of_the_model_follow_one_run(model):
    """A sampling loop that knows nothing of runs, and then another image."""
    model.forget()
    with torch.no_grad():
        for number, kept in enumerate([16, 0, 16, 0]):
            inputs = at(model, 0.9 - 0.02 * number)
            model(*inputs.values())
            assert (model.followed.run.kept > 0).tolist() == [kept > 0] * BATCH
        other = at(model, 0.9, 5)
        torch.testing.assert_close(model(*other.values()), model.original(*other.values()), rtol=1e-5, atol=1e-5)
    model.forget()


def test_a_copy_goes_on_from_where_the_run_is(model):
    """Each of its samples as the one that it is named after, while the run itself goes on as if nothing was."""
    run, beside = start(model), start(model)
    for each in (run, beside):
        for number in range(3):
            step(each, at(model, 0.9 - 0.1 * number, number), 1, number % 2, 1)
    samples = np.array([2, 0, 1, 2])
    copy = run.copied(samples)
    skipped, computed = at(model, 0.55, 5), at(model, 0.5, 6)
    rows = [{name: value[samples] for name, value in inputs.items()} for inputs in (skipped, computed)]
    found = [step(copy, rows[0], 0, 0, 0, 0), step(copy, rows[1], 1, 1, 1, 1)]
    wanted = [step(beside, skipped, 0, 0, 0), step(beside, computed, 1, 1, 1)]
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs[samples], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step(run, skipped, 0, 0, 0), wanted[0], rtol=1e-5, atol=1e-5)
