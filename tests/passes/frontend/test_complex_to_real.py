"""Complex rotary embeddings become real ones that give the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.capture import capture
from dcconvert.passes.frontend.complex_to_real import RealNumbers
from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.pass_runner import run_passes
from dcconvert.passes.ir.program import Program
from dcconvert.passes.methods import method_of

aten = torch.ops.aten
CHUNK = method_of("chunk")


class Turned(nn.Module):
    """x [B, N, H, d] turned by a table of complex numbers [N, d / 2]."""

    def __init__(self, turn: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.turn = turn
        self.register_buffer("table", torch.polar(torch.ones(5, 3), torch.randn(5, 3)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(self.turn(pairs, cast(Tensor, self.table))).flatten(-2)


X = torch.randn(3, 5, 2, 6)


def program_of(turn: Callable[[Tensor, Tensor], Tensor]) -> Program:
    program = capture(Turned(turn), (X,), {}, CHUNK)
    run_passes(program, (Normalise(),))
    return program


@pytest.mark.parametrize(
    "turn",
    [
        lambda x, table: x * table.unsqueeze(1),
        lambda x, table: torch.cat([table[2:], table[:2]]).unsqueeze(1) * x,
    ],
)
def test_it_gives_the_same(turn):
    torch.manual_seed(0)
    program = program_of(turn)
    wanted = program.graph_module(X)[0]
    [record] = run_passes(program, (RealNumbers(),))
    assert record.matches == 1
    torch.testing.assert_close(program.graph_module(X)[0], wanted, rtol=1e-6, atol=1e-6)
    values = [node.meta["val"] for node in program.graph.nodes if "val" in node.meta]
    assert not any(isinstance(value, Tensor) and value.is_complex() for value in values)


def test_a_factor_that_depends_on_an_input_is_multiplied_by_its_parts():
    program = program_of(lambda x, table: x * torch.polar(x.abs(), x.abs()))
    wanted = program.graph_module(X)[0]
    assert run_passes(program, (RealNumbers(),))[0].matches == 1
    torch.testing.assert_close(program.graph_module(X)[0], wanted, rtol=1e-6, atol=1e-6)
    products = [node for node in program.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    assert products
    assert not any(node.meta["val"].is_complex() for node in products)


def test_one_table_serves_every_use():
    def turn(x: Tensor, table: Tensor) -> Tensor:
        once = torch.view_as_real(x * table.unsqueeze(1))
        return torch.view_as_complex(once) * table.unsqueeze(1)

    program = program_of(turn)
    wanted = program.graph_module(X)[0]
    assert run_passes(program, (RealNumbers(),))[0].matches == 2
    torch.testing.assert_close(program.graph_module(X)[0], wanted, rtol=1e-5, atol=1e-5)
    assert len([name for name, _ in program.graph_module.named_buffers() if "rotary" in name]) == 2


def test_real_graphs_stay_as_they_are():
    program = capture(nn.Linear(6, 6), (X,), {}, CHUNK)
    run_passes(program, (Normalise(),))
    before = [node.name for node in program.graph.nodes]
    assert run_passes(program, (RealNumbers(),))[0].matches == 0
    assert [node.name for node in program.graph.nodes] == before


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (lambda x, table: x + table.unsqueeze(1), "in a way that is not supported"),
        (lambda x, table: x * x, "in a way that is not supported"),
    ],
)
def test_what_has_no_rule_is_refused(turn, said):
    with pytest.raises(UnsupportedModelError, match=said):
        run_passes(program_of(turn), (RealNumbers(),))
