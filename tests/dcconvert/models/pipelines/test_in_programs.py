"""A drop-in inside other people's programs: threads, adapters, compilers, offloading, saving, streams of images."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcconvert
from benchmarks.families import FAMILIES, made
from dcconvert import UsageError
from dcconvert.models.pipelines.drop_in import DropIn
from tests.passes.harness import relative

pytest.importorskip("diffusers", reason="these are models of diffusers")

STEPS = 6


@pytest.fixture(scope="module")
def transformer() -> Any:
    return made(FAMILIES["sd3"])[0]


@pytest.fixture(scope="module")
def shared(transformer) -> Any:
    """A drop-in that is converted already; tests leave the original as it is."""
    drop: Any = dcconvert.convert(transformer, ratio=2, steps=STEPS)
    sampled(drop)
    return drop


@torch.no_grad()
def sampled(model: Any, seed: int = 0, steps: int = STEPS, batch: int = 1) -> Tensor:
    """A sampling loop from noise and a prompt of this seed."""
    generator = torch.Generator().manual_seed(seed)
    x, text, pooled = (torch.randn(batch, *size, generator=generator) for size in ((4, 8, 8), (7, 24), (16,)))
    for number in range(steps):
        x = x - step(model, x, text, pooled, 1 - number / steps) / steps
    return x


def step(model: Any, x: Tensor, text: Tensor, pooled: Tensor, tau: float, **more: Any) -> Tensor:
    t = torch.full((len(x),), 1000 * tau)
    given = {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": t, "return_dict": False}
    return model(hidden_states=x, **given, **more)[0]


def fresh(transformer: Any, **options: Any) -> Any:
    return dcconvert.convert(transformer, **{"ratio": 2, "steps": STEPS, **options})


def stub(module: Any, shared: Any) -> tuple[Any, list[Any]]:
    """A drop-in for a copy of the original that takes the shared conversion for its own; and what it converted."""
    [model], converted = shared._models.values(), []

    def convert(given: Any, steps: int, **_: Any) -> Any:
        converted.append(given)
        return model.with_steps(steps)

    return DropIn(module, convert, STEPS), converted


def test_threads_share_a_drop_in(transformer, shared):
    wanted = {seed: sampled(shared, seed) for seed in (1, 2)}
    (drop, converted), found = stub(transformer, shared), {}
    jobs = [threading.Thread(target=lambda s=seed: found.update({s: sampled(drop, s)})) for seed in wanted]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert all(torch.equal(found[seed], wanted[seed]) for seed in wanted)
    assert converted == [transformer]  # one of them converted, the other waited


def test_it_is_the_original_for_those_who_ask(transformer, shared):
    assert isinstance(shared, type(transformer))
    assert isinstance(shared, DropIn)
    assert (shared.__class__, shared.__module__) == (type(transformer), type(transformer).__module__)
    assert not hasattr(shared, "_hf_hook")


def test_a_pipeline_saves_the_original(transformer, shared, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    parts = ("vae", *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe: Any = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **dict.fromkeys(parts))
    pipe.transformer = shared
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"][1] == type(transformer).__name__
    again = type(transformer).from_pretrained(tmp_path / "transformer")
    assert relative(sampled(again), sampled(transformer)) < 1e-5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda drop: pickle.loads(pickle.dumps(drop))])
def test_copies_have_weights_of_their_own_and_no_runs(shared, copied):
    other = copied(shared)
    assert type(other) is DropIn
    assert other.undo() is not shared.undo()
    assert "will be converted when it is called" in other.summary()
    torch.testing.assert_close(other.undo().state_dict(), shared.undo().state_dict(), rtol=0, atol=0)


class Adapted(nn.Module):
    """A linear layer with an adapter that can be switched, as PEFT's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.low = nn.Linear(base.in_features, base.out_features, bias=False)
        nn.init.normal_(self.low.weight, std=0.5)
        self._active_adapter = ["first"]

    def forward(self, x: Tensor) -> Tensor:
        found = self.base_layer(x)
        return found + self.low(x) if self._active_adapter else found


def test_adapters_may_change_after_the_first_call(transformer):
    model = copy.deepcopy(transformer)
    drop, seen = fresh(model, ratio=1), []
    layers = [block.attn for block in model.transformer_blocks]
    for layer in layers:
        layer.to_q = Adapted(layer.to_q)
    for change in (lambda _: None, lambda layer: layer.to_q._active_adapter.clear()):
        for layer in layers:
            change(layer)
        seen.append(sampled(drop, steps=1))
        assert relative(seen[-1], sampled(model, steps=1)) < 1e-5
    assert relative(seen[1], seen[0]) > 1e-4


def test_compiled_modules(transformer, shared):
    """The drop-in keeps the compiler out, and `convert` takes what is inside."""
    wanted = sampled(shared)
    assert torch.equal(sampled(torch.compile(shared)), wanted)
    drop, _ = stub(transformer, shared)
    drop.compile()
    assert torch.equal(sampled(drop), wanted)
    assert fresh(torch.compile(transformer)).undo() is transformer
    assert fresh(shared).undo() is transformer


def test_weights_that_are_brought_to_the_device_for_a_call(transformer, shared):
    hooks: Any = pytest.importorskip("accelerate.hooks")
    model, moved = copy.deepcopy(transformer), []

    class Notes(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            moved.append(module)
            return args, kwargs

    hooks.add_hook_to_module(model, Notes())
    assert torch.equal(sampled(stub(model, shared)[0]), sampled(shared))
    assert moved == [model] * STEPS


def test_weights_that_are_elsewhere(transformer):
    drop = fresh(copy.deepcopy(transformer).to("meta"))
    with pytest.raises(UsageError, match=r"weights of SD3Transformer2DModel are on meta, but its inputs on cpu: .*off"):
        sampled(drop)


def test_hooks_are_put_back_after_the_conversion(transformer):
    model = copy.deepcopy(transformer)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    wanted = sampled(model, steps=1)
    assert relative(sampled(fresh(model, ratio=1), steps=1), wanted) < 1e-5
    assert torch.equal(sampled(model, steps=1), wanted)


def test_the_number_of_steps_may_be_set_at_any_time(transformer, shared):
    drop, converted = stub(transformer, shared)
    drop.steps = 28
    sampled(drop, steps=4)
    before = drop._runs.own.run.ratio
    drop.steps = 4
    sampled(drop, steps=4)
    assert (before, drop._runs.own.run.ratio) == (pytest.approx(4 / 3), 2)
    assert len(converted) == 1
    for wrong in (0, -1, 2.5, "4"):
        with pytest.raises(UsageError, match="give a whole number of at least 1"):
            drop.steps = wrong


def test_a_run_that_was_asked_for_more_steps_says_what_it_reached(shared):
    shared.forget()
    sampled(shared, steps=3)
    last = shared.summary().splitlines()[-1]
    assert last.startswith("last run: 3 steps, ")
    assert "(asked for: 2x over 6 steps)" in last
    assert "x fewer operations in the whole model" in last


def test_contexts_say_which_step_it_is(shared):
    """As Wan's pipeline does; step 0 begins a run, whatever was left of the one before."""
    generator = torch.Generator().manual_seed(0)
    x, text, pooled = (torch.randn(1, *size, generator=generator) for size in ((4, 8, 8), (7, 24), (16,)))
    shared.forget()
    with torch.no_grad():
        for index, tau in ((0, 0.9), (1, 0.8), (0, 0.7)):
            with shared.cache_context("cond", step_index=index, sigma=tau, num_inference_steps=3):
                step(shared, x, text, pooled, tau)
            run = shared._runs.own.run
            assert len(run.computed) == index + 1


def test_values_added_to_the_tokens_may_change_at_every_step(transformer):
    """Those of a ControlNet; what depends on them is not computed once for all steps."""
    generator = torch.Generator().manual_seed(0)
    x, text, pooled = (torch.randn(1, *size, generator=generator) for size in ((4, 8, 8), (7, 24), (16,)))
    exact = fresh(transformer, ratio=1, options=dcconvert.Options("carry"))
    for number in range(3):
        added = [torch.randn(1, 16, 32, generator=generator)] * 2
        with torch.no_grad():
            found, wanted = (
                step(model, x, text, pooled, 0.9 - 0.1 * number, block_controlnet_hidden_states=added)
                for model in (exact, transformer)
            )
        assert relative(found, wanted) < 1e-5
    assert len(exact._runs.own.run.computed) == 3
