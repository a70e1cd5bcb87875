"""Counting multiply-accumulates of graphs on fake tensors, which costs neither time nor memory."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dcconvert.passes.ir.ops import attention_flops
from dcconvert.passes.planning.carry_plan import CarryPlan
from dcconvert.passes.planning.chunk_plan import Plan
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.runtime.model import DynamicModel, place_of

GIGA = 1e9

# The CPU's fused attention kernel, which torch's own table leaves out.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
ATTENTION = (*CPU_ATTENTION, torch.ops.dcconvert.padded_attention, torch.ops.dcconvert.segment_attention)


def count_macs(module: nn.Module, args: tuple[Any, ...], formulas: Mapping[Any, Any] = CPU_ATTENTION) -> float:
    """Multiply-accumulates of one run on inputs shaped like `args` (half of the FLOPs counted), wherever both are."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    device = place_of(module).device
    with fake, FlopCounterMode(display=False, custom_mapping=dict(formulas)) as counter, torch.no_grad():
        module(*(fake.from_tensor(a).to(device) if isinstance(a, Tensor) else a for a in args))
    return counter.get_total_flops() / 2


@dataclass(frozen=True)
class Traffic:
    """Bytes that a graph reads and writes in one run.

    `least`: every weight and input is read once and every output is written once; no implementation moves fewer bytes,
    unless a cache holds some. `unfused`: every op except views reads its operands and writes its results, as in an
    implementation without fusion.
    """

    least: int
    unfused: int


def count_bytes(module: nn.Module, args: tuple[Any, ...]) -> Traffic:
    """Traffic of one run on inputs shaped like `args`, wherever both are."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    device = place_of(module).device
    with fake, CountBytes() as counted, torch.no_grad():
        given = [fake.from_tensor(a).to(device) if isinstance(a, Tensor) else a for a in args]
        counted.bytes = 0
        results = module(*given)
    whole = (*module.parameters(), *module.buffers(), *given, *tree_leaves(results))
    return Traffic(sum(map(held_bytes, whole)), counted.bytes)


class CountBytes(TorchDispatchMode):
    """Adds up the bytes that ops read and write."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        written = sum(map(held_bytes, tree_leaves(results)))
        if written and not func.is_view:  # not a query about a tensor, such as its device
            self.bytes += written + sum(map(held_bytes, tree_leaves((args, kwargs))))
        return results


def held_bytes(value: Any) -> int:
    """The size of a tensor in memory, where expanded axes count once; 0 for anything else."""
    if not isinstance(value, Tensor):
        return 0
    sizes = (size for size, stride in zip(value.shape, value.stride(), strict=True) if stride)
    return math.prod(sizes) * value.element_size()


@dataclass(frozen=True)
class AttentionMemory:
    """Memory for attention in one step, in bytes of float32: the largest layer, and the sum of all layers.

    A layer has queries, keys, values and result, and the scores [rows, heads, queries, keys], which an implementation
    without tiling (torch's on most CPUs, ONNX Runtime's) stores at once. A tiled implementation needs only the others.
    """

    peak: int
    total: int

    def __or__(self, other: AttentionMemory) -> AttentionMemory:
        """The memory of two parts of a step that run one after the other."""
        return AttentionMemory(max(self.peak, other.peak), self.total + other.total)


def attention_memory(module: nn.Module, args: tuple[Any, ...]) -> AttentionMemory:
    """The attention memory of one run on inputs shaped like `args`."""
    sizes = [0]

    def note(q: Any, k: Any, *_: object, **__: object) -> int:
        rows, heads, queries, width = q
        sizes.append(4 * rows * heads * (queries * k[2] + 2 * width * (queries + k[2])))
        return 0

    count_macs(module, args, dict.fromkeys(ATTENTION, note))
    return AttentionMemory(max(sizes), sum(sizes))


def original_attention(model: DynamicModel, inputs: dict[str, Any]) -> AttentionMemory:
    """The attention memory of one forward pass of the original at the batch of `inputs`."""
    return attention_memory(model.original_graph, tuple(inputs[name] for name in model.spec.inputs))


def converted_attention(
    model: DynamicModel, inputs: dict[str, Any], counts: np.ndarray, bucket: Bucket | None
) -> AttentionMemory:
    """The attention memory of one step, route and denoise, whose samples keep `counts` [B] tokens in a bucket."""
    if model.spec.updates:
        parts = [attention_memory(*call) for call in step_calls(model, inputs, int(counts.max()))]
    else:
        keep = np.arange(model.spec.tokens) < counts[:, None]
        route, denoise = step_args(model, inputs, model.planner.of_mask(keep, bucket))
        parts = [attention_memory(model.route_graph, route), attention_memory(model.denoise_graph, denoise)]
    return reduce(operator.or_, parts)


def original_gmacs(model: DynamicModel, inputs: dict[str, Any]) -> float:
    """GMACs per sample of one forward pass of the original (DiT's paper calls them Gflops)."""
    args = tuple(inputs[name] for name in model.spec.inputs)
    return count_macs(model.original_graph, args) / batch_size(inputs) / GIGA


def converted_gmacs(model: DynamicModel, inputs: dict[str, Any], kept: int) -> float:
    """GMACs per sample of one step, route and denoise together, when every sample keeps `kept` tokens."""
    macs = sum(count_macs(graph, args) for graph, args in step_calls(model, inputs, kept))
    return macs / batch_size(inputs) / GIGA


def run_ratio(model: DynamicModel, kept: Sequence[int]) -> float:
    """Operations of the original in as many steps, divided by those of steps that keep so many tokens each."""
    inputs = model.spec.example(1)
    steps = Counter(kept)
    spent = sum(count * converted_gmacs(model, inputs, tokens) for tokens, count in steps.items())
    return original_gmacs(model, inputs) * len(kept) / spent


def converted_bytes(model: DynamicModel, inputs: dict[str, Any], kept: int) -> Traffic:
    """Traffic of one step, route and denoise together, when every sample of the batch keeps `kept` tokens."""
    parts = [count_bytes(graph, args) for graph, args in step_calls(model, inputs, kept)]
    return Traffic(sum(part.least for part in parts), sum(part.unfused for part in parts))


def step_calls(model: DynamicModel, inputs: dict[str, Any], kept: int) -> list[tuple[GraphModule, tuple[Any, ...]]]:
    """The graphs that a step calls when every sample keeps `kept` tokens, with their arguments."""
    if not model.spec.updates:
        route, denoise = step_args(model, inputs, even_plan(model, batch_size(inputs), kept))
        return [(model.route_graph, route), (model.denoise_graph, denoise)]
    if kept:
        return [(model.full_graph, tuple(model.feed("full", inputs).values()))]
    return [(model.skip_graph, tuple(model.skip_feed(inputs).values()))]


def step_args(
    model: DynamicModel, inputs: dict[str, Any], plan: Plan | CarryPlan
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of route and denoise in a step with a plan: the right shapes, with zeros for route's values."""
    batch = batch_size(inputs)
    live = dict(zip(model.spec.live, live_values(model, batch), strict=True))
    feeds = model.feed("route", inputs), model.feed("denoise", inputs, live, plan, model.empty_state(batch))
    return tuple(feeds[0].values()), tuple(feeds[1].values())


def prepare_gmacs(model: DynamicModel, inputs: dict[str, Any]) -> float:
    """GMACs per sample of the values that a run computes once."""
    if model.prepare_graph is None:
        return 0.0
    args = tuple(inputs[name] for name in model.spec.prepare_inputs)
    return count_macs(model.prepare_graph, args) / batch_size(inputs) / GIGA


def live_values(model: DynamicModel, batch: int) -> list[Tensor]:
    """Zeros with the shapes of the values that route passes to denoise."""
    shapes = model.spec.live_shapes
    return [torch.zeros(batch, *shape) for shape in shapes]


def even_plan(model: DynamicModel, batch: int, kept: int) -> Plan | CarryPlan:
    """A plan in which every sample keeps its first `kept` tokens; only its shapes are meaningful."""
    keep = np.zeros((batch, model.spec.tokens), bool)
    keep[:, :kept] = True
    return model.planner.of_mask(keep)


def batch_size(inputs: dict[str, Any]) -> int:
    return next(int(v.shape[0]) for v in inputs.values() if isinstance(v, Tensor) and v.ndim)
