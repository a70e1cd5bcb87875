"""What a run is given: one line for whatever the model was not captured for, and the precision of what it remembers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel
from tests.passes.carry_harness import TAUS, at, carried, flat
from tests.passes.harness import BATCH, relative

TOKENS = 16


@pytest.fixture
def model() -> DynamicModel:
    return carried("dit")[0].with_schedule(Policy("constant", 2).timetable())


def inputs(model: DynamicModel, tau: float = 1.0) -> dict[str, Any]:
    return flat(model, at(model, carried("dit")[1], tau))


@pytest.mark.parametrize(("batch", "groups"), [(0, 1), (-1, 1), (2, 0), (3, 2), (2, -1)])
def test_batches_and_groups_that_cannot_be(model, batch, groups):
    with pytest.raises(UsageError, match=f"a batch of {batch} cannot be split into {groups} groups"):
        model.start(batch, groups)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y": None}, "no input y: the model takes x, t, y"),
        ({"z": torch.ones(3)}, "an unknown input z"),
        ({"t": torch.tensor(500.0)}, r"input t has shape \[\], but the model was captured for \[batch\]"),
        ({"x": torch.zeros(3, 4, 8, 10)}, r"input x has shape \[3, 4, 8, 10\].*\[batch, 4, 8, 8\]"),
        ({"x": torch.zeros(2, 4, 8, 8)}, r"this run has 3 samples, but the step got \[2, 3\]"),
        ({"y": [1, 2, 3]}, "input y is a list: give a tensor or an array"),
        ({"y": torch.tensor([0, -1, 2])}, "input y has a value of -1 to 2, but the model knows 0 to 10"),
        ({"y": torch.tensor([0, 11, 2])}, "input y has a value of 0 to 11, but the model knows 0 to 10"),
        ({"x": np.zeros((3, 4, 8, 8))}, "input x is float64, but the model needs float32"),
    ],
)
def test_inputs_that_the_model_was_not_captured_for(model, changes, words):
    given = {name: value for name, value in {**inputs(model), **changes}.items() if value is not None}
    with pytest.raises(UsageError, match=words) as error:
        model.start(BATCH).step(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "counts", [[999] * 3, [0] * 3, [-1] * 3, [7.5] * 3, [4, 4], [[4, 4, 4]], ["4"] * 3, [float("nan")] * 3]
)
def test_counts_that_cannot_be(model, counts):
    with pytest.raises(UsageError, match="give 3 whole numbers from 1 to 16, the tokens that each sample keeps"):
        model.start(BATCH).step(inputs(model), np.array(counts))


@pytest.mark.parametrize("batch", [0, 3])
def test_plain_calls_with_inputs_that_cannot_be(model, batch):
    x, t, y = torch.zeros(batch, 4, 8, 8), torch.tensor(500.0), torch.zeros(batch, dtype=torch.int64)
    with pytest.raises(UsageError) as error:
        model(x, t if batch else torch.zeros(0), y)
    assert "\n" not in str(error.value)


def test_a_run_takes_memory_at_its_first_step_only(model, monkeypatch):
    """So that `run = model.start(batch)` in a loop holds one state, not two."""
    made = []
    monkeypatch.setattr(model, "empty_state", lambda batch: made.append(batch))
    run = model.start(BATCH)
    run.restart()
    assert made == []
    run.state  # noqa: B018
    assert made == [BATCH]


def test_how_much_the_steps_of_a_run_computed(model):
    run = model.start(BATCH)
    assert run.ratio == 1
    for tau in TAUS:
        run.step(inputs(model, tau))
    assert run.computed == [1, 0.5, 0.5, 0.5, 0.5]
    assert run.ratio == pytest.approx(5 / 3)
    run.restart()
    assert run.computed == []


@torch.no_grad()
def test_steps_under_autocast_remember_in_their_own_precision(model):
    plain, cast = model.start(BATCH), model.start(BATCH)
    counts = np.full(BATCH, TOKENS // 2)  # the same tokens in both: the first ones, whatever the scores
    for tau in TAUS:
        [wanted] = plain.step(inputs(model, tau), counts)
        with torch.autocast("cpu", torch.bfloat16):
            [found] = cast.step(inputs(model, tau), counts)
        assert relative(found.float(), wanted) < 0.1
    assert {value.dtype for value in cast.state.values.values()} == {torch.float32}


@torch.no_grad()
def test_a_state_that_overflows_is_named():
    model, call = carried("dit", state_dtype="fp16")
    run = model.start(BATCH)
    run.step(flat(model, at(model, call, 1.0)))
    for value in run.state.values.values():
        value.fill_(torch.inf)
    given = flat(model, at(model, call, 0.9))
    with pytest.raises(CheckFailedError, match=r"too large for float16.*state in float32"):
        run.step({**given, "x": given["x"] * torch.inf})
    assert run.computed == []  # it starts again
    with pytest.raises(CheckFailedError, match="check its input"):
        run.step({**given, "x": given["x"] * torch.inf})
