"""Run tables: one loop that gives what each scheduler gives, and refuses what cannot be run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dcconvert.passes.ir.errors import UsageError
from dcconvert.sampling.run_table import Row, RunTable
from dcconvert.sampling.samplers import SOLVERS, Sampler
from dcconvert.sampling.solver_rows import scheduler_rows

SHAPE = (3, 2, 4, 4)
LABELS = torch.tensor([2, 0, 1])


def curved(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A model that is not linear in anything."""
    level = (t / 1000).reshape(-1, 1, 1, 1)
    return torch.sin(3 * x + level) + (y.reshape(-1, 1, 1, 1) + 1) * level**2


def table(*rows: Row, **options: object) -> RunTable:
    return RunTable(rows, **options)  # type: ignore[arg-type]


STEP = Row(1000, 1.0, (-0.5,))


@pytest.mark.parametrize("prediction", ["flow", "eps"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 12, 50])
def test_every_scheduler_is_a_table(prediction, solver, steps):
    sampler, noise = Sampler(prediction, steps, solver), torch.randn(SHAPE)
    made = RunTable(scheduler_rows(sampler.scheduler), prediction)
    assert made.steps == made.evaluations == steps
    assert made.updates == 0
    assert made.timesteps.tolist() == sampler.timesteps.tolist()
    wanted = sampler.run(curved, noise, LABELS)
    torch.testing.assert_close(made.run(curved, noise, LABELS), wanted, rtol=1e-3, atol=1e-3)


def test_euler_needs_the_last_output_only():
    rows = scheduler_rows(Sampler("flow", 5).scheduler)
    assert [row.outputs for row in rows] == [pytest.approx((-0.2,), abs=1e-6)] * 5
    assert [row.state for row in rows] == [1.0] * 5


def test_a_row_by_hand():
    """x_{i+1} = state x_i + noise z + sum_j outputs[j] v_{i-j}, with v_i = scale m_i + shift x_i."""
    first = Row(1000, 1.0, (-0.5,))
    second = Row(500, 0.5, (0.25, 2.0), state=0.5, noise=3.0, scale=2.0, shift=-1.0)
    found = table(first, second).run(lambda x, t, y: x + t.reshape(-1, 1) / 1000, torch.ones(1, 1), torch.zeros(1))
    v = 1 + 1.0
    x = 1 - 0.5 * v
    w = 2 * (x + 0.5) - x
    assert found.item() == pytest.approx(0.5 * x + 3 * 1 + 0.25 * w + 2 * v)


def test_learned_variances_are_cut_off():
    found = table(STEP).run(lambda x, t, y: torch.cat([x, x + 7], 1), torch.ones(2, 3), torch.zeros(2))
    assert found.tolist() == [[0.5] * 3] * 2


def test_skipped_steps_get_their_weights_and_computed_ones_none():
    seen: list[tuple[float, ...]] = []

    def model(x: Tensor, t: Tensor, y: Tensor, weights: tuple[float, ...]) -> Tensor:
        seen.append(weights)
        return x

    rows = (
        STEP,
        Row(800, 0.8, (-0.1,), weights=(1.0,)),
        Row(500, 0.5, (-0.1,)),
        Row(200, 0.2, (0.0,), weights=(2, -1)),
    )
    made = table(*rows)
    assert (made.evaluations, made.updates) == (2, 2)
    made.run(model, torch.ones(1, 1), torch.zeros(1))
    assert seen == [(), (1.0,), (), (2, -1)]


@pytest.mark.parametrize("steps", [1, 6])
def test_guidance_is_the_samplers(steps):
    sampler, noise = Sampler("flow", steps, "unipc"), torch.randn(SHAPE)
    made = RunTable(scheduler_rows(sampler.scheduler), guidance=3.0)
    wanted = sampler.run(curved, noise, LABELS, guidance=3.0, null_class=5)
    torch.testing.assert_close(made.run(curved, noise, LABELS, null_class=5), wanted, rtol=1e-4, atol=1e-4)
    plain = made.run(curved, noise, LABELS, guidance=1.0)
    torch.testing.assert_close(plain, sampler.run(curved, noise, LABELS), rtol=1e-4, atol=1e-4)


def test_guidance_without_an_unconditional_class():
    with pytest.raises(UsageError, match="needs a model with an unconditional class"):
        table(STEP, guidance=2.0).run(curved, torch.ones(SHAPE), LABELS)


def test_batches_get_models_of_their_own():
    made = table(STEP, replace(STEP, t=500, tau=0.5))
    calls: list[list[int]] = []

    def new_model():
        calls.append([])

        def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            calls[-1].append(len(x))
            return x

        return model

    found = made.run_batches(new_model, torch.ones(3, 1), torch.zeros(3), 2)
    assert found.shape == (3, 1)
    assert calls == [[2, 2], [1, 1]]


def test_a_table_comes_back_from_json():
    row = replace(
        STEP, t=500, tau=0.5, outputs=(1.0, -0.5), weights=(1.5, -0.5), state=0.5, noise=0.1, scale=2, shift=3
    )
    made = table(STEP, row, prediction="eps", guidance=4.0, name="mine")
    assert RunTable.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "a run table of 0 steps"),
        ((replace(STEP, state=float("nan")),), "holds a number that is not finite"),
        ((replace(STEP, outputs=(1.0, 2.0)),), "step 0 of the run table reads what no earlier step computed"),
        ((replace(STEP, outputs=()),), "step 0 of the run table reads"),
        ((replace(STEP, weights=(1.0,)),), "step 0 of the run table reads"),
        ((STEP, replace(STEP, tau=1.5)), "noise levels of the run table rise"),
    ],
)
def test_what_cannot_be_run_is_refused(rows, message):
    with pytest.raises(UsageError, match=message):
        RunTable(tuple(rows))


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"version": 1},
        {"version": 2, "rows": [], "prediction": "flow", "guidance": 1},
        {"version": 1, "rows": [{"t": 1}], "prediction": "flow", "guidance": 1},
        {"version": 1, "rows": [{"t": 1, "tau": 1, "outputs": "x"}], "prediction": "flow", "guidance": 1},
        {"version": 1, "rows": [{"t": 1, "tau": 1, "outputs": [1], "code": 1}], "prediction": "flow", "guidance": 1},
        {"version": 1, "rows": [{"t": 1, "tau": 1, "outputs": [1]}], "prediction": "v", "guidance": 1},
        {"version": 1, "rows": [{"t": 1e999, "tau": 1, "outputs": [1]}], "prediction": "flow", "guidance": 1},
    ],
)
def test_damaged_files_are_one_line(data):
    with pytest.raises(UsageError) as error:
        RunTable.from_dict(data)
    assert "\n" not in str(error.value)
