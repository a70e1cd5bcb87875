"""Tokens beside the grid (text in joint attention): where they join and leave the grid, and their positions."""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from dcconvert.passes.frontend.cuts import same
from dcconvert.passes.ir.node_args import integer, integers, nodes, operand

if TYPE_CHECKING:
    from dcconvert.passes.packing.packer import Packer
    from dcconvert.passes.packing.values import PackedValue

aten = torch.ops.aten


@dataclass(frozen=True)
class Joint:
    """A token axis that holds the N grid tokens from `start` on, and `context` others before or after them."""

    start: int
    context: int


SPLITS = {aten.split_with_sizes.default, aten.split.sizes}


def joins(packer: Packer, node: Node) -> bool:
    """Write a `cat` of grid tokens and others along the token axis, in either order; False for any other op."""
    if node.target is not aten.cat.default:
        return False
    parts = nodes(node, 0)
    ours = [part for part in parts if packer.in_trunk(part)]
    if len(ours) != 1 or len(parts) != 2:
        return False
    [grid], [other] = ours, [part for part in parts if part is not ours[0]]
    laid = packer.get(grid, "packed")
    axis = integer(node, 1, 0) % node.meta["val"].ndim
    if axis != laid.token:
        return False
    if packer.joint(grid):
        raise packer.refuse(node, "it joins tokens of the grid with others a second time")
    if not same(other.meta["val"].shape[laid.batch], packer.program.batch):
        raise packer.refuse(node, "the values that it joins to the tokens do not exist once per sample")
    size = int(other.meta["val"].shape[axis])
    start = 0 if parts[0] is grid else size
    packer.store_joint(node, Joint(start, size), laid, packer.outside(other))
    return True


def takes_apart(packer: Packer, node: Node, joint: Joint) -> bool:
    """Write an op that selects the grid tokens or the others from a value with both; False for any other op."""
    source = node.all_input_nodes[0]
    if node.target is operator.getitem and source.target in SPLITS and splits_tokens(packer, source):
        sizes, which = integers(source, 1), integer(node, 1)
        begin = sum(sizes[:which])
        store_part(packer, node, source.all_input_nodes[0], joint, (begin, begin + sizes[which]))
        return True
    if node.target in SPLITS and splits_tokens(packer, node):
        packer._joint[node] = joint  # its parts are handled where they are taken out
        packer.store(node, packer.get(source, "packed"))
        return True
    if node.target is aten.slice.Tensor:
        axis, begin, end, step = slice_arguments(node)
        if axis == packer.get(source, "packed").token and step == 1:
            total = packer.tokens + joint.context
            store_part(packer, node, source, joint, (clamped(begin, total), clamped(end, total)))
            return True
    if node.target is aten.slice_scatter.default:
        return writes_over_grid(packer, node, joint)
    return False


def writes_over_grid(packer: Packer, node: Node, joint: Joint) -> bool:
    """Write an op that replaces exactly the grid's tokens in a value with both; False for any other."""
    whole, part = operand(node), operand(node, 1)
    laid, rank = packer.get(whole, "packed"), node.meta["val"].ndim
    if integer(node, 2, 0) % rank != laid.token or packer.joint(whole) != joint:
        return False
    total = packer.tokens + joint.context
    begin, end = (clamped(integer(node, place, default), total) for place, default in ((3, 0), (4, sys.maxsize)))
    if (begin, end) != (joint.start, joint.start + packer.tokens) or integer(node, 5, 1) != 1:
        raise packer.refuse(node, f"it writes over tokens {begin} to {end}, which are not exactly the grid's")
    if not packer.in_trunk(part) or packer.joint(part):
        raise packer.refuse(node, "what it writes over the grid's tokens is not computed from them")
    packer.store_joint(node, joint, packer.native(part), packer.get(whole, "context").node)
    return True


def splits_tokens(packer: Packer, node: Node) -> bool:
    axis = integer(node, 2, 0) % node.all_input_nodes[0].meta["val"].ndim
    return bool(axis == packer.get(node.all_input_nodes[0], "packed").token)


def slice_arguments(node: Node) -> tuple[int, int, int, int]:
    """Axis, begin, end and step of a slice."""
    rank = node.all_input_nodes[0].meta["val"].ndim
    return integer(node, 1, 0) % rank, integer(node, 2, 0), integer(node, 3, sys.maxsize), integer(node, 4, 1)


def clamped(place: int, total: int) -> int:
    return min(max(place + total if place < 0 else place, 0), total)


def store_part(packer: Packer, node: Node, source: Node, joint: Joint, span: tuple[int, int]) -> None:
    """Declare the tokens from span[0] to span[1] of a value with grid tokens and others."""
    context = (0, joint.start) if joint.start else (packer.tokens, packer.tokens + joint.context)
    if span == (joint.start, joint.start + packer.tokens):
        packer.store(node, packer.native(source))
    elif span == context:
        packer.keep_outside(node, packer.get(source, "context").node)
    else:
        raise packer.refuse(
            node, f"it selects tokens {span[0]} to {span[1]}, which are neither the grid's nor all others"
        )


def positional(packer: Packer, value: Node, laid: PackedValue, node: Node) -> Node:
    """A value that varies with the token's position, such as a rotary embedding, at the positions of packed tokens.

    For a value with grid tokens and others, a context gets the others' part. Raises UnsupportedModelError if the value
    is not for all tokens, or has neither one copy nor one per sample.
    """
    rank, shape = laid.node.meta["val"].ndim, value.meta["val"].shape
    joint = packer.joint(packer.trunk_input(node))
    context = joint.context if joint else 0
    start = joint.start if joint else 0
    if shape[laid.token - rank + len(shape)] != packer.tokens + context:
        raise packer.refuse(node, f"an operand of shape {tuple(shape)} varies along the token axis, but not by token")
    if laid.layout == "context":
        begin = 0 if start else packer.tokens
        axis = laid.token - rank + len(shape)
        return packer.emit(aten.slice.Tensor, value, axis, begin, begin + context)

    def placed() -> Node:
        full = value
        for _ in range(rank - len(shape)):
            full = packer.emit(aten.unsqueeze.default, full, 0)
        samples = full.meta["val"].shape[laid.batch]
        whole = laid.at(full)
        front = packer.to_front(whole)
        if context:
            front = packer.emit(aten.slice.Tensor, front, 1, start, start + packer.tokens)
        if same(samples, packer.program.batch):
            index = packer.token_index()
        elif samples == 1:
            index = packer.remembered(("places",), lambda: places(packer))
        else:
            raise packer.refuse(node, f"an operand of shape {tuple(shape)} exists neither once nor once per sample")
        return packer.from_front(packer.emit(torch.ops.dcconvert.gather_tokens.default, front, index), whole)

    return packer.remembered((value, laid.batch, laid.token, rank, start), placed)


def places(packer: Packer) -> Node:
    """Grid index of every packed token [G, L]."""
    return packer.emit(aten.remainder.Scalar, packer.token_index(), packer.tokens)
