"""Part a single stream at the trunk's ends: the grid's tokens and the others become two values."""

from __future__ import annotations

import torch
from torch.fx import Node

from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.program import Program

aten = torch.ops.aten


class PartTokens(Pass):
    """Where the trunk begins or ends with a value [B, N+X, D], take it apart into grid tokens [B, N, D] and others
    [B, X, D], and join them again for the ops that follow.

    From then on the model looks like one with joint attention, whose other tokens are always kept. In a packed trunk,
    taking apart and joining cost nothing, because such values are kept in two parts there.
    """

    optional = True
    exact = True

    def call(self, program: Program) -> PassResult:
        stream, trunk = program.found_stream(), program.found_trunk()
        ends = [node for node in trunk if node in stream.starts]
        parted = {node: part(program, node) for node in ends}
        for node, (grid, others) in parted.items():
            stream.contexts[grid] = (others,)
            stream.boundaries[stream.boundaries.index(node)] = grid
        start, end = (parted[node][0] if node in parted else node for node in trunk)
        program.trunk = (start, end)
        return PassResult(len(ends))


def part(program: Program, node: Node) -> tuple[Node, Node]:
    """The grid's tokens and the others of a value that holds both."""
    stream = program.found_stream()
    first, tokens, total = stream.starts[node], stream.tokens, int(node.meta["val"].shape[1])
    spans = (first, first + tokens), (0, first) if first else (tokens, total)
    users = list(node.users)
    with program.graph.inserting_before(node.next):
        grid, others = (program.emit(aten.slice.Tensor, (node, 1, *span)) for span in spans)
        again = program.emit(aten.cat.default, ([others, grid] if first else [grid, others], 1))
    for made in (grid, others, again):
        made.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    for user in users:
        user.replace_input_with(node, again)
    return grid, others
