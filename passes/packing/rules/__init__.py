"""One packing rule for each ATen op the trunk may hold, like vmap's batching rules.

A rule gets the packer, the original node and the layout to write in, emits the op for packed tokens and
says where batch and token axes went. Ops tagged `torch.Tag.pointwise` share one rule; any other op without a
rule is refused by name. Adding one: a decorated function in the file of its family, and a test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.program import where
from dcconvert.passes.packing.packer import Rule, RuleFunction

RULES: dict[Any, Rule] = {}


def rule(*targets: Any, moves_only: bool = False) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule for ATen ops."""

    def register(function: RuleFunction) -> RuleFunction:
        for target in targets:
            RULES[target] = Rule(function, moves_only)
        return function

    return register


def find_rule(node: Node) -> Rule:
    """The rule of a node's op, or UnsupportedModelError naming op, module and source line."""
    from dcconvert.passes.packing.rules.pointwise import pointwise

    if node.target in RULES:
        return RULES[node.target]
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return Rule(pointwise)
    raise UnsupportedModelError(
        f"no packing rule for {where(node)}: it may mix tokens or samples; "
        "keep it out of the trunk (--head-blocks, --tail-blocks) or add a rule (passes/packing/rules)"
    )


def load_rules() -> None:
    """Import the rule families, which register themselves."""
    from dcconvert.passes.packing.rules import attention, features, pointwise, shapes  # noqa: F401


load_rules()
