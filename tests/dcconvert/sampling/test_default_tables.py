"""Runs that nothing was fitted to: what they cost, and that both predictions give one and the same run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dcconvert.passes.ir.errors import UsageError
from dcconvert.sampling.default_tables import (
    ADAMS,
    GRADED,
    GUIDED_WORTH_SKIPPING,
    WORTH_SKIPPING,
    default_levels,
    default_table,
    nearest_times,
    on_levels,
    original_run,
    pattern,
    vp_coefficients,
)
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import SOLVERS, Sampler


@pytest.mark.parametrize("prediction", ["flow", "eps"])
@pytest.mark.parametrize(
    ("steps", "ratio"), [(50, 4), (50, 2), (50, 1), (50, 12), (20, 1.5), (250, 4), (4, 2), (3, 1.5)]
)
@pytest.mark.parametrize(("guidance", "least"), [(1.0, WORTH_SKIPPING), (2.0, GUIDED_WORTH_SKIPPING)])
def test_a_table_costs_what_was_asked_for(prediction, steps, ratio, guidance, least):
    table = default_table(prediction, steps, ratio, guidance)
    assert table.evaluations == round(steps / ratio)
    assert (table.updates > 0) == (table.evaluations >= least)
    assert (table.prediction, table.guidance) == (prediction, guidance)
    assert table.rows[0].full
    assert table.rows[-1].full


def test_a_budget_of_one_step_is_refused():
    with pytest.raises(UsageError, match="50 steps at 50x leave 1 computed steps, and a forecast needs 2"):
        default_table("flow", 50, 50)


def test_patterns():
    assert pattern(3) == [True] * 3
    assert pattern(5) == [True, True, False, True, False, True, True]
    assert pattern(5, 2) == [True, True, False, False, True, False, False, True, True]
    for evaluations in range(2, 40):
        for skips in (1, 2, 3):
            assert sum(pattern(evaluations, skips)) == evaluations


def test_the_last_move_holds_a_computed_step():
    levels = default_levels(pattern(12))
    assert len(levels) == len(pattern(12)) + 1
    assert levels[-2] == pytest.approx(0.3 * levels[-3])


def as_noise_prediction(velocity):
    """A flow's model as one that predicts noise: its samples are alpha + sigma times as large."""

    def model(x: Tensor, t: Tensor, y: Tensor, *weights: object) -> Tensor:
        alpha, sigma = (float(v[0]) for v in vp_coefficients(t[:1].long().numpy()))
        sample, level = x / (alpha + sigma), sigma / (alpha + sigma)
        return sample + (1 - level) * velocity(sample, level)

    return model


def test_a_noise_prediction_is_sampled_as_the_flow_it_is():
    """The same moves at the same levels, up to the scale of the samples."""

    def velocity(x: Tensor, level: float) -> Tensor:
        return torch.sin(3 * x) + level

    full = [True] * 9
    times = nearest_times(np.linspace(0.99, 0, 10)[:-1])
    alphas, sigmas = vp_coefficients(times)
    levels = np.append(sigmas / (alphas + sigmas), 0)
    noise, labels = torch.randn(2, 3).double(), torch.zeros(2)
    flow = on_levels("flow", levels, full).run(lambda x, t, y: velocity(x, float(t[0]) / 1000), noise, labels)
    scale = float(alphas[0] + sigmas[0])
    found = on_levels("eps", levels, full).run(as_noise_prediction(velocity), noise * scale, labels)
    torch.testing.assert_close(found, flow, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [2, 12, 50, 200])
def test_noise_predictions_see_whole_timesteps_once(steps):
    table = original_run("eps", steps, ADAMS)
    times = table.timesteps
    assert times.tolist() == [int(t) for t in times]
    assert len(set(times.tolist())) == steps
    assert times[0] == 999


def test_too_many_timesteps_are_refused():
    with pytest.raises(UsageError, match="there are 1000 timesteps"):
        nearest_times(np.linspace(1, 0, 1200))


@pytest.mark.parametrize("solver", [*SOLVERS, GRADED, ADAMS])
def test_runs_of_the_original(solver):
    run = original_run("flow", 10, solver)
    assert run.steps == 10
    assert run.solver == solver
    assert isinstance(run, RunTable if solver in (GRADED, ADAMS) else Sampler)
