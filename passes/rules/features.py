"""Ops that mix the features of a token and nothing else."""

from __future__ import annotations

import torch
from torch.fx import Node

from dcconvert.passes.packing import Laid, Layout, Packer, integer, integers, operand
from dcconvert.passes.rules import rule

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(packer: Packer, node: Node, layout: Layout) -> Laid:
    """linear(x [..., D], weight, bias): packed tokens against the same weights."""
    x = packer.get(operand(node), "packed")
    if any(packer.in_trunk(parameter) for parameter in node.args[1:]):
        raise packer.refuse(node, "its weight or bias depends on the tokens")
    last_axis_is_features(packer, node, x, 1)
    return x.at(packer.again(node, x.node, *node.args[1:]))


@rule(aten.layer_norm.default, aten.rms_norm.default)
def normalisation(packer: Packer, node: Node, layout: Layout) -> Laid:
    """layer_norm / rms_norm over trailing feature axes."""
    x = packer.get(operand(node), "packed")
    last_axis_is_features(packer, node, x, len(integers(node, 1)))
    return x.at(packer.again(node, x.node, *node.args[1:], **node.kwargs))


@rule(aten.softmax.int)
def softmax(packer: Packer, node: Node, layout: Layout) -> Laid:
    """Softmax over a feature axis (one over tokens would be attention by hand, which has no rule)."""
    x = packer.get(operand(node), "packed")
    if integer(node, 1) % node.meta["val"].ndim in (x.batch, x.token):
        raise packer.refuse(node, "it normalises over tokens or samples")
    return x.at(packer.again(node, x.node, *node.args[1:], **node.kwargs))


def last_axis_is_features(packer: Packer, node: Node, x: Laid, axes: int) -> None:
    if max(x.batch, x.token) >= x.node.meta["val"].ndim - axes:
        raise packer.refuse(node, "it mixes values along the batch or token axis")
