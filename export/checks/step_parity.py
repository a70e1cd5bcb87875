"""Checks of a model whose steps either compute the whole trunk or forecast it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.export.checks.parity import (
    IDENTITY,
    IDENTITY_TOLERANCE,
    INVARIANCE,
    ISOLATION,
    ISOLATION_TOLERANCE,
    RUNTIME_TOLERANCE,
    Case,
    Check,
    as_arrays,
    batched_inputs,
    compare,
    drown_last,
    largest,
    relative_error,
)
from dcconvert.passes.ir.spec import UPDATE, WEIGHTS, update_name
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.step_run import StepRun

OWN_UPDATE = "a skipped step with the step's own update equals the original"


def full_then_skipped(model: DynamicModel, inputs: dict[str, Any], weights: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Outputs of a computed step, and of a skipped step with the same inputs."""
    batch = len(inputs[model.spec.image])
    run = StepRun(model, batch)
    full = run.step(inputs, np.full(batch, model.spec.tokens))[0]
    skipped = run.step(inputs, np.zeros(batch, np.int64), weights=weights)[0]
    return full, skipped


@torch.no_grad()
def check_steps(model: DynamicModel, inputs: dict[str, Any]) -> list[Check]:
    """The checks that need only torch, on example inputs of at least two samples."""
    wanted = model.call("original", model.feed("original", inputs))
    original = next(iter(wanted.values()))
    full, skipped = full_then_skipped(model, inputs, (1.0,))
    forecast = full_then_skipped(model, inputs, (0.7,))
    batched = batched_inputs(model) - {model.spec.timestep or ""}  # a run rejects one that is out of range
    shouted = {name: drown_last(value) if name in batched else value for name, value in inputs.items()}
    loud = full_then_skipped(model, shouted, (0.7,))
    apart = largest(relative_error(new[:-1], old[:-1]) for new, old in zip(loud, forecast, strict=True))
    return [
        Check(IDENTITY, relative_error(full, original), IDENTITY_TOLERANCE, "a computed step, torch"),
        Check(OWN_UPDATE, relative_error(skipped, original), IDENTITY_TOLERANCE, "torch"),
        Check(ISOLATION, apart, ISOLATION_TOLERANCE, "input and update of another set to a loud value"),
        Check(INVARIANCE, alone_error(model, inputs, forecast), IDENTITY_TOLERANCE, f"{len(full)} samples, torch"),
    ]


def alone_error(model: DynamicModel, inputs: dict[str, Any], together: tuple[Tensor, Tensor]) -> float:
    """The largest error of a sample that runs alone."""
    batched, errors = batched_inputs(model), []
    for i in range(len(together[0])):
        alone = {n: v[i : i + 1] if n in batched else v for n, v in inputs.items()}
        outputs = full_then_skipped(model, alone, (0.7,))
        errors += [relative_error(own[0], both[i]) for own, both in zip(outputs, together, strict=True)]
    return largest(errors)


def check_step_runtime(
    model: DynamicModel,
    folder: Path,
    inputs_of: Callable[[int], dict[str, Any]],
    batches: tuple[int, ...],
    tick: Callable[[str], None] = lambda _: None,
    tolerance: float = RUNTIME_TOLERANCE,
) -> list[Check]:
    """Torch against ONNX Runtime (CPU) on `full` and `skip` for every batch size; arguments as in `check_runtime`."""
    cases: dict[str, list[Case]] = {"full": [], "skip": []}
    for batch in batches:
        tick(f"batch {batch}")
        inputs = inputs_of(batch)
        weights = torch.linspace(1.5, -0.5, model.spec.updates)[:, None].expand(-1, batch).contiguous()
        with torch.no_grad():
            full = model.feed("full", inputs)
            made = model.call("full", full)
            updates = {update_name(k): made[UPDATE] * (1 - 0.1 * k) for k in range(model.spec.updates)}
            skip = model.feed("skip", {**inputs, WEIGHTS: weights, **updates})
            outputs = model.call("skip", skip)
        cases["full"].append(Case(f"full, batch {batch}", tensors_of(full), as_arrays(made)))
        cases["skip"].append(Case(f"skip, batch {batch}", tensors_of(skip), as_arrays(outputs)))
    return [check for graph, found in cases.items() for check in compare(folder / f"{graph}.onnx", found, tolerance)]


def tensors_of(feed: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inputs of a graph's file; constants of the call are in the graph."""
    return as_arrays({name: value for name, value in feed.items() if isinstance(value, Tensor)})
