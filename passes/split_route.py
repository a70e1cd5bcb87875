"""Split the graph at the router: `route` up to the scores, `denoise` from the plan on."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from dcconvert.passes.errors import CheckFailedError, UnsupportedModelError
from dcconvert.passes.infra import Pass, PassResult, Program, placeholders, where, remove_dead_code
from dcconvert.passes.token_stream import same

aten = torch.ops.aten

SCORES = "scores"
HIDDEN = "h"


class SplitRoute(Pass):
    """Cut the graph in two, because the plan between the halves is made on the host.

    1. `route` holds what the scores and the trunk's input need. It returns the scores first, then every value
       `denoise` needs from it: the trunk's input `h`, and per-sample values as `live_0`, `live_1`, ...
    2. `denoise` holds the rest. It takes those values, the model inputs it still needs, and the plan.
    3. Batch sizes that crossed the cut are read again from `h`.
    """

    def requires(self, program: Program) -> None:
        if program.scores is None or not program.plan_inputs:
            raise CheckFailedError("SplitRoute needs InsertRouter and PackTrunk before it; fix the pipeline order")

    def call(self, program: Program) -> PassResult:
        start, _ = program.found_trunk()
        early = ancestors([program.scores, start])
        early |= {n for n in program.graph.nodes if n.target is operator.getitem and n.args[0] in early}
        values = [n for n in program.graph.nodes if n in early and n is not program.scores and crosses(n, early)]
        values.sort(key=lambda n: n is not start)
        names = {node: HIDDEN if node is start else f"live_{i - 1}" for i, node in enumerate(values)}
        program.route = build_route(program, early, values)
        program.denoise = build_denoise(program, early, names)
        return PassResult(1, (f"{len(values)} values pass from route to denoise",))


def ancestors(roots: list[Node]) -> set[Node]:
    found: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def crosses(node: Node, early: set[Node]) -> bool:
    """Whether a tensor computed in the early half is used in the late half, which also makes the outputs."""
    computed = node.op == "call_function" and isinstance(node.meta["val"], Tensor)
    return computed and any(user not in early for user in node.users)


def build_route(program: Program, early: set[Node], values: list[Node]) -> GraphModule:
    graph = Graph()
    copied: dict[Node, Node] = {}
    for node in program.graph.nodes:
        if node in early:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output((copied[program.scores], *(copied[v] for v in values)))
    return finish(program, graph, "Route")


def build_denoise(program: Program, early: set[Node], names: dict[Node, str]) -> GraphModule:
    graph = Graph()
    copied: dict[Node, Node] = {}
    late = [n for n in program.graph.nodes if n not in early]
    used = {source for node in late if node.op != "output" for source in node.all_input_nodes}
    output = late[-1]
    used.update(n for n in output.args[0][1:] if isinstance(n, Node))

    def again(node: Node) -> Node:
        """A weight or a size of the early half, once more in this graph."""
        if node not in copied:
            if node.op == "get_attr":
                copied[node] = graph.node_copy(node)
            elif same(node.meta["val"], program.batch):
                copied[node] = graph.call_function(aten.sym_size.int, (hidden, 0))
                copied[node].meta["val"] = program.batch
            elif isinstance(node.meta["val"], torch.SymInt):
                copied[node] = graph.node_copy(node, lambda n: copied[n] if n in copied else again(n))
            else:
                raise UnsupportedModelError(f"{where(node)} cannot pass from route to denoise")
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
        if node not in early:
            copied[node] = graph.node_copy(node, lambda n: copied[n] if n in copied else again(n))
    graph.output(torch.fx.node.map_arg(tuple(output.args[0][1:]), copied.__getitem__))
    return finish(program, graph, "Denoise")


def finish(program: Program, graph: Graph, name: str) -> GraphModule:
    remove_dead_code(graph)
    return GraphModule(program.graph_module, graph, class_name=name)
