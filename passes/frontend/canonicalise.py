"""Normalise the graph, so that later passes see one form of each op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.graph_tools import remove_dead_code, where
from dcconvert.passes.ir.pass_runner import GraphPass, PassResult

aten = torch.ops.aten

GUARDS = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default}
COPIES = {aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default, aten.detach_.default}
COPIES |= {aten.lift_fresh_copy.default}
VIEWS = {aten.view.default, aten._unsafe_view.default}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default}
DROPOUTS = {aten.dropout.default, aten.feature_dropout.default}


class Normalise(GraphPass):
    """Remove ops that have no effect on values, and rename aliases.

    1. Input guards and metadata assertions are removed.
    2. Inactive dropout, copies, casts to a tensor's own type and squeezes of an axis longer than one are replaced by
       their input. A copy over another value is replaced by the copied value.
    3. `view` becomes `reshape` (a removed copy may have been what made the view legal).
    4. Unused nodes are removed.
    """

    optional = True
    exact = True

    def call(self, module: GraphModule) -> PassResult:
        matches = 0
        for node in list(module.graph.nodes):
            if node.op == "call_module" or node.target in GUARDS:
                if node.users:
                    raise UnsupportedModelError(f"a submodule call was left in the captured graph: {where(node)}")
                module.graph.erase_node(node)
            elif node.target in VIEWS:
                node.target = aten.reshape.default
            elif node.target is aten.copy.default and is_like(node, node.args[1]):
                node.replace_all_uses_with(node.args[1])
                module.graph.erase_node(node)
            elif is_identity(node):
                node.replace_all_uses_with(node.all_input_nodes[0])
                module.graph.erase_node(node)
            else:
                continue
            matches += 1
        remove_dead_code(module.graph)
        for name in list(module._modules):
            if name == "_guards_fn":
                delattr(module, name)
        return PassResult(matches)

    def ensures(self, module: GraphModule) -> None:
        for node in module.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if node.op == "call_function" and schema is not None and schema.is_mutable:
                raise UnsupportedModelError(
                    f"in-place op {where(node)} cannot be rewritten; use its out-of-place form in the model"
                )


def is_like(node: Node, other: Any) -> bool:
    """Whether a node's value has the shape and type of another's."""
    one, two = node.meta.get("val"), isinstance(other, Node) and other.meta.get("val")
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return False
    return str(one.shape) == str(two.shape) and one.dtype == two.dtype


def is_identity(node: Node) -> bool:
    """Whether a node returns its first input's values unchanged."""
    if node.target in COPIES:
        return True
    if node.target in DROPOUTS:
        return node.args[2] is False
    if node.target is aten.squeeze.dim:  # has no effect on an axis longer than one, and ONNX rejects it
        return bool(node.all_input_nodes[0].meta["val"].ndim == node.meta["val"].ndim)
    if node.target in CASTS:
        before, after = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
        return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype
    return False
