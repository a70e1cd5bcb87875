"""Capture a module that `torch.export` can only capture for one batch size, and make the batch symbolic afterwards."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.graph_tools import fake_result, output_node, placeholders, tensor_at, where

aten = torch.ops.aten

MORE = 2  # samples that the second capture has beyond the first
FAR = 7  # and this many beyond twice the first number, for the check
SAME = 1e-4  # relative error between the graph with a symbolic batch and the one captured with more samples


def with_more_samples(value: Any, size: int, number: int = MORE) -> Any:
    """An example whose tensors with `size` samples have so many more, the same ones again."""

    def more(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == size:
            return leaf[torch.arange(size + number) % size]
        return leaf

    return pytree.tree_map(more, value)


def symbolic(
    module: nn.Module,
    captured: Callable[[Any], ExportedProgram],
    plain: Callable[[ExportedProgram], GraphModule],
    example: tuple[tuple[Any, ...], dict[str, Any]],
    size: int,
) -> tuple[ExportedProgram, GraphModule]:
    """A module captured with `size` samples, and its graph with a symbolic batch. `example`: args and kwargs.

    1. It is captured twice, with different numbers of samples. Every number that differs between the two graphs is k
       times the batch size plus a constant.
    2. These numbers are computed from the batch size, which is read from the first input.
    3. With more samples than either example has, the graph must return what the module returns.

    Raises UnsupportedModelError if the two graphs differ in anything else.
    """
    larger = with_more_samples(example, size)
    first, second = captured(example), captured(larger)
    one, two = (without_guards(plain(exported)) for exported in (first, second))
    changed = differing(one, two, size)
    give_symbolic_values(one, changed, size)
    many = with_more_samples(example, size, size + FAR)
    try:
        with torch.no_grad():
            found, wanted = pytree.tree_leaves(one(*pytree.tree_leaves(many))), module(*many[0], **many[1])
    except Exception as error:  # of any op
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"the model can only be captured for a batch of {size} (with another size: {reason})"
        ) from error
    for got, want in zip(found, pytree.tree_leaves(wanted), strict=True):
        if isinstance(want, Tensor) and want.is_floating_point():
            change = float((got - want).norm() / want.norm().clamp_min(1e-12))
            if not change <= SAME:
                raise UnsupportedModelError(
                    f"the model can only be captured for a batch of {size} (another size changes its output by "
                    f"{change:.2g})"
                )
    return first, one


def without_guards(module: GraphModule) -> GraphModule:
    """A graph without the checks of its inputs' sizes, which hold for one batch size only."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and not node.users:
            module.graph.erase_node(node)
    return module


def differing(one: GraphModule, two: GraphModule, size: int) -> dict[Node, Any]:
    """For every call whose numbers depend on the batch size: its arguments with `Scaled` in their place."""
    changed: dict[Node, Any] = {}
    for a, b in zip_longest(one.graph.nodes, two.graph.nodes):
        if a is None or b is None or (a.op, str(a.target)) != (b.op, str(b.target)):
            place = where(a or b)
            raise UnsupportedModelError(f"the model computes something else for another batch size, at {place}")
        if a.op == "get_attr":
            x, y = tensor_at(one, a.target), tensor_at(two, b.target)
            if alike_rows(x, y, size):
                changed[a] = None
            elif isinstance(x, Tensor) and (x.shape != y.shape or (x is not y and not torch.equal(x, y))):
                raise UnsupportedModelError(f"the model has a constant for a batch of {size} only: {where(a)}")
        if a.op != "call_function":
            continue
        old, spec = pytree.tree_flatten((a.args, a.kwargs))
        new, other = pytree.tree_flatten((b.args, b.kwargs))
        if spec != other:
            raise UnsupportedModelError(f"{where(a)} has other arguments for another batch size")
        leaves = [scaled(a, x, y, size) for x, y in zip(old, new, strict=True)]
        if any(isinstance(leaf, Scaled) for leaf in leaves):
            changed[a] = pytree.tree_unflatten(leaves, spec)
    return changed


def alike_rows(x: Any, y: Any, size: int) -> bool:
    """Whether two constants hold the same row once per sample."""
    if not isinstance(x, Tensor) or x.ndim == 0 or (len(x), len(y)) != (size, size + MORE):
        return False
    return torch.equal(x, x[:1].expand_as(x)) and torch.equal(y, x[:1].expand_as(y))


class Scaled:
    """The number `factor` * B + `rest`, where B is the batch size."""

    def __init__(self, factor: int, rest: int) -> None:
        self.factor, self.rest = factor, rest


def scaled(node: Node, x: Any, y: Any, size: int) -> Any:
    """An argument that may differ between two batch sizes; raises UnsupportedModelError if it is no whole multiple."""
    if not isinstance(x, int) or not isinstance(y, int) or x == y or isinstance(x, bool):
        return x
    factor, odd = divmod(y - x, MORE)
    if odd:
        raise UnsupportedModelError(f"{where(node)}: {x} becomes {y} with {MORE} more samples, which is not supported")
    return Scaled(factor, x - factor * size)


def give_symbolic_values(module: GraphModule, changed: dict[Node, Any], size: int) -> None:
    """Write the changed arguments, and give every node its fake value for a symbolic batch."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    batch = batch_values(module, mode, size)
    graph = module.graph
    source = next(n for n in placeholders(graph) if is_batched(n, size))
    last = placeholders(graph)[-1]
    for node in placeholders(graph):
        node.meta["val"] = batch(node)
    with graph.inserting_after(last):
        total = graph.call_function(aten.sym_size.int, (source, 0))
    for node in [node for node, arguments in changed.items() if arguments is None]:
        users = list(node.users)
        with graph.inserting_after(node if total < node else total):
            row = graph.call_function(aten.slice.Tensor, (node, 0, 0, 1))
        sizes: list[Any] = [total, *([-1] * (tensor_at(module, str(node.target)).ndim - 1))]
        with graph.inserting_after(row):
            rows = graph.call_function(aten.expand.default, (row, sizes))
        for user in users:
            user.replace_input_with(node, rows)
    for node, (args, kwargs) in ((node, given) for node, given in changed.items() if given is not None):
        with graph.inserting_before(node):
            node.args, node.kwargs = pytree.tree_map(lambda leaf: number(graph, total, leaf), (args, kwargs))
    for node in graph.nodes:
        if node.op == "get_attr":
            value = tensor_at(module, node.target)
            node.meta["val"] = mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value
        elif node.op == "call_function":
            try:
                node.meta["val"] = fake_result(mode, node)
            except Exception as error:  # ops raise many unrelated types
                reason = str(error).strip().splitlines()[0]
                raise UnsupportedModelError(f"{where(node)} works for a batch of {size} only: {reason}") from error
    if not isinstance(source.meta["val"].shape[0], torch.SymInt) or env.replacements:
        raise UnsupportedModelError(f"the model computes something that holds for a batch of {size} only")
    output_node(graph).meta.pop("val", None)
    module.recompile()


def number(graph: torch.fx.Graph, total: Node, leaf: Any) -> Any:
    if not isinstance(leaf, Scaled):
        return leaf
    made = total if leaf.factor == 1 else graph.call_function(operator.mul, (total, leaf.factor))
    return graph.call_function(operator.add, (made, leaf.rest)) if leaf.rest else made


def is_batched(node: Node, size: int) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size


def batch_values(module: GraphModule, mode: FakeTensorMode, size: int) -> Callable[[Node], Any]:
    """A function that gives an input its fake value, with the same symbol for the batch everywhere."""
    from torch._dynamo.source import ConstantSource

    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    marked = mode.from_tensor(torch.empty(size), symbolic_context=context, source=ConstantSource("dcconvert_batch"))

    def value(node: Node) -> Any:
        known = node.meta.get("val")
        if not isinstance(known, Tensor):
            return known
        shape = (marked.shape[0], *known.shape[1:]) if is_batched(node, size) else tuple(known.shape)
        with mode:
            return torch.empty(
                tuple(s if isinstance(s, torch.SymInt) else int(s) for s in shape),
                dtype=known.dtype,
                device=known.device,
            )

    return value
