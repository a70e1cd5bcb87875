"""Make two graphs of one: `full`, which also returns its trunk's update, and `skip`, which does without a trunk."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from dcconvert.passes.frontend.token_stream import ATTENTION
from dcconvert.passes.ir.errors import CheckFailedError, UnsupportedModelError
from dcconvert.passes.ir.graph_tools import fake_result, placeholders, remove_dead_code
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.program import Program
from dcconvert.passes.ir.spec import UPDATES, WEIGHTS, update_name

aten = torch.ops.aten


class SplitSteps(Pass):
    """Make two graphs of one, for runs whose steps compute the whole trunk or nothing of it.

    1. `full` is the graph as it is. Its last output is the trunk's update [B, N, D], what it added to the tokens.
    2. `skip` replaces the trunk by h + sum_k weights[k] * update_k. Its last inputs are `weights` [P, B] and the last P
       updates, `update_0` [B, N, D] and so on. With weights (1, 0, ...) and the update of the same call it gives what
       `full` gives.

    Holding the last update, a straight line and the forecasts of TaylorSeer (arXiv 2503.06923) are all rows of weights.
    """

    def __init__(self, updates: int = UPDATES) -> None:
        self.updates = updates

    def requires(self, program: Program) -> None:
        program.found_trunk()

    def call(self, program: Program) -> PassResult:
        program.full = full_graph(program)
        program.skip = skip_graph(program, self.updates)
        left, whole = (sum(n.target is ATTENTION for n in g.graph.nodes) for g in (program.skip, program.full))
        method = program.chosen()
        if left and not (method.head_blocks or method.tail_blocks):
            raise UnsupportedModelError(
                f"{left} of {whole} attention ops do not go through the tokens' update: a step that skips the trunk "
                "would compute them all the same; use --mode carry"
            )
        return PassResult(whole - left, (f"{whole - left} of {whole} attention ops are skipped",))

    def ensures(self, program: Program) -> None:
        if program.full is None or program.skip is None:
            raise CheckFailedError("SplitSteps made no graphs; this is a bug of dcconvert")


def emit(program: Program, graph: Graph, target: torch._ops.OpOverload, *args: Any) -> Node:
    node = graph.call_function(target, args)
    node.meta["val"] = fake_result(program.fake_mode, node)
    return node


def copied(program: Program) -> tuple[Graph, dict[Node, Node], tuple[Node, ...]]:
    """The program's graph once more, where its nodes went, and its outputs."""
    graph = Graph()
    places: dict[Node, Node] = {}
    outputs = graph.graph_copy(program.graph, places)
    return graph, places, cast(tuple[Node, ...], tuple(outputs))  # type: ignore[arg-type]


def full_graph(program: Program) -> GraphModule:
    graph, places, outputs = copied(program)
    start, end = (places[node] for node in program.found_trunk())
    with graph.inserting_before(end.next):
        update = emit(program, graph, aten.sub.Tensor, end, start)
    graph.output((*outputs, update))
    return GraphModule(program.graph_module, graph, class_name="Full")


def skip_graph(program: Program, updates: int) -> GraphModule:
    graph, places, outputs = copied(program)
    start, end = (places[node] for node in program.found_trunk())
    value = start.meta["val"]
    last = placeholders(graph)[-1]
    with graph.inserting_after(last):
        weights = graph.placeholder(WEIGHTS)
    with program.fake_mode:
        weights.meta["val"] = torch.empty((updates, program.batch), dtype=value.dtype, device=value.device)
    previous, given = weights, []
    for number in range(updates):
        with graph.inserting_after(previous):
            previous = graph.placeholder(update_name(number))
        previous.meta["val"] = value
        given.append(previous)
    with graph.inserting_before(end.next):
        tokens = start
        for number, update in enumerate(given):
            weight = emit(program, graph, aten.select.int, weights, 0, number)
            for axis in (1, 2):
                weight = emit(program, graph, aten.unsqueeze.default, weight, axis)
            part = emit(program, graph, aten.mul.Tensor, update, weight)
            tokens = emit(program, graph, aten.add.Tensor, tokens, part)
    end.replace_all_uses_with(tokens)
    outputs = tuple(tokens if node is end else node for node in outputs)
    graph.output(outputs)
    remove_dead_code(graph)
    return GraphModule(program.graph_module, graph, class_name="Skip")
