"""Capture: a module becomes one graph of ATen ops with a symbolic batch axis."""

from __future__ import annotations

import inspect
import re
import traceback
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from dcconvert.passes.frontend.exported.aliases import aliases_in
from dcconvert.passes.frontend.exported.fixed_batch import symbolic
from dcconvert.passes.frontend.exported.regions import inline_regions
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

    The ops are those of torch's training IR, in which linear, layer_norm and attention are single ops. If torch fixes
    the batch size, it becomes symbolic afterwards (`fixed_batch.symbolic`).
    """
    example = (tuple(args), dict(kwargs or {}))
    before = attributes_of(module)
    try:
        with plain(module) as inside:
            exported = export(inside, *example)
        return program_of(exported, plain_graph(exported), example, method)
    except UnsupportedModelError as error:
        give_attributes(before)
        try:
            fixed, graph = with_fixed_batch(module, example)
        except UnsupportedModelError as other:
            give_attributes(before)
            if str(other) == str(error):
                raise error from None
            raise UnsupportedModelError(f"{error}; with a fixed batch: {other}") from error
        return program_of(fixed, graph, example, method)


def with_fixed_batch(module: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, GraphModule]:
    """The exported program of one batch size, and its graph with a symbolic one."""
    with plain(module) as inside:
        run_once(inside, *example)  # what a model stores at its first call is made of real tensors then
        return symbolic(
            inside,
            lambda given: export(inside, given[0], given[1], dynamic=False),
            plain_graph,
            example,
            batch_of(example),
        )


Attributes = list[tuple[Any, dict[str, Any], dict[str, Any]]]
RESTORED = (dict, list, OrderedDict)  # not their subclasses, which may be frozen


def attributes_of(module: nn.Module) -> Attributes:
    """What the parts of a module, and plain objects in them, hold; with copies of their lists and dictionaries."""
    parts = list(module.modules())
    plain = [value for part in parts for value in part.__dict__.values() if is_plain_object(value)]
    return [
        (one, dict(one.__dict__), {n: copy(v) for n, v in one.__dict__.items() if type(v) in RESTORED})
        for one in (*parts, *plain)
    ]


def is_plain_object(value: Any) -> bool:
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, type | nn.Module | Tensor)
        and not callable(getattr(value, "__get__", None))
    )


def give_attributes(known: Attributes) -> None:
    """Undo what a failed capture has left in a module; its lists and dictionaries stay the same objects."""
    for one, attributes, contents in known:
        for name, content in contents.items():
            held = attributes[name]
            held.clear()
            held.extend(content) if isinstance(held, list) else held.update(content)
        one.__dict__.clear()
        one.__dict__.update(attributes)


def run_once(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Call a module; raises UsageError if it fails on its example inputs."""
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except Exception as error:  # models raise any type
        raise UsageError(
            f"{type(module).__name__} fails on the example inputs: {reason_of(error)}{line_of(module, error)}"
        ) from error


def batch_of(example: Any) -> int:
    """The number of samples of an example; raises UsageError if it does not have at least two."""
    ranked = [v for v in pytree.tree_leaves(example) if isinstance(v, Tensor) and v.ndim > 0]
    if not ranked or ranked[0].shape[0] < 2:
        raise UsageError(
            "example_inputs must hold a batch of at least 2 samples, so that the batch axis can be detected"
        )
    return int(ranked[0].shape[0])


def export(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, dynamic: bool = True
) -> ExportedProgram:
    """Export `module` with a dynamic batch, or for the example's batch size only.

    Args:
        module: any module that `torch.export` accepts; it is put in eval mode.
        args, kwargs: example inputs of one call. Every tensor whose first axis equals the batch size (the
            first axis of the first tensor, at least 2) is dynamic along it.

    Raises:
        UsageError: the example inputs do not contain a batch of at least two.
        UnsupportedModelError: `torch.export` refuses the module; the message ends with its reason and the line of the
            model's code.
    """
    kwargs = dict(kwargs or {})
    module.eval()
    size = batch_of((tuple(args), kwargs))
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)

    def marked(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) and value.ndim and value.shape[0] == size else None

    try:
        named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise UsageError(f"example_inputs do not fit {type(module).__name__}.forward: {error}") from error
    shapes = {name: pytree.tree_map(marked, value) for name, value in named.items()} if dynamic else None
    try:
        with torch.no_grad():
            exported = torch.export.export(module, tuple(args), kwargs, dynamic_shapes=shapes, strict=False)
            exported = plain_ops(exported)
    except Exception as error:  # torch.export raises many unrelated types
        raise UnsupportedModelError(
            f"torch.export cannot capture {type(module).__name__}: {reason_of(error)}{line_of(module, error)}"
        ) from error
    return exported


def reason_of(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    said = str(error).strip().splitlines()
    if isinstance(error, KeyError) or not said:
        return f"{type(error).__name__} {error}".strip()
    return said[0].removesuffix(' For more information, run with TORCH_LOGS="+dynamic".')


def line_of(module: nn.Module, error: Exception) -> str:
    """The last line of a model's code that an error went through, as " (file.py:12)"; "" if it left from elsewhere."""
    files = {path for part in module.modules() if (path := file_of(type(part))) and "/torch/nn/" not in path}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def file_of(cls: type) -> str:
    try:
        return inspect.getfile(cls)
    except (TypeError, OSError):
        return ""


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
    exported = plain_ops(exported)
    return program_of(exported, plain_graph(exported), example, method)


def plain_ops(exported: ExportedProgram) -> ExportedProgram:
    """An exported program with all ops out of place, and no aliases of ops."""
    aliases = aliases_in(exported.graph)
    if not aliases and not any(writes_in_place(node) for node in exported.graph.nodes):
        return exported
    return exported.run_decompositions(aliases)


def plain_graph(exported: ExportedProgram) -> GraphModule:
    """An exported program as a graph with flat inputs and outputs."""
    root = exported.module()
    root.graph.set_codegen(CodeGen())  # flat inputs and outputs from here on
    module = GraphModule(root, root.graph)  # a plain module: same tensors, none of export's hooks
    inline_regions(module)
    return module


def program_of(exported: ExportedProgram, graph_module: GraphModule, example: Any, method: Method) -> Program:
    """The Program of an exported program and its graph; inputs whose names a converted model uses are renamed."""
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
