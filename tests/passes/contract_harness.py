"""What the tests of graph passes share: a pass that breaks the contract in every way, and must be stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.graph_tools import copied, emit, output_node, placeholders
from dcconvert.passes.ir.output_gate import OutputGate
from dcconvert.passes.ir.pass_runner import GraphPass, PassResult, run_graph_passes

FAULTS = {
    "order": "left a graph that does not lint",
    "missing": "left .* without a fake value",
    "stale": "says that .* gives .* float64",
    "numbers": "changed the model's output",
}


def broken(current: GraphPass, fault: str) -> GraphPass:
    """A pass that does its work and leaves one of FAULTS."""

    class Broken(type(current)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__.update(current.__dict__)

        def call(self, module: GraphModule) -> PassResult:
            result = super().call(module)
            calls = [node for node in module.graph.nodes if node.op == "call_function"]
            last = [node for node in calls if isinstance(node.meta["val"], Tensor)][-1]
            if fault == "order":
                last.append(placeholders(module.graph)[0])
            elif fault == "missing":
                del last.meta["val"]
            elif fault == "stale":
                last.meta["val"] = last.meta["val"].double()
            else:
                output = output_node(module.graph)
                with module.graph.inserting_before(output):
                    output.update_arg(0, tuple(doubled(module, node) for node in output.args[0]))
            return result

    return Broken()


def doubled(module: GraphModule, node: Node) -> Node:
    return emit(module.graph, torch.ops.aten.add.Tensor, (node, node))


def check_contract(
    current: GraphPass, module: GraphModule, example: Mapping[str, Any] | None = None, gate: OutputGate | None = None
) -> None:
    """A pass must come through on a copy of a graph, and be stopped with every one of FAULTS.

    One of `example` and `gate` is needed; see `run_graph_passes`.
    """
    gate = gate or OutputGate(module, example or {})
    run_graph_passes(copied(module), [current], example, gate)
    for fault, message in FAULTS.items():
        with pytest.raises(CheckFailedError, match=f"Broken {message}"):
            run_graph_passes(copied(module), [broken(current, fault)], example, gate)
