"""Samplers: exact where the field is known, guided by the formula, the same noise whatever the batch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcconvert.passes.errors import UsageError
from dcconvert.sampling import Sampler, initial_noise, labels_for

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


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_euler_finds_the_point_that_a_field_points_at(steps, data, noise):
    """(x - data) / sigma depends on where the sampler is and on what t says."""
    result = Sampler("flow", steps).run(lambda x, t, y: (x - data) / (t / 1000).reshape(-1, 1, 1, 1), noise, LABELS)
    torch.testing.assert_close(result, data, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 300])
def test_ddim_with_the_exact_noise_recovers_the_data(steps, data, noise):
    start = alpha_bar(999) ** 0.5 * data + (1 - alpha_bar(999)) ** 0.5 * noise

    def exact(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        share = alpha_bar(float(t[0]))
        return (x - share**0.5 * data) / (1 - share) ** 0.5

    torch.testing.assert_close(Sampler("eps", steps).run(exact, start, LABELS), data, rtol=0, atol=2e-3)
    torch.testing.assert_close(Sampler("eps", steps).run(lambda *_: noise, start, LABELS), data, rtol=0, atol=2e-3)


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
def test_as_many_timesteps_as_steps(prediction):
    for steps in range(1, 1001, 20):  # 61 and 121 are among those that a range of floats gets wrong
        taus = Sampler(prediction, steps).taus
        assert len(taus) == steps
        assert taus.min() >= 0
        assert (np.diff(taus) < 0).all()


@pytest.mark.parametrize("prediction", ["flow", "eps"])
def test_learned_variances_are_ignored(prediction, noise):
    def plain(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * x

    def with_variances(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([0.1 * x, torch.full_like(x, 1e6)], dim=1)

    wanted = Sampler(prediction, 3).run(plain, noise, LABELS)
    torch.testing.assert_close(Sampler(prediction, 3).run(with_variances, noise, LABELS), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("prediction", ["flow", "eps"])
def test_the_model_sees_the_times_that_are_announced(prediction, noise):
    sampler = Sampler(prediction, 4)
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
def test_a_sampler_can_be_used_again(prediction, noise):
    sampler = Sampler(prediction, 3)
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
    with pytest.raises(UsageError, match="1001 sampling steps"):
        Sampler("eps", 1001)


def test_noise_depends_on_seed_and_place_alone():
    many, few = initial_noise(5, 4, 2, 8), initial_noise(5, 2, 2, 8)
    assert many.shape == (4, 2, 8, 8)
    assert torch.equal(many[:2], few)
    assert torch.equal(many[3], initial_noise(8, 1, 2, 8)[0])
    assert not torch.equal(many[0], many[1])
    assert abs(float(initial_noise(0, 64, 1, 16).std()) - 1) < 0.05


def test_labels_take_turns():
    assert labels_for(5, 3).tolist() == [0, 1, 2, 0, 1]
