"""The packer: walks the trunk and rewrites each op for packed tokens.

A trunk value of the original has a batch axis (size B) and a token axis (size N). Packed, it has the same rank with
sizes G and L: G tiles of L tokens. A tile holds tokens of one sample only, so that per-sample values (adaLN shift,
scale, gate) are gathered once per tile and broadcast. When every sample keeps k tokens, a tile is a sample (L = k) and
nothing is padded; otherwise small tiles limit the padding. In the attention grid, the sizes are R and S. Ops are
written in the packed layout, except that ops that only move data are written in the layout that their user requests. So
attention pulls its operands' reshapes and permutes into the grid, and the two gathers happen where a value is smallest:
at the output of the linear layer before attention and at the input of the one after it.

If other tokens take part in attention (text in joint attention, always computed), values with only these tokens do not
change, [B, X, ...], and values with both are kept in two parts: the grid tokens, laid out as above, and the context.
Every op on such a value is written twice, once for each part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from dcconvert.passes.frontend.cuts import same
from dcconvert.passes.ir import ops  # noqa: F401  (registers torch.ops.dcconvert)
from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.graph_tools import where
from dcconvert.passes.ir.program import Program
from dcconvert.passes.packing.joint_attention import Joint, joins, positional, takes_apart
from dcconvert.passes.packing.values import Layout, PackedValue, Rule

aten = torch.ops.aten


class Packer:
    """State of one packing: the rewritten node of each original node, and its layout."""

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
        self.whole_keys = False  # packed queries use the unpacked keys and values of all the grid's tokens
        self.attentions = 0
        self._laid: dict[tuple[Node, Layout], PackedValue] = {}
        self._native: dict[Node, Layout] = {}
        self._expanded: dict[tuple[Any, ...], Node] = {}
        self._groups: dict[Layout, Node] = {}
        self._outside: dict[Node, Node] = {}  # values with only context
        self._joint: dict[Node, Joint] = {}
        self._grid_only: set[Node] = set()  # values with grid tokens only, computed from values with both

    def start(self, node: Node, packed: Node) -> None:
        """Declare the trunk's input and its packed form."""
        self.entry = node
        self._store(node, PackedValue(packed, 0, 1))

    def visit(self, node: Node) -> None:
        """Rewrite one trunk node; all its trunk inputs must have been visited before."""
        if not any(source in self._native for source in node.all_input_nodes):
            self.keep_outside(node, self.copied(node))
            return
        joint = next((self._joint[n] for n in node.all_input_nodes if n in self._joint), None)
        if joins(self, node) or (joint and takes_apart(self, node, joint)):
            return
        rule = self.rules(node)
        layout: Layout = "packed"
        if rule.moves_only:
            layout = self._native[self.trunk_input(node)]
        self._store(node, rule.apply(self, node, layout))
        if joint and node not in self._grid_only:
            self._joint[node] = joint
        if node in self._joint and (node, "context") not in self._laid:
            self.store_context(node, rule.apply(self, node, "context"))

    def copied(self, node: Node) -> Node:
        """A node with only context, rewritten on its rewritten inputs."""
        args, kwargs = map_arg((node.args, node.kwargs), self.outside)
        return self.again(node, *args, **kwargs)

    def outside(self, value: Node) -> Node:
        """The rewritten form of a value without grid tokens; the value itself if the trunk does not change it."""
        return self._outside.get(value, value)

    def keep_outside(self, node: Node, value: Node) -> None:
        self._outside[node] = value

    def joint(self, value: Any) -> Joint | None:
        """Where grid tokens and others are in a value that holds both."""
        return self._joint.get(value) if isinstance(value, Node) else None

    def leaves_others(self, node: Node) -> None:
        """Declare that a node computed from values with grid tokens and others holds grid tokens only."""
        self._grid_only.add(node)

    def store_joint(self, node: Node, joint: Joint, laid: PackedValue, context: Node) -> None:
        """Declare a value that holds grid tokens and others on the same axis."""
        self._joint[node] = joint
        self._store(node, laid)
        self.store_context(node, replace(laid, node=context))

    def store_context(self, node: Node, laid: PackedValue) -> None:
        self._laid[node, "context"] = replace(laid, layout="context")

    def store(self, node: Node, laid: PackedValue) -> None:
        """Declare the rewritten form of a node with only grid tokens."""
        self._store(node, laid)

    def _store(self, node: Node, laid: PackedValue) -> None:
        self._native[node] = laid.layout
        self._laid[node, laid.layout] = laid

    def in_trunk(self, value: Any) -> bool:
        return isinstance(value, Node) and value in self._native

    def trunk_input(self, node: Node) -> Node:
        """The first operand that carries tokens."""
        return next(n for n in node.all_input_nodes if n in self._native)

    def get(self, node: Node, layout: Layout) -> PackedValue:
        """A visited node's value in the requested layout, converted or rewritten if needed."""
        known = self._laid.get((node, layout))
        if known is not None:
            return known
        rule = None if layout == "packed" or node not in self._native else self._movable_rule(node)
        laid = rule.apply(self, node, layout) if rule else self._convert(self.native(node), layout)
        self._laid[node, layout] = laid
        return laid

    def native(self, node: Node) -> PackedValue:
        """A visited node's value as it was written."""
        return self._laid[node, self._native[node]]

    def moved(self, node: Node, layout: Layout) -> PackedValue:
        """A visited node's value as it was written, moved to the requested layout."""
        if (node, layout) not in self._laid:
            self._laid[node, layout] = self._convert(self.native(node), layout)
        return self._laid[node, layout]

    def _movable_rule(self, node: Node) -> Rule | None:
        """The rule of a node that only moves data (the trunk's input has none)."""
        if not any(source in self._native for source in node.all_input_nodes):
            return None
        rule = self.rules(node)
        return rule if rule.moves_only else None

    def _convert(self, laid: PackedValue, layout: Layout) -> PackedValue:
        index = self.plan_input("grid_index" if layout == "grid" else "packed_index")
        node = self.emit(torch.ops.dcconvert.gather_tokens.default, self.to_front(laid), index)
        return replace(laid, node=self.from_front(node, laid), layout=layout)

    def to_front(self, laid: PackedValue) -> Node:
        """Move batch and token axes to 0 and 1."""
        order = self._front_order(laid)
        return laid.node if order == sorted(order) else self.emit(aten.permute.default, laid.node, order)

    def from_front(self, node: Node, laid: PackedValue) -> Node:
        """Undo `to_front`."""
        order = self._front_order(laid)
        back = [order.index(axis) for axis in range(len(order))]
        return node if back == sorted(back) else self.emit(aten.permute.default, node, back)

    def _front_order(self, laid: PackedValue) -> list[int]:
        rank = laid.node.meta["val"].ndim
        return [laid.batch, laid.token, *(a for a in range(rank) if a not in (laid.batch, laid.token))]

    def outside_operand(self, value: Node, laid: PackedValue, node: Node) -> Any:
        """An operand of a pointwise op that was computed outside the trunk, made to fit packed tokens or a context.

        Constants that do not vary with position are used as they are. A per-sample value is gathered once per tile and
        broadcast over the tile's tokens. For a value that varies with position (rotary embeddings), each packed token
        gets the part of its position. Raises UnsupportedModelError if the token axis is not an axis of positions.
        """
        value = self.outside(value)
        tensor = value.meta.get("val")
        if not isinstance(tensor, Tensor):
            return value
        offset = laid.node.meta["val"].ndim - tensor.ndim
        sizes = {axis: tensor.shape[axis - offset] for axis in (laid.batch, laid.token) if axis >= offset}
        per_sample = laid.batch in sizes and same(sizes[laid.batch], self.program.batch)
        if sizes.get(laid.token, 1) != 1:
            return positional(self, value, laid, node)
        if not per_sample or laid.layout == "context":
            return value
        key = (value, laid.batch - offset)
        if key not in self._expanded:
            self._expanded[key] = self.emit(aten.index_select.default, value, key[1], self.plan_input("sample_ids"))
        return self._expanded[key]

    def remembered(self, key: tuple[Any, ...], make: Callable[[], Node]) -> Node:
        """A node that several places need, created when it is first needed."""
        if key not in self._expanded:
            self._expanded[key] = make()
        return self._expanded[key]

    def token_index(self) -> Node:
        """Flat index b*N+n of every packed token [G, L]; for a chunk, of its central token."""
        if self.carry is not None:
            return self.plan_input("token_index")
        chunks = self.plan_input("chunk_index")
        return self.remembered(("token_index",), lambda: self.emit(aten.select.int, chunks, 2, 0))

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return self.program.emit(target, args, kwargs)

    def again(self, node: Node, *args: Any, **kwargs: Any) -> Node:
        """The op of `node` on other operands."""
        if isinstance(node.target, str):
            raise self.refuse(node, "it is not a function call")
        return self.emit(node.target, *args, **kwargs)

    def plan_input(self, name: str) -> Node:
        return self.program.plan_inputs[name]

    def groups(self, layout: Layout) -> Node:
        """The size of the batch axis in a layout, as a node: tiles G, attention rows R or samples B."""
        if layout not in self._groups:
            sized = {"grid": "grid_index", "packed": "packed_index"}
            index = self.plan_input(sized[layout]) if layout in sized else self.entry
            self._groups[layout] = self.emit(aten.sym_size.int, index, 0)
        return self._groups[layout]

    def refuse(self, node: Node, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{where(node)}: {reason}")
