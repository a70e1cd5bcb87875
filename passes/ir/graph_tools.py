"""Small tools for torch.fx graphs: finding, naming and printing nodes, and giving a module its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node

from dcconvert.passes.ir.errors import UnsupportedModelError


def readable(module: GraphModule) -> str:
    """One line per node: name, shape, op, arguments, source location."""
    lines = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        shape = tuple(value.shape) if isinstance(value, Tensor) else ""
        args = ", ".join(map(str, node.args)) + "".join(f", {k}={v}" for k, v in node.kwargs.items())
        lines.append(f"{node.name} {shape} = {node.op}[{node.target}]({args})  # {module_path(node)}")
    return "\n".join(lines) + "\n"


def remove_dead_code(graph: torch.fx.Graph) -> None:
    """Drop calls whose results nothing uses (torch.fx itself keeps attention because of its dropout)."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def placeholders(graph: torch.fx.Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def output_node(graph: Graph) -> Any:
    """The last node, whose only argument is the tuple of the graph's outputs."""
    return next(iter(reversed(graph.nodes)))


def copied(module: GraphModule, name: str = "") -> GraphModule:
    """A copy of a graph with the same tensors, except those that it does not read. `name`: the name of its class."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return GraphModule(module, graph, name or module._get_name())


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The mode that the fake values of a graph's inputs belong to."""
    return next(n.meta["val"].fake_mode for n in placeholders(graph) if isinstance(n.meta.get("val"), FakeTensor))


def fake_result(mode: FakeTensorMode, node: Node) -> Any:
    """Run a node on the fake values of its arguments."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with enable_python_dispatcher(), mode, torch.no_grad():  # some ops accept symbolic sizes only this way
        return node.target(*args, **kwargs)  # type: ignore[operator]


def emit(graph: Graph, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
    """Insert a call at the graph's insertion point, with its fake value computed."""
    node = graph.call_function(target, args, kwargs or {})
    node.meta["val"] = fake_result(fake_mode(graph), node)
    return node


def read_tensor(module: GraphModule, name: str) -> Node:
    """Insert a read of one of the module's tensors at the graph's insertion point, with its fake value."""
    node, value = module.graph.get_attr(name), tensor_at(module, name)
    with fake_mode(module.graph):
        node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return node


def add_input(graph: Graph, name: str, shape: Sequence[int | torch.SymInt], like: Tensor, after: Node) -> Node:
    """Add a graph input after another one; its fake value has the given shape and the type and device of `like`."""
    with graph.inserting_after(after):
        node = graph.placeholder(name)
    node.name = name  # without the suffix that torch.fx adds if capture renamed an input of this name
    with fake_mode(graph):
        node.meta["val"] = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    return node


def owner_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that contains the target of a dotted path, created if it is missing, and the path's last part."""
    *parents, leaf = name.split(".")
    for part in filter(None, parents):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root, leaf


def give_tensor(root: nn.Module, name: str, value: Tensor) -> None:
    """Register a tensor in a module under a dotted name, as a parameter or a buffer like the tensor itself."""
    owner, leaf = owner_of(root, name)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def module_path(node: Node) -> str:
    """Dotted path of the module a node was captured from (for messages only)."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(list(stack.values()))), "")


def where(node: Node) -> str:
    """'aten.conv2d.default in blocks.0.attn (file.py:12)': how messages name a node."""
    frames = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip().startswith("File ")]
    line = ""
    if frames:
        parts = frames[-1].split(", ")
        line = f" ({Path(parts[0].removeprefix('File ').strip(chr(34))).name}:{parts[1].removeprefix('line ')})"
    return f"{node.target} in {module_path(node) or 'the model'}{line}"


def tensor_at(root: nn.Module, name: str) -> Any:
    """The object at a dotted name."""
    return reduce(getattr, name.split("."), root)


def attributes(graph_module: GraphModule) -> dict[str, Tensor]:
    """The tensors that a graph's `get_attr` nodes read, by name."""
    found: dict[str, Any] = {}
    for path in (node.target for node in graph_module.graph.nodes if node.op == "get_attr"):
        found[path] = tensor_at(graph_module, path)
        if not isinstance(found[path], Tensor):
            raise UnsupportedModelError(
                f"the graph reads {path}, which is not a tensor and cannot be written to a bundle"
            )
    return found


def run_nodes(
    module: GraphModule, nodes: Iterable[Node], given: Mapping[Node, Any] | None = None, missing: Any = None
) -> dict[Node, Any]:
    """Compute some nodes, in graph order, from the given values, without gradients.

    `missing` replaces operands that are neither given nor among the nodes, such as sizes that do not matter.
    """
    runner = Interpreter(module, garbage_collect_values=False)
    runner.env = dict(given or {})
    with torch.no_grad():
        for node in nodes:
            if node in runner.env:
                continue
            if missing is not None:
                runner.env |= {source: missing for source in node.all_input_nodes if source not in runner.env}
            runner.env[node] = runner.run_node(node)
    return runner.env
