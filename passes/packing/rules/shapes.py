"""Ops that only move data: they follow the batch and token axes and exist in both layouts."""

from __future__ import annotations

import math
import operator

import torch
from torch.fx import Node

from dcconvert.passes.ir.node_args import integer, integers, operand
from dcconvert.passes.packing.packer import Packer
from dcconvert.passes.packing.rules.registry import rule
from dcconvert.passes.packing.values import Layout, PackedValue

aten = torch.ops.aten

BATCH_MARK = 1_000_003  # a prime no model has as a size: stands for B when groups of axes are matched


@rule(aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, moves_only=True)
def reshape(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """Any reshape that keeps batch and token axes whole; their constants B and N become G and L, or R and S."""
    x = packer.get(operand(node), layout)
    before = marked_sizes(packer, operand(node))
    after = marked_sizes(packer, node)
    batch, token = (follow_axis(before, after, axis) for axis in (x.batch, x.token))
    if batch is None or token is None:
        raise packer.refuse(node, f"it merges or splits the {'batch' if batch is None else 'token'} axis")
    sizes: list[int | Node] = list(after)
    sizes[batch] = packer.groups(layout)
    sizes[token] = -1
    return x.at(packer.emit(aten.reshape.default, x.node, sizes), batch, token)


def marked_sizes(packer: Packer, node: Node) -> list[int]:
    """A value's sizes as integers, with the symbolic batch replaced by a prime."""
    mark = str(packer.program.batch)
    sizes = []
    for size in node.meta["val"].shape:
        if isinstance(size, torch.SymInt):
            if str(size) != mark:
                raise packer.refuse(node, f"it has a size {size} that mixes the batch with other axes")
            size = BATCH_MARK
        sizes.append(int(size))
    return sizes


def follow_axis(before: list[int], after: list[int], axis: int) -> int | None:
    """Where an axis goes in a row-major reshape, or None if it is merged with another or split.

    The axis survives if some output axis has its size and the same product of sizes to its left.
    """
    left = math.prod(before[:axis])
    for candidate, size in enumerate(after):
        if size == before[axis] and math.prod(after[:candidate]) == left:
            return candidate
    return None


@rule(aten.permute.default, moves_only=True)
def permute(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    x = packer.get(operand(node), layout)
    rank = x.node.meta["val"].ndim
    order = [axis % rank for axis in integers(node, 1)]
    return x.at(packer.again(node, x.node, order), order.index(x.batch), order.index(x.token))


@rule(aten.transpose.int, moves_only=True)
def transpose(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    x = packer.get(operand(node), layout)
    a, b = (integer(node, position) % x.node.meta["val"].ndim for position in (1, 2))
    moved = {a: b, b: a}
    out = packer.again(node, x.node, a, b)
    return x.at(out, moved.get(x.batch, x.batch), moved.get(x.token, x.token))


@rule(aten.unsqueeze.default, moves_only=True)
def unsqueeze(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    x = packer.get(operand(node), layout)
    new = integer(node, 1) % node.meta["val"].ndim
    out = packer.again(node, x.node, new)
    return x.at(out, x.batch + (new <= x.batch), x.token + (new <= x.token))


@rule(aten.squeeze.dim, aten.select.int, moves_only=True)
def drop_axis(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """squeeze and select: one feature axis is removed."""
    x, axis = feature_axis(packer, node, layout, integer(node, 1))
    out = packer.again(node, x.node, axis, *node.args[2:])
    if out.meta["val"].ndim == x.node.meta["val"].ndim:  # squeeze of an axis longer than one does nothing
        return x.at(out)
    return x.at(out, x.batch - (axis < x.batch), x.token - (axis < x.token))


@rule(aten.unbind.int, moves_only=True)
def unbind(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    x, axis = feature_axis(packer, node, layout, integer(node, 1, 0))
    out = packer.again(node, x.node, axis)
    return x.at(out, x.batch - (axis < x.batch), x.token - (axis < x.token))


@rule(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, moves_only=True)
def split(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    x, axis = feature_axis(packer, node, layout, integer(node, 2, 0))
    return x.at(packer.again(node, x.node, node.args[1], axis))


@rule(aten.slice.Tensor, moves_only=True)
def slice_features(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    x, axis = feature_axis(packer, node, layout, integer(node, 1, 0))
    return x.at(packer.again(node, x.node, axis, *node.args[2:]))


@rule(aten.expand.default, moves_only=True)
def expand(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """Copies along feature axes of size one, without new axes."""
    x = packer.get(operand(node), layout)
    before, after = marked_sizes(packer, operand(node)), marked_sizes(packer, node)
    if len(before) != len(after):
        raise packer.refuse(node, "it adds axes in front of the batch axis")
    if any(before[axis] != after[axis] for axis in (x.batch, x.token)):
        raise packer.refuse(node, "it makes copies along the batch or token axis")
    sizes = [-1 if old == new else new for old, new in zip(before, after, strict=True)]
    return x.at(packer.again(node, x.node, sizes))


@rule(aten.repeat.default, moves_only=True)
def repeat(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """Copies along feature axes."""
    x = packer.get(operand(node), layout)
    times = integers(node, 1)
    if len(times) != x.node.meta["val"].ndim or times[x.batch] != 1 or times[x.token] != 1:
        raise packer.refuse(node, "it makes copies along the batch or token axis")
    return x.at(packer.again(node, x.node, times))


@rule(aten.flip.default, aten.roll.default, moves_only=True)
def turn(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """Another order along feature axes."""
    x = packer.get(operand(node), layout)
    axes = integers(node, 2 if node.target is aten.roll.default else 1)
    if {axis % node.meta["val"].ndim for axis in axes} & {x.batch, x.token}:
        raise packer.refuse(node, "it changes the order along the batch or token axis")
    return x.at(packer.again(node, x.node, *node.args[1:]))


@rule(operator.getitem, moves_only=True)
def getitem(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    x = packer.get(operand(node), layout)
    return x.at(packer.again(node, x.node, node.args[1]))


def feature_axis(packer: Packer, node: Node, layout: Layout, axis: int) -> tuple[PackedValue, int]:
    """The operand and the non-negative axis an op works on, which must not be batch or token."""
    x = packer.get(operand(node), layout)
    axis %= operand(node).meta["val"].ndim
    if axis in (x.batch, x.token):
        raise packer.refuse(node, f"it splits the {'batch' if axis == x.batch else 'token'} axis")
    return x, axis
