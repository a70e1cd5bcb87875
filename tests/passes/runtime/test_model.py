"""The rewritten model: called like the original, in the ways it was captured, and clear when it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel
from tests.passes.harness import BATCH, Block, TinyModel, diffusers_call, relative, tiny_inputs

HALF = Policy("constant", 2).timetable()
ALL = Policy("constant", 1).timetable()


class Keyworded(TinyModel):
    """Two keywords, a structured input, a plain number; returns a dictionary."""

    def forward(  # type: ignore[override]
        self, x: Tensor, *, cond: dict[str, Tensor], timestep: Tensor, gain: float = 1.0
    ) -> dict[str, Tensor]:
        return {"sample": super().forward(x, timestep) * gain + cond["bias"].unsqueeze(1)}


def keyworded_call(batch: int = BATCH) -> tuple[tuple[Tensor], dict[str, object]]:
    x, t = tiny_inputs(batch)
    return (x,), {"cond": {"bias": torch.randn(batch, 8)}, "timestep": t, "gain": 2.0}


@pytest.fixture(scope="module")
def tiny() -> tuple[nn.Module, DynamicModel]:
    torch.manual_seed(0)
    module = TinyModel(Block() for _ in range(3))
    return module, rewrite(module, tiny_inputs(), {}, method_of("chunk"), HALF, timestep_scale=1.0)


@pytest.fixture(scope="module")
def keyworded() -> tuple[nn.Module, DynamicModel]:
    torch.manual_seed(0)
    module = Keyworded(Block() for _ in range(3))
    return module, rewrite(module, *keyworded_call(), method_of("chunk"), ALL, timestep_scale=1.0)


def test_call_returns_what_the_original_returns(keyworded):
    module, model = keyworded
    for batch in (1, 2, 4):
        args, kwargs = keyworded_call(batch)
        found = model(*args, **kwargs)
        assert list(found) == ["sample"]
        torch.testing.assert_close(found, module(*args, **kwargs))
        torch.testing.assert_close(model.original(*args, **kwargs), module(*args, **kwargs))


def test_a_ready_made_output_class_comes_back_as_itself():
    module, args, kwargs = diffusers_call()
    kwargs["return_dict"] = True
    model = rewrite(module, args, kwargs, method_of("chunk"), ALL)
    found = model(*args, **kwargs)
    assert type(found).__name__ == "Transformer2DModelOutput"
    assert relative(found.sample, module(*args, **kwargs).sample) < 1e-5


def test_keywords_in_any_order(keyworded):
    _, model = keyworded
    args, kwargs = keyworded_call()
    swapped = dict(reversed(kwargs.items()))
    torch.testing.assert_close(model(*args, **swapped), model(*args, **kwargs), rtol=0, atol=0)


def test_another_call_is_a_usage_error_that_names_the_inputs(keyworded):
    _, model = keyworded
    args, kwargs = keyworded_call()
    wrong = [
        ((), kwargs),
        ((*args, args[0]), kwargs),
        (args, {name: value for name, value in kwargs.items() if name != "gain"}),
        (args, {**kwargs, "extra": 1}),
        (args, {**kwargs, "cond": kwargs["timestep"]}),
    ]
    for bad_args, bad_kwargs in wrong:
        with pytest.raises(UsageError, match=r"captured for a call with x, .*cond.*, timestep, gain") as error:
            model(*bad_args, **bad_kwargs)
        assert "\n" not in str(error.value)


def test_a_constant_of_the_captured_call_cannot_silently_change(keyworded):
    """The number 2.0 is burnt into the graph, so another one must not be taken for it."""
    _, model = keyworded
    args, kwargs = keyworded_call()
    with pytest.raises(UsageError, match=r"input gain was 2\.0 .* and is 3\.0"):
        model(*args, **{**kwargs, "gain": 3.0})


def test_the_timestep_is_found_by_name_or_given(tiny, keyworded):
    assert tiny[1].spec.timestep == "t"
    assert keyworded[1].spec.timestep == "timestep"
    module, inputs = tiny[0], tiny_inputs()
    assert rewrite(module, inputs, {}, method_of("chunk"), HALF, timestep="x").spec.timestep == "x"
    with pytest.raises(UsageError, match="no input 'sigma' to take the timestep from; it has x, t"):
        rewrite(module, inputs, {}, method_of("chunk"), HALF, timestep="sigma")


def test_a_schedule_that_follows_the_timestep(tiny):
    model = tiny[1].with_schedule(Policy("falling", 2).timetable())
    planner = model.planner
    taus = planner.taus({"t": torch.tensor([0.0, 0.5, 1.0])}, 3)
    assert planner.counts(taus).tolist() == [2, 4, 6]  # a quarter, half and three quarters of 8
    assert planner.taus({"t": torch.tensor(1.0)}, 2).tolist() == [1, 1]  # one timestep for the batch
    x, _ = tiny_inputs()
    run = model.start(3)
    run.step({"x": x, "t": torch.tensor([0.0, 0.5, 1.0])})
    assert run.last_plan is not None
    assert run.last_plan.counts.tolist() == [2, 4, 6]


def test_a_schedule_without_a_timestep_is_a_usage_error():
    class Nameless(TinyModel):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return super().forward(x, sigma)

    model = rewrite(Nameless(Block() for _ in range(3)), tiny_inputs(), {}, method_of("chunk"), HALF)
    assert model.spec.timestep is None
    model(*tiny_inputs())
    with pytest.raises(UsageError, match=r"schedule 'rising' needs the timestep.*timestep=\.\.\."):
        model.with_schedule(Policy("rising", 2).timetable())(*tiny_inputs())


def test_with_schedule_shares_weights_and_leaves_the_first_alone(tiny):
    _, model = tiny
    other = model.with_schedule(ALL)
    assert (model.schedule, other.schedule) == (HALF, ALL)
    assert other.route_graph is model.route_graph
    inputs = tiny_inputs()
    assert relative(other(*inputs), model.original(*inputs)) < 1e-5 < relative(model(*inputs), model.original(*inputs))


def test_a_ratio_beyond_the_tokens_is_a_usage_error(tiny):
    module, model = tiny
    for make in (
        lambda: model.with_schedule(Policy("constant", 9).timetable()),
        lambda: rewrite(module, tiny_inputs(), {}, method_of("chunk"), Policy("constant", 9).timetable()),
    ):
        with pytest.raises(UsageError, match="8x"):
            make()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_are_refused_and_the_sample_named(tiny, bad):
    x, t = tiny_inputs()
    x[1, 0, 2, 3] = bad
    for schedule in (HALF, ALL):
        with pytest.raises(CheckFailedError, match=r"sample 1 .*non-finite"):
            tiny[1].with_schedule(schedule)(x, t)


def test_a_bucket_gives_the_same_result(tiny):
    _, model = tiny
    x, t = tiny_inputs()
    inputs = model.flat_inputs((x, t), {})
    with torch.no_grad():
        scores, live = model.route(inputs)
        assert list(live) == list(model.spec.live)
        tight, roomy = (
            model.denoise(inputs, live, model.planner.plan(scores.numpy(), np.array([4, 3, 5]), bucket))[0]
            for bucket in (None, Bucket(3, 32, 3, 8, 4))
        )
    torch.testing.assert_close(tight, roomy)


def test_gradients_reach_every_parameter_but_none_through_the_plan():
    module = TinyModel(Block() for _ in range(3))
    model = rewrite(module, tiny_inputs(), {}, method_of("chunk"), HALF)
    model(*tiny_inputs()).square().mean().backward()
    missing = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert not missing


@pytest.mark.parametrize("name", ["h", "live_0", "scores", "chunk_index"])
def test_an_input_with_a_name_that_the_conversion_uses_too(name):
    """The model's own `h` is needed late; it must not be taken for the hidden state."""
    scope: dict[str, object] = {"TinyModel": TinyModel}
    exec(  # an argument's name cannot be a parameter
        f"class Named(TinyModel):\n"
        f"    def forward(self, x, t, {name}):\n"
        f"        return super().forward(x, t) + {name}.unsqueeze(1)\n",
        scope,
    )
    module = scope["Named"](Block() for _ in range(3))  # type: ignore[operator]
    inputs = (*tiny_inputs(), torch.randn(BATCH, 8))
    model = rewrite(module, inputs, {}, method_of("chunk"), ALL)
    assert relative(model(*inputs), module(*inputs)) < 1e-5


def test_half_precision():
    module = TinyModel(Block() for _ in range(3)).to(torch.bfloat16)

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            inner = self.inner
            c = torch.sin(t.unsqueeze(1) * torch.arange(12)).to(torch.bfloat16)
            x = inner.patchify(x).flatten(2).transpose(1, 2) + inner.positions
            for block in inner.blocks:
                x = block(x, c)
            return inner.final(x)

    x, t = tiny_inputs()
    model = rewrite(Cast(), (x.bfloat16(), t), {}, method_of("chunk"), HALF)
    assert model(x.bfloat16(), t).dtype == torch.bfloat16


def test_summary_tells_what_was_done(tiny):
    summary = tiny[1].summary()
    assert "2x4 = 8 tokens, 4 kept on average (2x)" in summary
    assert "3 blocks: 1 head, 1 trunk, 1 tail" in summary
    assert "router pool, schedule constant" in summary
    assert "PackTrunk: 1 matches" in summary
