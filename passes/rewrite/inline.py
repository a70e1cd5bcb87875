"""Copy a module into a graph: routers, adapters and new layers are written as modules and inlined as ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import GraphModule, Node

from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.capture import export, plain_graph
from dcconvert.passes.ir.graph_tools import attributes, emit, give_tensor, output_node, placeholders, read_tensor
from dcconvert.passes.ir.pass_runner import run_graph_passes


def inline(target: GraphModule, module: nn.Module, sources: Sequence[Node], name: str) -> Node:
    """Copy `module(*sources)` to the graph's insertion point and return the result's node.

    The module's tensors appear in `target` under `name`. Errors as in `export`.
    """
    values = [source.meta["val"] for source in sources]
    example = [torch.zeros(3, *map(int, v.shape[1:]), dtype=v.dtype, device=v.device) for v in values]
    inner = plain_graph(export(module.to(values[0].device), example))
    run_graph_passes(inner, (Normalise(),))
    for key, value in attributes(inner).items():
        give_tensor(target, f"{name}.{key}", value)
    copies: dict[Node, Node] = dict(zip(placeholders(inner.graph), sources, strict=True))
    for node in inner.graph.nodes:
        if node.op == "get_attr":
            copies[node] = read_tensor(target, f"{name}.{node.target}")
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = emit(target.graph, node.target, args, kwargs)
    return copies[output_node(inner.graph).args[0][0]]
