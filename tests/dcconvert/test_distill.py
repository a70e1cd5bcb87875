"""Distillation step by step: it starts at the model, lowers the loss, and goes on as if never stopped."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch

import dcconvert
from dcconvert.distill import Distillation, Recipe, pick_ratio, spread_times
from dcconvert.passes.errors import CheckFailedError, UsageError
from dcconvert.passes.infra import Options
from dcconvert.passes.model import DynamicModel
from dcconvert.passes.trained import all_tensors
from dcconvert.sampling import Sampler
from tests.dcconvert.harness import TOKENS, tiny_dit

TAUS = Sampler("flow", 10).taus
RECIPE = Recipe(samples=80, batch=8, lr=1e-3, rank=4)


@pytest.fixture(scope="module")
def model() -> DynamicModel:
    return dcconvert.convert(tiny_dit(), 4, options=Options(mode="chunk")).requires_grad_(False)


def batch(seed: int, size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 1, 16, 16, generator=generator)
    return {"x": x, "t": 1000 * spread_times(size, generator), "y": torch.arange(size) % 4}


def trained(model: DynamicModel, recipe: Recipe, steps: int) -> tuple[Distillation, list[float]]:
    made = Distillation(model, recipe, TAUS)
    losses = [made.train_step(batch(step % 2), made.planners[0])["output"] for step in range(steps)]
    return made, losses


@pytest.mark.parametrize("train", ["all", "lora"])
def test_it_starts_at_the_model(train, model):
    made = Distillation(model, replace(RECIPE, train=train), TAUS)
    tensors = all_tensors(model)
    assert made.averaged()
    for name, value in made.averaged().items():
        torch.testing.assert_close(value, tensors[name], rtol=0, atol=0)
    counts = np.full(8, TOKENS // 4)
    with torch.no_grad():
        [wanted] = model.start(8).step(batch(0), counts)
        found, _ = made.run_student(batch(0), counts)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_the_loss_falls_and_the_model_stays(train, model):
    before = {name: value.clone() for name, value in all_tensors(model).items()}
    made, losses = trained(model, replace(RECIPE, train=train, lr=3e-3, samples=240), 30)
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    torch.testing.assert_close(all_tensors(model), before, rtol=0, atol=0)
    assert made.step == 30


def test_lora_trains_little(model):
    few, every = (Distillation(model, replace(RECIPE, train=train, rank=2), TAUS) for train in ("lora", "all"))
    sizes = [sum(part.numel() for part in made.weights.parts) for made in (few, every)]
    assert sizes[0] < 0.3 * sizes[1]


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_run_that_was_stopped_ends_with_the_same_weights(train, model):
    recipe = replace(RECIPE, train=train)
    through, _ = trained(model, recipe, 6)
    first, _ = trained(model, recipe, 3)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = Distillation(model, recipe, TAUS)
    second.restore(torch.load(file, weights_only=True))
    for step in range(3, 6):
        second.train_step(batch(step % 2), second.planners[0])
    for name, value in through.averaged().items():
        torch.testing.assert_close(second.averaged()[name], value, rtol=0, atol=0)


def test_one_set_of_weights_for_several_ratios(model):
    made = Distillation(model, replace(RECIPE, ratios=(2.0, 8.0)), TAUS)
    assert [planner.run_counts(TAUS).mean() for planner in made.planners] == [32, 8]
    generator = torch.Generator().manual_seed(0)
    assert {id(pick_ratio(made.planners, generator)) for _ in range(20)} == {id(planner) for planner in made.planners}


def test_a_loss_that_is_no_number(model):
    made = Distillation(model, RECIPE, TAUS)
    with torch.no_grad():
        made.weights.parts[made.weights.names.index("final_layer.linear.weight")].fill_(torch.inf)
    with pytest.raises(CheckFailedError, match="not finite"):
        made.train_step(batch(0), made.planners[0])


def test_the_learning_rate_rises_and_falls():
    recipe = Recipe(samples=1000, batch=10, lr=1.0, warm_up=0.1)
    rates = [recipe.rate(step) for step in range(recipe.steps)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.01


def test_what_cannot_be_trained():
    with pytest.raises(UsageError, match="cannot train 'everything': choose one of all, lora"):
        Recipe(train="everything")


def test_times_are_spread_over_the_whole_run():
    times = spread_times(50, torch.Generator().manual_seed(0))
    assert ((times > 0) & (times <= 1)).all()
    assert torch.bincount((times.sort().values * 50).ceil().long() - 1, minlength=50).tolist() == [1] * 50
