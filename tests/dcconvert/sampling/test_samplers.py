"""Samplers: exact where the field is known, guided by the formula, the same noise whatever the batch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcconvert.passes.ir.errors import UsageError
from dcconvert.sampling.samplers import SOLVERS, Sampler, initial_noise, labels_for

SHAPE = (3, 2, 4, 4)


@pytest.fixture
def data() -> Tensor:
    return torch.randn(SHAPE)


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(SHAPE)


LABELS = torch.tensor([2, 0, 1])


def alpha_bar(t: float) -> float:
    """Share of the signal's variance left after step t of DiT's schedule, from its definition."""
    return float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: int(t) + 1]))


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_euler_follows_a_straight_path_to_its_end(steps, data, noise):
    result = Sampler("flow", steps).run(lambda x, t, y: noise - data, noise, LABELS)
    torch.testing.assert_close(result, data, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_every_solver_ends_where_a_straight_path_does(solver, steps, data, noise):
    """dpm++ takes the noise for what it is at 0.999, where its timesteps begin."""
    result = Sampler("flow", steps, solver).run(lambda x, t, y: noise - data, noise, LABELS)
    torch.testing.assert_close(result, data, rtol=0, atol=1e-5 if solver != "dpm++" else 5e-3)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_euler_finds_the_point_that_a_field_points_at(steps, data, noise):
    """(x - data) / sigma depends on where the sampler is and on what t says."""
    result = Sampler("flow", steps).run(lambda x, t, y: (x - data) / (t / 1000).reshape(-1, 1, 1, 1), noise, LABELS)
    torch.testing.assert_close(result, data, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 300])
def test_the_exact_noise_recovers_the_data(solver, steps, data, noise):
    start = alpha_bar(999) ** 0.5 * data + (1 - alpha_bar(999)) ** 0.5 * noise

    def exact(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        share = alpha_bar(float(t[0]))
        return (x - share**0.5 * data) / (1 - share) ** 0.5

    for field in (exact, lambda *_: noise):
        found = Sampler("eps", steps, solver).run(field, start, LABELS)
        torch.testing.assert_close(found, data, rtol=0, atol=2e-3)


@pytest.mark.parametrize("steps", [1, 3, 7, 19, 30, 60, 61, 103, 200])
def test_ddim_on_a_curved_path_is_ddim_written_out(steps, noise):
    """Normal data with deviation 0.5: the expected noise is known, and a step to the wrong level shows."""

    def expected(x: Tensor, share: float) -> Tensor:
        return x * (1 - share) ** 0.5 / (0.25 * share + 1 - share)

    sampler, x = Sampler("eps", steps), noise.double()
    levels = [*map(alpha_bar, sampler.timesteps), 1.0]
    for here, there in itertools.pairwise(levels):
        error = expected(x, here)
        x = there**0.5 * (x - (1 - here) ** 0.5 * error) / here**0.5 + (1 - there) ** 0.5 * error
    found = sampler.run(lambda x, t, y: expected(x, alpha_bar(float(t[0]))), noise, LABELS)
    torch.testing.assert_close(found.double(), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", ["flow", "eps"])
@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
def test_solvers_of_second_order_are_closer_to_a_curved_path(solver, prediction, noise):
    """Normal data with deviation 0.5: every sample ends at a known multiple of its noise."""

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        sigma = (t / 1000).reshape(-1, 1, 1, 1)
        return x * (sigma - 0.25 * (1 - sigma)) / (0.25 * (1 - sigma) ** 2 + sigma**2)

    def error(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        share = alpha_bar(float(t[0]))
        return x * (1 - share) ** 0.5 / (0.25 * share + 1 - share)

    field = velocity if prediction == "flow" else error
    misses = {}
    for name in ("euler", solver):
        for steps in (10, 40):
            found = Sampler(prediction, steps, name).run(field, noise, LABELS)
            misses[name, steps] = float((found - 0.5 * noise).norm() / noise.norm())
    assert misses[solver, 10] < 0.75 * misses["euler", 10]
    assert misses[solver, 40] < 0.25 * misses["euler", 40]


@pytest.mark.parametrize("prediction", ["flow", "eps"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_as_many_timesteps_as_steps(solver, prediction):
    for steps in (*range(1, 998, 20), 998):  # 61 and 121 are among those that a range of floats gets wrong
        taus = Sampler(prediction, steps, solver).taus
        assert len(taus) == steps
        assert taus.min() >= 0
        assert (np.diff(taus) < 0).all()


@pytest.mark.parametrize("prediction", ["flow", "eps"])
def test_the_solvers_look_at_nearly_the_same_noise_levels(prediction):
    """To within one of the thousand timesteps, so that they may share a schedule and a bundle."""
    euler, *others = (Sampler(prediction, 25, solver).timesteps for solver in SOLVERS)
    for other in others:
        np.testing.assert_allclose(other, euler, atol=2)


@pytest.mark.parametrize("prediction", ["flow", "eps"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_learned_variances_are_ignored(solver, prediction, noise):
    def plain(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * x

    def with_variances(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([0.1 * x, torch.full_like(x, 1e6)], dim=1)

    wanted = Sampler(prediction, 3, solver).run(plain, noise, LABELS)
    found = Sampler(prediction, 3, solver).run(with_variances, noise, LABELS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("prediction", ["flow", "eps"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_model_sees_the_times_that_are_announced(solver, prediction, noise):
    sampler = Sampler(prediction, 4, solver)
    seen: list[float] = []
    done: list[int] = []

    def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert t.shape == (3,)
        assert torch.equal(y, LABELS)
        seen.append(t.unique().item())
        return torch.zeros_like(x)

    sampler.run(step, noise, LABELS, on_step=done.append)
    np.testing.assert_allclose(seen, sampler.timesteps)
    assert done == [0, 1, 2, 3]


@pytest.mark.parametrize("prediction", ["flow", "eps"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sampler_can_be_used_again(solver, prediction, noise):
    sampler = Sampler(prediction, 3, solver)
    first, second = (sampler.run(lambda x, t, y: 0.3 * x, noise, LABELS) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("prediction", ["flow", "eps"])
@pytest.mark.parametrize("steps", [1, 2, 50, 1000])
def test_noise_levels_fall_from_noise_to_clean(prediction, steps):
    taus = Sampler(prediction, steps).taus
    assert len(taus) == steps
    assert taus[0] == (1 if prediction == "flow" else 0.999)
    assert taus.min() >= 0
    assert (np.diff(taus) < 0).all()


def test_guidance_goes_beyond_the_conditional_prediction(noise):
    calls: list[Any] = []

    def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append((x, t, y))
        return y.reshape(-1, 1, 1, 1) * torch.ones_like(x)

    result = Sampler("flow", 1).run(step, noise, LABELS, guidance=2.5, null_class=7)
    classes = LABELS.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(result, noise - (7 + 2.5 * (classes - 7)))
    [(x, t, y)] = calls
    assert torch.equal(x, torch.cat([noise, noise]))
    assert t.tolist() == [1000] * 6
    assert y.tolist() == [2, 0, 1, 7, 7, 7]


def test_no_guidance_runs_the_batch_once(noise):
    batches = []

    def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batches.append(len(x))
        return torch.zeros_like(x)

    Sampler("flow", 2).run(step, noise, LABELS, guidance=1, null_class=7)
    assert batches == [3, 3]


def test_guidance_without_an_unconditional_class(noise):
    with pytest.raises(UsageError, match="guidance needs a model with an unconditional class"):
        Sampler("flow", 2).run(lambda x, t, y: x, noise, LABELS, guidance=2, null_class=None)


def test_what_is_no_sampler():
    with pytest.raises(UsageError, match="unknown prediction 'v': choose eps or flow"):
        Sampler("v", 2)
    with pytest.raises(UsageError, match="0 sampling steps"):
        Sampler("flow", 0)
    for prediction, solver in (("eps", "euler"), ("flow", "dpm++"), ("flow", "unipc")):
        with pytest.raises(UsageError, match="1001 sampling steps: there are 1000 timesteps"):
            Sampler(prediction, 1001, solver)
    with pytest.raises(UsageError, match=r"unknown solver 'heun': choose one of euler, dpm\+\+, unipc"):
        Sampler("flow", 2, "heun")


def test_euler_on_a_flow_takes_any_number_of_steps():
    taus = Sampler("flow", 1500).taus
    assert len(taus) == 1500
    assert (np.diff(taus) < 0).all()


def test_noise_depends_on_seed_and_place_alone():
    many, few = initial_noise(5, 4, 2, 8), initial_noise(5, 2, 2, 8)
    assert many.shape == (4, 2, 8, 8)
    assert torch.equal(many[:2], few)
    assert torch.equal(many[3], initial_noise(8, 1, 2, 8)[0])
    assert not torch.equal(many[0], many[1])
    assert abs(float(initial_noise(0, 64, 1, 16).std()) - 1) < 0.05


def test_labels_take_turns():
    assert labels_for(5, 3).tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction", ["flow", "eps"])
@pytest.mark.parametrize(("first", "steps"), [(0, None), (6, None), (6, 5), (6, 1), (19, 1)])
def test_the_tail_of_a_run(prediction, solver, first, steps):
    """It sees levels of the run from there on, and takes data noised to the first of them back to clean."""
    sampler, clean = Sampler(prediction, 20, solver), torch.rand(2, 1, 4, 4) * 2 - 1
    part = sampler.tail(first, steps)
    seen: list[float] = []

    def knows(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(float(t[0]))
        if prediction == "flow":
            return (x - clean) / (t / 1000).view(-1, 1, 1, 1)
        kept = sampler.scheduler.alphas_cumprod[t.long()].view(-1, 1, 1, 1)
        return (x - kept.sqrt() * clean) / (1 - kept).sqrt()

    noised = part.add_noise(clean, torch.randn_like(clean), torch.full((2,), float(part.timesteps[0])))
    found = part.run(knows, noised, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-2)
    assert seen == part.timesteps.tolist()
    assert part.steps == len(seen) == (steps or 20 - first)
    assert seen[0] == sampler.timesteps[first]
    assert set(seen) <= set(sampler.timesteps.tolist())
    if steps is None:
        assert seen == sampler.timesteps[first:].tolist()
    assert sampler.steps == len(sampler.timesteps) == 20, "the run itself is as it was"


def test_the_whole_tail_is_the_run():
    sampler, noise = Sampler("eps", 7, "unipc"), torch.randn(1, 1, 4, 4)
    labels = torch.zeros(1, dtype=torch.int64)
    step = lambda x, t, y: torch.tanh(x + t.view(-1, 1, 1, 1) / 1000)  # noqa: E731
    assert torch.equal(sampler.run(step, noise, labels), sampler.tail(0).run(step, noise, labels))


@pytest.mark.parametrize(("first", "steps"), [(4, None), (2, 3), (0, 0)])
def test_a_tail_of_steps_that_there_are_not(first, steps):
    with pytest.raises(ValueError, match="steps of the"):
        Sampler("flow", 4).tail(first, steps)
