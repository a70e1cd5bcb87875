"""The packer: walks the trunk and writes each op again for packed tokens.

A trunk value of the original has a batch axis (size B) and a token axis (size N). Packed, it has the same
rank with sizes G and L: G tiles of L tokens, a tile holding tokens of one sample only, so that per-sample
values (adaLN shift, scale, gate) are gathered once a tile and broadcast. When every sample keeps k tokens,
a tile is a sample (L = k) and nothing is padded; otherwise small tiles bound the padding. In the attention
grid the sizes are R and S. Ops are written in the packed layout. Ops that only
move data exist in whichever layout they are asked for, so attention pulls its operands' reshapes and
permutes into the grid and the two gathers land where a value is smallest: at the output of the linear
layer before attention and at the input of the one after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from dcconvert.passes import ops  # noqa: F401  (registers torch.ops.dcconvert)
from dcconvert.passes.errors import UnsupportedModelError
from dcconvert.passes.infra import Program, where
from dcconvert.passes.token_stream import same

aten = torch.ops.aten

Layout = Literal["packed", "grid"]


@dataclass(frozen=True)
class Laid:
    """A rewritten trunk value: its node, which axes are batch and token, and how it is laid out.

    For an op that returns several tensors the axes are those of each tensor.
    """

    node: Node
    batch: int
    token: int
    layout: Layout = "packed"

    def at(self, node: Node, batch: int | None = None, token: int | None = None) -> Laid:
        """The same value after one more op; axes stay unless given."""
        batch, token = (old if new is None else new for old, new in ((self.batch, batch), (self.token, token)))
        return replace(self, node=node, batch=batch, token=token)


RuleFunction = Callable[["Packer", Node, Layout], Laid]


@dataclass(frozen=True)
class Rule:
    """How one ATen op is written for packed tokens. `moves_only`: it can be written in either layout."""

    apply: RuleFunction
    moves_only: bool = False


class Packer:
    """State of one packing: which original node became what, in which layout."""

    def __init__(
        self,
        program: Program,
        rules: Callable[[Node], Rule],
        tokens: int,
        packing: str,
        carry: Callable[[str, Node], Node] | None = None,
    ) -> None:
        self.program = program
        self.carry = carry  # in mode carry: packed values [G, C, L, E] -> those of all tokens [B, C, N, E]
        self.rules = rules
        self.tokens = tokens
        self.packing = packing
        self.attentions = 0
        self._laid: dict[tuple[Node, Layout], Laid] = {}
        self._native: dict[Node, Layout] = {}
        self._expanded: dict[Node, Node] = {}
        self._groups: dict[Layout, Node] = {}

    def start(self, node: Node, packed: Node) -> None:
        """Declare the trunk's input and its packed form."""
        self._store(node, Laid(packed, 0, 1))

    def visit(self, node: Node) -> None:
        """Rewrite one trunk node, all of whose trunk inputs were visited before."""
        rule = self.rules(node)
        layout: Layout = "packed"
        if rule.moves_only:
            layout = self._native[self.trunk_input(node)]
        self._store(node, rule.apply(self, node, layout))

    def _store(self, node: Node, laid: Laid) -> None:
        self._native[node] = laid.layout
        self._laid[node, laid.layout] = laid

    def in_trunk(self, value: Any) -> bool:
        return isinstance(value, Node) and value in self._native

    def trunk_input(self, node: Node) -> Node:
        """The first operand that carries tokens."""
        return next(n for n in node.all_input_nodes if n in self._native)

    def get(self, node: Node, layout: Layout) -> Laid:
        """A visited node's value in the layout asked for, converted or written again where needed."""
        known = self._laid.get((node, layout))
        if known is not None:
            return known
        rule = None if layout == "packed" or node not in self._native else self._movable_rule(node)
        laid = rule.apply(self, node, layout) if rule else self._convert(self._laid[node, self._native[node]], layout)
        self._laid[node, layout] = laid
        return laid

    def moved(self, node: Node, layout: Layout) -> Laid:
        """A visited node's value as it was written, moved to the layout asked for."""
        if (node, layout) not in self._laid:
            self._laid[node, layout] = self._convert(self._laid[node, self._native[node]], layout)
        return self._laid[node, layout]

    def _movable_rule(self, node: Node) -> Rule | None:
        """The rule of a node that only moves data (the trunk's input has none)."""
        if not any(source in self._native for source in node.all_input_nodes):
            return None
        rule = self.rules(node)
        return rule if rule.moves_only else None

    def _convert(self, laid: Laid, layout: Layout) -> Laid:
        index = self.plan_input("grid_index" if layout == "grid" else "packed_index")
        node = self.emit(torch.ops.dcconvert.regroup.default, self.to_front(laid), index)
        return replace(laid, node=self.from_front(node, laid), layout=layout)

    def to_front(self, laid: Laid) -> Node:
        """Move batch and token axes to 0 and 1."""
        order = self._front_order(laid)
        return laid.node if order == sorted(order) else self.emit(aten.permute.default, laid.node, order)

    def from_front(self, node: Node, laid: Laid) -> Node:
        """Undo `to_front`."""
        order = self._front_order(laid)
        back = [order.index(axis) for axis in range(len(order))]
        return node if back == sorted(back) else self.emit(aten.permute.default, node, back)

    def _front_order(self, laid: Laid) -> list[int]:
        rank = laid.node.meta["val"].ndim
        return [laid.batch, laid.token, *(a for a in range(rank) if a not in (laid.batch, laid.token))]

    def outside_operand(self, value: Node, laid: Laid, node: Node) -> Node:
        """An operand of a pointwise op that was computed outside the trunk, made to fit packed tokens.

        Constants that do not vary with position pass; a per-sample value is gathered once a tile and left to
        broadcast over the tile's tokens. UnsupportedModelError for a value that varies with the token's position.
        """
        tensor = value.meta.get("val")
        if not isinstance(tensor, Tensor):
            return value
        offset = laid.node.meta["val"].ndim - tensor.ndim
        sizes = {axis: tensor.shape[axis - offset] for axis in (laid.batch, laid.token) if axis >= offset}
        per_sample = laid.batch in sizes and same(sizes[laid.batch], self.program.batch)
        if sizes.get(laid.token, 1) != 1:
            raise UnsupportedModelError(
                f"{where(node)} adds a value of shape {tuple(tensor.shape)} that varies with the token's position "
                "inside the trunk; only position terms before the first block are supported "
                "(--head-blocks moves the trunk)"
            )
        if not per_sample:
            return value
        if value not in self._expanded:
            index = (laid.batch - offset, self.plan_input("sample_ids"))
            self._expanded[value] = self.emit(aten.index_select.default, value, *index)
        return self._expanded[value]

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return self.program.emit(target, args, kwargs)

    def again(self, node: Node, *args: Any, **kwargs: Any) -> Node:
        """The op of `node` on other operands."""
        if isinstance(node.target, str):
            raise self.refuse(node, "it is no call of a function")
        return self.emit(node.target, *args, **kwargs)

    def plan_input(self, name: str) -> Node:
        return self.program.plan_inputs[name]

    def groups(self, layout: Layout) -> Node:
        """The size of the batch axis in a layout, as a node: tiles G or attention rows R."""
        if layout not in self._groups:
            index = self.plan_input("grid_index" if layout == "grid" else "packed_index")
            self._groups[layout] = self.emit(aten.sym_size.int, index, 0)
        return self._groups[layout]

    def refuse(self, node: Node, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{where(node)}: {reason}")


def operand(node: Node, position: int = 0) -> Node:
    """The argument at `position`, computed by another node; UnsupportedModelError for a constant."""
    value = node.args[position]
    if not isinstance(value, Node):
        raise unexpected(node, position, "a tensor")
    return value


def integer(node: Node, position: int, default: int | None = None) -> int:
    """The argument at `position`, a plain integer, or `default` where it is left out; else UnsupportedModelError."""
    value = node.args[position] if position < len(node.args) else default
    if not isinstance(value, int):
        raise unexpected(node, position, "a plain integer")
    return value


def integers(node: Node, position: int) -> list[int]:
    """The argument at `position`, a list of plain integers; else UnsupportedModelError."""
    value = node.args[position]
    if not isinstance(value, list | tuple):
        raise unexpected(node, position, "a list of plain integers")
    found = [item for item in value if isinstance(item, int)]
    if len(found) < len(value):
        raise unexpected(node, position, "a list of plain integers")
    return found


def unexpected(node: Node, position: int, wanted: str) -> UnsupportedModelError:
    found = node.args[position] if position < len(node.args) else "nothing"
    return UnsupportedModelError(f"{where(node)}: argument {position} is {found}, where the rule needs {wanted}")
