"""A converted model on another device or in another precision.

`torch.export` writes the device and some types of the capture into a graph: where a new tensor is made, what a value is
cast to, and that two types were equal and needed no cast. `Module.to` moves the weights alone, so the graphs follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from dcconvert.passes.ir import ops  # noqa: F401  (registers torch.ops.dcconvert)
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.spec import InputSpec, ModelSpec

aten = torch.ops.aten
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Calls that take values of several types on purpose.
MIXING = {
    aten.to.dtype,
    aten.cat.default,
    aten.where.self,
    aten.type_as.default,
    torch.ops.dcconvert.cache_read.default,
}


def to_device(graph_module: GraphModule, device: torch.device) -> None:
    """Make the tensors that a graph creates on `device`."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            node.args = tuple(map(moved, node.args))
            node.kwargs = {name: moved(value) for name, value in node.kwargs.items()}
    graph_module.recompile()


def retyped_spec(spec: ModelSpec, old: torch.dtype, new: torch.dtype) -> ModelSpec:
    """The spec with inputs and states that were of the old precision in the new one; timesteps stay as they are.

    UsageError if `new` is no precision that models run in.
    """
    if new not in PRECISIONS:
        raise UsageError(f"a converted model cannot be cast to {new}: choose one of {', '.join(map(str, PRECISIONS))}")
    was, now = (str(dtype).removeprefix("torch.") for dtype in (old, new))

    def cast(item: InputSpec) -> InputSpec:
        return replace(item, dtype=now) if item.dtype == was and item.name != spec.timestep else item

    states = tuple(replace(state, dtype=now) if state.dtype == was else state for state in spec.states)
    return replace(spec, input_specs=tuple(map(cast, spec.input_specs)), states=states)


class Retype(Interpreter):
    """Runs a graph on fake values and casts operands where ops that take one type only now see several.

    Casts to a half precision that the model no longer has become casts to the new one; those to float32 stay, because a
    model asks for them where it needs the range.
    """

    def __init__(self, graph_module: GraphModule, old: torch.dtype, new: torch.dtype) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.old, self.new = old, new
        self.casts: list[tuple[Node, Node, torch.dtype]] = []  # user, operand, type

    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and self.old != torch.float32:
            n.args = tuple(self.new if value is self.old else value for value in n.args)
            n.kwargs = {k: self.new if value is self.old else value for k, value in n.kwargs.items()}
        for operand, dtype in self.wrong(n):
            self.casts.append((n, operand, dtype))
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if takes_one_type(target) and len(types(args)) > 1:
            wanted = args[0].dtype if target is torch.ops.dcconvert.cache_write.default else self.new
            args = torch.utils._pytree.tree_map(lambda v: v.to(wanted) if is_float(v) else v, args)
        return super().call_function(target, args, kwargs)

    def wrong(self, node: Node) -> Iterator[tuple[Node, torch.dtype]]:
        """Operands of a node that need a cast, and to what."""
        if node.op != "call_function" or not takes_one_type(node.target):
            return
        operands = [n for n in node.all_input_nodes if is_float(self.env[n])]
        if len({self.env[n].dtype for n in operands}) > 1:
            # A state may be kept in a precision of its own: what is written to it follows.
            wanted = self.env[operands[0]].dtype if node.target is torch.ops.dcconvert.cache_write.default else self.new
            yield from ((n, wanted) for n in operands if self.env[n].dtype != wanted)

    def finish(self) -> None:
        """Write the casts into the graph."""
        known: dict[tuple[Node, torch.dtype], Node] = {}
        for user, operand, dtype in self.casts:
            if (operand, dtype) not in known:
                with self.graph.inserting_after(operand):
                    known[operand, dtype] = self.graph.call_function(aten.to.dtype, (operand, dtype))
            user.replace_input_with(operand, known[operand, dtype])
        self.graph.lint()


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def types(args: Sequence[Any]) -> set[torch.dtype]:
    """Floating types among a call's operands."""
    return {value.dtype for value in torch.utils._pytree.tree_leaves(args) if is_float(value)}


def takes_one_type(target: Callable[..., Any] | str) -> bool:
    """Whether a call refuses operands of several floating types: all do but pointwise ones, which promote."""
    return isinstance(target, torch._ops.OpOverload) and target not in MIXING and torch.Tag.pointwise not in target.tags


def retype(graph_module: GraphModule, args: Sequence[Any], old: torch.dtype, new: torch.dtype) -> list[Any]:
    """Rewrite a graph whose weights were cast from `old` to `new`; its results on fake values shaped like `args`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    retyping = Retype(graph_module, old, new)
    with mode, torch.no_grad():
        found = retyping.run(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    retyping.finish()
    graph_module.recompile()
    return [torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v for v in found]


def in_place(graph_module: GraphModule) -> None:
    """Let a `denoise` graph of mode carry write to the states it is given instead of copying them first.

    What it returns are the same tensors. For inference in torch: gradients need the states as they were, and exported
    graphs get the same from the runtime, which shares the buffers.
    """
    cache_write = torch.ops.dcconvert.cache_write
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target is cache_write.default:
            with graph_module.graph.inserting_before(node):
                graph_module.graph.call_function(torch.ops.dcconvert.cache_write_.default, node.args)
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.graph.lint()
    graph_module.recompile()
