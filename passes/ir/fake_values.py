"""Fake values of a graph: the result of every node as a tensor with a shape, a type and a device, but no data.

They are in `node.meta["val"]`. Capture creates them and bundles do not store them. If the weights are moved or cast,
they are out of date.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.graph_tools import fake_mode, fake_result, output_node, tensor_at


def give_fake_values(module: GraphModule, example: Mapping[str, Any]) -> None:
    """Give every node its fake value for an example: the values of the graph's inputs (and maybe others), by name.

    Raises KeyError if an input is missing, and the op's error if the example does not fit the graph.
    """
    give_leaf_values(module, example)
    renew_fake_values(module)


def give_leaf_values(module: GraphModule, example: Mapping[str, Any]) -> None:
    """Give inputs the fake values of an example, and weights those of the module's tensors."""
    mode = FakeTensorMode()
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            value = example[node.name] if node.op == "placeholder" else tensor_at(module, node.target)
            node.meta["val"] = mode.from_tensor(value) if isinstance(value, Tensor) else value


def renew_fake_values(module: GraphModule) -> None:
    """Recompute the fake value of every call from those of its operands."""
    mode = fake_mode(module.graph)
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.meta["val"] = fake_result(mode, node)


def results_like(module: GraphModule) -> list[Any]:
    """A graph's outputs, with zeros instead of fake values."""
    values = [node.meta["val"] if isinstance(node, Node) else node for node in output_node(module.graph).args[0]]
    return [torch.zeros(v.shape, dtype=v.dtype, device=v.device) if isinstance(v, Tensor) else v for v in values]


def check_fake_values(module: GraphModule, after: str) -> None:
    """Raises CheckFailedError with the name of the pass if a fake value does not match the call or the weight."""
    mode = fake_mode(module.graph)
    for node in module.graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        known = node.meta["val"]
        try:
            value = fake_result(mode, node) if node.op == "call_function" else tensor_at(module, node.target)
        except Exception as error:  # ops raise many unrelated types
            reason = " ".join(str(error).split())[:200]
            message = f"{after} left {node.name}, which cannot be called ({reason}); this is a bug in dcconvert"
            raise CheckFailedError(message) from error
        if described(value) != described(known):
            raise CheckFailedError(
                f"{after} says that {node.name} gives {described(known)}, but it gives {described(value)}; "
                "this is a bug in dcconvert"
            )


def described(value: Any) -> str:
    """Shape, type and device of a tensor, or of each of several tensors; the representation of any other value."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    if isinstance(value, list | tuple):
        return ", ".join(map(described, value))
    return str(value)
