"""Which rule an op gets, and how one without a rule is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.methods import method_of
from dcconvert.passes.packing.rules import find_rule
from dcconvert.passes.packing.rules.pointwise import pointwise
from dcconvert.passes.packing.rules.registry import RULES
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from tests.passes.harness import BATCH, TOKENS, WIDTH, Block, TinyModel, pack, tiny_inputs

aten = torch.ops.aten


def node_of(target) -> torch.fx.Node:
    return torch.fx.Graph().call_function(target, ())


def test_a_registered_op_gets_its_rule():
    assert find_rule(node_of(aten.linear.default)) is RULES[aten.linear.default]


def test_a_pointwise_op_gets_the_shared_rule():
    assert aten.gelu.default not in RULES
    assert find_rule(node_of(aten.gelu.default)).apply is pointwise


@pytest.mark.parametrize(
    ("body", "op"),
    [
        (lambda h: h.cummax(1)[0], "aten.cummax.default"),
        (lambda h: h.cumprod(1), "aten.cumprod.default"),
        (lambda h: h.sort(1)[0], "aten.sort.default"),
        (lambda h: torch.nn.functional.dropout(h, 0.5, training=True), "aten.dropout.default"),
    ],
)
def test_an_op_without_a_rule_is_refused_by_name(body, op):
    with pytest.raises(UnsupportedModelError, match=f"no packing rule for {op} "):
        pack(body, torch.zeros(BATCH, TOKENS, WIDTH))


class Centred(nn.Module):
    """Takes products over tokens away: nothing a trunk may do."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.cumprod(1)


class CentredBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.centred = Centred()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(self.centred(x), c)


def test_the_refusal_names_op_module_source_line_and_remedy():
    model = TinyModel(CentredBlock() for _ in range(3))
    with pytest.raises(UnsupportedModelError) as refused:
        rewrite(model, tiny_inputs(), {}, method_of("chunk"), Policy("constant", 2).timetable())
    message = str(refused.value)
    assert "aten.cumprod.default in blocks.1.centred (test_find_rule.py:" in message
    assert "--head-blocks" in message
    assert "\n" not in message
