"""Split fused projections: one linear layer of queries, keys and values becomes three."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from dcconvert.passes.frontend.cuts import is_token_tensor
from dcconvert.passes.ir.graph_tools import remove_dead_code, run_nodes
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.program import Program

aten = torch.ops.aten

# Ops that only move the data of one tensor or take parts of it.
MOVES = {
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.select.int,
    aten.slice.Tensor,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
    aten.unflatten.int,
    operator.getitem,
}


@dataclass(frozen=True)
class Part:
    """A value that holds features `begin` to `end` of a linear layer's output; `heads`: (H, d) of [B, H, N, d]."""

    node: Node
    begin: int
    end: int
    heads: tuple[int, int] | None = None


class SplitProjections(Pass):
    """Rewrite linear(x) [B, N, F] whose users take disjoint runs of features as one linear layer for each run.

    Then a pass that needs the keys of some tokens and the queries of others does not compute both for all tokens. The
    features that a user takes are found by running the ops in between on the features' indices.
    """

    optional = True
    exact = True

    def call(self, program: Program) -> PassResult:
        tokens = program.found_stream().tokens
        matches = 0
        for node in list(program.graph.nodes):
            if node.target is not aten.linear.default or not is_token_tensor(node, program.batch, tokens):
                continue
            parts = parts_of(program, node)
            if parts:
                split(program, node, parts)
                matches += 1
        remove_dead_code(program.graph)
        return PassResult(matches)


def parts_of(program: Program, node: Node) -> list[Part]:
    """The features that each user of a linear layer takes; empty unless they are several runs that cover all
    features."""
    features, tokens = int(node.meta["val"].shape[2]), int(node.meta["val"].shape[1])
    moved = moved_from(node)
    given = {node: torch.arange(features).expand(1, tokens, features)}
    values = run_nodes(program.graph_module, moved, given, missing=1)
    ends = [
        other
        for other in (node, *moved)
        if isinstance(values[other], Tensor) and any(user not in (node, *moved) for user in other.users)
    ]
    found = [part_of(end, values[end], tokens) for end in ends]
    parts = sorted((part for part in found if part), key=lambda part: part.begin)
    bounds = [0, *(part.end for part in parts)]
    whole = len(parts) == len(ends) > 1 and bounds[-1] == features
    return parts if whole and all(part.begin == bound for part, bound in zip(parts, bounds, strict=False)) else []


def moved_from(node: Node) -> list[Node]:
    """All nodes that only move a node's value, in graph order."""
    found, pending = {node}, list(node.users)
    order = []
    while pending:
        other = pending.pop(0)
        sources = [n for n in other.all_input_nodes if isinstance(n.meta.get("val"), Tensor | list | tuple)]
        if other in found or other.target not in MOVES or other.kwargs or not set(sources) <= found:
            continue
        found.add(other)
        order.append(other)
        pending.extend(other.users)
    return order


def part_of(node: Node, value: Tensor, tokens: int) -> Part | None:
    """The run of features that a value [1, N, E] or [1, H, N, d] contains, if they are consecutive and in order."""
    begin = int(value.min())
    if value.ndim == 3:
        wanted = torch.arange(value.shape[2]) + begin
        fits = value.shape[1] == tokens and torch.equal(value, wanted.expand_as(value))
        return Part(node, begin, begin + value.shape[2]) if fits else None
    if value.ndim != 4 or value.shape[2] != tokens:
        return None
    heads = (int(value.shape[1]), int(value.shape[3]))
    wanted = (torch.arange(math.prod(heads)) + begin).view(1, heads[0], 1, heads[1])
    fits = torch.equal(value, wanted.expand_as(value))
    return Part(node, begin, begin + math.prod(heads), heads) if fits else None


def split(program: Program, node: Node, parts: Sequence[Part]) -> None:
    """Write the linear layer once for each part."""
    x, weight, *bias = node.args
    tokens = int(node.meta["val"].shape[1])
    for part in parts:
        with program.graph.inserting_before(part.node):
            rows = [
                program.emit(aten.slice.Tensor, (source, 0, part.begin, part.end))
                for source in (weight, *bias)
                if isinstance(source, Node)
            ]
            made = program.emit(aten.linear.default, (x, *rows))
            if part.heads:
                made = program.emit(aten.reshape.default, (made, [-1, tokens, *part.heads]))
                made = program.emit(aten.permute.default, (made, [0, 2, 1, 3]))
            for source in (made, *rows):
                source.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        part.node.replace_all_uses_with(made)
