"""What a graph file may not hold: other code, other names, other shapes. Each is refused in one line."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dcconvert.export.onnx.lowerings import PORTABLE
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.packing.rules.registry import RULES
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.serialise.graph_json import (
    FUNCTIONS,
    RESERVED_NAMES,
    VERSION,
    find_function,
    graph_from_dict,
    graph_to_dict,
    is_allowed,
    model_from_dict,
    model_tensors,
    model_to_dict,
)
from tests.passes.carry_harness import carried
from tests.passes.harness import Block, TinyModel, tiny_inputs


@pytest.fixture(scope="module")
def tiny() -> DynamicModel:
    torch.manual_seed(0)
    module = TinyModel(Block() for _ in range(3))
    return rewrite(module, tiny_inputs(), {}, method_of("chunk"), Policy("constant", 2).timetable(), timestep_scale=1.0)


@pytest.fixture
def data(tiny) -> Any:
    """A file that a test may spoil."""
    return json.loads(json.dumps(model_to_dict(tiny)))


@pytest.fixture(scope="module")
def tensors(tiny) -> dict[str, Tensor]:
    return model_tensors(tiny)


# Files that were spoiled


def small() -> dict[str, Any]:
    """x, weight -> add -> output."""
    nodes = [
        {"name": "x", "op": "placeholder", "target": "x", "args": [], "kwargs": {}},
        {"name": "weight", "op": "get_attr", "target": "weight", "args": [], "kwargs": {}, "parameter": True},
        {
            "name": "add",
            "op": "call_function",
            "target": "aten.add.Tensor",
            "args": [{"node": "x"}, {"node": "weight"}],
            "kwargs": {"alpha": 2},
        },
        {"name": "output", "op": "output", "target": "output", "args": [{"tuple": [{"node": "add"}]}], "kwargs": {}},
    ]
    return {"version": VERSION, "nodes": nodes}


WEIGHTS = {"weight": torch.ones(2)}


def refused(data: Any, tensors: dict[str, Tensor] | None = None) -> str:
    """The one line with which a graph is refused."""
    with pytest.raises(UsageError) as error:
        graph_from_dict(data, WEIGHTS if tensors is None else tensors)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    return str(error.value)


def test_the_small_graph_is_sound():
    data = small()
    assert graph_from_dict(data, WEIGHTS)(torch.ones(2))[0].tolist() == [3, 3]
    assert graph_to_dict(graph_from_dict(data, WEIGHTS)) == data


@pytest.mark.parametrize(
    "target",
    [
        "os.system", "builtins.eval", "eval", "torch.load", "torch.ops.aten.add.Tensor", "operator.pow",
        "operator.attrgetter", "operator.methodcaller", "aten.add", "aten.add.Tensor.op", "aten.add.nothing",
        "aten.nothing.default", "aten.__class__.__base__", "aten.add.__class__", "aten.add._schema", "aten..default",
        "aten.add.Tensor\n", "aten.add.Tensor; import os", " aten.add.Tensor", "prim.device.default",
        "quantized.add.default", "inductor.accumulate_grad_.default", "dcconvert.chunk", "dcconvert.nothing.default",
        "aten.save.default", "aten.from_file.default", "aten.from_file.out", "aten.warn.default",
        "aten.backward.default", "", "..", None, 3, ["aten", "add", "Tensor"], {"node": "x"},
    ],
)  # fmt: skip
def test_other_calls_are_refused_by_name(target):
    data = small()
    data["nodes"][2]["target"] = target
    message = refused(data)
    assert f"calls {target!r}, which is not allowed" in message


@pytest.mark.parametrize(
    "target",
    [
        "aten._convert_indices_from_csr_to_coo.default", "aten.from_file.default", "aten._coalesced_.default",
        "aten.as_strided.default", "aten.set_.source_Storage", "aten.resize_.default", "aten.add.out",
        "aten._cslt_sparse_mm.default", "aten.index_put_.default", "aten.special_hermite_polynomial_h.default",
        "aten.gelu_backward.default", "aten._local_scalar_dense.default", "aten.rand.default", "aten.nonzero.default",
    ],
)  # fmt: skip
def test_ops_that_no_rule_knows_are_refused(target):
    data = small()
    data["nodes"][2]["target"] = target
    assert "is not allowed" in refused(data)


def test_packing_rules_and_elementwise_ops_are_known():
    names = ("aten.add.Tensor", "aten.relu_.default", "aten.silu.default", "aten.where.self", "aten.conv2d.default")
    for target in (*map(find_function, names), *RULES, *PORTABLE.functions):
        assert is_allowed(target) or target in FUNCTIONS.values()


def bomb(data: Any, target: str, args: list[Any], times: int = 1) -> None:
    """Put calls in front of the original's output, each of which takes the last one's result as its first argument."""
    nodes = data["graphs"]["original"]["nodes"]
    last = nodes[-1]["args"][0]["tuple"][0]["node"]
    for number in range(times):
        inserted = [{"node": last} if arg == "LAST" else arg for arg in args]
        if target == "aten.cat.default":
            inserted = [{"list": [{"node": last}, {"node": last}]}]
        last = f"bomb_{number}"
        nodes.insert(-1, {"name": last, "op": "call_function", "target": target, "args": inserted, "kwargs": {}})
    nodes[-1]["args"][0]["tuple"][0]["node"] = last


@pytest.mark.parametrize(
    ("target", "args", "times"),
    [
        ("aten.full.default", [{"list": [1 << 17, 1 << 17]}, 1.0], 1),
        ("aten.arange.default", [1 << 36], 1),
        ("aten.repeat.default", ["LAST", {"list": [1 << 20, 1, 1, 1, 1, 1, 1]}], 1),
        ("aten.cat.default", [], 40),
    ],
)
def test_a_graph_that_needs_absurd_memory_is_refused(target, args, times, data, tensors):
    bomb(data, target, args, times)
    with pytest.raises(UsageError, match=r"has a node bomb_\d+ in original of [\d.e+]+ GB .* is larger than"):
        model_from_dict(data, tensors)


def test_a_graph_that_cannot_be_run_is_refused(data, tensors, capfd):
    bomb(data, "aten.reshape.default", ["LAST", {"list": [7, 11, 13]}])
    with pytest.raises(UsageError, match="has a node bomb_0 in original that cannot be computed") as error:
        model_from_dict(data, tensors)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


BAD_NAMES = [
    "x); import os", "x\n", "x y", "", "1x", "a.b", "lambda", "import", "None", "self", "torch", "inf", "nan", "device",
    "\N{LATIN SMALL LIGATURE FI}x", "\N{GREEK SMALL LETTER ALPHA}", "x=print()", "*x", None, 1, ["x"],
    "x" * 100000 + ";",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:20])
def test_names_that_are_no_plain_identifiers_are_refused(name):
    data = small()
    data["nodes"][2]["name"] = name
    data["nodes"][3]["args"] = [{"tuple": [{"node": name}]}]
    assert "the name" in refused(data)
    data = small()
    data["nodes"][0]["name"] = data["nodes"][0]["target"] = name
    data["nodes"][2]["args"][0] = {"node": name}
    assert "the name" in refused(data)
    if isinstance(name, str) and name not in RESERVED_NAMES:  # JSON has no other keys; keywords shadow nothing
        data = small()
        data["nodes"][2]["kwargs"] = {name: 1}
        assert "the name" in refused(data)


@pytest.mark.parametrize("op", ["call_module", "call_method", "root", "", None, ["output"]])
def test_other_kinds_of_node_are_refused(op):
    data = small()
    data["nodes"][2]["op"] = op
    assert f"a node add ({op!r}, 'aten.add.Tensor') that is not allowed" in refused(data)


@pytest.mark.parametrize(
    "path",
    [
        "weight); import os; (x", "a.weight; b", "a b", "a..b", ".a", "a.", "", "a.lambda", "a.\N{SUPERSCRIPT TWO}",
        'a."b', "\N{GREEK SMALL LETTER ALPHA}", "self", "0x",
        # in the way of what a module has already
        "forward", "__class__", "__class__.x", "__dict__", "__init__.x", "training", "graph", "graph.x", "code",
        "_graph.x", "meta", "recompile", "_parameters", "_modules.x",
    ],
)  # fmt: skip
@pytest.mark.parametrize("parameter", [True, False])
def test_other_attributes_are_refused(path, parameter):
    data = small()
    data["nodes"][1] |= {"target": path, "parameter": parameter}
    assert "the graph file" in refused(data, {path: torch.ones(2)})


def test_a_tensor_that_is_also_a_folder_is_refused():
    data = small()
    data["nodes"].insert(1, {**data["nodes"][1], "name": "w", "target": "weight.w"})
    refused(data, {**WEIGHTS, "weight.w": torch.ones(2)})


@pytest.mark.parametrize("target", [None, 3, ["weight"], "bias"])
def test_a_missing_tensor_is_named(target):
    data = small()
    data["nodes"][1]["target"] = target
    message = refused(data)
    if target == "bias":
        assert message == "the weights hold no tensor 'bias', which the graph needs: convert the model again"


def drop(key: str) -> Any:
    return lambda data: [node.pop(key, None) for node in data["nodes"]]


def put(index: int, **fields: Any) -> Any:
    return lambda data: data["nodes"][index].update(fields)


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"list": [value]}
    return value


SPOILED = {
    "version missing": lambda data: data.pop("version"),
    "version unknown": lambda data: data.update(version=VERSION + 1),
    "version as text": lambda data: data.update(version=str(VERSION)),
    "version of another type": lambda data: data.update(version=[VERSION, {}]),
    "no nodes": lambda data: data.pop("nodes"),
    "empty nodes": lambda data: data.update(nodes=[]),
    "nodes as number": lambda data: data.update(nodes=3),
    "nodes as text": lambda data: data.update(nodes="xyz"),
    "nodes as null": lambda data: data.update(nodes=[None]),
    **{f"no {key}": drop(key) for key in ("name", "op", "target", "args", "kwargs", "parameter")},
    "args as number": put(2, args=3),
    "args as object": put(2, args={"node": "x"}),
    "kwargs as list": put(2, kwargs=["alpha"]),
    "name twice": put(2, name="x"),
    "input twice": lambda data: data["nodes"].insert(1, dict(data["nodes"][0])),
    "input renamed": put(0, target="y"),
    "input with a default": put(0, args=[1]),
    "input that is a builtin": lambda data: (put(0, name="print", target="print")(data), put(2, args=[])(data)),
    "attribute with arguments": put(1, args=[1]),
    "node unknown": put(2, args=[{"node": "y"}]),
    "node from later": put(2, args=[{"node": "output"}]),
    "node unhashable": put(2, args=[{"node": ["x"]}]),
    "no output": lambda data: data["nodes"].pop(),
    "two outputs": lambda data: data["nodes"].append({**data["nodes"][3], "name": "again"}),
    "node after output": lambda data: data["nodes"].append({**data["nodes"][2], "name": "again"}),
    "output is no tuple": put(3, args=[{"node": "add"}]),
    "output of nothing": put(3, args=[]),
    "bare list": put(2, args=[[1]]),
    "bare object": put(2, args=[{}]),
    "two kinds": put(2, args=[{"node": "x", "dtype": "torch.float32"}]),
    "kind unknown": put(2, args=[{"eval": "1"}]),
    "dtype unknown": put(2, args=[{"dtype": "torch.load"}]),
    "layout unknown": put(2, args=[{"layout": "torch.float32"}]),
    "memory format unknown": put(2, args=[{"memory_format": 3}]),
    "device unknown": put(2, args=[{"device": "x); import os"}]),
    "device as number": put(2, args=[{"device": 0}]),
    "float unknown": put(2, args=[{"float": "__import__('os')"}]),
    "slice too long": put(2, args=[{"slice": [1, 2, 3, 4]}]),
    "slice empty": put(2, args=[{"slice": []}]),
    "tuple of text": put(2, args=[{"tuple": "abc"}]),
    "nested too deep to compile": put(2, args=[deep(400)]),
    "nested too deep to read": put(2, args=[deep(5000)]),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_malformed_graphs_are_refused(spoil):
    data = small()
    spoil(data)
    refused(data)


@pytest.mark.parametrize("data", [None, 3, "text", [], [1], {}, {"version": None}])
def test_other_json_is_refused(data):
    refused(data)
    with pytest.raises(UsageError):
        model_from_dict(data, WEIGHTS)


# Spoiled facts of a model


def at(*path: str | int) -> Any:
    def change(data: Any, value: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


FACTS: dict[str, tuple[Any, Any]] = {
    "version": (at("version"), 0),
    "spec": (at("spec"), []),
    "spec field": (at("spec", "more"), 1),
    "grid": (at("spec", "grid"), [2, "4"]),
    "grid size": (at("spec", "grid"), [2, 4, 1]),
    "grid of nothing": (at("spec", "grid"), [0, 4]),
    "width": (at("spec", "width"), "12"),
    "depth": (at("spec", "depth"), True),
    "timestep": (at("spec", "timestep"), "y"),
    "timestep scale": (at("spec", "timestep_scale"), None),
    "inputs": (at("spec", "input_specs"), []),
    "input name": (at("spec", "input_specs", 0, "name"), "y"),
    "input dtype": (at("spec", "input_specs", 0, "dtype"), "load"),
    "input value": (at("spec", "input_specs", 0, "value"), {"eval": "1"}),
    "route inputs": (at("spec", "route_inputs"), ["x"]),
    "denoise inputs": (at("spec", "denoise_inputs"), []),
    "live": (at("spec", "live"), []),
    "in_spec": (at("spec", "in_spec"), "{}"),
    "in_spec null": (at("spec", "in_spec"), None),
    "in_spec of one": (at("spec", "in_spec"), pytree.treespec_dumps(pytree.tree_flatten(1)[1])),
    "out_spec of two": (at("spec", "out_spec"), pytree.treespec_dumps(pytree.tree_flatten((1, 2))[1])),
    "option": (at("method", "more"), 1),
    "option type": (at("method", "seed"), "0"),
    "packing": (at("method", "packing"), "none"),
    "schedule kind": (at("schedule", "kind"), "x"),
    "schedule ratio": (at("schedule", "ratio"), 0.5),
    "schedule ratio for the grid": (at("schedule", "ratio"), 1000),
    "pass": (at("passes", 0), {}),
    "pass matches": (at("passes", 0, "matches"), "1"),
    "pass notes": (at("passes", 0, "notes"), None),
    "graphs": (at("graphs"), {}),
    "graph version": (at("graphs", "route", "version"), 0),
    "graph call": (at("graphs", "original", "nodes", -2, "target"), "os.system"),
}


@pytest.mark.parametrize(("change", "value"), FACTS.values(), ids=FACTS)
def test_spoiled_facts_are_refused(change, value, data, tensors):
    change(data, value)
    with pytest.raises(UsageError) as error:
        model_from_dict(data, tensors)
    assert "\n" not in str(error.value)


CARRY_FACTS: dict[str, tuple[Any, Any]] = {
    "no states": (at("spec", "states"), []),
    "states of nothing": (at("spec", "states"), None),
    "state name": (at("spec", "states", 0, "name"), "y"),
    "state twice": (at("spec", "states", 1, "name"), "key_0"),
    "state dtype": (at("spec", "states", 0, "dtype"), "load"),
    "state channels": (at("spec", "states", 0, "channels"), 0),
    "state width": (at("spec", "states", 0, "width"), -1),
    "state width as text": (at("spec", "states", 0, "width"), "6"),
    "state field": (at("spec", "states", 0, "more"), 1),
    "image": (at("spec", "image"), "y"),
    "constants": (at("spec", "constants"), ["constant_0"]),
    "prepare inputs": (at("spec", "prepare_inputs"), ["y"]),
    "denoise input": (at("spec", "denoise_inputs", 0), "y"),
    "mode": (at("method", "method"), "chunk"),
    "mode type": (at("method", "method"), None),
    "max_staleness": (at("method", "max_staleness"), "3"),
    "warm-up": (at("schedule", "warm_up"), -5),
    "refresh": (at("schedule", "refresh"), "2"),
    "knots": (at("schedule", "knots"), [[0.5, 0.5]]),
    "knots of text": (at("schedule", "knots"), "ab"),
}


@pytest.mark.parametrize(("change", "value"), CARRY_FACTS.values(), ids=CARRY_FACTS)
def test_spoiled_facts_of_a_carry_model_are_refused(change, value):
    model = carried("tiny")[0]
    data = json.loads(json.dumps(model_to_dict(model)))
    change(data, value)
    with pytest.raises(UsageError) as error:
        model_from_dict(data, model_tensors(model))
    assert "\n" not in str(error.value)


def test_exchanged_graphs_are_refused(data, tensors):
    graphs = data["graphs"]
    graphs["route"], graphs["original"] = graphs["original"], graphs["route"]
    with pytest.raises(UsageError, match=r"as inputs and outputs of (route|original)"):
        model_from_dict(data, tensors)


def test_a_missing_weight_is_named(data, tensors):
    fewer = {name: tensor for name, tensor in tensors.items() if name != "final.weight"}
    with pytest.raises(UsageError, match=r"no tensor 'final\.weight'"):
        model_from_dict(data, fewer)


# Tree specs, through which torch would import what a file names


def hostile(module: str) -> dict[str, str]:
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    enum = json.dumps([{"__enum__": True, "fqn": f"{module}:X", "name": "Y"}])
    factory = {"default_factory_module": module, "default_factory_name": "X", "dict_context": ["a"]}
    roots = {
        "enum": {"type": "builtins.dict", "context": enum, "children_spec": [leaf]},
        "factory": {"type": "collections.defaultdict", "context": factory, "children_spec": [leaf]},
    }
    roots |= {
        f"nested {k}": {"type": "builtins.list", "context": "null", "children_spec": [v]} for k, v in roots.items()
    }
    # a leaf with a context or children is none
    roots["leaf"] = {"type": None, "context": enum, "children_spec": [copy.deepcopy(roots["enum"])]}
    return {name: json.dumps([1, root]) for name, root in roots.items()}


@pytest.mark.parametrize("kind", hostile(""))
@pytest.mark.parametrize("field", ["in_spec", "out_spec"])
def test_a_tree_spec_imports_nothing(kind, field, data, tensors, tmp_path, monkeypatch):
    (tmp_path / "planted_module.py").write_text("X = dict")
    monkeypatch.syspath_prepend(tmp_path)
    data["spec"][field] = hostile("planted_module")[kind]
    with pytest.raises(UsageError, match=f"the graph file's {field}"):
        model_from_dict(data, tensors)
    assert "planted_module" not in sys.modules


def test_a_structure_from_a_library_not_loaded_says_what_to_do(data, tensors):
    data["spec"]["out_spec"] = data["spec"]["out_spec"].replace("null", '"somewhere.Output"', 1)
    with pytest.raises(UsageError, match=r"'somewhere\.Output', unknown here: import the library"):
        model_from_dict(data, tensors)
