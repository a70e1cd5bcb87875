"""Graphs as JSON: a form of a converted model that loads without pickle and can name no code.

A file may call only ATen ops and dcconvert's own, looked up by exact name, and the few Python operators that
compute sizes. Names become Python identifiers when a graph is compiled, so anything else is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from dcconvert.passes import ops  # noqa: F401  (registers torch.ops.dcconvert)
from dcconvert.passes.errors import DcconvertError, UnsupportedModelError, UsageError
from dcconvert.passes.infra import Options, PassRecord
from dcconvert.passes.model import ChunkedModel
from dcconvert.passes.schedule import Schedule
from dcconvert.passes.spec import ModelSpec

VERSION = 1
NAMESPACES = ("aten", "dcconvert")
OPERATORS: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
}
# torch objects that appear as arguments, by kind: how they are named in a file.
CONSTANTS: dict[str, dict[str, Any]] = {
    "dtype": {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)},
    "layout": {str(v): v for v in vars(torch).values() if isinstance(v, torch.layout)},
    "memory_format": {str(v): v for v in vars(torch).values() if isinstance(v, torch.memory_format)},
}
GRAPHS = ("route", "denoise", "original")


def model_to_dict(model: ChunkedModel) -> dict[str, Any]:
    """Everything about a converted model but its tensors, as JSON values."""
    graphs = dict(zip(GRAPHS, graph_modules(model), strict=True))
    return {
        "version": VERSION,
        "spec": model.spec.as_dict(),
        "options": asdict(model.options),
        "schedule": {"kind": model.schedule.kind, "ratio": model.schedule.ratio},
        "passes": [record.as_dict() for record in model.records],
        "graphs": {name: graph_to_dict(graph) for name, graph in graphs.items()},
    }


def model_from_dict(data: Any, tensors: Mapping[str, Tensor]) -> ChunkedModel:
    """Rebuild a model on its tensors; UsageError if the data is damaged or names anything that is not allowed."""
    try:
        if data["version"] != VERSION:
            raise UsageError(f"the graph file has version {data['version']}, this dcconvert reads {VERSION}: convert again")
        graphs = [graph_from_dict(data["graphs"][name], tensors) for name in GRAPHS]
        spec, options = ModelSpec.from_dict(data["spec"]), Options(**data["options"])
        schedule = Schedule(data["schedule"]["kind"], data["schedule"]["ratio"])
        records = [PassRecord(**{**item, "notes": tuple(item["notes"])}) for item in data["passes"]]
        return ChunkedModel(graphs[0], graphs[1], graphs[2], spec, options, schedule, records)
    except DcconvertError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise UsageError(f"the graph file is damaged ({type(error).__name__}: {error}): convert the model again") from error


def graph_modules(model: ChunkedModel) -> tuple[GraphModule, GraphModule, GraphModule]:
    return model.route_graph, model.denoise_graph, model.original_graph


def model_tensors(model: ChunkedModel) -> dict[str, Tensor]:
    """All parameters and buffers of the three graphs by name; they share them, so each appears once."""
    found: dict[str, Tensor] = {}
    for graph in graph_modules(model):
        for name, tensor in graph.state_dict().items():
            if name in found and found[name].data_ptr() != tensor.data_ptr():
                raise UnsupportedModelError(f"two graphs hold different tensors under the name {name}")
            found[name] = tensor
    seen: set[tuple[int, int]] = set()
    for name, tensor in found.items():
        place = (tensor.data_ptr(), tensor.numel())
        if place in seen or not tensor.is_contiguous():  # tied weights: a safetensors file holds no aliases
            found[name] = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(place)
    return found


def graph_to_dict(graph_module: GraphModule) -> dict[str, Any]:
    """Nodes in order: name, op, target, arguments."""
    state = {name for name, _ in graph_module.named_parameters(remove_duplicate=False)}
    nodes = []
    for node in graph_module.graph.nodes:
        entry: dict[str, Any] = {"name": node.name, "op": node.op, "target": target_name(node)}
        if node.op == "get_attr":
            entry["parameter"] = node.target in state
        entry["args"], entry["kwargs"] = encode(node.args), {k: encode(v) for k, v in node.kwargs.items()}
        nodes.append(entry)
    return {"nodes": nodes}


def target_name(node: Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    for name, function in OPERATORS.items():
        if node.target is function:
            return name
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in NAMESPACES:
        return str(node.target)
    raise UnsupportedModelError(f"the graph calls {node.target}, which cannot be written to a bundle")


def find_target(name: str) -> Callable[..., Any]:
    """The function a file names; UsageError unless it is on the list."""
    if name in OPERATORS:
        return OPERATORS[name]
    parts = name.split(".")
    if len(parts) in (2, 3) and parts[0] in NAMESPACES and all(part.isidentifier() for part in parts):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        overload = getattr(packet, parts[2] if len(parts) == 3 else "default", None)
        if isinstance(overload, torch._ops.OpOverload):
            return overload
    raise UsageError(f"the graph file calls {name!r}, which no converted model does: it is damaged or was tampered with")


def encode(value: Any) -> Any:
    """An argument as JSON: plain values as they are, anything else as an object with one key that names its kind."""
    if isinstance(value, Node):
        return {"node": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [encode(item) for item in value]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, names in CONSTANTS.items():
        if str(value) in names and names[str(value)] is value:
            return {kind: str(value)}
    raise UnsupportedModelError(f"the graph holds an argument of type {type(value).__name__}, which has no JSON form")


def decode(value: Any, nodes: Mapping[str, Node]) -> Any:
    """Undo `encode`; KeyError or ValueError for what it never writes."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"argument {value!r} is of no known kind")
    kind, content = next(iter(value.items()))
    if kind in ("tuple", "list"):
        items = [decode(item, nodes) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind in CONSTANTS:
        return CONSTANTS[kind][content]
    simple: dict[str, Callable[[Any], Any]] = {"node": nodes.__getitem__, "float": float, "device": torch.device}
    return simple[kind](content)


def graph_from_dict(data: Any, tensors: Mapping[str, Tensor]) -> GraphModule:
    """Rebuild a graph; its `get_attr` nodes are looked up in `tensors`."""
    graph, root, nodes = Graph(), nn.Module(), {}
    for entry in data["nodes"]:
        name, op, target = entry["name"], entry["op"], entry["target"]
        if not (isinstance(name, str) and name.isidentifier()) or name in nodes:
            raise UsageError(f"the graph file names a node {name!r}: it is damaged or was tampered with")
        args = decode(entry["args"], nodes)
        kwargs = {check_name(key): decode(item, nodes) for key, item in entry["kwargs"].items()}
        if op == "placeholder":
            node = graph.placeholder(check_name(target))
        elif op == "get_attr":
            attach(root, target, tensors, bool(entry["parameter"]))
            node = graph.get_attr(target)
        elif op == "call_function":
            node = graph.create_node(op, find_target(target), tuple(args), kwargs, name=name)
        elif op == "output":
            node = graph.output(args[0])
        else:
            raise UsageError(f"the graph file holds a node of kind {op!r}: it is damaged or was tampered with")
        nodes[name] = node
    graph.lint()
    return GraphModule(root, graph)


def check_name(name: Any) -> str:
    if not (isinstance(name, str) and name.isidentifier()):
        raise UsageError(f"the graph file uses {name!r} as a name: it is damaged or was tampered with")
    return name


def attach(root: nn.Module, target: Any, tensors: Mapping[str, Tensor], parameter: bool) -> None:
    """Put a tensor where a dotted path says."""
    parts = str(target).split(".")
    if not all(part.isidentifier() or part.isdigit() for part in parts):
        raise UsageError(f"the graph file reads an attribute {target!r}: it is damaged or was tampered with")
    if target not in tensors:
        raise UsageError(f"the weights hold no tensor {target}, which the graph needs: convert the model again")
    owner = root
    for part in parts[:-1]:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]  (never None: just added)
    if parts[-1] not in {**owner._parameters, **owner._buffers}:
        tensor = tensors[target]
        if parameter:
            owner.register_parameter(parts[-1], nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(parts[-1], tensor)
