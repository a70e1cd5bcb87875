"""Capture: a module becomes one graph of ATen ops with a symbolic batch axis."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from dcconvert.passes.frontend.plain_module import plain
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.ir.graph_tools import placeholders
from dcconvert.passes.ir.program import Program
from dcconvert.passes.planning.chunk_plan import PLAN_ARRAYS

if TYPE_CHECKING:
    from dcconvert.passes.methods.method import Method

MAX_BATCH = 4096

# Names that a converted model uses at its interfaces: an input with one of these names gets a suffix.
RESERVED = re.compile("|".join((r"h|live_\d+|scores", *PLAN_ARRAYS)))


def capture(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, method: Method) -> Program:
    """The Program of a module, with a dynamic batch and the given method. Arguments and errors as in `export`.

    The ops are those of torch's training IR, in which linear, layer_norm and attention are single ops.
    """
    with plain(module) as inside:
        exported = export(inside, args, kwargs)
    return program_of(exported, (tuple(args), dict(kwargs or {})), method)


def export(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> ExportedProgram:
    """Export `module` with a dynamic batch.

    Args:
        module: any module that `torch.export` accepts; it is put in eval mode.
        args, kwargs: example inputs of one call. Every tensor whose first axis equals the batch size (the
            first axis of the first tensor, at least 2) is dynamic along it.

    Raises:
         UsageError: the example inputs do not contain a batch of at least two.
        UnsupportedModelError: `torch.export` refuses the module; the message ends with its reason.
    """
    kwargs = dict(kwargs or {})
    module.eval()
    leaves = [v for v in pytree.tree_leaves((tuple(args), kwargs)) if isinstance(v, Tensor)]
    ranked = [v for v in leaves if v.ndim > 0]
    if not ranked or ranked[0].shape[0] < 2:
        raise UsageError(
            "example_inputs must hold a batch of at least 2 samples, so that the batch axis can be detected"
        )
    size = ranked[0].shape[0]
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)

    def dynamic(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) and value.ndim and value.shape[0] == size else None

    try:
        named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise UsageError(f"example_inputs do not fit {type(module).__name__}.forward: {error}") from error
    shapes = {name: pytree.tree_map(dynamic, value) for name, value in named.items()}
    try:
        with torch.no_grad():
            exported = torch.export.export(module, tuple(args), kwargs, dynamic_shapes=shapes, strict=False)
            if any(writes_in_place(node) for node in exported.graph.nodes):
                exported = exported.run_decompositions({})  # the same ops, out of place
    except Exception as error:  # torch.export raises many unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(f"torch.export cannot capture {type(module).__name__}: {reason}") from error
    return exported


def opened(exported: ExportedProgram, method: Method) -> Program:
    """The Program of a model that was already exported, with a dynamic batch and with its example inputs.

    Raises UsageError if it has no example inputs or a fixed batch size.
    """
    example = exported.example_inputs
    if example is None:
        raise UsageError("the exported program has no example inputs: save it together with its example inputs")
    shapes = [n.meta["val"].shape for n in exported.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    if not any(isinstance(size, torch.SymInt) for shape in shapes for size in shape[:1]):
        raise UsageError(
            "the exported program is for one batch size: export it with dynamic_shapes={..: {0: torch.export.Dim(..)}}"
        )
    if any(writes_in_place(node) for node in exported.graph.nodes):
        exported = exported.run_decompositions({})
    return program_of(exported, example, method)


def plain_graph(exported: ExportedProgram) -> GraphModule:
    """An exported program as a graph with flat inputs and outputs."""
    root = exported.module()
    root.graph.set_codegen(CodeGen())  # flat inputs and outputs from here on
    return GraphModule(root, root.graph)  # a plain module: same tensors, none of export's hooks


def program_of(exported: ExportedProgram, example: Any, method: Method) -> Program:
    """The Program of an exported program; inputs whose names a converted model uses are renamed."""
    graph_module = plain_graph(exported)
    for node in placeholders(graph_module.graph):
        if RESERVED.fullmatch(node.name):
            node.name = node.target = f"{node.name}_input"
    graph_module.recompile()
    first = next(n for n in placeholders(graph_module.graph) if has_batch_axis(n))
    return Program(
        graph_module=graph_module,
        batch=first.meta["val"].shape[0],
        in_spec=pytree.treespec_dumps(exported.call_spec.in_spec),
        out_spec=pytree.treespec_dumps(exported.call_spec.out_spec),
        method=method,
        example=tuple(pytree.tree_leaves(example)),
    )


def writes_in_place(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def has_batch_axis(node: torch.fx.Node) -> bool:
    """Whether an input's first axis is the symbolic batch."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 0 and isinstance(value.shape[0], torch.SymInt)
