"""The numeric gate: after an exact pass the graph must still give the original's outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcconvert.passes.ir.output_gate import HALF_PRECISION, require_same
from dcconvert.passes.ir.pass_runner import GraphPass, Pass
from dcconvert.passes.ir.program import Program
from dcconvert.passes.planning.carry_plan import full_carry_plan


class NumericGate:
    """Stores the captured graph's outputs on the example inputs, and compares those of later graphs with them.

    Once the graph has plan inputs, they keep every token. Raises CheckFailedError with the name of the pass.
    """

    def __init__(self, program: Program) -> None:
        self.wanted = outputs(program)

    def __call__(self, program: Program, current: Pass | GraphPass) -> None:
        first = 0 if program.scores is None else 1  # the scores come before the model's own outputs
        halves = any(node.meta["val"].dtype == torch.float16 for node in program.state.values())
        require_same(outputs(program)[first:], self.wanted, current.name, HALF_PRECISION if halves else 0.0)


def outputs(program: Program) -> list[Any]:
    """Outputs of the program's graph with every token kept."""
    with torch.no_grad():
        return list(program.graph_module(*program.example, *full_plan(program)))


def full_plan(program: Program) -> list[Tensor]:
    """Values for the graph's plan inputs that keep everything, and empty states."""
    if not program.plan_inputs:
        return []
    stream = program.found_stream()
    batch = int(next(v.shape[0] for v in program.example if isinstance(v, Tensor) and v.ndim))
    if program.state:
        arrays = full_carry_plan(batch, stream.tokens).arrays()
    else:
        arrays = program.method.planner(stream.grid).full_plan(batch).arrays()
    dtypes = {name: node.meta["val"].dtype for name, node in program.plan_inputs.items()}
    plan = [torch.from_numpy(arrays[name]).to(program.device, dtype) for name, dtype in dtypes.items()]
    states = [node.meta["val"] for node in program.state.values()]
    shapes = ((v.shape[0], batch, *map(int, v.shape[2:])) for v in states)
    return plan + [torch.zeros(*s, dtype=v.dtype, device=program.device) for s, v in zip(shapes, states, strict=True)]
