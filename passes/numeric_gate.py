"""The numeric gate: after an exact pass the graph must still give the original's outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.program import Program
from dcconvert.passes.planning.carry_plan import full_carry_plan

FULL_PRECISION = 1e-5  # relative L2 error allowed in fp32 and wider
HALF_PRECISION = 2e-2


class NumericGate:
    """Remembers what the captured graph gives on the example inputs, and compares later graphs with it.

    Plan inputs, once there are any, are those that keep every token. Raises CheckFailedError naming the pass.
    """

    def __init__(self, program: Program) -> None:
        self.wanted = outputs(program)

    def __call__(self, program: Program, after: str) -> None:
        first = 0 if program.scores is None else 1  # the scores come before the model's own outputs
        found = outputs(program)[first : first + len(self.wanted)]
        for got, want in zip(found, self.wanted, strict=True):
            if not (isinstance(want, Tensor) and want.is_floating_point()):
                continue
            tolerance = FULL_PRECISION if want.dtype in (torch.float32, torch.float64) else HALF_PRECISION
            if any(node.meta["val"].dtype == torch.float16 for node in program.state.values()):
                tolerance = HALF_PRECISION
            error = float((got - want).double().norm() / want.double().norm().clamp_min(1e-12))
            if not error <= tolerance:
                raise CheckFailedError(
                    f"{after} changed the model's output by {error:.2g} (at most {tolerance:g} is rounding) on the "
                    "example inputs: they hold values that are not finite, or this is a bug of dcconvert"
                )


def outputs(program: Program) -> list[Any]:
    """Outputs of the program's graph, every token kept."""
    with torch.no_grad():
        return list(program.graph_module(*program.example, *full_plan(program)))


def full_plan(program: Program) -> list[Tensor]:
    """The plan inputs the graph has, keeping everything, and empty states."""
    if not program.plan_inputs:
        return []
    stream = program.found_stream()
    batch = int(next(v.shape[0] for v in program.example if isinstance(v, Tensor) and v.ndim))
    if program.state:
        arrays = full_carry_plan(batch, stream.tokens).arrays()
    else:
        arrays = program.chosen().planner(stream.grid).full_plan(batch).arrays()
    dtypes = {name: node.meta["val"].dtype for name, node in program.plan_inputs.items()}
    plan = [torch.from_numpy(arrays[name]).to(program.device, dtype) for name, dtype in dtypes.items()]
    states = [node.meta["val"] for node in program.state.values()]
    shapes = ((v.shape[0], batch, *map(int, v.shape[2:])) for v in states)
    return plan + [torch.zeros(*s, dtype=v.dtype, device=program.device) for s, v in zip(shapes, states, strict=True)]
