"""Insert the router: every token gets a keep score at the trunk's input."""

from __future__ import annotations

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.graph_tools import output_node
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.program import Program
from dcconvert.passes.modules.routers import OWN
from dcconvert.passes.rewrite.inline import inline

PREFIX = "router"


class InsertRouter(Pass):
    """Add p [B, N] = router(h [B, N, D]) to the graph, ahead of the original output.

    1. The router is captured like any module, and its ops are inserted after the trunk's input.
    2. Its parameters and buffers appear in the program under `router.`, or `dcconvert_router.` if the model has one.
    """

    exact = True

    def call(self, program: Program) -> PassResult:
        stream, (start, _), method = program.found_stream(), program.found_trunk(), program.method
        router = program.router
        if method.router != OWN:
            router = method.router_module(stream.grid)
        elif router is None:
            raise UsageError("router 'own' needs a model with its own router (DC-DiT): choose another")
        name = f"dcconvert_{PREFIX}" if hasattr(program.graph_module, PREFIX) else PREFIX
        with program.graph.inserting_before(start.next):
            program.scores = inline(program.graph_module, router, (start,), name)
        output = output_node(program.graph)
        output.args = ((program.scores, *output.args[0]),)
        return PassResult(1, (f"router {method.router} on {start.name}",))
