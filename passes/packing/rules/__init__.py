"""One packing rule for each ATen op the trunk may hold, like vmap's batching rules.

A rule gets the packer, the original node and the layout to write in, emits the op for packed tokens and
says where batch and token axes went. Ops tagged `torch.Tag.pointwise` share one rule; any other op without a
rule is refused by name. To add one, write a decorated function in the file of its family, and a test.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.graph_tools import where
from dcconvert.passes.packing.rules import attention, features, shapes  # noqa: F401  (their rules register themselves)
from dcconvert.passes.packing.rules.pointwise import pointwise
from dcconvert.passes.packing.rules.registry import RULES
from dcconvert.passes.packing.values import Rule


def find_rule(node: Node) -> Rule:
    """The rule of a node's op; raises UnsupportedModelError, naming op, module and source line, if there is none."""
    if node.target in RULES:
        return RULES[node.target]
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return Rule(pointwise)
    raise UnsupportedModelError(
        f"no packing rule for {where(node)}: it may mix tokens or samples; "
        "keep it out of the trunk (--head-blocks, --tail-blocks) or add a rule (passes/packing/rules)"
    )
