"""Split the graph at the router: `route` up to the scores, `denoise` from the plan on."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from dcconvert.passes.frontend.cuts import ancestors, same
from dcconvert.passes.ir.errors import CheckFailedError, UnsupportedModelError
from dcconvert.passes.ir.graph_tools import placeholders, remove_dead_code, where
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.program import Program

aten = torch.ops.aten

SCORES = "scores"
HIDDEN = "h"


class SplitRoute(Pass):
    """Cut the graph in two, because the plan between the halves is made on the host.

    1. `route` computes the scores and the trunk's input. It returns the scores first, then every value that `denoise`
       needs from it: the trunk's input `h`, and per-sample values as `live_0`, `live_1`, ... Values without a batch
       axis are recomputed instead.
    2. `denoise` computes the rest. It takes those values, the model inputs that it still needs, and the plan.
    3. Batch sizes that crossed the cut are read again from `h`.
    """

    def requires(self, program: Program) -> None:
        if program.scores is None or not program.plan_inputs:
            raise CheckFailedError("SplitRoute needs InsertRouter and PackTrunk before it; fix the pipeline order")

    def call(self, program: Program) -> PassResult:
        scores, (start, _) = program.found_scores(), program.found_trunk()
        early = ancestors([scores, start, *program.found_stream().contexts.get(start, ())])
        early |= {n for n in program.graph.nodes if n.target is operator.getitem and n.args[0] in early}
        values = [n for n in program.graph.nodes if n in early and n is not scores and crosses(program, n, early)]
        values.sort(key=lambda n: n is not start)
        names = {node: HIDDEN if node is start else f"live_{i - 1}" for i, node in enumerate(values)}
        program.parts = {
            "route": build_route(program, early, values),
            "denoise": build_denoise(program, early, names),
        }
        return PassResult(1, (f"{len(values)} values pass from route to denoise",))


def crosses(program: Program, node: Node, early: set[Node]) -> bool:
    """Whether a batched tensor computed in the early half is used in the late half, which also makes the outputs."""
    return is_batched(program, node) and any(user not in early for user in node.users)


def is_batched(program: Program, node: Node) -> bool:
    """Whether a node computes a tensor whose first axis is the batch."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor) or value.ndim == 0:
        return False
    return same(value.shape[0], program.batch)


def used_late(program: Program, late: list[Node], early: set[Node]) -> set[Node]:
    """Nodes that `denoise` reads, including those behind values that it recomputes."""
    found: set[Node] = set()
    stack = [source for node in late for source in node.all_input_nodes if source is not program.scores]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if node in early and not is_batched(program, node) and not isinstance(node.meta["val"], torch.SymInt):
                stack.extend(node.all_input_nodes)
    return found


def build_route(program: Program, early: set[Node], values: list[Node]) -> GraphModule:
    graph = Graph()
    copied: dict[Node, Node] = {}
    image = next(node for node in placeholders(program.graph) if node.name == program.image)
    for node in program.graph.nodes:
        if node not in early:
            continue
        copied[node] = graph.node_copy(node, copied.__getitem__)
        if is_input_size(program, node):
            copied[node].args = (copied[image], 0)  # reading another input would keep that alive for nothing else
    graph.output((copied[program.found_scores()], *(copied[v] for v in values)))
    return finish(program, graph, "Route")


def is_input_size(program: Program, node: Node) -> bool:
    """Whether a node reads the batch size from an input of the model."""
    if node.target is not aten.sym_size.int or not same(node.meta["val"], program.batch):
        return False
    return node.all_input_nodes[0].name in program.inputs


def read_size(program: Program, graph: Graph, hidden: Node) -> Node:
    """The batch size, from the trunk's input."""
    node = graph.call_function(aten.sym_size.int, (hidden, 0))
    node.meta["val"] = program.batch
    return node


def build_denoise(program: Program, early: set[Node], names: dict[Node, str]) -> GraphModule:
    graph = Graph()
    copied: dict[Node, Node] = {}
    late = [n for n in program.graph.nodes if n not in early]
    used, output = used_late(program, late, early), late[-1]

    size: Node | None = None  # of the batch

    def again(node: Node) -> Node:
        """A weight, a size or a value without a batch axis from the early half, recomputed in this graph."""
        if node not in copied:
            if node.op == "get_attr":
                copied[node] = graph.node_copy(node)
            elif same(node.meta["val"], program.batch):
                copied[node] = size or read_size(program, graph, hidden)
            elif is_batched(program, node) or node.op == "placeholder":
                raise UnsupportedModelError(f"{where(node)} cannot pass from route to denoise")
            else:
                copied[node] = graph.node_copy(node, again)
        return copied[node]

    for node, name in names.items():
        copied[node] = graph.placeholder(name)
        copied[node].meta["val"] = node.meta["val"]
    for node in placeholders(program.graph):
        if node in used and node not in copied:
            copied[node] = graph.node_copy(node)
    hidden = copied[program.found_trunk()[0]]
    for node in program.graph.nodes:
        if node in copied or node.op in ("output", "placeholder"):
            continue
        if node not in early and is_input_size(program, node):
            # Reading it from that input would keep the input alive, and TensorRT drops such inputs.
            copied[node] = size = again(node)
        elif node not in early:
            copied[node] = graph.node_copy(node, again)
    graph.output(torch.fx.node.map_arg(tuple(output.args[0][1:]), copied.__getitem__))
    return finish(program, graph, "Denoise")


def finish(program: Program, graph: Graph, name: str) -> GraphModule:
    remove_dead_code(graph)
    for node in placeholders(graph):
        if not node.users and node.name in program.inputs:
            graph.erase_node(node)
    return GraphModule(program.graph_module, graph, class_name=name)
