"""Converted models in another precision and on another device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.ir.output_gate import OutputGate
from dcconvert.passes.ir.pass_runner import run_graph_passes
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.rewrite.retarget import Retarget, retarget
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.rewritten import example_of
from tests.passes.contract_harness import check_contract
from tests.passes.harness import dit_call, relative

TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float64: 1e-6, torch.float32: 1e-6}


def tiny_dit() -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    return dit_call(16)[0]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, t, y = dit_call(16)[1]
    return x.to(dtype), t, y


def converted(dit: nn.Module, **options: Any) -> DynamicModel:
    """A quarter of 64 tokens is kept after the first step of a run."""
    chosen, place = method_of(**{"mode": "carry", **options}), next(dit.parameters())
    spending = Policy("constant", 4, warm_up=int(chosen.mode == "carry")).timetable()
    x, t, y = inputs()
    return rewrite(dit, (x.to(place), t.to(place.device), y.to(place.device)), {}, chosen, spending)


def steps(model: DynamicModel, dtype: torch.dtype) -> list[Tensor]:
    """Three steps of a run; after the first, tokens are dropped in both modes."""
    x, t, y = inputs(dtype)
    run = model.start(3)
    with torch.no_grad():
        found = [run.step({"x": x, "t": t * factor, "y": y})[0] for factor in (1, 0.9, 0.8)]
    assert all(output.dtype == dtype for output in found)
    return [output.double() for output in found]


@pytest.mark.parametrize("mode", ["carry", "chunk"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cast_after_conversion(mode, dtype):
    """It must give what a model captured in that precision gives, up to its rounding, and what the plain one gives."""
    options, tolerance = {"mode": mode, "router": "pool"}, TOLERANCES[dtype]
    plain, captured = (converted(dit, **options) for dit in (tiny_dit(), tiny_dit().to(dtype)))
    wanted = steps(plain, torch.float32)
    cast = plain.to(dtype)
    for found, other, was in zip(steps(cast, dtype), steps(captured, dtype), wanted, strict=True):
        assert relative(found, was) < tolerance
        assert relative(found, other) < tolerance
    assert cast.original(*inputs(dtype)).dtype == dtype
    assert {state.dtype for state in cast.spec.states} <= {str(dtype).removeprefix("torch.")}
    for found, was in zip(steps(cast.float(), torch.float32), wanted, strict=True):
        assert relative(found, was) < tolerance  # there and back: the weights were rounded, nothing else


def test_a_state_in_half_precision_stays_so():
    model = converted(tiny_dit(), state_dtype="fp16")
    wanted = steps(model, torch.float32)
    model = model.to(torch.bfloat16)
    assert {state.dtype for state in model.spec.states} == {"float16"}
    assert relative(steps(model, torch.bfloat16)[2], wanted[2]) < TOLERANCES[torch.bfloat16]


def test_each_model_on_shared_weights_follows():
    """The weights are cast with the first one; the graphs of the second must notice."""
    dit = tiny_dit()
    first, second = (converted(dit, mode=mode) for mode in ("carry", "chunk"))
    for model in (first, second):
        steps(model.to(torch.bfloat16), torch.bfloat16)


def test_a_cast_model_is_saved_and_loaded(tmp_path):
    from dcconvert.passes.serialise.graph_json import model_from_dict, model_tensors, model_to_dict

    model = converted(tiny_dit()).to(torch.bfloat16)
    again = model_from_dict(model_to_dict(model), model_tensors(model))
    for found, wanted in zip(steps(again, torch.bfloat16), steps(model, torch.bfloat16), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_only_precisions_that_models_run_in():
    model = converted(tiny_dit())
    with pytest.raises(UsageError, match=r"cannot be cast to torch.float8_e4m3fn: choose one of torch.float16"):
        model.to(torch.float8_e4m3fn)


def prepared(graph: str = "denoise", mode: str = "chunk") -> tuple[GraphModule, dict[str, Any]]:
    """A graph of a converted model, and what it takes."""
    model = converted(tiny_dit(), mode=mode)
    names, example = model.spec.inputs_of(graph), example_of(model)
    return model.graph(graph), {name: example[name] for name in names}


CPU, META, HALF = torch.empty(0), torch.empty(0, device="meta"), torch.empty(0, dtype=torch.bfloat16)


@pytest.mark.parametrize("mode", ["carry", "chunk"])
@pytest.mark.parametrize("name", ["original", "route", "denoise"])
def test_graphs_follow_to_another_device(mode, name):
    """Device `meta` has no numbers and needs no GPU: a call that meets a tensor left on the CPU raises."""
    graph, example = prepared(name, mode)
    with torch.no_grad():
        wanted = graph(*example.values())
    there = {key: value.to("meta") for key, value in example.items()}
    found = retarget(graph.to("meta"), there, CPU, META)
    assert [(value.shape, value.device.type) for value in found] == [(value.shape, "meta") for value in wanted]


def test_a_model_on_another_device_keeps_its_spec():
    model = converted(tiny_dit())
    spec = model.spec
    assert model.to("meta").spec == spec


def cast(name: str, mode: str = "chunk") -> tuple[GraphModule, dict[str, Any], OutputGate]:
    """A graph whose weights were cast to bfloat16, what it takes now, and what it gave before."""
    graph, example = prepared(name, mode)
    gate = OutputGate(graph, example)
    half = {key: v.bfloat16() if v.is_floating_point() and key != "t" else v for key, v in example.items()}
    return graph.to(torch.bfloat16), half, gate


@pytest.mark.parametrize("mode", ["carry", "chunk"])
@pytest.mark.parametrize("name", ["original", "denoise"])
def test_a_broken_cast_is_stopped(mode, name):
    graph, half, gate = cast(name, mode)
    check_contract(Retarget(half, CPU, HALF), graph, gate=gate)


def test_a_cast_that_is_forgotten_is_stopped():
    class Forgetful(Retarget):
        def wrong(self, node: Node) -> list[tuple[Node, torch.dtype]]:
            return []

    graph, half, gate = cast("original")
    with pytest.raises(CheckFailedError, match=r"Forgetful left a graph that does not run \(.* dtype"):
        run_graph_passes(graph, [Forgetful(half, CPU, HALF)], gate=gate)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["carry", "chunk"])
@pytest.mark.parametrize("packing", ["rows", "varlen"])
def test_on_a_gpu(mode, packing):
    """Moved there, or converted there: the same results as on the CPU."""
    if mode == "carry" and packing == "varlen":
        pytest.skip("mode carry attends to all tokens and has one packing")
    options = {"mode": mode, "packing": packing, "router": "pool"}
    wanted = steps(converted(tiny_dit(), **options), torch.float32)
    moved = converted(tiny_dit(), **options).cuda()
    there = converted(tiny_dit().cuda(), **options)
    x, t, y = (value.cuda() for value in inputs())
    for model in (moved, there):
        run = model.start(3)
        with torch.no_grad():
            found = [run.step({"x": x, "t": t * factor, "y": y})[0].cpu() for factor in (1, 0.9, 0.8)]
        assert all(relative(a.double(), b) < 1e-4 for a, b in zip(found, wanted, strict=True))
