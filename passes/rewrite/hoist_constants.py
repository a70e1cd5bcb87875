"""Hoist values that stay the same during a run: text keys and values are computed once, not at every step."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from dcconvert.passes.frontend.capture import has_batch_axis
from dcconvert.passes.frontend.cuts import ancestors, same
from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.graph_tools import placeholders, remove_dead_code
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.program import Program
from dcconvert.passes.ir.spec import InputSpec
from dcconvert.passes.rewrite.split_route import finish, is_batched

aten = torch.ops.aten

COSTLY = {aten.linear.default, aten.matmul.default, aten.bmm.default, aten.scaled_dot_product_attention.default}
COSTLY |= {aten.conv2d.default, aten.convolution.default}
CONSTANT = "constant"


class HoistConstants(Pass):
    """Move values of `denoise` that depend on neither image nor timestep into a third graph, `prepare`.

    1. A value is constant during a run if it depends on model inputs, but not on the image or the timestep.
    2. Constant values with a batch axis that need a matrix product, and that other values use, become the outputs of
       `prepare` and the inputs `constant_0`, ... of `denoise`.
    3. A model without such values (classes instead of text) gets no third graph. Neither does a model whose constants
       exist once for all samples, because then no input of `prepare` has the batch size.
    """

    optional = True

    def requires(self, program: Program) -> None:
        if "denoise" not in program.parts:
            raise CheckFailedError("HoistConstants needs SplitRoute before it; fix the pipeline order")

    def call(self, program: Program) -> PassResult:
        graph = program.parts["denoise"].graph
        constant = constant_nodes(program, graph)
        chosen = [node for node in graph.nodes if node in constant and worth_keeping(program, node, constant)]
        if not any(is_batched_input(node) for node in ancestors(chosen) & constant):
            return PassResult(0, ("nothing costly is the same at every step",))
        program.parts["prepare"] = build_prepare(program, chosen)
        last = placeholders(graph)[-1]
        for number, node in enumerate(chosen):
            with graph.inserting_after(last):
                last = graph.placeholder(f"{CONSTANT}_{number}")
            last.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(last)
        remove_dead_code(graph)
        for node in placeholders(graph):
            if not node.users and node.name in program.inputs:
                graph.erase_node(node)
        return PassResult(len(chosen), (f"{len(chosen)} values are computed once in a run",))


def constant_nodes(program: Program, graph: Graph) -> set[Node]:
    """Nodes that depend on model inputs, but only on those that stay the same during a run."""
    still = set(program.inputs) - {program.image, program.timestep} - per_token_inputs(program)
    found: set[Node] = set()
    moving = {node for node in placeholders(graph) if node.name not in still}
    for node in graph.nodes:
        if is_batch_size(program, node):
            continue  # the same no matter which input it is read from
        if node.op == "placeholder":
            if node not in moving:
                found.add(node)
        elif any(source in moving for source in node.all_input_nodes):
            moving.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def per_token_inputs(program: Program) -> set[str]:
    """Inputs that are added to the token stream and may be others at every step, as in `ModelSpec.varies`."""
    stream = program.found_stream()
    given = (InputSpec.of(node) for node in placeholders(program.graph) if node.name in program.inputs)
    return {spec.name for spec in given if spec.batched and spec.shape == (stream.tokens, stream.width)}


def is_batch_size(program: Program, node: Node) -> bool:
    return node.op == "call_function" and same(node.meta["val"], program.batch)


def worth_keeping(program: Program, node: Node, constant: set[Node]) -> bool:
    if not is_batched(program, node) or all(user in constant for user in node.users):
        return False
    return any(source.target in COSTLY for source in ancestors([node]) & constant)


def is_batched_input(node: Node) -> bool:
    """Whether a node is an input with a batch axis, from which `prepare` can read the batch size."""
    return node.op == "placeholder" and has_batch_axis(node)


def build_prepare(program: Program, chosen: list[Node]) -> GraphModule:
    graph = Graph()
    copied: dict[Node, Node] = {}
    needed = ancestors(chosen, ends=lambda node: is_batch_size(program, node))
    batched: Node | None = None
    for node in chosen[0].graph.nodes:
        if node not in needed:
            continue
        if is_batch_size(program, node):
            copied[node] = graph.call_function(aten.sym_size.int, (batched, 0))
            copied[node].meta["val"] = program.batch
            continue
        copied[node] = graph.node_copy(node, copied.__getitem__)
        if batched is None and is_batched_input(node):
            batched = copied[node]
    graph.output(tuple(copied[node] for node in chosen))
    return finish(program, graph, "Prepare")
