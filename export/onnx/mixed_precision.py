"""Mixed precision in the graphs: matrix products and attention in half precision, everything else in fp32.

TensorRT 11 and ONNX Runtime compute in the precision given in the file, so it must be chosen here. The residual stream,
normalisation, modulation, gates and the embedding of time and class stay in fp32: they are cheap, and diffusion
transformers in plain fp16 are known to overflow there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from dcconvert.passes.ir.graph_tools import emit, fake_mode, fake_result, give_tensor, tensor_at
from dcconvert.passes.ir.pass_runner import GraphPass, PassResult
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.rewritten import rewritten

aten, own = torch.ops.aten, torch.ops.dcconvert

HALF = "_half"  # suffix of the names of parameters in half
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# Most of the work. Linear layers count only if they have tokens; those on [B, D], such as adaLN's, stay in fp32.
PRODUCTS = {aten.linear.default, aten.matmul.default, aten.bmm.default}
ATTENTION = {
    aten.scaled_dot_product_attention.default,
    own.padded_attention.default,
    own.segment_attention.default,
    own.packed_attention.default,
}
# Ops that only move values, or that are applied between two matrix products and cannot leave their range.
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


def in_precision(model: DynamicModel, precision: str) -> DynamicModel:
    """The model with its matrix products in "fp16" or "bf16" and its weights shared where they stay in fp32.

    Inputs, outputs and values passed between the graphs keep their types. The original's graph is changed as well, so
    that both can be compared in the same precision. Errors as in `rewritten`.
    """
    return rewritten(model, {name: HalfProducts(HALVES[precision]) for name in model.graphs.named()})


class HalfProducts(GraphPass):
    """Run matrix products over tokens and attention in `half`; a graph's outputs keep their types.

    1. A product's operands are cast to `half`; its weights are read as copies in half, called `*_half`.
    2. Ops that only move values, or are between two products, stay in half.
    3. Everything else gets its operands in fp32, as before.
    """

    optional = True
    exact = True

    def __init__(self, half: torch.dtype) -> None:
        self.half = self.rounds_to = half

    def call(self, module: GraphModule) -> PassResult:
        writer = HalfWriter(module.graph, self.half)
        for node in module.graph.nodes:
            writer.write(node)
        writer.graph.eliminate_dead_code()
        for node in writer.halved.values():
            name = str(node.target)
            value = tensor_at(module, name.removesuffix(HALF)).to(self.half)
            give_tensor(module, name, nn.Parameter(value, requires_grad=False))
        module.graph = writer.graph
        return PassResult(writer.products, (f"in {str(self.half).removeprefix('torch.')}",))


class HalfWriter:
    """Copies the nodes of a graph to another; half-precision values stay in half until something needs fp32."""

    def __init__(self, source: Graph, half: torch.dtype) -> None:
        self.graph, self.mode, self.half = Graph(), fake_mode(source), half
        self.nodes: dict[Node, Node] = {}
        self.in_half: set[Node] = set()  # of the old graph
        self.halved: dict[Node, Node] = {}  # weights of the old graph, and their reads in half
        self.products = 0
        self._casts: dict[tuple[Node, torch.dtype], Node] = {}

    def write(self, node: Node) -> None:
        if self.is_product(node):
            self.emit(node, self.as_half)
            self.in_half.add(node)
            self.products += 1
        elif node.target in PASSING and node.all_input_nodes[0] in self.in_half:
            self.emit(node, self.nodes.__getitem__)
            self.in_half.add(node)
        elif node.target is aten.to.dtype and node.args[1] == self.half and node.all_input_nodes[0] in self.in_half:
            self.nodes[node] = self.nodes[node.all_input_nodes[0]]  # already in the requested type
        else:
            self.emit(node, self.as_before)

    def emit(self, node: Node, operand: Callable[[Node], Node]) -> None:
        made = self.nodes[node] = self.graph.node_copy(node, operand)
        if made.op == "call_function":
            made.meta["val"] = fake_result(self.mode, made)

    def is_product(self, node: Node) -> bool:
        if node.target in ATTENTION:
            return is_single(node)
        if node.target not in PRODUCTS or not is_single(node):
            return False
        return all(source.meta["val"].ndim > 2 for source in node.all_input_nodes[:1])

    def as_half(self, node: Node) -> Node:
        if node in self.in_half or not is_single(node):
            return self.nodes[node]
        if node.op == "get_attr":
            return self.half_parameter(node)
        return self.cast(node, self.half)

    def as_before(self, node: Node) -> Node:
        """The value in the precision that it had in the old graph."""
        if node not in self.in_half or not isinstance(node.meta["val"], Tensor):
            return self.nodes[node]  # several values: each is handled where it is taken out
        return self.cast(node, torch.float32)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        key = (node, dtype)
        if key not in self._casts:
            self._casts[key] = emit(self.graph, aten.to.dtype, (self.nodes[node], dtype))
        return self._casts[key]

    def half_parameter(self, node: Node) -> Node:
        if node not in self.halved:
            with self.graph.inserting_before(self.nodes[node]):
                made = self.halved[node] = self.graph.get_attr(f"{node.target}{HALF}")
            with self.mode:
                made.meta["val"] = node.meta["val"].to(self.half)
        return self.halved[node]


def is_single(node: Node) -> bool:
    """Whether a node returns a tensor in fp32."""
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.dtype == torch.float32
