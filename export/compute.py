"""Counting multiply-accumulates: of graphs on fake tensors, so that it costs neither time nor memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dcconvert.passes.carry_plan import CarryPlan
from dcconvert.passes.model import DynamicModel
from dcconvert.passes.ops import attention_flops
from dcconvert.passes.plan import Plan

GIGA = 1e9

# The CPU's fused attention kernel, which torch's own table leaves out.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


def count_macs(module: nn.Module, args: tuple[Any, ...]) -> float:
    """Multiply-accumulates of one run on inputs shaped like `args` (half of the FLOPs counted)."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.no_grad():
        module(*(fake.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    return counter.get_total_flops() / 2


def original_gmacs(model: DynamicModel, inputs: dict[str, Any]) -> float:
    """GMACs a sample of one forward pass of the original (what DiT's paper calls Gflops)."""
    args = tuple(inputs[name] for name in model.spec.inputs)
    return count_macs(model.original_graph, args) / batch_size(inputs) / GIGA


def converted_gmacs(model: DynamicModel, inputs: dict[str, Any], kept: int) -> float:
    """GMACs a sample of one step, route and denoise together, when every sample keeps `kept` tokens."""
    batch, spec = batch_size(inputs), model.spec
    route_args = tuple(inputs[name] for name in spec.route_inputs)
    plan = even_plan(model, batch, kept)
    live = dict(zip(spec.live, live_values(model, batch), strict=True))
    arrays = {name: torch.from_numpy(a) for name, a in plan.arrays().items()}
    given = {**inputs, **model.prepare(inputs), **live, **arrays, **model.new_state(batch).tensors}
    denoise_args = tuple(given[name] for name in spec.denoise_inputs)
    macs = count_macs(model.route_graph, route_args) + count_macs(model.denoise_graph, denoise_args)
    return macs / batch / GIGA


def prepare_gmacs(model: DynamicModel, inputs: dict[str, Any]) -> float:
    """GMACs a sample of what a run computes once."""
    if model.prepare_graph is None:
        return 0.0
    args = tuple(inputs[name] for name in model.spec.prepare_inputs)
    return count_macs(model.prepare_graph, args) / batch_size(inputs) / GIGA


def live_values(model: DynamicModel, batch: int) -> list[Tensor]:
    """Zeros shaped like what route hands to denoise."""
    shapes = model.spec.live_shapes
    return [torch.zeros(batch, *shape) for shape in shapes]


def even_plan(model: DynamicModel, batch: int, kept: int) -> Plan | CarryPlan:
    """A plan in which every sample keeps its first `kept` tokens: the right shapes, and nothing else."""
    keep = np.zeros((batch, model.spec.tokens), bool)
    keep[:, :kept] = True
    return model.step_planner.of_mask(keep)


def batch_size(inputs: dict[str, Any]) -> int:
    return next(int(v.shape[0]) for v in inputs.values() if isinstance(v, Tensor) and v.ndim)
