"""Normalise: what has no effect goes, aliases get one spelling, values stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.capture import capture
from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.graph_tools import placeholders
from dcconvert.passes.ir.pass_runner import run_passes
from dcconvert.passes.ir.program import Program
from dcconvert.passes.methods import method_of
from tests.passes.harness import count

aten = torch.ops.aten
CHUNK = method_of("chunk")


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def normalised(function: Callable[[Tensor], Tensor]) -> Program:
    x = torch.randn(3, 4, 6)
    program = capture(Of(function), (x,), {}, CHUNK)
    run_passes(program, (Normalise(),))
    torch.testing.assert_close(program.graph_module(x)[0], function(x), rtol=0, atol=0)
    return program


def calls(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.contiguous(),
        lambda x: x.clone(),
        lambda x: x.detach(),
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.type_as(x),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: x.squeeze(1),
    ],
    ids=["contiguous", "clone", "detach", "float", "to", "type_as", "dropout off", "squeeze of a long axis"],
)
def test_ops_without_effect_go(function):
    assert calls(normalised(lambda x: function(x) + 1)) == ["aten.add.Tensor"]


def test_an_op_without_effect_as_the_output_goes():
    assert calls(normalised(lambda x: (x * 2).contiguous())) == ["aten.mul.Tensor"]


def test_views_become_reshapes():
    program = normalised(lambda x: x.transpose(1, 2).contiguous().view(x.shape[0], 24))
    assert count(program.graph_module, aten.view.default) == 0
    assert count(program.graph_module, aten.reshape.default) == 1


def test_unused_nodes_and_guards_go():
    program = capture(Of(lambda x: x + 1), (torch.randn(3, 4),), {}, CHUNK)
    with program.graph.inserting_after(placeholders(program.graph)[0]):
        program.emit(aten.exp.default, (placeholders(program.graph)[0],))
    Normalise().call(program.graph_module)
    assert calls(program) == ["aten.add.Tensor"]
    assert not any(node.op == "call_module" for node in program.graph.nodes)


def test_a_squeeze_that_drops_an_axis_stays():
    assert calls(normalised(lambda x: x[:, :1].squeeze(1)))[-1] == "aten.squeeze.dim"


def test_what_changes_values_stays():
    assert "aten.to.dtype" in " ".join(calls(normalised(lambda x: x.double().float())))

    program = capture(Of(lambda x: F.dropout(x, 0.5, training=True)), (torch.randn(3, 4),), {}, CHUNK)
    Normalise().call(program.graph_module)
    assert calls(program) == ["aten.dropout.default"]


def test_a_second_run_changes_nothing():
    program = normalised(lambda x: x.contiguous().view(-1, 6).float() * 2)
    before = [(str(node.target), node.name) for node in program.graph.nodes]
    run_passes(program, (Normalise(),))
    assert [(str(node.target), node.name) for node in program.graph.nodes] == before


def test_what_is_written_in_place_is_captured_out_of_place():
    def body(x: Tensor) -> Tensor:
        y = (x * 2).add_(1)
        y[:, ::2] = x[:, 1::2]
        return y

    x = torch.randn(3, 4)
    program = capture(Of(body), (x,), {}, CHUNK)
    run_passes(program, (Normalise(),))
    torch.testing.assert_close(program.graph_module(x)[0], body(x), rtol=0, atol=0)
    assert not any(call.endswith("_.Tensor") for call in calls(program))
    assert "aten.copy.default" not in calls(program)  # of the same shape and type: what is copied takes its place


def test_in_place_ops_are_refused_by_name():
    program = capture(Of(lambda x: (x * 2).add(1)), (torch.randn(3, 4),), {}, CHUNK)
    [add] = [node for node in program.graph.nodes if node.target is aten.add.Tensor]
    add.target = aten.add_.Tensor
    with pytest.raises(UnsupportedModelError, match=r"in-place op aten\.add_\.Tensor in .*out-of-place"):
        run_passes(program, (Normalise(),))


def test_a_submodule_call_left_in_the_graph_is_refused():
    program = capture(Of(lambda x: x + 1), (torch.randn(3, 4),), {}, CHUNK)
    add = next(node for node in program.graph.nodes if node.target is aten.add.Tensor)
    program.graph_module.add_submodule("left_over", nn.Identity())
    with program.graph.inserting_before(add):
        add.replace_input_with(placeholders(program.graph)[0], program.graph.call_module("left_over", (add.args[0],)))
    with pytest.raises(UnsupportedModelError, match="left_over"):
        Normalise().call(program.graph_module)
