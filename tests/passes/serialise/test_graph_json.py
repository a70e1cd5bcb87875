"""Graphs as JSON: what comes back is bit for bit what went in, and a file can ask for nothing else."""

from __future__ import annotations

import json
import math
import operator
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from dcconvert.passes.ir.errors import CheckFailedError, UnsupportedModelError
from dcconvert.passes.ir.graph_tools import placeholders
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import CURVE, Policy, Timetable
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.model import DynamicModel, Graphs
from dcconvert.passes.serialise.graph_json import (
    decode,
    encode,
    graph_from_dict,
    graph_to_dict,
    model_from_dict,
    model_tensors,
    model_to_dict,
)
from tests.passes.carry_harness import TAUS, at, carried, flat
from tests.passes.harness import BATCH, Block, Call, TinyModel, diffusers_call, dit_call, pixart_call, tiny_inputs

aten = torch.ops.aten
HALF = Policy("constant", 2).timetable()
CALLS: dict[str, Callable[[], Call]] = {"dit": dit_call, "diffusers": diffusers_call, "pixart": pixart_call}
CASES = [(name, packing) for name in CALLS for packing in ("rows", "bins") if (name, packing) != ("pixart", "bins")]


def through_json(data: Any) -> Any:
    return json.loads(json.dumps(data, allow_nan=False))


def through_files(model: DynamicModel, folder: Path) -> DynamicModel:
    save_file(model_tensors(model), folder / "model.safetensors")
    (folder / "graph.json").write_text(json.dumps(model_to_dict(model), allow_nan=False))
    return model_from_dict(json.loads((folder / "graph.json").read_text()), load_file(folder / "model.safetensors"))


def assert_same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


# Whole models


@pytest.mark.parametrize(("name", "packing"), CASES)
def test_a_model_runs_bit_for_bit_after_files(name, packing, tmp_path):
    module, args, kwargs = CALLS[name]()
    model = rewrite(module, args, kwargs, method_of("chunk", packing=packing), HALF)
    back = through_files(model, tmp_path)
    with torch.no_grad():
        assert_same(back(*args, **kwargs), model(*args, **kwargs))
        assert_same(back.original(*args, **kwargs), model.original(*args, **kwargs))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", ["model", "fp16"])
def test_a_carry_model_runs_bit_for_bit_after_files(name, dtype, tmp_path):
    """Every step of a run, and calls that follow each other."""
    module, args, kwargs = CALLS[name]()
    schedule = Policy("falling", 2, warm_up=1, refresh=3).timetable(TAUS)
    model = rewrite(module, args, kwargs, method_of("carry", state_dtype=dtype), schedule)
    back = through_files(model, tmp_path)
    assert (back.spec, back.method, back.schedule) == (model.spec, model.method, schedule)
    runs = back.start(BATCH), model.start(BATCH)
    with torch.no_grad():
        for number, tau in enumerate(TAUS):
            now = at(model, (module, args, kwargs), tau, number)
            assert_same(*(run.step(flat(model, now)) for run in runs))
            assert_same(back(*now[1], **now[2]), model(*now[1], **now[2]))
            assert_same(back.original(*now[1], **now[2]), model.original(*now[1], **now[2]))
        assert runs[0].last_plan is not None
        assert not runs[0].last_plan.keep.all()
    assert through_json(model_to_dict(back)) == through_json(model_to_dict(model))


def test_the_knots_of_a_curve_come_back(tmp_path):
    model = carried("tiny")[0].with_schedule(Policy(CURVE, 2, knots=((0.25, 0.5), (0.75, 0.25))).timetable())
    assert through_files(model, tmp_path).schedule == model.schedule


@pytest.fixture(scope="module")
def tiny() -> DynamicModel:
    torch.manual_seed(0)
    options = method_of("chunk", router="cosine", seed=3)
    schedule = Timetable(Policy("rising", 2), 0.5, centre=0.25)
    return rewrite(TinyModel(Block() for _ in range(3)), tiny_inputs(), {}, options, schedule, timestep_scale=1.0)


@pytest.fixture
def data(tiny) -> Any:
    """A file that a test may spoil."""
    return through_json(model_to_dict(tiny))


@pytest.fixture(scope="module")
def tensors(tiny) -> dict[str, Tensor]:
    return model_tensors(tiny)


def test_the_facts_come_back(tiny, data, tensors):
    back = model_from_dict(data, tensors)
    assert (back.spec, back.method, back.schedule) == (tiny.spec, tiny.method, tiny.schedule)
    assert back.records == tiny.records
    assert back.summary() == tiny.summary()
    assert through_json(model_to_dict(back)) == through_json(model_to_dict(tiny))


def test_nodes_come_back_in_order_with_their_names(tiny, data, tensors):
    back = model_from_dict(data, tensors)
    for name in ("route_graph", "denoise_graph", "original_graph"):
        found, wanted = getattr(back, name), getattr(tiny, name)
        assert [(n.name, n.op) for n in found.graph.nodes] == [(n.name, n.op) for n in wanted.graph.nodes]
        assert found.code == wanted.code


def test_numbers_that_json_lacks_survive_in_the_facts(data, tensors):
    data["spec"]["input_specs"][1]["value"] = {"float": "-inf"}
    back = model_from_dict(data, tensors)
    assert back.spec.input_specs[1].value == -math.inf
    assert through_json(model_to_dict(back)) == data


def test_the_graphs_share_one_frozen_parameter_for_each_weight(data, tensors):
    back = model_from_dict(data, tensors)
    assert {name for name, _ in back.original_graph.named_parameters()} == set(tensors)
    assert not any(p.requires_grad for p in back.parameters())
    for graph in (back.route_graph, back.denoise_graph):
        for name, parameter in graph.named_parameters():
            assert parameter is back.original_graph.get_parameter(name)
            assert parameter.data_ptr() == tensors[name].data_ptr()


def test_the_callers_tensors_are_left_alone(data, tensors):
    given = {name: nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}
    model_from_dict(data, given)
    assert all(tensor.requires_grad for tensor in given.values())


# Tensors


class Holder(nn.Module):
    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


def reading(**tensors: Tensor) -> GraphModule:
    """A graph that returns the tensors it holds."""
    graph = Graph()
    graph.output(tuple([graph.get_attr(name) for name in tensors]))
    return GraphModule(Holder(**tensors), graph)


def holding(tiny: DynamicModel, route: GraphModule, denoise: GraphModule) -> DynamicModel:
    return DynamicModel(Graphs(route, denoise, reading()), StepPlanner(tiny.spec, tiny.method, HALF))


def test_tied_and_strided_tensors_fit_into_safetensors(tiny, tmp_path):
    weight, table = nn.Parameter(torch.randn(4, 3)), torch.randn(6, 2)
    first = reading(a=weight, same=weight, part=weight.detach()[:2])
    second = reading(a=weight, turned=weight.detach().t(), table=table, row=table[1], empty=torch.empty(0))
    found = model_tensors(holding(tiny, first, second))
    save_file(found, tmp_path / "x.safetensors")
    back = load_file(tmp_path / "x.safetensors")
    wanted = dict(zip(["a", "same", "part"], first(), strict=True))
    wanted |= dict(zip(["a", "turned", "table", "row", "empty"], second(), strict=True))
    assert set(back) == set(wanted)
    for name, tensor in wanted.items():
        assert_same(back[name], tensor.detach())
    assert found["a"].data_ptr() == weight.data_ptr()
    assert found["table"].data_ptr() == table.data_ptr()


def test_a_model_with_tied_weights_runs_bit_for_bit_after_files(tmp_path):
    blocks = [Block() for _ in range(3)]
    blocks[2].qkv.weight = blocks[0].qkv.weight  # head and tail: on both sides of the split
    blocks[1].mlp = blocks[0].mlp
    model = rewrite(TinyModel(blocks), tiny_inputs(), {}, method_of("chunk"), HALF)
    back = through_files(model, tmp_path)
    model.requires_grad_(False)  # as those from files: torch may choose another kernel for weights in training
    inputs = tiny_inputs()
    with torch.no_grad():
        assert_same(back(*inputs), model(*inputs))
        assert_same(back.original(*inputs), model.original(*inputs))


def test_tensors_after_a_change_of_dtype():
    model = rewrite(TinyModel(Block() for _ in range(3)), tiny_inputs(), {}, method_of("chunk"), HALF).double()
    found = model_tensors(model)  # every graph has its own copy of a buffer by now
    assert {t.dtype for t in found.values() if t.is_floating_point()} == {torch.float64}
    model_from_dict(through_json(model_to_dict(model)), found)


def test_one_name_for_two_tensors_is_refused(tiny):
    with pytest.raises(CheckFailedError, match="different tensors as a"):
        model_tensors(holding(tiny, reading(a=torch.zeros(2)), reading(a=torch.ones(2))))


def test_parameters_and_buffers_stay_what_they_were():
    graph = reading(
        weight=nn.Parameter(torch.randn(2)), table=torch.arange(3), count=nn.Parameter(torch.ones(1), False)
    )
    back = graph_from_dict(through_json(graph_to_dict(graph)), graph.state_dict())
    assert sorted(name for name, _ in back.named_parameters()) == ["count", "weight"]
    assert [name for name, _ in back.named_buffers()] == ["table"]
    assert not any(p.requires_grad for p in back.parameters())


# One graph


def round_trip(graph: Graph, root: nn.Module | None = None) -> GraphModule:
    module = GraphModule(root or nn.Module(), graph)
    return graph_from_dict(through_json(graph_to_dict(module)), module.state_dict())


def test_arguments_of_every_kind():
    values = [
        None, True, False, 0, -7, 2**70, 0.1, -0.0, math.inf, -math.inf, "tanh", "'); x = (\"\n\\", [], (),
        [1, (2.5, [None])], slice(None), slice(1, None, -1), torch.float16, torch.int64, torch.bool, torch.strided,
        torch.channels_last, torch.contiguous_format, torch.device("cpu"), torch.device("cuda", 1),
    ]  # fmt: skip
    for value in values:
        found = decode(through_json(encode(value)), {})
        assert found == value
        assert type(found) is type(value)
    assert math.isnan(decode(through_json(encode(math.nan)), {}))
    assert math.copysign(1, decode(through_json(encode(-0.0)), {})) == -1


def test_arguments_reach_the_ops():
    graph = Graph()
    x = graph.placeholder("x")
    size = graph.call_function(aten.sym_size.int, (x, 0))
    size = graph.call_function(torch.sym_max, (graph.call_function(operator.mul, (size, 2)), 7))
    zeros = graph.call_function(
        aten.full.default, ([size, 2], -math.inf), {"dtype": torch.float64, "pin_memory": False}
    )
    clamped = graph.call_function(aten.clamp.default, (x, -math.inf, 0.5))
    filled = graph.call_function(aten.nan_to_num.default, (x, math.nan))
    copied = graph.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
    moved = graph.call_function(aten.to.device, (x, torch.device("cpu"), torch.float16))
    parts = graph.call_function(aten.split.Tensor, (x, 1))
    part = graph.call_function(operator.getitem, (graph.call_function(operator.getitem, (parts, slice(1, None))), 0))
    graph.output((zeros, clamped, filled, copied, moved, part, None, 3, size))
    module = GraphModule(nn.Module(), graph)
    value = torch.tensor([[1.0, math.nan], [-2.0, 3.0], [0.0, 0.25]])
    found, wanted = round_trip(graph)(value), module(value)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert found[0].shape == (7, 2)
    assert found[-1] == 7


def test_a_string_argument_is_only_a_string(tmp_path):
    graph = Graph()
    text = f"'\"\n); open({str(tmp_path / 'opened')!r}, 'w') #\\"
    graph.output((graph.call_function(aten.gelu.default, (graph.placeholder("x"),), {"approximate": text}), text))
    module = round_trip(graph)
    with pytest.raises(RuntimeError):
        module(torch.ones(1))
    assert not list(tmp_path.iterdir())
    assert next(iter(reversed(module.graph.nodes))).args[0][1] == text


def test_ops_in_place_and_inputs_named_like_builtins():
    graph = Graph()
    x = graph.placeholder("input")
    graph.output((graph.call_function(aten.relu_.default, (graph.call_function(aten.neg.default, (x,)),)),))
    back = round_trip(graph)
    assert [n.name for n in placeholders(back.graph)] == [n.name for n in placeholders(graph)]
    assert_same(back(torch.tensor([-1.0, 2.0])), (torch.tensor([1.0, 0.0]),))


def test_dotted_names_with_numbers_and_a_tensor_read_twice():
    root = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    graph = Graph()
    names = ("1.weight", "0.weight", "1.weight")
    graph.output(tuple([graph.get_attr(name) for name in names]))
    back = round_trip(graph, root)
    assert_same([t.detach() for t in back()], [root.get_parameter(name).detach() for name in names])


def calling(target: Any, *args: Any) -> GraphModule:
    graph = Graph()
    graph.output((graph.call_function(target, (graph.placeholder("x"), *args)),))
    return GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("target", [torch.nn.functional.relu, print, aten.relu, aten.save.default, math.sqrt])
def test_a_graph_with_another_call_cannot_be_written(target):
    with pytest.raises(UnsupportedModelError, match="cannot be written to a bundle"):
        graph_to_dict(calling(target))


@pytest.mark.parametrize("value", [1j, {"a": 1}, range(3)])
def test_a_graph_with_another_argument_cannot_be_written(value):
    with pytest.raises(UnsupportedModelError, match=r"argument of type \w+, which has no JSON form"):
        graph_to_dict(calling(aten.add.Tensor, value))


def test_submodules_cannot_be_written():
    graph = Graph()
    graph.output((graph.call_module("0", (graph.placeholder("x"),)),))
    with pytest.raises(UnsupportedModelError, match="call_module 0"):
        graph_to_dict(GraphModule(nn.Sequential(nn.ReLU()), graph))
    graph = Graph()
    graph.output((graph.get_attr("0"),))
    with pytest.raises(UnsupportedModelError, match="reads 0, which is not a tensor"):
        graph_to_dict(GraphModule(nn.Sequential(nn.ReLU()), graph))


# Call structures


class Defaulting(TinyModel):
    def forward(self, x: Tensor, t: Tensor) -> Any:
        return defaultdict(list, sample=super().forward(x, t))


def test_a_structure_that_could_not_be_read_is_not_written():
    model = rewrite(Defaulting(Block() for _ in range(3)), tiny_inputs(), {}, method_of("chunk"), HALF)
    with pytest.raises(UnsupportedModelError, match="out_spec cannot be written"):
        model_to_dict(model)


def test_ready_made_output_classes_come_back():
    module, args, kwargs = diffusers_call()
    kwargs["return_dict"] = True
    model = rewrite(module, args, kwargs, method_of("chunk"), HALF)
    back = model_from_dict(through_json(model_to_dict(model)), model_tensors(model))
    with torch.no_grad():
        found = back(*args, **kwargs)
        assert type(found).__name__ == "Transformer2DModelOutput"
        assert_same(found.sample, model(*args, **kwargs).sample)
