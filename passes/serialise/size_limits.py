"""How large the values of a graph would be, by arithmetic on shapes: nothing is allocated and nothing is run."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from dcconvert.passes.ir.fake_values import described
from dcconvert.passes.ir.graph_tools import fake_result, output_node, tensor_at
from dcconvert.passes.ir.spec import WEIGHTS, InputSpec, ModelSpec
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.state import TensorState
from dcconvert.passes.serialise.interface_checks import damaged

BATCH = 2
MOST_TOKENS = 1 << 20  # of a sample: an image of 1024 x 1024 patches
MOST_WIDTH = 1 << 17
MOST_INPUT = 1 << 28  # numbers in an input of one sample
SMALL_BYTES = 1 << 28  # a value up to this size is never refused
WIDEST = 64  # numbers that an activation may have for each number of the token stream


def check_spec_sizes(spec: ModelSpec) -> None:
    """UsageError for sizes of inputs, tokens and states that no model has."""
    if not (1 <= spec.tokens <= MOST_TOKENS and 1 <= spec.width <= MOST_WIDTH):
        raise damaged(f"has {spec.tokens} tokens of width {spec.width}, which no model has")
    shapes = [(item.name, item.shape) for item in spec.input_specs]
    shapes += [(name, shape) for name, (shape, _) in spec.state_shapes(1).items()]
    for name, shape in shapes:
        plain = all(type(size) is int and size >= 0 for size in shape)
        if not plain or math.prod(shape) > MOST_INPUT * (1 if name in spec.inputs else max(1, spec.width // 1024)):
            raise damaged(f"gives {name} the shape {list(shape)}, which no model has")


def check_sizes(model: DynamicModel) -> None:
    """Give every node of a model's graphs its shape, for a small batch; UsageError for a graph that cannot be run, or
    for a value of it that is too large for the model or for this machine's memory."""
    spec, mode = model.spec, FakeTensorMode()
    with mode:
        inputs = {item.name: example(item) for item in spec.input_specs}
        state = TensorState({n: empty(s, dtype) for n, (s, dtype) in spec.state_shapes(BATCH).items()})
    limit = most_bytes(spec)

    def results(graph: str, feed: Mapping[str, Any]) -> dict[str, Any]:
        made = sized(model.graph(graph), graph, mode, feed, limit)
        return dict(zip(spec.outputs_of(graph, len(made)), made, strict=True))

    results("original", model.feed("original", inputs))
    if spec.updates:
        results("full", model.feed("full", inputs))
        with mode:
            weights = empty((spec.updates, BATCH), spec.update_dtype)
        results("skip", model.feed("skip", {**inputs, WEIGHTS: weights}, state=state))
        return
    live = results("route", model.feed("route", inputs))
    if spec.constants:
        inputs |= results("prepare", model.feed("prepare", inputs))
    results("denoise", model.feed("denoise", inputs, live, model.planner.full_plan(BATCH), state))


def example(item: InputSpec) -> Any:
    return empty((BATCH, *item.shape) if item.batched else item.shape, item.dtype) if item.dtype else item.value


def empty(shape: tuple[int, ...], dtype: str) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype))


def most_bytes(spec: ModelSpec) -> int:
    """The largest value that a graph of this model may have, in bytes."""
    stream = BATCH * spec.tokens * spec.width * torch.float64.itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(SMALL_BYTES, WIDEST * stream), memory)


def sized(module: GraphModule, name: str, mode: FakeTensorMode, feed: Mapping[str, Any], limit: int) -> list[Any]:
    """The results of a graph, without data."""
    for node in module.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = fake(mode, feed[node.name])
        elif node.op == "get_attr":
            node.meta["val"] = fake(mode, tensor_at(module, node.target))
        elif node.op == "call_function":
            try:
                with silent_torch():
                    node.meta["val"] = fake_result(mode, node)
            except Exception as error:  # ops raise many unrelated types
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                raise damaged(f"has a node {node.name} in {name} that cannot be computed ({reason})") from error
            largest = max((value.numel() * value.itemsize for value in tensors(node.meta["val"])), default=0)
            if largest > limit:
                found = described(node.meta["val"])[:160]
                raise damaged(
                    f"has a node {node.name} in {name} of {largest / 1e9:.3g} GB ({found}), and no value of such a "
                    f"model is larger than {limit / 1e9:.3g} GB"
                )
    results = [value.meta["val"] if hasattr(value, "meta") else value for value in output_node(module.graph).args[0]]
    for node in module.graph.nodes:
        node.meta.pop("val", None)  # a loaded model has none
    return results


@contextmanager
def silent_torch() -> Iterator[None]:
    """Keep torch from printing the errors that it raises as well."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def fake(mode: FakeTensorMode, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value if getattr(value, "fake_mode", None) is mode else mode.from_tensor(value)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
