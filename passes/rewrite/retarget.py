"""A converted model on another device or in another precision.

`torch.export` fixes the device and some types in a graph: where a new tensor is created, what a value is cast to, and
that two types were equal and needed no cast. `Module.to` moves only the weights, so the graphs must be adapted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dcconvert.passes.ir import ops  # noqa: F401  (registers torch.ops.dcconvert)
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.fake_values import give_leaf_values, results_like
from dcconvert.passes.ir.graph_tools import emit, fake_mode, fake_result
from dcconvert.passes.ir.pass_runner import GraphPass, PassResult, run_graph_passes
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


def retyped_spec(spec: ModelSpec, old: torch.dtype, new: torch.dtype) -> ModelSpec:
    """The spec with inputs and states changed from the old precision to the new one; timesteps do not change.

    Raises UsageError if models cannot run in precision `new`.
    """
    if new not in PRECISIONS:
        raise UsageError(f"a converted model cannot be cast to {new}: choose one of {', '.join(map(str, PRECISIONS))}")
    was, now = (str(dtype).removeprefix("torch.") for dtype in (old, new))

    def cast(item: InputSpec) -> InputSpec:
        return replace(item, dtype=now) if item.dtype == was and item.name != spec.timestep else item

    states = tuple(replace(state, dtype=now) if state.dtype == was else state for state in spec.states)
    updates = now if spec.update_dtype == was else spec.update_dtype
    return replace(spec, input_specs=tuple(map(cast, spec.input_specs)), states=states, update_dtype=updates)


class Retarget(GraphPass):
    """Adapt a graph to weights that are now on another device or in another precision.

    1. New tensors are created on the new device.
    2. Casts to a half precision that the model no longer has become casts to the new one. Casts to float32 stay,
       because the model needs their range.
    3. If an op that accepts only one type gets several, its operands are cast.
    4. Fake values are recomputed on an example of the graph's inputs, by name.
    """

    optional = True
    exact = True

    def __init__(self, example: Mapping[str, Any], old: Tensor, new: Tensor) -> None:
        """`old`, `new`: tensors with the device and type of the weights before and now."""
        self.example, self.device = example, new.device
        self.old, self.new = old.dtype, new.dtype
        self.rounds_to = None if old.dtype == new.dtype else new.dtype

    def call(self, module: GraphModule) -> PassResult:
        give_leaf_values(module, self.example)
        mode, changed = fake_mode(module.graph), 0
        casts: dict[tuple[Node, torch.dtype], Node] = {}
        for node in [n for n in module.graph.nodes if n.op == "call_function"]:
            before = (node.args, node.kwargs)
            node.args = tuple(map(self.followed, node.args))
            node.kwargs = {name: self.followed(value) for name, value in node.kwargs.items()}
            for source, dtype in self.wrong(node):
                if (source, dtype) not in casts:
                    with module.graph.inserting_after(source):
                        casts[source, dtype] = emit(module.graph, aten.to.dtype, (source, dtype))
                node.replace_input_with(source, casts[source, dtype])
            node.meta["val"] = fake_result(mode, node)
            changed += (node.args, node.kwargs) != before
        return PassResult(changed, (f"{len(casts)} casts",))

    def followed(self, value: Any) -> Any:
        """An argument of a call, adapted to the new weights."""
        if isinstance(value, torch.device):
            return self.device
        return self.new if value is self.old and self.old not in (torch.float32, self.new) else value

    def wrong(self, node: Node) -> list[tuple[Node, torch.dtype]]:
        """Operands of a node that need a cast, and the type to cast to."""
        operands = [source for source in node.all_input_nodes if is_float(source.meta["val"])]
        types = [source.meta["val"].dtype for source in operands]
        if not takes_one_type(node.target) or len(set(types)) < 2:
            return []
        # A state may be kept in a precision of its own: what is written to it follows.
        wanted = types[0] if node.target is torch.ops.dcconvert.cache_write.default else self.new
        return [(source, wanted) for source, dtype in zip(operands, types, strict=True) if dtype != wanted]


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def takes_one_type(target: Callable[..., Any] | str) -> bool:
    """Whether a call rejects operands of several floating types: all do except pointwise ops, which promote."""
    return isinstance(target, torch._ops.OpOverload) and target not in MIXING and torch.Tag.pointwise not in target.tags


def retarget(module: GraphModule, example: Mapping[str, Any], old: Tensor, new: Tensor) -> list[Any]:
    """Run Retarget on a graph; returns its results on the example, as zeros.

    Numbers are not compared: that would take two runs of the whole model, one of them before its weights move.
    """
    run_graph_passes(module, [Retarget(example, old, new)])
    return results_like(module)
