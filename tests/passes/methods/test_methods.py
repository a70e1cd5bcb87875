"""The registry of methods: options, their checks, and bundles that name a method, of this format and of the last."""

from __future__ import annotations

import math

import pytest
import torch

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.methods import METHODS, MODES, PRESETS, method_from_dict, method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import DIFFERENCE, NATURAL, Policy, Timetable
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.serialise.graph_json import RENAMED, model_from_dict, model_tensors, model_to_dict
from tests.passes.harness import dit_call

NATURALLY = Policy(NATURAL, 4, base=4)
BY_DIFFERENCE = Policy(DIFFERENCE, 4, threshold=1)


def test_every_method_is_described():
    assert (MODES, PRESETS) == (("steps", "carry", "chunk"), ("dc-dit", "sparsedit", "ddit", "tome"))
    for name, method in METHODS.items():
        assert method.name == name
        assert method.title
        assert method.limits
        made = method_of(name)
        assert made.router == method.routers[0]
        assert made.head_blocks == made.tail_blocks == method.blocks
        assert method_of(name, 4).policy(4).ratio == 4
        assert method.policy(1) == Policy(method.schedule, 1)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_comes_back_from_what_a_bundle_stores(name):
    made = method_of(name, 5, seed=3)
    assert method_from_dict(made.as_dict()) == made


OLD = {  # the one set of options of format 2, as bundles hold it
    "mode": "chunk",
    "head_blocks": 1,
    "tail_blocks": 1,
    "router": "pool",
    "guard": 3.0,
    "state_dtype": "model",
    "packing": "rows",
    "members": 4,
    "neighbours": 4,
    "coverage": True,
    "trunk": "plain",
    "dechunk": "gaussian",
    "fewest": 0.25,
    "prediction": "",
    "refined": False,
    "preset": "",
    "seed": 0,
}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, method_of("chunk")),
        ({"packing": "bins", "members": 2}, method_of("chunk", packing="bins", members=2)),
        (
            {"mode": "carry", "router": "age", "state_dtype": "fp16", "head_blocks": 0, "tail_blocks": 0},
            method_of("carry", router="age", state_dtype="fp16"),
        ),
        ({"router": "predictability", "dechunk": "smoothed", "members": 1}, method_of("dc-dit", head_blocks=1)),
        (
            {"router": "own", "dechunk": "values", "refined": True, "head_blocks": 0, "tail_blocks": 0},
            method_of("dc-dit", router="own", refined=True, head_blocks=0, tail_blocks=0),
        ),
        ({"trunk": "sparse-dense", "fewest": 0.1}, method_of("sparsedit", fewest=0.1, head_blocks=1, tail_blocks=1)),
        (
            {"trunk": "patch-sizes", "prediction": "flow", "head_blocks": 0, "tail_blocks": 0},
            method_of("ddit", prediction="flow"),
        ),
        ({"router": "merge", "members": 8, "fewest": 0.5}, method_of("tome", fewest=0.5)),
    ],
)
def test_options_of_format_2(change, wanted):
    assert method_from_dict({**OLD, **change}) == wanted


@pytest.mark.parametrize(
    ("mode", "name", "choices"),
    [
        ("chunk", "norm", "pool, predictability, cosine, random"),
        ("chunk", "drift", "pool, predictability, cosine, random"),
        ("carry", "norm", "drift, age, pool, predictability, cosine, random"),
        ("tome", "pool", "merge"),
    ],
)
def test_routers_of_another_method(mode, name, choices):
    with pytest.raises(UsageError, match=f"method {mode} has no router '{name}': choose one of {choices}$"):
        method_of(mode, router=name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("both", {}, "unknown method 'both': choose one of steps, carry, chunk, dc-dit, sparsedit, ddit, tome"),
        (
            "chunk",
            {"max_staleness": 2.0},
            "method chunk has no option 'max_staleness': it has head_blocks, tail_blocks, router, seed, mem",
        ),
        ("chunk", {"packing": "tight"}, "unknown packing 'tight': choose one of rows, bins, varlen"),
        ("chunk", {"members": 0}, "must be at least 1"),
        ("chunk", {"neighbours": 0}, "must be at least 1"),
        ("chunk", {"head_blocks": -2}, "cannot be negative"),
        ("carry", {"max_staleness": -1.0}, "max_staleness -1 is out of range"),
        ("carry", {"max_staleness": math.nan}, "max_staleness nan is out of range"),
        ("carry", {"state_dtype": "fp8"}, "unknown state dtype 'fp8': choose one of model, fp16, fp32"),
        ("ddit", {"prediction": "v"}, "unknown prediction 'v'"),
        ("ddit", {"head_blocks": 1}, "all blocks run in the patch size of the step"),
        ("sparsedit", {"fewest": 0.0}, "fewest 0 is out of range"),
        ("sparsedit", {"fewest": math.nan}, "fewest nan is out of range"),
        ("tome", {"members": 0}, "members 0 must be at least 1"),
        ("tome", {"fewest": 2.0}, "fewest 2 above 0 and at most 1"),
    ],
)
def test_what_is_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        method_of(name, **options)


@pytest.fixture(scope="module")
def models():
    return {
        name: rewrite(*dit_call(image_size=16, depth=8), method_of(name, 4), Policy("constant", 4).timetable())
        for name in PRESETS
    }


@pytest.mark.parametrize(
    ("preset", "schedule", "message"),
    [
        (
            "tome",
            NATURALLY.timetable(),
            "schedule 'natural' does not work with method tome",
        ),
        ("sparsedit", BY_DIFFERENCE.timetable(), "schedule 'difference' does not work with method sparsedit"),
        ("ddit", NATURALLY.timetable(), "schedule 'natural' does not work with method ddit"),
        ("dc-dit", Timetable(NATURALLY, 0.25, levels=(65, 1000)), "a sample of this model can keep at most 64"),
        ("dc-dit", Timetable(NATURALLY, 0.25, levels=(17,)), "a sample of this model can keep at most 64"),
        ("ddit", Timetable(BY_DIFFERENCE, 0.25, levels=(5, 64)), "a sample of this model can keep 4, 16, 64"),
        (
            "sparsedit",
            Policy("constant", 32).timetable(),
            r"has \d+ of 64 tokens, which is .*: choose a ratio below 32x",
        ),
    ],
)
def test_schedules_of_another_model(models, preset, schedule, message):
    model = models[preset]
    with pytest.raises(UsageError, match=message):
        StepPlanner(model.spec, model.method, schedule)


@pytest.mark.parametrize(
    ("preset", "part", "name", "value"),
    [
        ("dc-dit", "method", "method", "deep"),
        ("dc-dit", "method", "method", "ddit"),
        ("dc-dit", "method", "method", "carry"),
        ("dc-dit", "method", "seed", "a"),
        ("dc-dit", "method", "max_staleness", 3),
        ("dc-dit", "schedule", "levels", "ab"),
        ("dc-dit", "schedule", "levels", [65, 1000]),
        ("dc-dit", "schedule", "kind", "difference"),
        ("ddit", "method", "prediction", "v"),
        ("ddit", "schedule", "threshold", "a"),
        ("sparsedit", "method", "fewest", -1.0),
        ("tome", "method", "router", "pool"),
        ("tome", "schedule", "kind", "natural"),
    ],
)
def test_a_file_with_them_is_damaged(models, preset, part, name, value):
    """One line for a graph file that says another thing than its graphs do; none of these may load."""
    facts = model_to_dict(models[preset])
    facts[part][name] = value
    with pytest.raises(UsageError, match="damaged or tampered with"):
        model_from_dict(facts, model_tensors(models[preset]))


def test_untouched_files_load(models):
    for model in models.values():
        back = model_from_dict(model_to_dict(model), model_tensors(model))
        assert (back.method, back.schedule) == (model.method, model.schedule)
        assert not any(torch.is_tensor(value) for value in vars(back.method).values())


def with_old_names(data, version):
    """A graph file as an earlier version wrote it: its ops had other names."""
    old = {new: name for name, new in RENAMED.items()}
    data["version"] = version
    for graph in data["graphs"].values():
        graph["version"] = version
        for node in graph["nodes"]:
            namespace, _, rest = node["target"].partition(".")
            op, _, overload = rest.partition(".")
            if namespace == "dcconvert" and op in old:
                node["target"] = f"dcconvert.{old[op]}.{overload}"


def test_graph_files_of_format_3_load():
    model = rewrite(*dit_call(), method_of("carry", max_staleness=2.0), Policy("constant", 4).timetable())
    data = model_to_dict(model)
    with_old_names(data, 3)
    data["method"]["guard"] = data["method"].pop("max_staleness")
    targets = {node["target"] for graph in data["graphs"].values() for node in graph["nodes"]}
    assert {f"dcconvert.{name}.default" for name in RENAMED if name != "row_attention"} <= targets
    back = model_from_dict(data, model_tensors(model))
    assert back.method == model.method
    for found, wanted in ((back.route_graph, model.route_graph), (back.denoise_graph, model.denoise_graph)):
        assert [node.target for node in found.graph.nodes] == [node.target for node in wanted.graph.nodes]


@pytest.mark.parametrize("name", ["carry", *PRESETS])
def test_graph_files_of_format_2_load(models, name):
    model = (
        models[name] if name in models else rewrite(*dit_call(), method_of("carry"), Policy("constant", 4).timetable())
    )
    data = model_to_dict(model)
    own = data.pop("method")
    data["options"] = {**OLD, **{option: value for option, value in own.items() if option in OLD}}
    data["options"] |= {
        "carry": {"mode": "carry"},
        "dc-dit": {"dechunk": "smoothed", "preset": "dc-dit"},
        "sparsedit": {"trunk": "sparse-dense"},
        "ddit": {"trunk": "patch-sizes"},
        "tome": {},
    }[name]
    with_old_names(data, 2)
    back = model_from_dict(data, model_tensors(model))
    assert (back.method, back.schedule) == (model.method, model.schedule)
