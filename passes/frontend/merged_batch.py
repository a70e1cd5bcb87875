"""Samples merged with another axis, as in [B*H, N, d] or [B*N, D]: taken apart, or merged later."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dcconvert.passes.ir.graph_tools import remove_dead_code
from dcconvert.passes.ir.node_args import integer, integers
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.program import Program

aten = torch.ops.aten

FEATURE_OPS = {aten.linear.default, aten.layer_norm.default, aten.rms_norm.default}  # that keep all axes but the last


class MergeLater(Pass):
    """Let ops on [B*N, D] work on [B, N, D], so that samples and tokens keep axes of their own.

    An op on features or on single elements whose operand was reshaped so is applied before the reshape. A reshape of a
    value that has merged samples, and is itself a reshape, starts from what that one started from.
    """

    optional = True
    exact = True

    def call(self, program: Program) -> PassResult:
        matches = 0
        for node in list(program.graph.nodes):
            if node.op != "call_function":
                continue
            source = node.args[0] if node.args else None
            if (
                not isinstance(source, Node)
                or source.target is not aten.reshape.default
                or not is_merged(program, source)
            ):
                continue
            if node.target is aten.reshape.default:
                node.replace_input_with(source, source.all_input_nodes[0])
                matches += 1
                if str(node.meta["val"].shape) == str(source.all_input_nodes[0].meta["val"].shape):
                    node.replace_all_uses_with(source.all_input_nodes[0])
            elif can_be_earlier(node, source):
                apply_earlier(program, node, source)
                matches += 1
        remove_dead_code(program.graph)
        return PassResult(matches)


def is_merged(program: Program, node: Node) -> bool:
    """Whether a value has samples, but no axis of samples alone."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return False
    return has_samples(program, value) and str(program.batch) not in map(str, value.shape)


def has_samples(program: Program, value: Tensor) -> bool:
    return any(divided(program, size) is not None for size in value.shape)


def divided(program: Program, size: Any) -> int | None:
    """The number k of a size k*B; None for any other size."""
    if not isinstance(size, torch.SymInt):
        return None
    quotient = size.node.expr / program.batch.node.expr
    return int(quotient) if quotient.is_Integer else None


def can_be_earlier(node: Node, reshape: Node) -> bool:
    """Whether an op on a reshaped value gives the same before the reshape, which must keep the last axis."""
    source, value = reshape.all_input_nodes[0].meta["val"], reshape.meta["val"]
    if str(source.shape[-1]) != str(value.shape[-1]) or source.ndim <= value.ndim:
        return False
    if node.target in FEATURE_OPS:
        return node.target is aten.linear.default or len(node.args[1]) == 1  # type: ignore[arg-type]
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) and tensors == [reshape]


def apply_earlier(program: Program, node: Node, reshape: Node) -> None:
    source = reshape.all_input_nodes[0]
    with program.graph.inserting_before(node):
        args = (source, *node.args[1:])
        made = program.emit(node.target, args, dict(node.kwargs))  # type: ignore[arg-type]
        sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
        again = program.emit(aten.reshape.default, (made, sizes))
    for name in ("nn_module_stack", "stack_trace"):
        made.meta[name] = again.meta[name] = node.meta.get(name)
    node.replace_all_uses_with(again)


def order_of(program: Program, node: Node, axis: int) -> tuple[int, bool] | None:
    """The number of heads H on an axis of size B*H, and whether samples come first in it; None if it is not known."""
    heads = divided(program, node.meta["val"].shape[axis])
    if not heads:
        return None
    source, place = merging(node, axis)
    if source.target is not aten.reshape.default:
        return None
    before = source.all_input_nodes[0].meta["val"].shape
    left = math.prod(1 if isinstance(s, torch.SymInt) else s for s in source.meta["val"].shape[:place])
    for position, size in enumerate(before):
        if math.prod(1 if isinstance(s, torch.SymInt) else s for s in before[:position]) >= left and size != 1:
            return heads, isinstance(size, torch.SymInt)
    return heads, True


def merging(node: Node, axis: int) -> tuple[Node, int]:
    """The op that made an axis, and the axis there, followed through moves of axes and ops on single elements."""
    while True:
        if node.target in (aten.transpose.int, aten.permute.default):
            axis = axes_of(node)[axis]
        elif not is_scaled(node):
            return node, axis
        node = node.all_input_nodes[0]


def axes_of(node: Node) -> list[int]:
    """For every axis of a transpose or permute, the axis of its operand."""
    rank = node.meta["val"].ndim
    if node.target is aten.permute.default:
        return [axis % rank for axis in integers(node, 1)]
    order = list(range(rank))
    a, b = (integer(node, place) % rank for place in (1, 2))
    order[a], order[b] = order[b], order[a]
    return order


def is_scaled(node: Node) -> bool:
    """Whether a node treats each element of one tensor alike."""
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) and len(tensors) == 1


def split_batch(program: Program, node: Node, axis: int, heads: int, samples_first: bool) -> Node:
    """A value with an axis of size B*H as one with the axes B and H, or H and B, in its place.

    If the axis was made by a reshape, that one is written anew, and the moves after it.
    """
    if node.target is aten.reshape.default:
        return reshaped(program, node.all_input_nodes[0], node, axis, heads, samples_first)
    if node.target in (aten.transpose.int, aten.permute.default):
        order = axes_of(node)
        source = split_batch(program, node.all_input_nodes[0], order[axis], heads, samples_first)
        wide: list[int] = []
        for old in order:
            wide += [old, old + 1] if old == order[axis] else [old + (old > order[axis])]
        return program.emit(aten.permute.default, (source, wide))
    if is_scaled(node):
        source = split_batch(program, node.all_input_nodes[0], axis, heads, samples_first)
        args = tuple(source if arg is node.all_input_nodes[0] else arg for arg in node.args)
        return program.emit(node.target, args, dict(node.kwargs))  # type: ignore[arg-type]
    return reshaped(program, node, node, axis, heads, samples_first)


def reshaped(program: Program, source: Node, like: Node, axis: int, heads: int, samples_first: bool) -> Node:
    sizes: list[int] = []
    for place, size in enumerate(like.meta["val"].shape):
        if place == axis:
            sizes += [-1, heads] if samples_first else [heads, -1]
        else:
            sizes.append(int(size))
    return program.emit(aten.reshape.default, (source, sizes))
