"""Graphs as JSON: a form of a converted model that loads without pickle and cannot name any code.

A file may call only the ATen ops that `known_ops` and the packing rules know and dcconvert's own, looked up by exact
name, and the few Python functions that compute sizes. Three other risks are excluded: names end up in the Python source
of a compiled graph, so only plain identifiers are allowed; torch imports modules that a tree spec names; and a graph of
a few nodes may need any amount of memory (`size_limits`).
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from dcconvert.passes.ir import ops  # registers torch.ops.dcconvert
from dcconvert.passes.ir.errors import CheckFailedError, DcconvertError, UnsupportedModelError, UsageError
from dcconvert.passes.ir.graph_tools import attributes, owner_of
from dcconvert.passes.ir.known_ops import is_known
from dcconvert.passes.ir.pass_runner import PassRecord
from dcconvert.passes.ir.spec import ModelSpec
from dcconvert.passes.methods import method_from_dict
from dcconvert.passes.methods.method import Method
from dcconvert.passes.packing.rules.registry import RULES
from dcconvert.passes.planning.schedule import Timetable
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.model import DynamicModel, Graphs
from dcconvert.passes.serialise.interface_checks import check_seams, damaged
from dcconvert.passes.serialise.size_limits import check_sizes, check_spec_sizes
from dcconvert.passes.serialise.treespec import shown, treespec_fault

VERSION = 4  # 3: a method and its options; before, one set of options for all methods. 4: ops under their new names
READABLE = (2, 3, VERSION)
RENAMED = {
    "regroup": "gather_tokens",
    "row_attention": "padded_attention",
    "address": "cache_index",
    "remember": "cache_write",
    "recall": "cache_read",
}  # dcconvert's ops in files of format 2 and 3
ORIGINAL = "original"  # beside the graphs that a run calls
STATE_DTYPES = ("float16", "bfloat16", "float32", "float64")
MAX_STATE = 1 << 20  # numbers per token and value
NAMESPACES = ("aten", "dcconvert")

_SIZES = {
    operator: "getitem add sub mul truediv floordiv mod neg eq ne lt le gt ge",
    math: "ceil floor trunc",
    torch: "sym_max sym_min sym_int sym_float sym_not",
}
# What torch.export leaves in a graph for arithmetic on sizes (and for picking one of several results).
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module.__name__}.{name}": getattr(module, name) for module, names in _SIZES.items() for name in names.split()
}
# Arguments that are neither plain JSON nor containers: how a file writes each kind.
CONSTANTS: dict[str, dict[str, Any]] = {
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
    **{
        kind.__name__: {str(v): v for v in vars(torch).values() if isinstance(v, kind)}
        for kind in (torch.dtype, torch.layout, torch.memory_format)
    },
}
# A graph's source uses these names itself; an input with one of them would shadow it.
RESERVED_NAMES = {"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"}
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

T = TypeVar("T")


def model_to_dict(model: DynamicModel) -> dict[str, Any]:
    """Everything about a converted model except its tensors, as JSON values without NaN or infinity.

    Raises UnsupportedModelError for a model with a call, an argument or an input structure that has no such form.
    """
    spec = model.spec.as_dict()
    for item in spec["input_specs"]:
        item["value"] = encode(item["value"])
    for name in ("in_spec", "out_spec"):
        if reason := treespec_fault(spec[name]):
            raise UnsupportedModelError(f"the model's {name} cannot be written to a bundle: {reason}")
    return {
        "version": VERSION,
        "spec": spec,
        "method": model.method.as_dict(),
        "schedule": model.schedule.as_dict(),
        "passes": [record.as_dict() for record in model.records],
        "graphs": {name: graph_to_dict(graph) for name, graph in model.graphs.named().items()},
    }


def model_from_dict(data: Any, tensors: Mapping[str, Tensor]) -> DynamicModel:
    """Rebuild a model on its tensors; the graphs share them.

    Raises UsageError for data that is damaged, of another version, or asks for anything outside the lists above.
    """
    with damage_is_a_usage_error():
        spec, method, schedule = read_facts(data)
        records = [plainly(PassRecord(**{**r, "notes": tuple(map(str, r["notes"]))})) for r in data["passes"]]
        pool = dict(tensors)
        graphs = Graphs(**{n: read_graph(data["graphs"][n], pool) for n in (*spec.graphs, ORIGINAL)})
        planner = StepPlanner(spec.with_rows(graphs.original), method, schedule)
        model = DynamicModel(graphs, planner, records)
        check_seams(model, model.graphs.named())
        check_sizes(model)
        return model


def planner_from_dict(data: Any) -> StepPlanner:
    """The planner of a model without its graphs and tensors; errors as in `model_from_dict`."""
    with damage_is_a_usage_error():
        return StepPlanner(*read_facts(data))


def read_facts(data: Any) -> tuple[ModelSpec, Method, Timetable]:
    check_version(data)
    spec = read_spec(data["spec"])
    try:
        method = plainly(method_from_dict(data["method"] if "method" in data else data["options"]))
        schedule = plainly(Timetable.from_dict(data["schedule"]))
        plainly(schedule.policy)
        return spec, method, StepPlanner(spec, method, schedule).schedule
    except UsageError as error:
        raise damaged(f"has invalid options or an invalid schedule ({error})") from error


def model_tensors(model: DynamicModel) -> dict[str, Tensor]:
    """Every tensor that the graphs read, once, by name. They are contiguous, and no two share memory (safetensors
    rejects that), so all but the first of tied weights are copied.

    Raises CheckFailedError if a name stands for different tensors in two graphs.
    """
    found: dict[str, Tensor] = {}
    for graph in model.graphs.named().values():
        for name, tensor in attributes(graph).items():
            known = found.setdefault(name, tensor)
            # `Module.to` gives every graph its own copy of a buffer: equal is enough.
            if known is not tensor and not (known.dtype == tensor.dtype and torch.equal(known, tensor)):
                raise CheckFailedError(f"two graphs hold different tensors as {name}: convert the model again")
    seen: set[int] = set()
    for name, tensor in found.items():
        plain = tensor.detach().contiguous()
        found[name] = plain.clone() if plain.untyped_storage().data_ptr() in seen else plain
        seen.add(found[name].untyped_storage().data_ptr())
    return found


def read_spec(fields: dict[str, Any]) -> ModelSpec:
    """A ModelSpec that cannot make later code run anything that the file chooses."""
    inputs = [{**item, "value": decode(item["value"], {})} for item in fields["input_specs"]]
    spec = plainly(ModelSpec.from_dict({**fields, "input_specs": inputs}))
    for item in spec.input_specs:
        if item.dtype and f"torch.{item.dtype}" not in CONSTANTS["dtype"]:
            raise damaged(f"gives input {shown(item.name)} the unknown dtype {shown(item.dtype)}")
    for name in ("in_spec", "out_spec"):
        if reason := treespec_fault(getattr(spec, name)):
            raise UsageError(f"the graph file's {name} cannot be used: {reason}")
    for state in spec.states:
        plainly(state)
        if state.dtype not in STATE_DTYPES or not 1 <= state.channels * state.width <= MAX_STATE:
            raise damaged(f"gives the state {shown(state.name)} an invalid shape or dtype")
    if len(spec.grid) != 2 or not all(type(size) is int and size > 0 for size in spec.grid):
        raise damaged(f"gives {shown(spec.grid)} as token grid, not two positive integers")
    check_spec_sizes(spec)
    return spec


def plainly(facts: T) -> T:
    """A dataclass whose plain fields have their declared types; raises UsageError otherwise."""
    for name, hint in get_type_hints(type(facts)).items():
        value = getattr(facts, name)
        if hint in (int, float, str) and type(value) is not hint and (hint, type(value)) != (float, int):
            raise damaged(f"gives {shown(value)} as {name}, which must be {hint.__name__}")
    return facts


def graph_to_dict(graph_module: GraphModule) -> dict[str, Any]:
    """Version and nodes in order, each with name, op, target, args and kwargs; fake values are left out.

    Raises UnsupportedModelError for a call or an argument that has no JSON form.
    """
    nodes, tensors = [], attributes(graph_module)
    for node in graph_module.graph.nodes:
        entry: dict[str, Any] = {"name": node.name, "op": node.op, "target": target_name(node)}
        entry |= {"args": [encode(a) for a in node.args], "kwargs": {k: encode(v) for k, v in node.kwargs.items()}}
        if node.op == "get_attr":
            entry["parameter"] = isinstance(tensors[node.target], nn.Parameter)
        nodes.append(entry)
    return {"version": VERSION, "nodes": nodes}


def graph_from_dict(data: Any, tensors: Mapping[str, Tensor]) -> GraphModule:
    """Rebuild a graph; `get_attr` nodes read from `tensors`, as frozen parameters or as buffers, as they were.

    Raises UsageError for data that is damaged or asks for anything outside the lists above.
    """
    with damage_is_a_usage_error():
        return read_graph(data, dict(tensors))


def read_graph(data: Any, pool: dict[str, Tensor]) -> GraphModule:
    """`graph_from_dict` on its own dictionary, in which the tensors of parameters become parameters."""
    check_version(data)
    graph, root = Graph(), nn.Module()
    nodes: dict[str, Node] = {}
    for entry in data["nodes"]:
        name = checked_name(entry["name"])
        if name in nodes:
            raise damaged(f"has two nodes called {name}")
        nodes[name] = read_node(entry, graph, root, nodes, pool)
    kinds = [node.op for node in graph.nodes]
    if kinds[-1:] != ["output"] or kinds.count("output") != 1:
        raise damaged("has a graph that does not end in its one output")
    graph.lint()
    return GraphModule(root, graph)


def read_node(
    entry: dict[str, Any], graph: Graph, root: nn.Module, nodes: Mapping[str, Node], pool: dict[str, Tensor]
) -> Node:
    """Append one node to `graph`; what a `get_attr` node reads is attached to `root`."""
    name, op, target = entry["name"], entry["op"], entry["target"]
    args = decode({"tuple": entry["args"]}, nodes)
    kwargs = {checked_name(key, ()): decode(item, nodes) for key, item in entry["kwargs"].items()}
    if op == "call_function":
        return graph.create_node(op, find_function(renamed(target)), args, kwargs, name=name)
    if op == "output" and len(args) == 1 and isinstance(args[0], tuple) and not kwargs:
        return graph.output(args[0])
    if op == "get_attr" and not (args or kwargs):
        attach(root, target, pool, entry["parameter"])
        return graph.create_node(op, target, name=name)
    if op == "placeholder" and target == name and not (args or kwargs):
        node = graph.placeholder(name)
        if node.name == name:
            return node
    raise damaged(f"has a node {name} ({shown(op)}, {shown(target)}) that is not allowed")


def target_name(node: Node) -> str:
    """The name that a file uses for what a node calls or reads."""
    if node.op == "placeholder" and not node.args:
        return node.name  # its target may be a Python name that a graph renamed
    if node.op in ("get_attr", "output"):
        return str(node.target)
    if node.op == "call_function":
        name = next((name for name, function in FUNCTIONS.items() if node.target is function), None)
        if name or is_allowed(node.target):
            return name or str(node.target)
    raise UnsupportedModelError(f"the graph holds {node.op} {node.target}, which cannot be written to a bundle")


def renamed(name: Any) -> Any:
    """The current name of a function that a file may call by an older name."""
    namespace, _, rest = name.partition(".") if isinstance(name, str) else ("", "", "")
    op, _, overload = rest.partition(".")
    return f"{namespace}.{RENAMED[op]}.{overload}" if namespace == "dcconvert" and op in RENAMED else name


def find_function(name: Any) -> Callable[..., Any]:
    """The function that a file names; raises UsageError unless it is on the lists."""
    if isinstance(name, str):
        if name in FUNCTIONS:
            return FUNCTIONS[name]
        parts = name.split(".")
        if len(parts) == 3 and parts[0] in NAMESPACES and all(map(IDENTIFIER.fullmatch, parts)):
            packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
            overload: Any = getattr(packet, parts[2], None)
            if is_allowed(overload) and str(overload) == name:
                return overload
    raise damaged(f"calls {shown(name)}, which is not allowed")


def is_allowed(target: Any) -> bool:
    """Whether a target is an op of dcconvert, or an ATen op that our lists or a packing rule know."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in NAMESPACES:
        return False
    return target.namespace == ops.NAMESPACE or target in RULES or is_known(target)


def attach(root: nn.Module, target: Any, pool: dict[str, Tensor], parameter: Any) -> None:
    """Put the tensor called `target` (a dotted path) where the path says; raises UsageError if there is none."""
    for part in str(target).split("."):
        if not re.fullmatch("[0-9]+", part):
            checked_name(part)
    if target not in pool:
        raise UsageError(f"the weights hold no tensor {shown(target)}, which the graph needs: convert the model again")
    owner, leaf = owner_of(root, target)
    if leaf in owner._parameters or leaf in owner._buffers:
        return
    if parameter is not True:
        owner.register_buffer(leaf, pool[target])
        return
    tensor = pool[target]
    if not isinstance(tensor, nn.Parameter) or tensor.requires_grad:
        tensor = pool[target] = nn.Parameter(tensor.detach(), requires_grad=False)
    owner.register_parameter(leaf, tensor)


def encode(value: Any) -> Any:
    """An argument as JSON: plain values as they are, anything else as an object with one key that names its kind."""
    if isinstance(value, Node):
        return {"node": value.name}
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [encode(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [encode(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, names in CONSTANTS.items():
        if type(value).__name__ == kind and str(value) in names:
            return {kind: str(value)}
    raise UnsupportedModelError(f"the graph holds an argument of type {type(value).__name__}, which has no JSON form")


def decode(value: Any, nodes: Mapping[str, Node]) -> Any:
    """Undo `encode`; `nodes` are the preceding ones. Raises UsageError for what `encode` never writes."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind, content = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else ("", None)
    if kind in ("tuple", "list", "slice") and isinstance(content, list):
        items = [decode(item, nodes) for item in content]
        return items if kind == "list" else tuple(items) if kind == "tuple" else slice(*items)
    if isinstance(content, str):
        if kind == "device":
            return torch.device(content)
        known: Mapping[str, Any] = nodes if kind == "node" else CONSTANTS.get(kind, {})
        if content in known:
            return known[content]
    raise damaged(f"has the argument {shown(value)}, which has no meaning")


def checked_name(name: Any, reserved: Collection[str] = RESERVED_NAMES) -> str:
    """A name that is valid in Python source and shadows nothing there; raises UsageError otherwise."""
    plain = isinstance(name, str) and IDENTIFIER.fullmatch(name) and not keyword.iskeyword(name)
    if not plain or name in reserved:
        raise damaged(f"has the name {shown(name)}, which is not allowed")
    return name


def check_version(data: Any) -> None:
    if type(data["version"]) is not int or data["version"] not in READABLE:
        found = shown(data["version"])
        raise UsageError(
            f"the graph file has version {found}, but this dcconvert reads {VERSION}: convert the model again"
        )


@contextmanager
def damage_is_a_usage_error() -> Iterator[None]:
    """Invalid data raises many kinds of errors, here and in torch: all of them mean that the file is damaged."""
    try:
        yield
    except DcconvertError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise damaged(f"cannot be read ({reason})") from error
