"""WriteInPlace: the same numbers, in the tensors that were given."""

from __future__ import annotations

import pytest
import torch

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.pass_runner import run_graph_passes
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.rewrite.write_in_place import WriteInPlace
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.rewritten import example_of
from tests.passes.contract_harness import check_contract
from tests.passes.harness import dit_call


def converted(mode: str = "carry") -> DynamicModel:
    torch.manual_seed(0)
    module, args, kwargs = dit_call(16)
    return rewrite(
        module, args, kwargs, method_of(mode), Policy("constant", 4, warm_up=int(mode == "carry")).timetable()
    )


def steps(model: DynamicModel) -> list[torch.Tensor]:
    """Three steps of a run; after the first, tokens are dropped."""
    run, inputs = model.start(3), model.spec.example(3)
    return [run.step({**inputs, "t": torch.full((3,), t)})[0] for t in (900.0, 800.0, 700.0)]


def test_a_state_that_is_written_in_place():
    model = converted()
    wanted = steps(model)
    [record] = run_graph_passes(model.denoise_graph, [WriteInPlace()])
    assert record.matches == len(model.spec.states)
    for found, was in zip(steps(model), wanted, strict=True):
        torch.testing.assert_close(found, was, rtol=0, atol=0)
    state, inputs = model.empty_state(3), model.spec.example(3)
    tensors = dict(state.values)
    with torch.no_grad():
        model.denoise(inputs, model.route(inputs)[1], model.planner.full_plan(3), state)
    assert all(state.values[name] is tensor and tensor.any() for name, tensor in tensors.items())


def test_a_graph_without_states():
    with pytest.raises(UnsupportedModelError, match="WriteInPlace found nothing to do"):
        run_graph_passes(converted("chunk").denoise_graph, [WriteInPlace()])


def test_a_broken_one_is_stopped():
    model = converted()
    check_contract(WriteInPlace(), model.denoise_graph, example_of(model))
