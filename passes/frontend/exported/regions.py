"""Parts of a captured graph that run in another mode, such as without autocast, become part of the graph itself."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.graph_tools import output_node, placeholders, tensor_at, where

higher = torch.ops.higher_order


def inline_regions(module: GraphModule) -> None:
    """Copy the ops of regions without gradients and without autocast to where they are called, and those within them.

    Raises UnsupportedModelError for a region with autocast, because its ops would have other types outside it.
    """
    found = True
    while found:
        found = False
        for node in list(module.graph.nodes):
            if node.target in (higher.wrap_with_autocast, higher.wrap_with_set_grad_enabled):
                inline_region(module, node)
                found = True
    module.recompile()


def inline_region(module: GraphModule, node: Node) -> None:
    autocast = node.target is higher.wrap_with_autocast
    if autocast and node.args[2]:
        raise UnsupportedModelError(
            f"{where(node)}: a region with autocast is not supported; call the model without it"
        )
    body, *inputs = node.args[4 if autocast else 1 :]
    assert isinstance(body, Node)
    inner = tensor_at(module, str(body.target))
    copies: dict[Node, Any] = dict(zip(placeholders(inner.graph), inputs, strict=True))
    with module.graph.inserting_before(node):
        for step in inner.graph.nodes:
            if step.op == "get_attr":
                name = f"{body.target}.{step.target}"
                copies[step] = module.graph.get_attr(name)
                copies[step].meta = dict(step.meta)
            elif step.op == "call_function":
                copies[step] = module.graph.node_copy(step, copies.__getitem__)
    results = torch.fx.node.map_arg(output_node(inner.graph).args[0], copies.__getitem__)
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(results)
    module.graph.erase_node(node)
    if not body.users:
        module.graph.erase_node(body)
