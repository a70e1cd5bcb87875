"""How passes and rules read the arguments of a node."""

from __future__ import annotations

from torch.fx import Node

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.graph_tools import where


def operand(node: Node, position: int = 0) -> Node:
    """The argument at `position`, computed by another node; raises UnsupportedModelError for a constant."""
    value = node.args[position]
    if not isinstance(value, Node):
        raise unexpected(node, position, "a tensor")
    return value


def integer(node: Node, position: int, default: int | None = None) -> int:
    """The integer at `position`, or `default` if it is left out; raises UnsupportedModelError for anything else."""
    value = node.args[position] if position < len(node.args) else None
    value = default if value is None else value
    if not isinstance(value, int):
        raise unexpected(node, position, "a plain integer")
    return value


def integers(node: Node, position: int) -> list[int]:
    """The list of integers at `position`; raises UnsupportedModelError for anything else."""
    value = node.args[position]
    if not isinstance(value, list | tuple):
        raise unexpected(node, position, "a list of plain integers")
    found = [item for item in value if isinstance(item, int)]
    if len(found) < len(value):
        raise unexpected(node, position, "a list of plain integers")
    return found


def nodes(node: Node, position: int) -> list[Node]:
    """The list of nodes at `position`; raises UnsupportedModelError for anything else."""
    value = node.args[position]
    found = [item for item in value if isinstance(item, Node)] if isinstance(value, list | tuple) else []
    if not isinstance(value, list | tuple) or len(found) < len(value):
        raise unexpected(node, position, "a list of tensors")
    return found


def unexpected(node: Node, position: int, wanted: str) -> UnsupportedModelError:
    found = node.args[position] if position < len(node.args) else "nothing"
    return UnsupportedModelError(f"{where(node)}: argument {position} is {found}, but the rule needs {wanted}")
