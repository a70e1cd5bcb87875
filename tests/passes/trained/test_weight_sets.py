"""Models that hold two sets of weights: the original's and trained ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.serialise.graph_json import model_from_dict, model_tensors, model_to_dict
from dcconvert.passes.trained.adapters import with_features
from dcconvert.passes.trained.weight_sets import (
    PREFIX,
    all_tensors,
    linear_weights,
    original_name,
    plainly_named,
    teacher_of,
    trained_model,
)
from tests.passes.harness import Block, TinyModel, relative, tiny_inputs

torch.manual_seed(1)
INPUTS = tiny_inputs()


@pytest.fixture
def model() -> DynamicModel:
    torch.manual_seed(0)
    module = TinyModel(Block() for _ in range(3))
    made = rewrite(module, tiny_inputs(), {}, method_of("chunk"), Policy("constant", 2).timetable(), timestep_scale=1.0)
    return made.requires_grad_(False)


def named_inputs(model: DynamicModel) -> dict[str, torch.Tensor]:
    return dict(zip(model.spec.inputs, INPUTS, strict=True))


def everything(model: DynamicModel) -> torch.Tensor:
    inputs = named_inputs(model)
    scores, live = model.route(inputs)
    return model.denoise(inputs, live, model.planner.full_plan(len(scores)))[0]


def changed(model: DynamicModel) -> dict[str, torch.Tensor]:
    """Every linear layer with other numbers, by the original's names."""
    tensors = all_tensors(model)
    return {original_name(name): tensors[name] + 0.1 for name in linear_weights(model)}


def test_the_teacher_is_the_original(model):
    inputs = INPUTS
    assert relative(everything(teacher_of(model)), model.original_graph(*inputs)[0]) < 1e-5


def test_training_changes_the_model_and_not_its_original(model):
    before = model.original_graph(*INPUTS)[0]
    other = trained_model(model, changed(model))
    torch.testing.assert_close(other.original_graph(*INPUTS)[0], before, rtol=0, atol=0)
    torch.testing.assert_close(everything(teacher_of(other)), everything(model), rtol=0, atol=0)
    assert relative(everything(other), before) > 1e-2
    assert {name for name in all_tensors(other) if name.startswith(PREFIX)} == {PREFIX + n for n in changed(model)}


def test_training_again_keeps_what_was_trained_before(model):
    first = trained_model(model, changed(model))
    name, *_ = changed(model)
    second = trained_model(first, {name: all_tensors(first)[PREFIX + name] + 1})
    assert set(all_tensors(second)) == set(all_tensors(first))
    for known, value in all_tensors(first).items():
        torch.testing.assert_close(all_tensors(second)[known], value + (known == PREFIX + name), rtol=0, atol=0)


def test_plain_names_change_no_value(model):
    other = trained_model(model, changed(model))
    plain = plainly_named(other)
    assert not any(name.startswith(PREFIX) for name in all_tensors(plain))
    torch.testing.assert_close(everything(plain), everything(other), rtol=0, atol=0)


def test_both_sets_of_weights_are_written_and_read(model):
    other = trained_model(model, changed(model))
    again = model_from_dict(model_to_dict(other), model_tensors(other))
    torch.testing.assert_close(everything(again), everything(other), rtol=0, atol=0)
    torch.testing.assert_close(everything(teacher_of(again)), everything(model), rtol=0, atol=0)


def test_a_trained_weight_whose_original_is_gone(model):
    other = trained_model(model, changed(model))
    other.original_graph = teacher_of(model).route_graph
    with pytest.raises(CheckFailedError, match="the original has no tensor"):
        teacher_of(other)


def test_features_are_what_leaves_the_trunk(model):
    teacher = with_features(teacher_of(model))
    inputs = named_inputs(model)
    scores, live = teacher.route(inputs)
    outputs = teacher.denoise(inputs, live, teacher.planner.full_plan(len(scores)))
    assert len(outputs) == 2
    assert outputs[1].shape == (len(scores), model.spec.tokens, model.spec.width)
    torch.testing.assert_close(outputs[0], everything(model), rtol=0, atol=0)


def test_features_of_a_graph_without_dechunk():
    torch.manual_seed(0)
    module = TinyModel(Block() for _ in range(3))
    carried = rewrite(
        module, tiny_inputs(), {}, method_of("carry"), Policy("constant", 2).timetable(), timestep_scale=1.0
    )
    with pytest.raises(CheckFailedError, match="0 dechunks"):
        with_features(carried)


def test_linear_weights_are_matrices(model):
    tensors = all_tensors(model)
    names = linear_weights(model)
    assert names
    assert all(tensors[name].ndim == 2 and isinstance(tensors[name], nn.Parameter) for name in names)
