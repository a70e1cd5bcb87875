"""Writes states in place instead of copying them first."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from dcconvert.passes.ir import ops  # noqa: F401  (registers torch.ops.dcconvert)
from dcconvert.passes.ir.graph_tools import emit
from dcconvert.passes.ir.pass_runner import GraphPass, PassResult


class WriteInPlace(GraphPass):
    """Make a `denoise` graph of mode carry write to the states that it gets; it returns the same tensors.

    For inference in torch only: gradients need the old states, and exported graphs do not need this pass, because the
    runtime shares the buffers.
    """

    exact = True

    def call(self, module: GraphModule) -> PassResult:
        cache_write = torch.ops.dcconvert.cache_write.default
        writes = [node for node in module.graph.nodes if node.target is cache_write]
        for node in writes:
            with module.graph.inserting_before(node):
                emit(module.graph, torch.ops.dcconvert.cache_write_.default, node.args)
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        return PassResult(len(writes))
