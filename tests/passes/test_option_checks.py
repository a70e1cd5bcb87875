"""Options and schedules that do not exist or do not go together, wherever they came from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dcconvert.methods.presets import PRESETS, preset_options
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.options import Options
from dcconvert.passes.option_checks import check_options
from dcconvert.passes.pipeline import PIPELINES, pipeline_of, rewrite
from dcconvert.passes.planning.schedule import DIFFERENCE, NATURAL, Schedule
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.serialise.graph_json import model_from_dict, model_tensors, model_to_dict
from tests.passes.harness import dit_call

CHUNK = Options(mode="chunk")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_goes_together(preset):
    assert pipeline_of(preset_options(preset, 4)) in PIPELINES.values()


@pytest.mark.parametrize(
    ("mode", "name", "choices"),
    [
        ("chunk", "norm", "predictability, cosine, pool, random, merge"),
        ("chunk", "drift", "predictability, cosine, pool, random, merge"),
        ("chunk", "age", "predictability, cosine, pool, random, merge"),
        ("carry", "norm", "drift, age, predictability, cosine, pool, random"),
    ],
)
def test_routers_of_another_mode(mode, name, choices):
    with pytest.raises(UsageError, match=f"mode {mode} has no router '{name}': choose one of {choices}$"):
        check_options(Options(mode=mode, router=name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "both"}, "unknown mode 'both'"),
        ({"trunk": "deep"}, "trunk 'deep', dechunk 'gaussian': there are plain, sparse-dense, patch-sizes"),
        ({"dechunk": "none"}, "dechunk 'none'"),
        ({"packing": "tight"}, "unknown packing 'tight': choose one of rows, bins, varlen"),
        ({"prediction": "v"}, "unknown prediction 'v'"),
        ({"members": 0}, "members and neighbours at least 1"),
        ({"neighbours": 0}, "members and neighbours at least 1"),
        ({"head_blocks": -2}, "must not be negative"),
        ({"fewest": 0.0}, "fewest 0, guard 3: above 0"),
        ({"fewest": math.nan}, "above 0"),
        ({"guard": -1.0}, "above 0"),
        ({"state_dtype": "fp16"}, "mode chunk has no state"),
        ({"trunk": "sparse-dense", "packing": "bins"}, "trunk sparse-dense needs one sample a row: use packing rows"),
        ({"router": "merge", "dechunk": "smoothed"}, "token merging has the plain trunk"),
        ({"trunk": "patch-sizes", "head_blocks": 0}, "all blocks run in the patch size of the step"),
        ({"mode": "carry", "router": "drift", "dechunk": "values"}, "mode carry has only the plain trunk"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        check_options(replace(CHUNK, **change))


@pytest.fixture(scope="module")
def models():
    return {
        name: rewrite(*dit_call(image_size=16, depth=8), preset_options(name, 4), Schedule("constant", 4))
        for name in PRESETS
    }


@pytest.mark.parametrize(
    ("preset", "schedule", "message"),
    [
        ("tome", Schedule(NATURAL, 4, base=4), "schedule 'natural' is for models converted with preset dc-dit"),
        ("sparsedit", Schedule(DIFFERENCE, 4, threshold=1), "schedule 'difference' is for .* preset ddit"),
        ("ddit", Schedule(NATURAL, 4, base=4), "schedule 'natural' is for"),
        ("dc-dit", Schedule(NATURAL, 4, base=4, levels=(65, 1000)), "a sample of this model can keep at most 64"),
        ("dc-dit", Schedule(NATURAL, 4, base=4, levels=(17,)), "a sample of this model can keep at most 64"),
        ("ddit", Schedule(DIFFERENCE, 4, threshold=1, levels=(5, 64)), "a sample of this model can keep 4, 16, 64"),
        ("sparsedit", Schedule("constant", 32), r"has \d+ of 64 tokens, which is .*: ask for less than 32x"),
    ],
)
def test_schedules_of_another_model(models, preset, schedule, message):
    model = models[preset]
    with pytest.raises(UsageError, match=message):
        StepPlanner(model.spec, model.options, schedule)


@pytest.mark.parametrize(
    ("preset", "part", "name", "value"),
    [
        ("dc-dit", "options", "trunk", "deep"),
        ("dc-dit", "options", "trunk", "patch-sizes"),
        ("dc-dit", "options", "preset", 3),
        ("dc-dit", "schedule", "levels", "ab"),
        ("dc-dit", "schedule", "levels", [65, 1000]),
        ("dc-dit", "schedule", "kind", "difference"),
        ("ddit", "options", "trunk", "plain"),
        ("ddit", "options", "trunk", "sparse-dense"),
        ("ddit", "schedule", "threshold", "a"),
        ("sparsedit", "options", "trunk", "plain"),
        ("sparsedit", "options", "fewest", -1.0),
        ("tome", "options", "router", "pool"),
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
        assert (back.options, back.schedule) == (model.options, model.schedule)
        assert not any(torch.is_tensor(value) for value in vars(back.options).values())
