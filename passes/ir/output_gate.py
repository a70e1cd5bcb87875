"""Check that passes that claim to be exact do not change a graph's outputs on an example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.graph_tools import placeholders
from dcconvert.passes.ir.pass_runner import Rewrite

FULL_PRECISION = 1e-5  # relative L2 error allowed in fp32 and wider
HALF_PRECISION = 2e-2
ROUNDING = {torch.float16: HALF_PRECISION, torch.bfloat16: 5e-2}  # for passes that round to these types


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding may cause in values of a type."""
    return FULL_PRECISION if dtype in (torch.float32, torch.float64) else HALF_PRECISION


def require_same(found: Sequence[Any], wanted: Sequence[Any], after: str, allowed: float = 0.0) -> None:
    """Raises CheckFailedError, naming the pass, if floating outputs differ by more than both `allowed` and rounding.

    `found` may hold more values than `wanted`; the extra ones come last.
    """
    if len(found) < len(wanted):
        raise CheckFailedError(f"{after} left {len(found)} of {len(wanted)} outputs; this is a bug in dcconvert")
    for got, want in zip(found, wanted, strict=False):
        if not (isinstance(want, Tensor) and want.is_floating_point()):
            continue
        if got.shape != want.shape:
            raise CheckFailedError(
                f"{after} gives {list(got.shape)} where the model gave {list(want.shape)}; this is a bug in dcconvert"
            )
        limit = max(allowed, tolerance(want.dtype))
        error = float((got.to(want.device) - want).double().norm() / want.double().norm().clamp_min(1e-12))
        if not error <= limit:
            raise CheckFailedError(
                f"{after} changed the model's output by {error:.2g} (at most {limit:g} is rounding) on the "
                "example inputs: they hold values that are not finite, or this is a bug in dcconvert"
            )


class OutputGate:
    """Stores a graph's outputs on an example, and compares them with its outputs after each exact pass.

    `example`: values of its inputs by name, including inputs that passes add. They are cast and moved to what the graph
    takes, and copied, because a graph may write to its inputs. `scores`: whether the first output only orders tokens. A
    pass that rounds may order near ties differently, so this output is compared only after other passes.
    """

    def __init__(self, module: GraphModule, example: Mapping[str, Any], scores: bool = False) -> None:
        self.example = example
        self.scores = scores
        self.wanted = self.outputs(module)

    def __call__(self, module: GraphModule, current: Rewrite[GraphModule]) -> None:
        first = int(self.scores and current.rounds_to is not None)
        allowed = ROUNDING.get(current.rounds_to, 0.0) if current.rounds_to else 0.0
        try:
            found = self.outputs(module)
        except RuntimeError as error:  # for example from an op that does not accept the types of its operands together
            reason = " ".join(str(error).split())[:200]
            message = f"{current.name} left a graph that does not run ({reason}); this is a bug in dcconvert"
            raise CheckFailedError(message) from error
        require_same(found[first:], self.wanted[first:], current.name, allowed)

    def outputs(self, module: GraphModule) -> list[Any]:
        given = []
        for node in placeholders(module.graph):
            value = self.example[node.name]
            like = node.meta.get("val", value)
            given.append(value.to(like.device, like.dtype, copy=True) if isinstance(value, Tensor) else value)
        with torch.no_grad():
            return list(module(*given))
