"""How much of a model its trunk holds: attention ops, and operations that can shrink."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dcconvert.passes.frontend.cuts import ATTENTION, dependents, main_stream
from dcconvert.passes.ir.graph_tools import module_path
from dcconvert.passes.ir.node_args import operand
from dcconvert.passes.ir.program import Program, Reach

aten = torch.ops.aten

CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default}
PRODUCTS = {aten.linear.default, aten.matmul.default, aten.bmm.default, aten.mm.default, aten.addmm.default}
ENOUGH = 0.9  # of the attention ops on the image's path


def trunk_nodes(program: Program, start: Node, ends: Sequence[Node]) -> list[Node]:
    """Nodes on a path from `start` to one of `ends`, in graph order, without `start`."""
    after = dependents(program, [start])
    needed, found = set(ends), []
    for node in reversed(after):
        if node in needed and node is not start:
            found.append(node)
            needed.update(node.all_input_nodes)
    return found[::-1]


def reach_of(program: Program, head: int, tail: int) -> Reach:
    """What the program's trunk holds, between `head` and `tail` blocks."""
    stream, (start, end) = program.found_stream(), program.found_trunk()
    attentions = [node for node in main_stream(program, stream.patchify) if node.target is ATTENTION]
    trunk = trunk_nodes(program, start, (end, *stream.contexts.get(end, ())))
    blocks = stream.boundaries
    whole = trunk_nodes(program, blocks[0], (blocks[-1], *stream.contexts.get(blocks[-1], ())))
    inside = set(trunk)
    beside = max(stream.beside(node) for node in blocks)
    sizes = {stream.tokens, stream.tokens + beside, beside} - {0}
    shrinking = sum(work(node) * share_of_grid(node, stream.tokens, sizes) for node in trunk)
    total = sum(work(node) for node in program.graph.nodes if node.op == "call_function")
    held = sum(node in inside for node in attentions)
    share = shrinking / total if total else 0.0
    notes = [f"the trunk holds {held} of {len(attentions)} attention ops and {share:.0%} of the operations"]
    outside = [node for node in attentions if node not in set(whole)]
    if len(outside) > (1 - ENOUGH) * len(attentions):
        notes.append(
            f"{len(outside)} attention ops are in no block that can be cut out, because the ops around them do not "
            f"repeat or values other than tokens are needed there: {listed(outside)}"
        )
    return Reach(held, len(attentions), share, head, tail, tuple(notes))


def listed(nodes: Iterable[Node], most: int = 4) -> str:
    """The modules that nodes were captured from, the first few by name."""
    paths = list(dict.fromkeys(module_path(node) or "the model" for node in nodes))
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def share_of_grid(node: Node, tokens: int, sizes: set[int]) -> float:
    """How much of an op's work is for the grid's N tokens: N of the N+X that its result has, and none of X.

    `sizes`: N, N+X and X.
    """
    value = node.meta["val"]
    if not isinstance(value, Tensor) or value.ndim < 3:
        return 0.0
    found = [size for size in plain_sizes(value.shape[1:-1]) if size in sizes]
    return min(tokens / found[0], 1.0) if found and found[0] >= tokens else 0.0


def work(node: Node) -> float:
    """Multiplications and additions of a matrix product, convolution or attention for one sample; 0 for other ops."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not node.all_input_nodes:
        return 0.0
    count = elements(value)
    if node.target is ATTENTION:
        key = operand(node, 1).meta["val"]
        return 2.0 * count * int(key.shape[-2]) if not isinstance(key.shape[-2], torch.SymInt) else 0.0
    if node.target in CONVOLUTIONS:
        weight = operand(node, 1).meta["val"]
        return float(count * math.prod(map(int, weight.shape[1:])))
    if node.target in PRODUCTS:
        return float(count * int(operand(node).meta["val"].shape[-1]))
    return 0.0


def elements(value: Tensor) -> int:
    """The elements of one sample: symbolic sizes count as one."""
    return math.prod(plain_sizes(value.shape))


def plain_sizes(shape: Iterable[Any]) -> list[int]:
    """The sizes that are not symbolic."""
    return [int(size) for size in shape if not isinstance(size, torch.SymInt)]
