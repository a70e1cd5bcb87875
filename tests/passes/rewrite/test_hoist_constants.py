"""HoistConstants: what neither image nor timestep decides is computed once in a run, and is what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.graph_tools import placeholders
from dcconvert.passes.ir.pass_runner import run_passes
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import captured, rewrite
from dcconvert.passes.planning.carry_plan import full_carry_plan
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.rewrite.hoist_constants import HoistConstants
from dcconvert.passes.runtime.model import DynamicModel
from tests.passes.carry_harness import at, carried, flat, plain
from tests.passes.harness import BATCH, TOKENS, WIDTH, Block, TinyModel, count, first_tensor, relative, tiny_inputs

aten = torch.ops.aten
FULL = Policy("constant", 1).timetable()


class Texted(TinyModel):
    """Every block takes a linear layer's view of a text, [B, 5]; a table and a sum of the text cost nothing."""

    def __init__(self) -> None:
        super().__init__(Block() for _ in range(3))
        self.views = nn.ModuleList(nn.Linear(5, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        c = torch.sin(t.unsqueeze(1) * torch.arange(WIDTH))
        x = self.patchify(x).flatten(2).transpose(1, 2) + self.positions
        for block, view in zip(self.blocks, self.views, strict=True):
            x = block(x, c + torch.tanh(view(text)))
        return self.final(x) * text.sum(1).view(-1, 1, 1)


@pytest.fixture(scope="module")
def texted() -> tuple[DynamicModel, tuple[Any, ...]]:
    torch.manual_seed(0)
    inputs = (*tiny_inputs(), torch.randn(BATCH, 5))
    return rewrite(Texted(), inputs, {}, method_of("carry"), FULL, timestep_scale=1.0), inputs


def test_costly_constants_come_from_prepare(texted):
    model, _ = texted
    assert model.spec.constants == ("constant_0", "constant_1", "constant_2")
    assert model.spec.prepare_inputs == ("text",)
    assert count(model.prepare_graph, aten.linear.default) == count(model.prepare_graph, aten.tanh.default) == 3
    assert count(model.denoise_graph, aten.tanh.default) == 0
    assert "text" in model.spec.denoise_inputs  # for the sum, which is cheap


def test_inputs_that_are_needed_no_more_are_gone():
    model, _ = carried("pixart")
    assert "encoder_hidden_states" not in model.spec.denoise_inputs
    for graph in (model.denoise_graph, model.prepare_graph):
        assert graph is not None
        assert all(node.users for node in placeholders(graph.graph))


@pytest.mark.parametrize("batch", [1, 4])
def test_values_are_those_of_the_original(texted, batch):
    model, _ = texted
    inputs = (*tiny_inputs(batch), torch.randn(batch, 5))
    with torch.no_grad():
        assert relative(model.with_schedule(FULL)(*inputs), model.original(*inputs)) < 1e-5


def test_denoise_takes_the_constants_it_is_given_and_makes_those_it_is_not():
    model, call = carried("pixart")
    now = at(model, call, 0.5)
    inputs = flat(model, now)
    with torch.no_grad():
        constants = model.prepare(inputs)
        assert tuple(constants) == model.spec.constants
        _, live = model.route(inputs)
        plan = full_carry_plan(BATCH, model.spec.tokens)
        made, given = (first_tensor(model.denoise(i, live, plan)) for i in (inputs, {**inputs, **constants}))
        wild = {name: torch.full_like(value, 3.0) for name, value in constants.items()}
        other = first_tensor(model.denoise({**inputs, **wild}, live, plan))
    assert torch.equal(made, given)
    assert relative(made, plain(now)) < 1e-5 < relative(other, made)


@pytest.mark.parametrize("name", ["tiny", "dit", "diffusers"])
def test_a_model_with_classes_has_nothing_to_prepare(name):
    """What a label's embedding gives is added to the timestep's."""
    model, call = carried(name)
    assert model.prepare_graph is None
    assert model.prepare(flat(model, call)) == {}
    record = model.records[-1]
    assert (record.name, record.matches) == ("HoistConstants", 0)
    assert record.notes == ("nothing costly is the same at every step",)


def test_it_needs_the_split_before_it():
    torch.manual_seed(0)
    program = captured(TinyModel(Block() for _ in range(3)), tiny_inputs(), {}, method_of("carry"))
    with pytest.raises(CheckFailedError, match="HoistConstants needs SplitRoute before it"):
        run_passes(program, (HoistConstants(),))


def test_the_batch_size_of_constants_is_their_own():
    """A reshape with the image's batch size in the text's path must not drag the image into prepare."""

    class Reshaped(Texted):
        def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
            wide = self.views[0](text.reshape(x.shape[0] * 5, 1).expand(-1, 5)).reshape(x.shape[0], 5, WIDTH).mean(1)
            c = torch.sin(t.unsqueeze(1) * torch.arange(WIDTH)) + wide
            x = self.patchify(x).flatten(2).transpose(1, 2) + self.positions
            for block in self.blocks:
                x = block(x, c)
            return self.final(x) * wide.mean(1).view(-1, 1, 1)

    inputs = (*tiny_inputs(), torch.randn(BATCH, 5))
    model = rewrite(Reshaped(), inputs, {}, method_of("carry"), FULL, timestep_scale=1.0)
    assert model.spec.prepare_inputs == ("text",)
    for batch in (1, 2, BATCH + 1):
        given = (*tiny_inputs(batch), torch.randn(batch, 5))
        with torch.no_grad():
            found = model.with_schedule(FULL)(*given)
            assert found.shape == (batch, TOKENS, 8)
            assert relative(found, model.original(*given)) < 1e-5


@pytest.mark.parametrize("gain", [torch.tensor(0.5), torch.rand(5)], ids=["a number", "a row"])
def test_constants_of_inputs_with_and_without_samples(gain):
    """What is there once for the whole batch comes first: the batch size is not read off it."""

    class Gained(Texted):
        def forward(self, x: Tensor, t: Tensor, gain: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, t, (gain * text).reshape(x.shape[0] * 5, 1).reshape(x.shape[0], 5))

    inputs = (*tiny_inputs(), gain, torch.randn(BATCH, 5))
    model = rewrite(Gained(), inputs, {}, method_of("carry"), FULL, timestep_scale=1.0)
    assert model.spec.prepare_inputs == ("gain", "text")
    for batch in (1, BATCH + 1):
        given = (*tiny_inputs(batch), torch.rand_like(gain), torch.randn(batch, 5))
        with torch.no_grad():
            assert relative(model.with_schedule(FULL)(*given), model.original(*given)) < 1e-5


def test_one_text_for_all_samples_is_not_hoisted():
    """Nothing that `prepare` would read says how many samples there are."""

    class Shared(Texted):
        def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, t, text.expand(x.shape[0], 5))

    model = rewrite(Shared(), (*tiny_inputs(), torch.randn(1, 5)), {}, method_of("carry"), FULL, timestep_scale=1.0)
    assert model.prepare_graph is None
    for batch in (1, BATCH + 1):
        given = (*tiny_inputs(batch), torch.randn(1, 5))
        with torch.no_grad():
            assert relative(model.with_schedule(FULL)(*given), model.original(*given)) < 1e-5
