"""SparseDiT's trunk: groups of blocks on a pooled grid, each of which restores all tokens at its end (2412.06028)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from dcconvert.passes.frontend.cuts import ATTENTION, dependents
from dcconvert.passes.frontend.reach import trunk_nodes
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.ir.graph_tools import give_tensor, read_tensor, remove_dead_code, where
from dcconvert.passes.ir.node_args import operand
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.plan_inputs import CHUNK_INPUTS
from dcconvert.passes.ir.program import Program
from dcconvert.passes.packing.packer import Packer
from dcconvert.passes.packing.rules import find_rule
from dcconvert.passes.packing.rules.attention import ARGUMENTS, scale_of
from dcconvert.passes.rewrite.pack_trunk import add_plan_inputs, drop_unused_inputs

aten = torch.ops.aten

RECOVERY = "recovery"  # new weights are called recovery.<group>.sparse and recovery.<group>.dense
GROUP_BLOCKS = 4  # the minimum of a group: generation, one sparse, recovery, dense
GROUPS = 4


@dataclass(frozen=True)
class Group:
    """The indices of the blocks of one group, in order."""

    generation: int
    sparse: tuple[int, ...]
    recovery: int
    dense: int


def arrange(depth: int, head: int, tail: int) -> list[Group]:
    """Four groups of equal length between `head` pooling and `tail` dense blocks, fewer in models with few blocks.

    Raises UsageError if fewer blocks remain than one group needs.
    """
    count = min(GROUPS, (depth - head - tail) // GROUP_BLOCKS)
    if count < 1:
        raise UsageError(
            f"a group of sparse and dense blocks needs {GROUP_BLOCKS}; {head} head and {tail} tail blocks leave "
            f"{depth - head - tail} of {depth}: lower --head-blocks or --tail-blocks"
        )
    groups = []
    for part in np.array_split(np.arange(head, depth - tail), count):
        first, *between, recovery, dense = part.tolist()
        groups.append(Group(first, tuple(between), recovery, dense))
    return groups


class SparseDense(Pass):
    """Rewrite the blocks as in SparseDiT; the schedule of the pooled grids comes with the plan.

    1. Head blocks replace attention by the mean of the values, without queries and keys.
    2. A group pools the grid; its first block's queries are the pooled tokens, keys and values those of the whole
       grid. The sparse blocks that follow see the pooled tokens only.
    3. The second-to-last block of a group gets X W2 + up-sampled pooled tokens W1 (nearest) as tokens, with W1 = 0 and
       W2 = I before training, and the pooled tokens as keys and values. The last block does not change.

    With everything kept, the result is not the original: it needs training.
    """

    def call(self, program: Program) -> PassResult:
        stream, method = program.found_stream(), program.method
        if any(stream.contexts.get(node) for node in stream.boundaries):
            raise UnsupportedModelError(
                "sparse-dense blocks do not support tokens beside the grid (joint attention with text): use the "
                "plain trunk"
            )
        groups = arrange(stream.depth, method.head_blocks, method.tail_blocks)
        bodies = [
            trunk_nodes(program, start, (end,))
            for start, end in zip(stream.boundaries, stream.boundaries[1:], strict=False)
        ]
        add_plan_inputs(program, CHUNK_INPUTS)
        for number in range(method.head_blocks):
            pool_values(program, bodies[number])
        for number, group in enumerate(groups):
            rewrite_group(program, number, group, bodies)
        remove_dead_code(program.graph)
        drop_unused_inputs(program)
        sizes = ", ".join(str(len(group.sparse) + 3) for group in groups)
        return PassResult(len(groups), (f"{method.head_blocks} pooling blocks, groups of {sizes} blocks",))


def rewrite_group(program: Program, number: int, group: Group, bodies: Sequence[list[Node]]) -> None:
    boundaries, width = program.found_stream().boundaries, program.found_stream().width
    packer = Packer(program, find_rule, program.found_stream().tokens, program.method.row_packing)
    dense = boundaries[group.generation]
    packer.whole_keys = True
    for block in (group.generation, *group.sparse):
        with program.graph.inserting_before(boundaries[block + 1].next):
            if block == group.generation:
                members = (packer.plan_input("chunk_index"), packer.plan_input("chunk_weight"))
                packer.start(dense, packer.emit(torch.ops.dcconvert.chunk.default, dense, *members))
            for node in bodies[block]:
                packer.visit(node)
            packer.whole_keys = False
    last = boundaries[group.recovery]
    pooled = packer.get(last, "packed").node
    with program.graph.inserting_before(pooled.next):
        kept = packer.emit(aten.linear.default, dense, weight(program, f"{number}.dense", torch.eye(width)))
        brought = packer.emit(
            aten.linear.default, pooled, weight(program, f"{number}.sparse", torch.zeros(width, width))
        )
        fill = (packer.plan_input("fill_index"), packer.plan_input("fill_weight"))
        recovered = packer.emit(torch.ops.dcconvert.dechunk.default, kept, brought, *fill)
    recover(packer, bodies[group.recovery], last, recovered)


def recover(packer: Packer, body: Sequence[Node], entry: Node, recovered: Node) -> None:
    """Make a block work on `recovered` [B, N, D], with keys and values of the packed tokens that `entry` became."""
    program = packer.program
    attentions = [n for n in body if n.target is ATTENTION and key_of(n) in body]
    for node in attentions:
        needed = ancestors_in(body, [key_of(node), value_of(node)])
        with program.graph.inserting_before(node):
            for source in needed:
                packer.visit(source)
            k, v = (packer.get(source, "grid").node for source in (key_of(node), value_of(node)))
            given = (operand(node), k, v, packer.plan_input("row_lengths"), scale_of(arguments(node)))
            made = packer.emit(torch.ops.dcconvert.padded_attention.default, *given)
        node.replace_all_uses_with(made)
        program.graph.erase_node(node)
    for node in [node for node in body if node not in attentions]:
        node.replace_input_with(entry, recovered)


def pool_values(program: Program, body: Sequence[Node]) -> None:
    """Make the attention ops of a block return the mean of all values for every token.

    Values are linear in their layer's input, so the mean is taken there: values are computed for one token instead of
    all.
    """
    for node in [n for n in body if n.target is ATTENTION and key_of(n) in body]:
        path = ancestors_in(body, [value_of(node)])
        layer = next((n for n in reversed(path) if n.target is aten.linear.default), None)
        if layer is None:
            raise UnsupportedModelError(f"{where(node)}: its values are not a linear function of tokens")
        source = operand(layer)
        needed = [n for n in dependents(program, [source]) if n in path and n is not source]
        packer = MeanPacker(program, find_rule, program.found_stream().tokens, program.method.row_packing)
        with program.graph.inserting_before(node):
            packer.start(source, packer.emit(aten.mean.dim, source, [1], True))
            for step in needed:
                packer.visit(step)
            mean = packer.get(value_of(node), "packed").node
            shape = [-1, *map(int, operand(node).meta["val"].shape[1:])]
            made = packer.emit(aten.expand.default, mean, shape)
        node.replace_all_uses_with(made)
        program.graph.erase_node(node)


class MeanPacker(Packer):
    """Rewrites ops for one token per sample, the mean of all its tokens."""

    def groups(self, layout: str) -> Node:
        return self.remembered(("batch",), lambda: self.emit(aten.sym_size.int, self.entry, 0))


def arguments(node: Node) -> dict[str, Any]:
    return dict(zip(ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)


def key_of(node: Node) -> Node:
    return operand(node, 1)


def value_of(node: Node) -> Node:
    return operand(node, 2)


def ancestors_in(body: Sequence[Node], roots: Sequence[Node]) -> list[Node]:
    """The roots and everything inside a block that they are computed from, in graph order."""
    needed, found = set(roots), []
    for node in reversed(body):
        if node in needed:
            found.append(node)
            needed.update(node.all_input_nodes)
    return found[::-1]


def weight(program: Program, name: str, value: torch.Tensor) -> Node:
    """A new weight of the model, under the name recovery.`name`."""
    like = program.found_stream().boundaries[0].meta["val"]
    parameter = nn.Parameter(value.to(like.device, like.dtype), requires_grad=False)
    give_tensor(program.graph_module, f"{RECOVERY}.{name}", parameter)
    return read_tensor(program.graph_module, f"{RECOVERY}.{name}")
