"""Ops that treat every element alike: one rule for all of them."""

from __future__ import annotations

from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from dcconvert.passes.frontend.canonicalise import CASTS
from dcconvert.passes.packing.packer import Packer
from dcconvert.passes.packing.rules.registry import rule
from dcconvert.passes.packing.values import Layout, PackedValue


@rule(*CASTS)  # elementwise, but without the tag
def pointwise(packer: Packer, node: Node, layout: Layout) -> PackedValue:
    """Token operands are packed, per-sample and positional ones are gathered per token, and constants stay as they
    are."""
    first = packer.get(packer.trunk_input(node), layout)
    rank = node.meta["val"].ndim
    shift = rank - first.node.meta["val"].ndim  # broadcasting may add leading axes
    if shift:
        raise packer.refuse(node, "broadcasts a token value to a higher rank")

    def operand(value: Node) -> Any:
        if not packer.in_trunk(value):
            return packer.outside_operand(value, first, node)
        laid = packer.get(value, layout)
        if (laid.batch, laid.token) != (first.batch, first.token):
            raise packer.refuse(node, "its operands have batch and token on different axes")
        return laid.node

    return first.at(packer.again(node, *map_arg(node.args, operand), **map_arg(node.kwargs, operand)))
