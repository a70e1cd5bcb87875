"""Converted models in another precision and on another device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Schedule
from dcconvert.passes.rewrite.retarget import in_place, to_device
from dcconvert.passes.runtime.model import DynamicModel
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
    spending = Schedule("constant", 4, warm_up=int(chosen.mode == "carry"))
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


def test_a_state_that_is_written_in_place():
    model = converted(tiny_dit())
    wanted = steps(model, torch.float32)
    in_place(model.denoise_graph)
    for found, was in zip(steps(model, torch.float32), wanted, strict=True):
        torch.testing.assert_close(found, was, rtol=0, atol=0)
    state = model.empty_state(3)
    tensors = dict(state.values)
    with torch.no_grad():
        given = dict(zip("xty", inputs(), strict=True))
        model.denoise(given, model.route(given)[1], model.planner.full_plan(3), state)
    assert all(state.values[name] is tensor and tensor.any() for name, tensor in tensors.items())


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


@pytest.mark.parametrize("mode", ["carry", "chunk"])
def test_graphs_follow_to_another_device(mode):
    """On fake tensors of a GPU: an op that meets a tensor left on the CPU raises."""
    model = converted(tiny_dit(), mode=mode)
    graphs = (model.route_graph, model.denoise_graph, model.original_graph)
    cuda = torch.device("cuda", 0)
    for graph in graphs:
        to_device(graph, cuda)
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def there(value: Tensor) -> Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device=cuda)

    def run(graph: nn.Module, given: list[Tensor]) -> list[Tensor]:
        weights = {name: there(tensor) for name, tensor in graph.state_dict().items()}
        return torch.func.functional_call(graph, weights, tuple(map(there, given)))

    values = dict(zip("xty", inputs(), strict=True))
    with fake, torch.no_grad():
        (original,) = run(model.original_graph, [values[name] for name in model.spec.inputs])
        _, *live = run(model.route_graph, [values[name] for name in model.spec.route_inputs])
        arrays = {n: torch.from_numpy(a) for n, a in model.planner.full_plan(3).arrays().items()}
        given = {**values, **dict(zip(model.spec.live, live, strict=True)), **arrays, **model.empty_state(3).values}
        found = run(model.denoise_graph, [given[name] for name in model.spec.denoise_inputs])
    assert {value.device for value in (original, *live, *found)} == {cuda}
    assert found[0].shape == original.shape


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
