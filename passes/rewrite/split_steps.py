"""Make two graphs from one: `full`, which also returns the trunk's update, and `skip`, which has no trunk."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import Graph, GraphModule, Node

from dcconvert.passes.frontend.cuts import ATTENTION
from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.graph_tools import add_input, emit, placeholders, remove_dead_code
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.program import Program
from dcconvert.passes.ir.spec import UPDATES, WEIGHTS, update_name

aten = torch.ops.aten


class SplitSteps(Pass):
    """Make two graphs from one, for runs whose steps either compute the whole trunk or skip it.

    1. `full` is the graph as it is. Its last output is the trunk's update [B, N, D], which the trunk added to the
       tokens.
    2. `skip` replaces the trunk by h + sum_k weights[k] * update_k. Its last inputs are `weights` [P, B] and the last P
       updates, `update_0` [B, N, D] and so on. With weights (1, 0, ...) and the update of the same call, it returns the
       same as `full`.

    Holding the last update, linear extrapolation and the forecasts of TaylorSeer (arXiv 2503.06923) are all rows of
    weights.
    """

    def __init__(self, updates: int = UPDATES) -> None:
        self.updates = updates

    def requires(self, program: Program) -> None:
        program.found_trunk()

    def call(self, program: Program) -> PassResult:
        program.parts = {"full": full_graph(program), "skip": skip_graph(program, self.updates)}
        whole, left = (sum(n.target is ATTENTION for n in part.graph.nodes) for part in program.parts.values())
        method = program.method
        if left and not (method.head_blocks or method.tail_blocks):
            raise UnsupportedModelError(
                f"{left} of {whole} attention ops do not go through the tokens' update: a step that skips the trunk "
                "would still compute them; use --mode carry"
            )
        return PassResult(whole - left, (f"{whole - left} of {whole} attention ops are skipped",))


def copied(program: Program) -> tuple[Graph, dict[Node, Node], tuple[Node, ...]]:
    """A copy of the program's graph, the copy of each node, and the outputs."""
    graph = Graph()
    places: dict[Node, Node] = {}
    outputs = graph.graph_copy(program.graph, places)
    return graph, places, cast(tuple[Node, ...], tuple(outputs))  # type: ignore[arg-type]


def full_graph(program: Program) -> GraphModule:
    graph, places, outputs = copied(program)
    start, end = (places[node] for node in program.found_trunk())
    with graph.inserting_before(end.next):
        update = emit(graph, aten.sub.Tensor, (end, start))
    graph.output((*outputs, update))
    return GraphModule(program.graph_module, graph, class_name="Full")


def skip_graph(program: Program, updates: int) -> GraphModule:
    graph, places, outputs = copied(program)
    start, end = (places[node] for node in program.found_trunk())
    value = start.meta["val"]
    weights = add_input(graph, WEIGHTS, (updates, program.batch), value, after=placeholders(graph)[-1])
    given = [weights]
    for number in range(updates):
        given.append(add_input(graph, update_name(number), value.shape, value, after=given[-1]))
    with graph.inserting_before(end.next):
        tokens = start
        for number, update in enumerate(given[1:]):
            weight = emit(graph, aten.select.int, (weights, 0, number))
            for axis in (1, 2):
                weight = emit(graph, aten.unsqueeze.default, (weight, axis))
            part = emit(graph, aten.mul.Tensor, (update, weight))
            tokens = emit(graph, aten.add.Tensor, (tokens, part))
    end.replace_all_uses_with(tokens)
    outputs = tuple(tokens if node is end else node for node in outputs)
    graph.output(outputs)
    remove_dead_code(graph)
    return GraphModule(program.graph_module, graph, class_name="Skip")
