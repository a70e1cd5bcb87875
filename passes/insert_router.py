"""Insert the router: every token gets a keep score at the trunk's input."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node

from dcconvert.passes.errors import UsageError
from dcconvert.passes.infra import Pass, PassResult, Program, owner_of, placeholders
from dcconvert.passes.normalise import Normalise
from dcconvert.passes.routers import CHUNK_ROUTERS, ROUTERS, make_router

PREFIX = "router"


class InsertRouter(Pass):
    """Add p [B, N] = router(h [B, N, D]) to the graph, ahead of the original output.

    1. The router is captured like any module and its ops are copied in after the trunk's input.
    2. Its parameters and buffers appear in the program under `router.`, or `dcconvert_router.` if the model has one.
    """

    exact = True

    def requires(self, program: Program) -> None:
        known = ROUTERS if program.options.mode == "carry" else CHUNK_ROUTERS
        if program.options.router not in known:
            raise UsageError(
                f"mode {program.options.mode} has no router '{program.options.router}': "
                f"choose one of {', '.join(known)}"
            )

    def call(self, program: Program) -> PassResult:
        stream, (start, _) = program.found_stream(), program.found_trunk()
        router = make_router(program.options.router, stream.grid, program.options.seed)
        program.scores = inline(program, router, start)
        output = next(iter(reversed(program.graph.nodes)))
        output.args = ((program.scores, *output.args[0]),)
        return PassResult(1, (f"router {program.options.router} on {start.name}",))


def inline(program: Program, module: nn.Module, source: Node) -> Node:
    """Copy `module(source)` into the program's graph after `source`; returns the result's node."""
    from dcconvert.passes.capture import capture

    shape = source.meta["val"].shape
    like = source.meta["val"]
    example = torch.zeros(3, *(int(size) for size in shape[1:]), dtype=like.dtype, device=like.device)
    inner = capture(module.to(like.device), (example,))
    Normalise().call(inner)
    prefix = f"dcconvert_{PREFIX}" if hasattr(program.graph_module, PREFIX) else PREFIX
    program.graph_module.add_submodule(prefix, state_holder(inner.graph_module))
    mapping: dict[Node, Node] = {placeholders(inner.graph)[0]: source}
    output = next(iter(reversed(inner.graph.nodes)))
    with program.graph.inserting_after(source):
        anchor = program.graph.call_function(torch.ops.aten.alias.default, (source,))
    with program.graph.inserting_before(anchor):
        for node in inner.graph.nodes:
            if node.op == "get_attr":
                mapping[node] = program.graph.get_attr(f"{prefix}.{node.target}")
                with program.fake_mode:
                    value = node.meta["val"]
                    mapping[node].meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
            elif node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), mapping.__getitem__)
                mapping[node] = program.emit(node.target, args, kwargs)
    program.graph.erase_node(anchor)
    return mapping[output.args[0][0]]


def state_holder(graph_module: GraphModule) -> nn.Module:
    """The captured module's parameters and buffers without its graph."""
    holder = nn.Module()
    for name, value in graph_module.state_dict().items():
        target, leaf = owner_of(holder, name)
        target.register_buffer(leaf, value)
    return holder
