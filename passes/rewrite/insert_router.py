"""Insert the router: every token gets a keep score at the trunk's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import Node

from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.capture import capture
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.graph_tools import give_tensor, placeholders
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.program import Program
from dcconvert.passes.modules.routers import OWN

PREFIX = "router"


class InsertRouter(Pass):
    """Add p [B, N] = router(h [B, N, D]) to the graph, ahead of the original output.

    1. The router is captured like any module and its ops are copied in after the trunk's input.
    2. Its parameters and buffers appear in the program under `router.`, or `dcconvert_router.` if the model has one.
    """

    exact = True

    def call(self, program: Program) -> PassResult:
        stream, (start, _), method = program.found_stream(), program.found_trunk(), program.chosen()
        router = program.router
        if method.router != OWN:
            router = method.router_module(stream.grid)
        elif router is None:
            raise UsageError("router 'own' is for models that have one (DC-DiT): choose another")
        name = f"dcconvert_{PREFIX}" if hasattr(program.graph_module, PREFIX) else PREFIX
        with program.graph.inserting_before(start.next):
            program.scores = inline(program, router, (start,), name)
        output = next(iter(reversed(program.graph.nodes)))
        output.args = ((program.scores, *output.args[0]),)
        return PassResult(1, (f"router {method.router} on {start.name}",))


def inline(program: Program, module: nn.Module, sources: Sequence[Node], name: str) -> Node:
    """Copy `module(*sources)` into the program's graph where its insertion point is; returns the result's node.

    The module's tensors appear in the program under `name`.
    """
    like = sources[0].meta["val"]
    values = [source.meta["val"] for source in sources]
    example = [torch.zeros(3, *map(int, v.shape[1:]), dtype=v.dtype, device=v.device) for v in values]
    inner = capture(module.to(like.device), example)
    Normalise().call(inner)
    for key, value in [*inner.graph_module.named_parameters(), *inner.graph_module.named_buffers()]:
        give_tensor(program.graph_module, f"{name}.{key}", value)
    mapping: dict[Node, Node] = dict(zip(placeholders(inner.graph), sources, strict=True))
    output = next(iter(reversed(inner.graph.nodes)))
    for node in inner.graph.nodes:
        if node.op == "get_attr":
            mapping[node] = program.graph.get_attr(f"{name}.{node.target}")
            with program.fake_mode:
                value = node.meta["val"]
                mapping[node].meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), mapping.__getitem__)
            mapping[node] = program.emit(node.target, args, kwargs)
    return mapping[output.args[0][0]]
