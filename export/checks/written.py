"""Checks of a model of any method: in torch, and of the graphs that were written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dcconvert.export.checks.parity import (
    RUNTIME_TOLERANCE,
    Check,
    check_batch_invariance,
    check_identity,
    check_isolation,
    check_runtime,
    keeps_original,
)
from dcconvert.export.checks.step_parity import check_step_runtime, check_steps
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.runtime.model import DynamicModel


def check_promises(model: DynamicModel, inputs: dict[str, Any]) -> list[Check]:
    """The checks that need only torch, on example inputs of at least two samples."""
    if model.spec.updates:
        return check_steps(model, inputs)
    exact = [check_identity] if keeps_original(model) else []
    return [check(model, inputs) for check in (*exact, check_isolation, check_batch_invariance)]


def check_written(
    model: DynamicModel,
    folder: Path,
    inputs_of: Callable[[int], dict[str, Any]],
    buckets: tuple[Bucket, ...],
    tick: Callable[[str], None] = lambda _: None,
    tolerance: float = RUNTIME_TOLERANCE,
) -> list[Check]:
    """Torch against ONNX Runtime (CPU) on every graph of a folder; arguments as in `check_runtime`."""
    if model.spec.updates:
        batches = tuple(sorted({bucket.batch for bucket in buckets}))
        return check_step_runtime(model, folder, inputs_of, batches, tick, tolerance)
    return check_runtime(model, folder, inputs_of, buckets, tick, tolerance)
