"""The table of packing rules, and how to add a rule to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dcconvert.passes.packing.values import Rule, RuleFunction

RULES: dict[Any, Rule] = {}


def rule(*targets: Any, moves_only: bool = False) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule for ATen ops."""

    def register(function: RuleFunction) -> RuleFunction:
        for target in targets:
            RULES[target] = Rule(function, moves_only)
        return function

    return register
