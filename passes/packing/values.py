"""Values of a rewritten trunk and how they are laid out, and what a rule is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch.fx import Node

if TYPE_CHECKING:
    from dcconvert.passes.packing.packer import Packer

Layout = Literal["packed", "grid", "context"]


@dataclass(frozen=True)
class PackedValue:
    """A rewritten trunk value: its node, which axes are batch and token, and how it is laid out.

    For an op that returns several tensors the axes are those of each tensor.
    """

    node: Node
    batch: int
    token: int
    layout: Layout = "packed"

    def at(self, node: Node, batch: int | None = None, token: int | None = None) -> PackedValue:
        """The same value after one more op; axes stay unless given."""
        batch, token = (old if new is None else new for old, new in ((self.batch, batch), (self.token, token)))
        return replace(self, node=node, batch=batch, token=token)


RuleFunction = Callable[["Packer", Node, Layout], PackedValue]


@dataclass(frozen=True)
class Rule:
    """How one ATen op is written for packed tokens. `moves_only`: it can be written in either layout."""

    apply: RuleFunction
    moves_only: bool = False
