"""Rewrites complex rotary embeddings with real numbers, because ONNX and TensorRT have no complex numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from dcconvert.passes.frontend.cuts import ancestors
from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.graph_tools import emit, give_tensor, read_tensor, remove_dead_code, run_nodes, where
from dcconvert.passes.ir.pass_runner import GraphPass, PassResult

aten = torch.ops.aten

NAME = "dcconvert_rotary"


class RealNumbers(GraphPass):
    """Write view_as_real(view_as_complex(x) * c), where c is the same for every input, with real numbers.

    (a + ib)(c + id) = (ac - bd) + i(ad + bc), on the last axis of x, which holds a and b. The parts of c are computed
    in advance, once for each value.
    """

    optional = True
    exact = True

    def call(self, module: GraphModule) -> PassResult:
        matches = 0
        for node in list(module.graph.nodes):
            if node.target is aten.view_as_real.default and node.all_input_nodes[0].op != "placeholder":
                rewrite(module, node)
                matches += 1
        remove_dead_code(module.graph)
        return PassResult(matches)


def rewrite(module: GraphModule, node: Node) -> None:
    product = node.all_input_nodes[0]
    factors = product.all_input_nodes
    turned = [factor for factor in factors if factor.target is aten.view_as_complex.default]
    if product.target is not aten.mul.Tensor or len(factors) != 2 or len(turned) != 1:
        raise UnsupportedModelError(f"{where(product)} uses complex numbers in a way that is not supported")
    [fixed] = [factor for factor in factors if factor is not turned[0]]
    real, imaginary = parts_of(module, fixed, node)
    with module.graph.inserting_before(node):
        pair = turned[0].all_input_nodes[0]
        a, b = (emit(module.graph, aten.select.int, (pair, -1, part)) for part in (0, 1))
        terms = {(x, y): emit(module.graph, aten.mul.Tensor, (x, y)) for x in (a, b) for y in (real, imaginary)}
        first = emit(module.graph, aten.sub.Tensor, (terms[a, real], terms[b, imaginary]))
        second = emit(module.graph, aten.add.Tensor, (terms[a, imaginary], terms[b, real]))
        result = emit(module.graph, aten.stack.default, ([first, second], -1))
    node.replace_all_uses_with(result)


def parts_of(module: GraphModule, node: Node, user: Node) -> tuple[Node, Node]:
    """The real and imaginary parts of a value: tensors of the model, unless it depends on an input."""
    if isinstance(node.meta.get("val"), torch.Tensor) and depends_on_inputs(module, node):
        with module.graph.inserting_before(user):
            pair = emit(module.graph, aten.view_as_real.default, (node,))
            return tuple(emit(module.graph, aten.select.int, (pair, -1, part)) for part in (0, 1))  # type: ignore[return-value]
    source = node
    while source.target is aten.unsqueeze.default and len(source.users) == 1:
        source = source.all_input_nodes[0]  # the same table is unsqueezed for every use
    parts = []
    value = evaluated(module, node)
    for part, values in (("real", value.real), ("imag", value.imag)):
        name = f"{NAME}_{source.name}_{'x'.join(map(str, value.shape))}_{part}"
        if not hasattr(module, name):
            give_tensor(module, name, values.contiguous())
        with module.graph.inserting_before(node):
            parts.append(read_tensor(module, name))
    return parts[0], parts[1]


def depends_on_inputs(module: GraphModule, node: Node) -> bool:
    return any(source.op == "placeholder" for source in ancestors([node]))


def evaluated(module: GraphModule, node: Node) -> Any:
    """The value of a node that depends on no input."""
    needed = ancestors([node])
    ordered = [other for other in module.graph.nodes if other in needed]
    return run_nodes(module, ordered)[node]
