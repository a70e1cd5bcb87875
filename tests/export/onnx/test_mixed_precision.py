"""Half precision is where the work is, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from dcconvert.export.checks.parity import relative_error
from dcconvert.export.onnx.mixed_precision import HalfProducts, in_precision
from dcconvert.passes.ir.graph_tools import copied
from dcconvert.passes.ir.output_gate import OutputGate
from dcconvert.passes.ir.pass_runner import run_graph_passes
from dcconvert.passes.runtime.rewritten import example_of
from tests.export.harness import convert, inputs
from tests.passes.contract_harness import check_contract

aten = torch.ops.aten


class Block(nn.Module):
    """Two products with an activation between, a residual, a norm, and a modulation made of [B, D]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.modulation = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        update = self.down(nn.functional.gelu(self.up(x)))
        return nn.functional.layer_norm(x + update * self.modulation(c).unsqueeze(1), (4,))


@pytest.fixture(scope="module")
def example() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 4), torch.randn(2, 4)


@pytest.fixture(scope="module")
def block(example: tuple[Tensor, Tensor]) -> GraphModule:
    module = torch.export.export(Block(), example).module(check_guards=False)
    assert isinstance(module, GraphModule)
    module.graph.eliminate_dead_code()
    return module


class Types(Interpreter):
    """The precision of everything that flows through a graph."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.found: list[tuple[Node, Any]] = []

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.found.append((n, value))
        return value


def precisions(module: GraphModule, *args: Any) -> Iterator[tuple[Any, torch.dtype]]:
    """Op and dtype of every floating-point result."""
    types = Types(module)
    types.run(*args)
    for node, value in types.found:
        if node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
            yield node.target, value.dtype


def in_half(block: GraphModule, example: tuple[Tensor, Tensor]) -> GraphModule:
    """A copy of the graph after the pass."""
    graph, given = copied(block), dict(zip("xc", example, strict=True))
    run_graph_passes(graph, [HalfProducts(torch.float16)], given, OutputGate(graph, given))
    return copied(graph)


def test_casts_stand_only_where_the_precision_changes(block, example):
    changed = in_half(block, example)
    found = list(precisions(changed, *example))
    expected = [
        (aten.to.dtype, torch.float16),
        (aten.linear.default, torch.float16),
        (aten.gelu.default, torch.float16),
        (aten.linear.default, torch.float16),
        (aten.linear.default, torch.float32),  # the modulation
        (aten.unsqueeze.default, torch.float32),
        (aten.to.dtype, torch.float32),
        (aten.mul.Tensor, torch.float32),
        (aten.add.Tensor, torch.float32),
        (aten.layer_norm.default, torch.float32),
    ]
    assert sorted(map(str, found)) == sorted(map(str, expected))


@torch.no_grad()
def test_the_original_graph_stays_as_it_is(block, example):
    before, wanted = str(block.graph), block(*example)
    changed = in_half(block, example)
    assert str(block.graph) == before
    assert torch.equal(block(*example), wanted)
    [found] = changed(*example)
    assert 0 < relative_error(found, wanted) < 1e-3


def test_weights_are_halved_once_and_shared_otherwise(block, example):
    changed = in_half(block, example)
    state = changed.state_dict()
    halves = {name for name, value in state.items() if value.dtype == torch.float16}
    assert halves == {f"{layer}.{part}_half" for layer in ("up", "down") for part in ("weight", "bias")}
    assert changed.get_parameter("modulation.weight") is block.get_parameter("modulation.weight")
    assert set(state) == halves | {"modulation.weight", "modulation.bias"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("mode", ["rows_model", "carry_model", "bins_model"])
def test_a_model_in_half_keeps_its_seams(request, mode, precision):
    model = request.getfixturevalue(mode)
    changed = in_precision(model, precision)
    given = inputs()
    scores, live = changed.route(given)
    assert scores.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in live.values())
    plan = model.planner.full_plan(len(scores))
    with torch.no_grad():
        found = changed.denoise(given, live, plan)[0]
        wanted = model.original_graph(*given.values())[0]
    assert found.dtype == torch.float32
    assert 0 < relative_error(found, wanted) < (1e-2 if precision == "fp16" else 5e-2)


@pytest.mark.parametrize("mode", ["rows_model", "carry_model", "bins_model"])
def test_all_products_over_tokens_and_all_attention_are_in_half(request, mode):
    model = request.getfixturevalue(mode)
    changed, given = in_precision(model, "fp16"), inputs()
    _, live = model.route(given)
    plan, state = model.planner.full_plan(len(given["x"])), model.empty_state(len(given["x"]))
    args = model.feed("denoise", given, live, plan, state).values()
    own = torch.ops.dcconvert
    for target, dtype in precisions(changed.denoise_graph, *args):
        if target in (own.padded_attention.default, own.segment_attention.default, aten.gelu.default):
            assert dtype == torch.float16
        if target in (aten.layer_norm.default, aten.add.Tensor, own.dechunk.default, own.cache_write.default):
            assert dtype == torch.float32


def test_a_state_in_half_is_written_without_a_detour():
    changed = in_precision(convert("carry", state_dtype="fp16"), "fp16")
    graph = changed.denoise_graph.graph
    written = [node for node in graph.nodes if node.target is torch.ops.dcconvert.cache_write.default]
    keys = [node for node in written if "key" in str(node.args[0]) or "value" in str(node.args[0])]
    assert keys
    assert all(node.args[1].target is not aten.to.dtype for node in keys)


@pytest.mark.parametrize("graph", ["route", "denoise", "original"])
def test_a_broken_one_is_stopped(carry_model, graph):
    check_contract(HalfProducts(torch.float16), carry_model.graph(graph), example_of(carry_model))


def test_the_records_say_what_is_in_half(carry_model):
    new = in_precision(carry_model, "bf16").records[len(carry_model.records) :]
    assert [record.name for record in new] == ["HalfProducts"] * 3
    assert [record.notes for record in new] == [(f"in {graph}", "in bfloat16") for graph in carry_model.graphs.named()]
    matched = {record.notes[0]: bool(record.matches) for record in new}
    assert matched == {"in original": True, "in route": False, "in denoise": True}  # no block before the trunk
