"""The pipeline as a whole: order, log, dump, and that the module it was given stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.methods import MODES, method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from tests.passes.harness import Block, TinyModel, pixart_call, tiny_inputs

HALF = Policy("constant", 2).timetable()
UNUSED = ["RealNumbers", "WriteAttention", "MergeLater", "PartTokens"]  # by models that need none of them


def test_order():
    same = ["Normalise", "RealNumbers", "WriteAttention", "MergeLater"]
    before, after = [*same, "FindTokenStream", "PartTokens", "InsertRouter"], ["SplitRoute"]
    assert MODES == ("steps", "carry", "chunk")
    assert [p.name for p in method_of("chunk").pipeline()] == [*before, "PackTrunk", *after]
    assert [p.name for p in method_of("carry").pipeline()] == [*before, "CarryTrunk", *after, "HoistConstants"]


def test_defaults_of_each_mode():
    assert method_of().mode == "steps"
    carry = method_of("carry")
    assert (carry.head_blocks, carry.tail_blocks, carry.router) == (0, 0, "drift")
    chunk = method_of("chunk")
    assert (chunk.head_blocks, chunk.tail_blocks, chunk.router) == (1, 1, "pool")
    given = method_of("chunk", head_blocks=0, router="pool")
    assert (given.head_blocks, given.tail_blocks, given.router) == (0, 1, "pool")


def test_carry_is_logged_and_dumped_and_its_last_pass_may_find_nothing(tmp_path):
    model = rewrite(
        TinyModel(Block() for _ in range(3)), tiny_inputs(), {}, method_of("carry"), HALF, dump=tmp_path / "tiny"
    )
    assert [record.name for record in model.records] == [p.name for p in method_of("carry").pipeline()]
    assert [r.name for r in model.records if r.matches == 0] == [*UNUSED, "HoistConstants"]
    assert model.prepare_graph is None
    assert "dcconvert.cache_write" in (tmp_path / "tiny" / "09_HoistConstants.denoise.txt").read_text()
    model = rewrite(*pixart_call(), method_of("carry"), HALF, dump=tmp_path / "pixart")
    assert [r.name for r in model.records if r.matches == 0] == [name for name in UNUSED if name != "MergeLater"]
    assert model.prepare_graph is not None
    assert "aten.linear" in (tmp_path / "pixart" / "09_HoistConstants.prepare.txt").read_text()


def test_every_pass_fires_and_is_logged_and_dumped(tmp_path):
    model = rewrite(TinyModel(Block() for _ in range(3)), tiny_inputs(), {}, method_of("chunk"), HALF, dump=tmp_path)
    assert [record.name for record in model.records] == [p.name for p in method_of("chunk").pipeline()]
    assert [r.name for r in model.records if r.matches == 0] == UNUSED
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:8] == [f"{i:02d}_{p.name}.graph.txt" for i, p in enumerate(method_of("chunk").pipeline()[:8])]
    assert names[8:] == ["08_SplitRoute.denoise.txt", "08_SplitRoute.route.txt"]
    assert "dcconvert.chunk" in (tmp_path / "08_SplitRoute.denoise.txt").read_text()


every_mode = pytest.mark.parametrize("mode", MODES)


@every_mode
def test_the_module_is_not_changed(mode):
    module, inputs = TinyModel(Block() for _ in range(3)), tiny_inputs()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    wanted = module(*inputs)
    for _ in range(2):
        rewrite(module, inputs, {}, method_of(mode), HALF)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(module(*inputs), wanted, rtol=0, atol=0)


@every_mode
def test_weights_are_shared_with_the_module(mode):
    """Scale: a converted model must not hold its weights twice."""
    module = TinyModel(Block() for _ in range(3))
    model = rewrite(module, tiny_inputs(), {}, method_of(mode), HALF)
    own = {parameter.data_ptr() for parameter in module.parameters()}
    assert {parameter.data_ptr() for parameter in model.parameters()} == own


@every_mode
def test_a_model_that_is_no_transformer_is_unsupported(mode):
    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(2, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 2, 1))

        def forward(self, x, t):
            return self.layers(x)

    with pytest.raises(UnsupportedModelError, match="no attention found"):
        rewrite(Convolutional(), tiny_inputs(), {}, method_of(mode), HALF)
