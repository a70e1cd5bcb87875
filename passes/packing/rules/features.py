"""Ops that mix only the features of a token."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from dcconvert.passes.ir.node_args import integer, integers, nodes, operand
from dcconvert.passes.packing.packer import Packer
from dcconvert.passes.packing.rules.registry import rule
from dcconvert.passes.packing.values import Layout, PackedValue

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """linear(x [..., D], weight, bias): packed tokens against the same weights."""
    x = packer.get(operand(node), layout)
    if any(packer.in_trunk(parameter) for parameter in node.args[1:]):
        raise packer.refuse(node, "its weight or bias depends on the tokens")
    last_axis_is_features(packer, node, x, 1)
    return x.at(packer.again(node, x.node, *node.args[1:]))


@rule(aten.layer_norm.default, aten.rms_norm.default)
def normalisation(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """layer_norm / rms_norm over trailing feature axes."""
    x = packer.get(operand(node), layout)
    last_axis_is_features(packer, node, x, len(integers(node, 1)))
    return x.at(packer.again(node, x.node, *node.args[1:], **node.kwargs))


@rule(aten.softmax.int)
def softmax(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """Softmax over a feature axis (one over tokens would be hand-written attention, which has no rule)."""
    x = packer.get(operand(node), layout)
    if integer(node, 1) % node.meta["val"].ndim in (x.batch, x.token):
        raise packer.refuse(node, "it normalises over tokens or samples")
    return x.at(packer.again(node, x.node, *node.args[1:], **node.kwargs))


@rule(aten.matmul.default)
def product(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """matmul(x [..., D], weight [D, E]) without a bias, where the weight does not depend on the tokens."""
    if not packer.in_trunk(node.args[0]) or packer.in_trunk(node.args[1]) or operand(node, 1).meta["val"].ndim != 2:
        raise packer.refuse(node, "it multiplies tokens with tokens, but is no attention that could be recognised")
    x = packer.get(operand(node), layout)
    last_axis_is_features(packer, node, x, 1)
    return x.at(packer.again(node, x.node, packer.outside(operand(node, 1))))


AXES: dict[Any, int] = {aten.linalg_vector_norm.default: 2}  # where an op has its axes, if not at 1


@rule(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
@rule(aten.var.correction, aten.std.correction, aten.linalg_vector_norm.default)
def reduction(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """Mean, sum, maximum, variance and norm over feature axes."""
    x = packer.get(operand(node), layout)
    rank = x.node.meta["val"].ndim
    axes = [axis % rank for axis in integers(node, AXES.get(node.target, 1))]
    if {x.batch, x.token} & set(axes):
        raise packer.refuse(node, "it mixes values along the batch or token axis")
    out = packer.again(node, x.node, *node.args[1:], **node.kwargs)
    if out.meta["val"].ndim == rank:
        return x.at(out)
    return x.at(out, *(axis - sum(gone < axis for gone in axes) for axis in (x.batch, x.token)))


@rule(aten.cat.default, aten.stack.default)
def side_by_side(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """Features of the same tokens side by side, on an existing axis (cat) or a new one (stack)."""
    parts = nodes(node, 0)
    if not all(packer.in_trunk(part) for part in parts):
        raise packer.refuse(node, "it joins tokens with values that are not computed from them")
    laid = [packer.get(part, layout) for part in parts]
    first = laid[0]
    axis = integer(node, 1, 0) % node.meta["val"].ndim
    if any((x.batch, x.token) != (first.batch, first.token) for x in laid):
        raise packer.refuse(node, "its operands have batch and token on different axes")
    new = node.target is aten.stack.default
    if not new and axis in (first.batch, first.token):
        raise packer.refuse(node, "it joins tokens with tokens, or samples with samples")
    out = packer.again(node, [x.node for x in laid], axis)
    return first.at(out, first.batch + (new and axis <= first.batch), first.token + (new and axis <= first.token))


@rule(aten.glu.default, aten.cumsum.default)
def along_an_axis(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """Ops along one feature axis, which stays."""
    x = packer.get(operand(node), layout)
    axis = integer(node, 1, -1) % node.meta["val"].ndim
    if axis in (x.batch, x.token):
        raise packer.refuse(node, "it mixes values along the batch or token axis")
    return x.at(packer.again(node, x.node, axis, *node.args[2:], **node.kwargs))


@rule(aten.constant_pad_nd.default)
def pad(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """Constant values beside the features."""
    x = packer.get(operand(node), layout)
    widths, rank = integers(node, 1), node.meta["val"].ndim
    padded = {rank - 1 - place // 2 for place, width in enumerate(widths) if width}
    if padded & {x.batch, x.token}:
        raise packer.refuse(node, "it pads samples or tokens")
    return x.at(packer.again(node, x.node, *node.args[1:]))


@rule(aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default)
def same_shape(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """A new value to be filled, in the shape of another."""
    x = packer.get(operand(node), layout)
    return x.at(packer.again(node, x.node, **node.kwargs))


@rule(aten.slice_scatter.default)
def written_into(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """Some features replaced by others of the same tokens."""
    x, source = packer.get(operand(node), layout), packer.get(operand(node, 1), layout)
    axis = integer(node, 2, 0) % node.meta["val"].ndim
    if axis in (x.batch, x.token) or (x.batch, x.token) != (source.batch, source.token):
        raise packer.refuse(node, "it writes over tokens or samples")
    return x.at(packer.again(node, x.node, source.node, axis, *node.args[3:]))


def last_axis_is_features(packer: Packer, node: Node, x: PackedValue, axes: int) -> None:
    if max(x.batch, x.token) >= x.node.meta["val"].ndim - axes:
        raise packer.refuse(node, "it mixes values along the batch or token axis")
