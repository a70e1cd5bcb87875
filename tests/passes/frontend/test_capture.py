"""Capture: one ATen graph, dynamic in the batch; clear refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dcconvert.passes.frontend.capture import capture
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.ir.graph_tools import placeholders
from dcconvert.passes.methods import method_of
from tests.passes.harness import WIDTH, Block, TinyModel, count, pixart_call, tiny_inputs

aten = torch.ops.aten


class Plain(nn.Module):
    """Nested inputs, a keyword, a shared vector without a batch axis; returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, cond: dict[str, Tensor], *, gain: Tensor) -> dict[str, Tensor]:
        return {"out": F.gelu(self.linear(x)) * gain + cond["c"].unsqueeze(1), "c": cond["c"] * 2}


def plain_call(batch: int) -> tuple[tuple[Tensor, dict[str, Tensor]], dict[str, Tensor]]:
    return (torch.randn(batch, 5, 4), {"c": torch.randn(batch, 4)}), {"gain": torch.randn(4)}


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_graph_runs_at_any_batch_on_flat_inputs(batch):
    module = Plain()
    program = capture(module, *plain_call(3))
    args, kwargs = plain_call(batch)
    flat, _ = pytree.tree_flatten((args, kwargs))
    outputs = program.graph_module(*flat)
    found = pytree.tree_unflatten(outputs, pytree.treespec_loads(program.out_spec))
    torch.testing.assert_close(found, module(*args, **kwargs))


def test_only_axes_of_the_batch_are_dynamic():
    program = capture(Plain(), *plain_call(3))
    shapes = [[str(size) for size in node.meta["val"].shape] for node in placeholders(program.graph)]
    assert shapes == [[str(program.batch), "5", "4"], [str(program.batch), "4"], ["4"]]


def test_ops_stay_whole():
    program = capture(TinyModel([Block(), Block()]), tiny_inputs())
    assert count(program.graph_module, aten.scaled_dot_product_attention.default) == 2
    assert count(program.graph_module, aten.layer_norm.default) == 2
    assert count(program.graph_module, aten.linear.default) == 4 * 2 + 1
    assert count(program.graph_module, aten.conv2d.default) == 1


def test_structured_specs_and_options_survive():
    module, args, kwargs = pixart_call()
    options = method_of("carry", head_blocks=0)
    program = capture(module, args, kwargs, options)
    assert program.method is options
    flat, spec = pytree.tree_flatten((args, kwargs))
    assert pytree.treespec_loads(program.in_spec) == spec
    assert len(placeholders(program.graph)) == len(flat)


def test_the_weights_are_shared_not_copied():
    module = TinyModel([Block(), Block()])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    program = capture(module, tiny_inputs())
    name = "blocks.0.qkv.weight"
    assert program.graph_module.get_parameter(name).data_ptr() == module.get_parameter(name).data_ptr()
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_dropout_is_captured_switched_off():
    program = capture(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)).train(), (torch.ones(3, 4),))
    x = torch.ones(3, 4)
    torch.testing.assert_close(program.graph_module(x), program.graph_module(x))


@pytest.mark.parametrize(
    "args", [(), (1.0,), (torch.tensor(3.0),), (torch.zeros(1, 4),)], ids=["none", "number", "scalar", "batch of 1"]
)
def test_examples_without_a_batch_are_a_usage_error(args):
    with pytest.raises(UsageError, match="batch of at least 2"):
        capture(nn.Linear(4, 4), args)


def test_examples_that_do_not_fit_the_signature_are_a_usage_error():
    with pytest.raises(UsageError, match=r"do not fit TinyModel\.forward: .*'t'"):
        capture(TinyModel([Block()]), tiny_inputs()[:1])


class LooksAtData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, WIDTH).sum(0)


@pytest.mark.parametrize("module", [LooksAtData(), FixedBatch()], ids=lambda module: type(module).__name__)
def test_a_module_that_does_not_export_is_unsupported(module):
    message = rf"torch\.export cannot capture {type(module).__name__}: \S"
    with pytest.raises(UnsupportedModelError, match=message) as error:
        capture(module, (torch.randn(3, WIDTH),))
    assert "\n" not in str(error.value)
