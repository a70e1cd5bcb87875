"""Variants of the exported graphs: one source graph, written for different runtimes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dcconvert.export.checks.parity import Check, largest, mixed_plan, relative_error, require, second_step
from dcconvert.export.checks.step_parity import full_then_skipped
from dcconvert.export.checks.written import check_written
from dcconvert.export.onnx.export import export_onnx
from dcconvert.export.onnx.lowerings import FUSED, TENSORRT, Lowerings
from dcconvert.export.onnx.mixed_precision import in_precision
from dcconvert.export.onnx.packed_attention import with_packed_attention
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.runtime.model import DynamicModel


@dataclass(frozen=True)
class Variant:
    """How the graphs of a bundle are written for one runtime, in addition to the portable fp32 files that it always
    has.

    `error`: the allowed relative error of the output, compared with the model in fp32. `agreement`: the allowed
    difference between ONNX Runtime and torch with the same graphs, as in `check_written`; None if ONNX Runtime has no
    CPU kernels to compare. `packed`: attention runs directly on the packed tokens (`with_packed_attention`).
    """

    name: str
    precision: str
    lowerings: Lowerings
    error: float
    agreement: float | None
    packed: bool = False


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("ort-cuda", "fp16", FUSED, 1e-2, 3e-2),
        Variant("trt", "fp16", TENSORRT, 1e-2, 3e-2),
        Variant("trt-bf16", "bf16", TENSORRT, 5e-2, None),
        Variant("trt-packed", "fp16", TENSORRT, 1e-2, 3e-2, packed=True),
        Variant("trt-packed-bf16", "bf16", TENSORRT, 5e-2, None, packed=True),
    )
}


def write_variant(
    variant: Variant,
    model: DynamicModel,
    folder: Path,
    buckets: tuple[Bucket, ...],
    tick: Callable[[str], None] = lambda _: None,
) -> list[Check]:
    """Write `folder`/NAME/*.onnx and check them; returns the checks.

    Raises CheckFailedError if one fails, and UsageError for a model that cannot be written in this variant.
    """
    tick(f"{variant.name}, {variant.precision}")
    changed = in_precision(with_packed_attention(model) if variant.packed else model, variant.precision)
    checks = [check_precision(model, changed, variant)]
    require(checks)
    export_onnx(changed, folder / variant.name, variant.lowerings)
    if variant.agreement is not None:
        found = check_written(changed, folder / variant.name, model.spec.example, buckets, tick, variant.agreement)
        require(found)
        checks += [Check(f"{variant.name}: {c.name}", c.value, c.tolerance, c.detail) for c in found]
    return checks


@torch.no_grad()
def check_precision(model: DynamicModel, changed: DynamicModel, variant: Variant) -> Check:
    """The error of half precision in the output of a step whose samples keep different numbers of tokens, or of a
    computed step and the skipped one after it."""
    name = f"{variant.name}: {variant.precision} against fp32"
    inputs, tokens = model.spec.example(2), model.spec.tokens
    if model.spec.updates:
        pairs = zip(*(full_then_skipped(either, inputs, (0.7,)) for either in (changed, model)), strict=True)
        error = largest(relative_error(found, wanted) for found, wanted in pairs)
        return Check(name, error, variant.error, "a computed and a skipped step, torch")
    scores, live, state = second_step(model, inputs)
    _, live_changed, state_changed = second_step(changed, inputs)
    plan = mixed_plan(model, scores, torch.tensor([tokens // 2, tokens // 8]).numpy())
    wanted = model.denoise(inputs, live, plan, state)[0]
    found = changed.denoise(inputs, live_changed, plan, state_changed)[0]
    return Check(name, relative_error(found, wanted), variant.error, "one step on the same keep mask, torch")
