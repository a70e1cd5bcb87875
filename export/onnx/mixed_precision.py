"""Mixed precision written into the graphs: matrix products and attention in half, everything else in fp32.

TensorRT 11 and ONNX Runtime compute in the precision that the file says, so it has to be decided here. The residual
stream, normalisation, modulation, gates and the embedding of time and class stay in fp32: they are cheap, and diffusion
transformers in plain fp16 are known to overflow there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from dcconvert.passes.runtime.model import DynamicModel

aten, own = torch.ops.aten, torch.ops.dcconvert

HALF = "_half"  # ends the names of parameters in half
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# Where the work is. A linear layer counts where it has tokens; one on [B, D], such as adaLN's, stays in fp32.
PRODUCTS = {aten.linear.default, aten.matmul.default, aten.bmm.default}
ATTENTION = {
    aten.scaled_dot_product_attention.default,
    own.padded_attention.default,
    own.segment_attention.default,
    own.packed_attention.default,
}
# What only moves values, or is applied between two matrix products and cannot leave their range.
PASSING = {
    operator.getitem,
    own.gather_tokens.default,
    aten.chunk.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.gelu.default,
    aten.index_select.default,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.silu.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.view.default,
}


def in_precision(model: DynamicModel, precision: str, batch: int = 2) -> DynamicModel:
    """The model with its matrix products in "fp16" or "bf16" and its weights shared where they stay in fp32.

    Inputs, outputs and what passes between the graphs keep their types. The original's graph is changed as well, so
    that the two can be compared in the same precision.
    """
    inputs = model.spec.example(batch)
    _, live = model.route(inputs)
    plan, state = model.planner.full_plan(batch), model.empty_state(batch)
    return model.with_graphs(
        **{
            name: half_products(graph, list(model.feed(name, inputs, live, plan, state).values()), HALVES[precision])
            for name, graph in model.graphs.named().items()
        }
    )


def half_products(module: GraphModule, args: Sequence[Any], half: torch.dtype) -> GraphModule:
    """A copy of a graph whose matrix products over tokens run in `half`; its outputs keep their types.

    `args`: one call's inputs, of which only types and shapes matter.
    """
    graph, types = Graph(), known_types(module, args)
    writer = HalfWriter(graph, types, half)
    for node in module.graph.nodes:
        writer.write(node)
    graph.eliminate_dead_code()
    graph.lint()
    return GraphModule(attributes(module, graph, half), graph, module._get_name())


def attributes(module: GraphModule, graph: Graph, half: torch.dtype) -> dict[str, Any]:
    """What the nodes of a graph read, by name: the module's own, and copies in half of what is read so."""
    found = {}
    for name in {str(node.target) for node in graph.nodes if node.op == "get_attr"}:
        value = fetch(module, name.removesuffix(HALF))
        found[name] = nn.Parameter(value.to(half), requires_grad=False) if name.endswith(HALF) else value
    return found


def fetch(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    value = getattr(module.get_submodule(path), leaf)
    assert isinstance(value, Tensor)
    return value.detach() if not isinstance(value, nn.Parameter) else value


def known_types(module: GraphModule, args: Sequence[Any]) -> dict[Node, Any]:
    """What every node gives, as fake tensors."""
    graph = Graph()
    pairs: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, pairs))
    FakeTensorProp(GraphModule(module, graph), FakeTensorMode(allow_non_fake_inputs=True)).propagate(*args)
    return {node: twin.meta.get("val") for node, twin in pairs.items()}


class HalfWriter:
    """Writes the nodes of a graph into another; half-precision values stay so until something needs fp32."""

    def __init__(self, graph: Graph, types: dict[Node, Any], half: torch.dtype) -> None:
        self.graph, self.types, self.half = graph, types, half
        self.nodes: dict[Node, Node] = {}
        self.in_half: set[Node] = set()  # of the old graph
        self._casts: dict[tuple[Node, torch.dtype], Node] = {}

    def write(self, node: Node) -> None:
        if self.is_product(node):
            self.emit(node, self.as_half)
            self.in_half.add(node)
        elif node.target in PASSING and node.all_input_nodes[0] in self.in_half:
            self.emit(node, self.nodes.__getitem__)
            self.in_half.add(node)
        elif node.target is aten.to.dtype and node.args[1] == self.half and node.all_input_nodes[0] in self.in_half:
            self.nodes[node] = self.nodes[node.all_input_nodes[0]]  # already is what was asked for
        else:
            self.emit(node, self.as_before)

    def emit(self, node: Node, operand: Callable[[Node], Node]) -> None:
        self.nodes[node] = self.graph.node_copy(node, operand)
        self.nodes[node].meta.pop("val", None)

    def is_product(self, node: Node) -> bool:
        if node.target in ATTENTION:
            return self.is_single(node)
        if node.target not in PRODUCTS or not self.is_single(node):
            return False
        return all(self.types[operand].ndim > 2 for operand in node.all_input_nodes[:1])

    def is_single(self, node: Node) -> bool:
        value = self.types[node]
        return isinstance(value, Tensor) and value.dtype == torch.float32

    def as_half(self, node: Node) -> Node:
        if node in self.in_half or not self.is_single(node):
            return self.nodes[node]
        if node.op == "get_attr":
            return self.half_parameter(node)
        return self.cast(node, self.half)

    def as_before(self, node: Node) -> Node:
        """In the precision that the value had in the old graph."""
        if node not in self.in_half or not isinstance(self.types[node], Tensor):
            return self.nodes[node]  # of several values, each is looked at where it is taken out
        return self.cast(node, torch.float32)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        key = (node, dtype)
        if key not in self._casts:
            self._casts[key] = self.graph.call_function(aten.to.dtype, (self.nodes[node], dtype))
        return self._casts[key]

    def half_parameter(self, node: Node) -> Node:
        key = (node, self.half)
        if key not in self._casts:
            with self.graph.inserting_before(self.nodes[node]):
                self._casts[key] = self.graph.get_attr(f"{node.target}{HALF}")
        return self._casts[key]
