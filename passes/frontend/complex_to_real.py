"""Rotary embeddings that are written with complex numbers, in real ones: ONNX and TensorRT have no others."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.graph_tools import give_tensor, remove_dead_code, run_nodes, where
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.program import Program

aten = torch.ops.aten

NAME = "dcconvert_rotary"


class RealNumbers(Pass):
    """Write view_as_real(view_as_complex(x) * c), c the same for every input, with real numbers.

    (a + ib)(c + id) = (ac - bd) + i(ad + bc), on the last axis of x, which holds a and b. What c is made of is computed
    now, once for each value.
    """

    optional = True
    exact = True

    def call(self, program: Program) -> PassResult:
        matches = 0
        for node in list(program.graph.nodes):
            if node.target is aten.view_as_real.default:
                rewrite(program, node)
                matches += 1
        remove_dead_code(program.graph)
        return PassResult(matches)


def rewrite(program: Program, node: Node) -> None:
    product = node.all_input_nodes[0]
    factors = product.all_input_nodes
    turned = [factor for factor in factors if factor.target is aten.view_as_complex.default]
    if product.target is not aten.mul.Tensor or len(factors) != 2 or len(turned) != 1:
        raise UnsupportedModelError(f"{where(product)} computes with complex numbers in a way that has no rule")
    [fixed] = [factor for factor in factors if factor is not turned[0]]
    real, imaginary = constants(program, fixed)
    with program.graph.inserting_before(node):
        pair = turned[0].all_input_nodes[0]
        a, b = (program.emit(aten.select.int, (pair, -1, part)) for part in (0, 1))
        terms = {(x, y): program.emit(aten.mul.Tensor, (x, y)) for x in (a, b) for y in (real, imaginary)}
        first = program.emit(aten.sub.Tensor, (terms[a, real], terms[b, imaginary]))
        second = program.emit(aten.add.Tensor, (terms[a, imaginary], terms[b, real]))
        result = program.emit(aten.stack.default, ([first, second], -1))
    node.replace_all_uses_with(result)


def constants(program: Program, node: Node) -> tuple[Node, Node]:
    """Real and imaginary part of a value that depends on no input, as tensors of the model."""
    source = node
    while source.target is aten.unsqueeze.default and len(source.users) == 1:
        source = source.all_input_nodes[0]  # the same table is unsqueezed for every use
    parts = []
    value = evaluated(program, node)
    for part, values in (("real", value.real), ("imag", value.imag)):
        name = f"{NAME}_{source.name}_{'x'.join(map(str, value.shape))}_{part}"
        if not hasattr(program.graph_module, name):
            give_tensor(program.graph_module, name, values.contiguous())
        with program.graph.inserting_before(node):
            found = program.graph.get_attr(name)
        with program.fake_mode:
            found.meta["val"] = torch.empty(values.shape, dtype=values.dtype, device=values.device)
        parts.append(found)
    return parts[0], parts[1]


def evaluated(program: Program, node: Node) -> Any:
    """What a node gives; UnsupportedModelError if that depends on an input."""
    needed: set[Node] = set()
    stack = [node]
    while stack:
        source = stack.pop()
        if source not in needed:
            needed.add(source)
            stack.extend(source.all_input_nodes)
    if inputs := [source.name for source in needed if source.op == "placeholder"]:
        raise UnsupportedModelError(f"a complex rotary embedding depends on input {inputs[0]}: it has no rule")
    ordered = [other for other in program.graph.nodes if other in needed]
    return run_nodes(program.graph_module, ordered)[node]
