"""Attention: the one op of a trunk that mixes tokens; it runs in the grid layout."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch.fx import Node

from dcconvert.passes.frontend.cuts import same
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.node_args import operand
from dcconvert.passes.packing.joint_attention import Joint
from dcconvert.passes.packing.packer import Packer
from dcconvert.passes.packing.rules.registry import rule
from dcconvert.passes.packing.values import Layout, PackedValue

aten = torch.ops.aten

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@rule(aten.scaled_dot_product_attention.default)
def attention(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """Self-attention over each sample's kept tokens, or cross-attention from them to per-sample keys."""
    given: dict[str, Any] = dict(zip(ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    if given.get("dropout_p") or given.get("is_causal") or given.get("enable_gqa"):
        raise packer.refuse(node, "attention with dropout, a causal mask or grouped queries is not supported")
    tokenwise = [packer.in_trunk(given[name]) for name in ("key", "value")]
    if packer.joint(given["query"]) and not any(tokenwise):
        return joint_cross_attention(packer, node, given)
    if any(packer.joint(given[name]) for name in ARGUMENTS[:3]):
        return joint_attention(packer, node, given)
    layout = "packed" if packer.packing == "varlen" and all(tokenwise) else "grid"
    # Carried values are taken where they were computed, so that only the queries move to the rows, not all three.
    q = packer.moved(given["query"], "grid") if packer.carry else packer.get(given["query"], layout)
    if (q.batch, q.token, q.node.meta["val"].ndim) != (0, 2, 4):
        raise packer.refuse(node, "queries must be laid out [B, H, N, d]")
    scale = scale_of(given)
    packer.attentions += 1
    if all(tokenwise) and packer.whole_keys:
        return whole_attention(packer, node, given, q, scale)
    if all(tokenwise):
        return self_attention(packer, node, given, q, scale)
    if any(tokenwise):
        raise packer.refuse(node, "keys and values must both come from the tokens or both from outside")
    return cross_attention(packer, node, given, q, scale)


def scale_of(given: dict[str, Any]) -> float:
    return float(given.get("scale") or 1 / math.sqrt(int(given["query"].meta["val"].shape[-1])))


def joint_attention(packer: Packer, node: Node, given: dict[str, Any]) -> PackedValue:
    """Attention to the grid tokens and the other tokens of a sample, from all of them or from those of the grid only.

    The others come first in a row.
    """
    joint = packer.joint(given["key"])
    alone = packer.in_trunk(given["query"]) and packer.joint(given["query"]) is None
    if joint is None or packer.joint(given["value"]) != joint or (packer.joint(given["query"]) != joint and not alone):
        raise packer.refuse(node, "queries, keys and values must hold the same tokens beside the grid in one order")
    mask = checked_mask(packer, node, given.get("attn_mask"))
    if packer.packing == "bins":
        raise UsageError("this model has joint attention, which needs one sample per row: use packing='rows'")
    q = packer.moved(given["query"], "grid") if packer.carry else packer.get(given["query"], "grid")
    carried = packer.carry and [packed_heads(packer, node, given[name], q) for name in ("key", "value")]
    layouts = [q] if packer.carry else [q, *(packer.get(given[name], "grid") for name in ARGUMENTS[1:3])]
    if any((x.batch, x.token, x.node.meta["val"].ndim) != (0, 2, 4) for x in layouts):
        raise packer.refuse(node, "queries, keys and values must be laid out [B, H, N, d]")
    grids = [x.node for x in layouts]
    if packer.carry and carried:
        grids += [
            packer.carry(f"{name}_{packer.attentions}", packed)
            for name, packed in zip(("key", "value"), carried, strict=True)
        ]
    packer.attentions += 1
    contexts = [packer.get(given[name], "context").node for name in ARGUMENTS[alone:3]]
    rows = [packer.emit(aten.cat.default, pair, 2) for pair in zip(contexts, grids[alone:], strict=True)]
    rows = [q.node, *rows] if alone else rows
    if packer.carry or mask is not None:
        keys = None if mask is None else key_mask(packer, mask, joint)
        out = packer.emit(aten.scaled_dot_product_attention.default, *rows, keys, scale=scale_of(given))
    else:
        lengths = packer.plan_input("row_lengths")
        longer = packer.remembered(
            ("lengths", joint.context), lambda: packer.emit(aten.add.Tensor, lengths, joint.context)
        )
        out = packer.emit(torch.ops.dcconvert.padded_attention.default, *rows, longer, scale_of(given))
    if alone:
        packer.leaves_others(node)
        return q.at(out)
    packer.store_context(node, q.at(packer.emit(aten.slice.Tensor, out, 2, 0, joint.context)))
    return q.at(packer.emit(aten.slice.Tensor, out, 2, joint.context, sys.maxsize))


def joint_cross_attention(packer: Packer, node: Node, given: dict[str, Any]) -> PackedValue:
    """Cross-attention from the grid tokens and from the others, to keys that are no tokens of the stream."""
    q = packer.moved(given["query"], "grid") if packer.carry else packer.get(given["query"], "grid")
    others = packer.get(given["query"], "context")
    if any((x.batch, x.token, x.node.meta["val"].ndim) != (0, 2, 4) for x in (q, others)):
        raise packer.refuse(node, "queries must be laid out [B, H, N, d]")
    packer.attentions += 1
    scale = scale_of(given)
    packer.store_context(node, cross_attention(packer, node, given, others, scale))
    return cross_attention(packer, node, given, q, scale)


def checked_mask(packer: Packer, node: Node, mask: Node | None) -> Node | None:
    """A mask of keys [B, 1, 1, N], boolean or added to the scores; raises UnsupportedModelError for any other."""
    if mask is None:
        return None
    mask = unexpanded(mask)
    shape = mask.meta["val"].shape
    if packer.in_trunk(mask) or tuple(shape[1:-1]) != (1, 1) or not same(shape[0], packer.program.batch):
        raise packer.refuse(node, f"only key masks [B, 1, 1, N] are supported, and its mask is {list(shape)}")
    return packer.outside(mask)


def unexpanded(mask: Node) -> Node:
    """A mask of keys that was expanded for all heads and queries, as it was before."""
    while mask.target is aten.expand.default and tuple(operand(mask).meta["val"].shape[1:-1]) == (1, 1):
        mask = operand(mask)
    return mask


def key_mask(packer: Packer, mask: Node, joint: Joint | None) -> Node:
    """A mask [B, 1, 1, N] of grid tokens and others, in the order of the rows: the others first, then slots or N."""

    def made() -> Node:
        def part(begin: int, count: int) -> Node:
            return packer.emit(aten.slice.Tensor, mask, 3, begin, begin + count)

        grid = part(joint.start, packer.tokens) if joint else mask
        if packer.carry is None:
            flat = packer.emit(aten.reshape.default, grid, [-1, packer.tokens])
            packed = packer.emit(torch.ops.dcconvert.gather_tokens.default, flat, packer.token_index())
            slots = packer.emit(torch.ops.dcconvert.gather_tokens.default, packed, packer.plan_input("grid_index"))
            lengths = packer.emit(aten.unsqueeze.default, packer.plan_input("row_lengths"), 1)
            longest = packer.emit(aten.sym_size.int, packer.plan_input("grid_index"), 1)
            places = packer.emit(aten.arange.default, longest, device=packer.program.device)
            if mask.meta["val"].dtype == torch.bool:
                used = packer.emit(aten.lt.Tensor, places, lengths)
                kept = packer.emit(aten.logical_and.default, slots, used)
            else:
                unused = packer.emit(aten.ge.Tensor, places, lengths)
                kept = packer.emit(aten.masked_fill.Scalar, slots, unused, -math.inf)
            grid = packer.emit(aten.unsqueeze.default, packer.emit(aten.unsqueeze.default, kept, 1), 1)
        if joint is None:
            return grid
        others = part(0 if joint.start else packer.tokens, joint.context)
        return packer.emit(aten.cat.default, [others, grid], 3)

    return packer.remembered((mask, joint), made)


def packed_heads(packer: Packer, node: Node, value: Node, q: PackedValue) -> Node:
    """Keys or values of the packed tokens, with the axes of the queries."""
    packed = packer.get(value, "packed")
    if (packed.batch, packed.token) != (q.batch, q.token):
        raise packer.refuse(node, "keys and values must be laid out [B, H, N, d]")
    return packed.node


def self_attention(packer: Packer, node: Node, given: dict[str, Any], q: PackedValue, scale: float) -> PackedValue:
    mask = checked_mask(packer, node, given.get("attn_mask"))
    if packer.carry is not None:
        return carried_attention(packer, node, given, q, scale, mask)
    k, v = (packer.get(given[name], q.layout) for name in ("key", "value"))
    if any((x.batch, x.token) != (q.batch, q.token) for x in (k, v)):
        raise packer.refuse(node, "keys and values must be laid out [B, H, N, d]")
    if mask is not None:
        if packer.packing != "rows":
            raise UsageError("this model masks keys, which needs one sample per row: use packing='rows'")
        operands = (q.node, k.node, v.node, key_mask(packer, mask, None))
        return q.at(packer.emit(aten.scaled_dot_product_attention.default, *operands, scale=scale))
    if packer.packing == "varlen":
        return varlen_attention(packer, q, k, v, scale)
    if packer.packing == "rows":
        op, separator = torch.ops.dcconvert.padded_attention.default, packer.plan_input("row_lengths")
    else:
        op, separator = torch.ops.dcconvert.segment_attention.default, packer.plan_input("segment_ids")
    return q.at(packer.emit(op, q.node, k.node, v.node, separator, scale))


def whole_attention(packer: Packer, node: Node, given: dict[str, Any], q: PackedValue, scale: float) -> PackedValue:
    """Packed queries against the keys and values of all tokens of their sample, which are not moved."""
    if packer.packing != "rows" or given.get("attn_mask") is not None:
        raise packer.refuse(node, "attention to the whole grid needs one sample per row (packing='rows') and no mask")
    operands = (q.node, given["key"], given["value"], None)
    return q.at(packer.emit(aten.scaled_dot_product_attention.default, *operands, scale=scale))


def varlen_attention(packer: Packer, q: PackedValue, k: PackedValue, v: PackedValue, scale: float) -> PackedValue:
    """Attention over the packed axis as it is, tokens before heads; rows are not laid out at all."""
    tokens_first = [packer.emit(aten.transpose.int, x.node, 1, 2) for x in (q, k, v)]
    longest = packer.emit(aten.sym_size.int, packer.plan_input("grid_index"), 1)
    bounds = (packer.plan_input("cu_seqlens"), longest, scale)
    out = packer.emit(torch.ops.dcconvert.varlen_attention.default, *tokens_first, *bounds)
    return q.at(packer.emit(aten.transpose.int, out, 1, 2))


def carried_attention(
    packer: Packer, node: Node, given: dict[str, Any], q: PackedValue, scale: float, mask: Node | None
) -> PackedValue:
    """Kept queries against the keys of all N tokens of their sample, fresh or carried over from earlier steps."""
    assert packer.carry is not None
    everywhere = []
    for name in ("key", "value"):
        packed = packed_heads(packer, node, given[name], q)
        everywhere.append(packer.carry(f"{name}_{packer.attentions - 1}", packed))
    operands = (q.node, *everywhere, None if mask is None else key_mask(packer, mask, None))
    return q.at(packer.emit(aten.scaled_dot_product_attention.default, *operands, scale=scale))


def cross_attention(packer: Packer, node: Node, given: dict[str, Any], q: PackedValue, scale: float) -> PackedValue:
    """Queries of row r against the keys of sample r; the results of pad queries are never read."""
    if packer.packing == "bins":
        raise UsageError("this model has cross-attention, which needs one sample per row: use packing='rows'")
    mask = given.get("attn_mask")
    mask = unexpanded(mask) if isinstance(mask, Node) else mask
    if isinstance(mask, Node) and mask.meta["val"].ndim > 1 and mask.meta["val"].shape[-2] != 1:
        raise packer.refuse(node, "its mask depends on the token's position")
    key, value = (packer.outside(given[name]) for name in ("key", "value"))
    operands = (q.node, key, value, mask)
    return q.at(packer.emit(aten.scaled_dot_product_attention.default, *operands, scale=scale))
