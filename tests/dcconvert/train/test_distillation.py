"""Distillation step by step: it starts at the model, lowers the loss, and goes on as if never stopped."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch

import dcconvert
from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.trained.weight_sets import all_tensors
from dcconvert.sampling.samplers import Sampler
from dcconvert.train.distillation import Recipe, StepDistillation, pick_ratio, ratio_loss, spread_times, with_new_paths
from dcconvert.train.run_distillation import RunDistillation
from tests.dcconvert.harness import CONFIG, TOKENS, tiny_dit

TAUS = Sampler("flow", 10).taus
RECIPE = Recipe(samples=80, batch=8, lr=1e-3, rank=4)


@pytest.fixture(scope="module")
def model() -> DynamicModel:
    return dcconvert.convert(tiny_dit(), 4, options=method_of("chunk")).requires_grad_(False)


def batch(seed: int, size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 1, 16, 16, generator=generator)
    return {"x": x, "t": 1000 * spread_times(size, generator), "y": torch.arange(size) % 4}


def trained(model: DynamicModel, recipe: Recipe, steps: int) -> tuple[StepDistillation, list[float]]:
    made = StepDistillation(model, recipe, TAUS)
    losses = [made.train(batch(step % 2), made.planners[0])["output"] for step in range(steps)]
    return made, losses


@pytest.mark.parametrize("train", ["all", "lora"])
def test_it_starts_at_the_model(train, model):
    made = StepDistillation(model, replace(RECIPE, train=(train,)), TAUS)
    tensors = all_tensors(model)
    assert made.averaged()
    for name, value in made.averaged().items():
        torch.testing.assert_close(value, tensors[name], rtol=0, atol=0)
    counts = np.full(8, TOKENS // 4)
    with torch.no_grad():
        [wanted] = model.start(8).step(batch(0), counts)
        found, *_ = made.run_student(batch(0), counts)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_the_loss_falls_and_the_model_stays(train, model):
    before = {name: value.clone() for name, value in all_tensors(model).items()}
    made, losses = trained(model, replace(RECIPE, train=(train,), lr=3e-3, samples=240), 30)
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    torch.testing.assert_close(all_tensors(model), before, rtol=0, atol=0)
    assert made.step == 30


def test_lora_trains_little(model):
    few, every = (StepDistillation(model, replace(RECIPE, train=(train,), rank=2), TAUS) for train in ("lora", "all"))
    sizes = [sum(part.numel() for part in made.weights.parts) for made in (few, every)]
    assert sizes[0] < 0.3 * sizes[1]


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_run_that_was_stopped_ends_with_the_same_weights(train, model):
    recipe = replace(RECIPE, train=(train,))
    through, _ = trained(model, recipe, 6)
    first, _ = trained(model, recipe, 3)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = StepDistillation(model, recipe, TAUS)
    second.restore(torch.load(file, weights_only=True))
    for step in range(3, 6):
        second.train(batch(step % 2), second.planners[0])
    for name, value in through.averaged().items():
        torch.testing.assert_close(second.averaged()[name], value, rtol=0, atol=0)


def test_one_set_of_weights_for_several_ratios(model):
    made = StepDistillation(model, replace(RECIPE, ratios=(2.0, 8.0)), TAUS)
    assert [planner.run_counts(TAUS).mean() for planner in made.planners] == [32, 8]
    generator = torch.Generator().manual_seed(0)
    assert {pick_ratio(made.planners, generator) for _ in range(20)} == {0, 1}


def test_a_loss_that_is_no_number(model):
    made = StepDistillation(model, RECIPE, TAUS)
    with torch.no_grad():
        made.weights.parts[made.weights.whole.index("final_layer.linear.weight")].fill_(torch.inf)
    with pytest.raises(CheckFailedError, match="not finite"):
        made.train(batch(0), made.planners[0])


def test_the_learning_rate_rises_and_falls():
    recipe = Recipe(lr=1.0, warm_up=0.1)
    rates = [recipe.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.01


def test_weights_are_averaged_as_they_go(model):
    """The decay rises from 2/11 to the recipe's; what it forgets at first is the untrained model."""
    made = StepDistillation(model, replace(RECIPE, ema=0.5), TAUS)
    wanted = [part.detach().clone() for part in made.weights.parts]
    for step in range(1, 14):
        made.train(batch(0), made.planners[0])
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = [decay * old + (1 - decay) * new.detach() for old, new in zip(wanted, made.weights.parts, strict=True)]
    torch.testing.assert_close(made.average, wanted, rtol=1e-5, atol=1e-6)
    assert any((now != old).any() for now, old in zip(made.weights.parts, made.average, strict=True))


@pytest.mark.parametrize("clip", [1e-4, 1e9])
def test_gradients_are_clipped(clip, model):
    made = StepDistillation(model, replace(RECIPE, clip=clip), TAUS)
    norms = []

    def look(*_: object) -> None:
        grads = [part.grad.flatten() for part in made.weights.parts if part.grad is not None]
        norms.append(float(torch.cat(grads).norm()))

    made.optimiser.register_step_pre_hook(look)
    norm = made.train(batch(0), made.planners[0])["norm"]
    assert norm > 1e-3
    assert norms == [pytest.approx(min(norm, clip), rel=1e-3)]


def test_learned_variances_are_not_trained():
    """Of a model that predicts noise and variances, samplers here use the noise: the loss is that of the noise."""
    config = replace(CONFIG, learn_sigma=True)
    variances = dcconvert.convert(tiny_dit(config), 4, options=method_of("chunk")).requires_grad_(False)
    made = StepDistillation(variances, replace(RECIPE, feature_weight=0.0), TAUS)
    grads: list[torch.Tensor] = []
    place = made.weights.whole.index("final_layer.linear.weight")
    made.optimiser.register_step_pre_hook(lambda *_: grads.append(made.weights.parts[place].grad.clone()))
    made.train(batch(0), made.planners[0])
    rows = grads[0].view(config.patch**2, 2, -1)  # pixels of a patch, then noise and variance
    assert float(rows[:, 0].abs().max()) > 0
    assert float(rows[:, 1].abs().max()) == 0


def test_what_cannot_be_trained():
    with pytest.raises(UsageError, match="cannot train 'everything': choose one of all, lora, router, adapters"):
        Recipe(train=("everything",))
    with pytest.raises(UsageError, match="either all weights or low-rank"):
        Recipe(train=("all", "lora"))


def test_times_are_spread_over_the_whole_run():
    times = spread_times(50, torch.Generator().manual_seed(0))
    assert ((times > 0) & (times <= 1)).all()
    assert torch.bincount((times.sort().values * 50).ceil().long() - 1, minlength=50).tolist() == [1] * 50


# New paths


@pytest.mark.parametrize("train", ["router", "adapters"])
def test_new_paths_start_at_the_model_and_learn(train, model):
    recipe = replace(RECIPE, train=(train,), lr=1e-2)
    more = with_new_paths(model, recipe)
    with torch.no_grad():
        [before], [after] = (m.start(8).step(batch(0), np.full(8, 16)) for m in (model, more))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    made, losses = trained(more, recipe, 30)
    assert {name.split(".")[0] for name in made.averaged()} == {
        "router_adapter" if train == "router" else "dechunk_adapter"
    }
    weights = all_tensors(more)
    assert any((value != weights[name]).any() for name, value in made.averaged().items())
    if train == "adapters":
        assert sum(losses[-2:]) < sum(losses[:2])


def test_mode_carry_has_no_place_for_new_paths(carried):
    with pytest.raises(UsageError, match="cannot train 'router' in mode carry"):
        with_new_paths(carried, replace(RECIPE, train=("router",)))


def test_ratio_loss_is_one_where_the_router_keeps_what_it_should():
    scores = torch.tensor([[0.9, 0.1, 0.1, 0.1]]).repeat(16, 1)
    exact = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(16, 1)
    assert float(ratio_loss(exact, np.full(16, 0.25))) == pytest.approx(1.0)
    assert float(ratio_loss(torch.ones(16, 4), np.full(16, 0.25))) == pytest.approx(4.0)  # n/(n-1) (n-1)
    assert float(ratio_loss(scores, np.full(16, 0.25))) == pytest.approx(4 / 3 * (0.75 * 0.7 + 3 * 0.25 * 0.3))
    assert float(ratio_loss(scores, np.ones(16))) == 0


# Mode carry


@pytest.fixture(scope="module")
def carried() -> DynamicModel:
    made = dcconvert.convert(tiny_dit(), 4, options=method_of("carry")).requires_grad_(False)
    return made.with_schedule(made.schedule.fitted(TAUS))


def runs_of(model: DynamicModel, rounds: int, lr: float = 1e-4, start: RunDistillation | None = None):
    made = start or RunDistillation(model, replace(RECIPE, lr=lr, unroll=4, samples=80 * rounds), Sampler("flow", 10))
    drifts = []
    while made.round < rounds:
        noise = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        drifts.append(made.train(noise, torch.arange(8) % 4, 0)["drift"])
    return made, drifts


def test_runs_are_trained_with_what_they_remember(carried):
    made, drifts = runs_of(carried, 5)
    assert made.step == 5 * 3  # ten steps in windows of four
    assert drifts[-1] < drifts[0]
    assert made.samples_a_round == 80


def test_runs_that_were_stopped_end_with_the_same_weights(carried):
    through, _ = runs_of(carried, 2)
    first = RunDistillation(carried, through.recipe, Sampler("flow", 10))
    noise = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    first.train(noise, torch.arange(8) % 4, 0)
    second = RunDistillation(carried, through.recipe, Sampler("flow", 10))
    second.restore(first.state())
    runs_of(carried, 2, start=second)
    for name, value in through.averaged().items():
        torch.testing.assert_close(second.averaged()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["chunk", "carry"])
def test_training_under_autocast(mode, model, carried):
    """As `upcycle --bf16` does."""
    with torch.autocast("cpu", torch.bfloat16):
        made, losses = runs_of(carried, 1) if mode == "carry" else trained(model, RECIPE, 1)
    assert made.step > 0
    assert np.isfinite(losses).all()
    assert {weight.dtype for weight in made.averaged().values()} == {torch.float32}
