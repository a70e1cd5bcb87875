"""Method `steps` on the architectures there are: two graphs, a state of three updates, and no keys or values."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from benchmarks.families import FAMILIES, made
from dcconvert.export.checks.step_parity import check_steps
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.ir.spec import UPDATES
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.serialise.graph_json import model_from_dict, model_tensors, model_to_dict
from tests.passes.harness import dit_call

HALF = Policy("constant", 2).timetable()


def test_what_a_model_consists_of():
    model = rewrite(*dit_call(), method_of("steps"), HALF)
    assert set(model.graphs.named()) == {"original", "full", "skip"}
    assert model.spec.graphs == ("full", "skip")
    shapes = model.spec.state_shapes(2)
    assert list(shapes) == ["update_0", "update_1", "update_2"]
    assert set(shapes.values()) == {((2, model.spec.tokens, model.spec.width), "float32")}
    assert model.spec.state_bytes == UPDATES * model.spec.tokens * model.spec.width * 4
    assert not any("attention" in str(node.target) for node in model.skip_graph.graph.nodes)


NOT_SKIPPED = {"sd35"}  # attention of their other tokens does not go through the update
NOT_ALONE = {"latte", "hunyuan-dit"}  # what `benchmarks.families` says of them


@pytest.mark.parametrize("family", sorted(NOT_SKIPPED))
def test_a_trunk_that_cannot_be_skipped_is_said(family):
    module, args, kwargs = made(FAMILIES[family])
    with pytest.raises(UnsupportedModelError, match=r"do not go through the tokens' update.*--mode carry"):
        rewrite(module, args, kwargs, method_of("steps"), HALF)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_SKIPPED | NOT_ALONE])
def test_every_family_keeps_its_promises(family):
    module, args, kwargs = made(FAMILIES[family])
    model = rewrite(module, args, kwargs, method_of("steps"), HALF)
    checks = check_steps(model, model.spec.example(2))
    assert [check.name for check in checks if not check.passed] == []


def test_it_comes_back_from_its_graph_file():
    model = rewrite(*dit_call(), method_of("steps"), HALF)
    back = model_from_dict(model_to_dict(model), model_tensors(model))
    assert (back.method, back.schedule, back.spec) == (model.method, model.schedule, model.spec)
    with torch.no_grad():
        inputs = model.spec.example(3)
        for run in (model.start(3), back.start(3)):
            run.step(inputs)
        assert torch.equal(model.start(3).step(inputs)[0], back.start(3).step(inputs)[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data["spec"].update(updates=2), "as inputs and outputs of skip"),
        (lambda data: data["spec"].update(updates=0), "."),
        (lambda data: data["graphs"].pop("skip"), "cannot be read"),
        (lambda data: data["graphs"].update(full=data["graphs"]["original"]), "as inputs and outputs of full"),
        (lambda data: data["method"].update(method="chunk", router="pool"), "remembers updates"),
    ],
)
def test_spoiled_files_are_refused(spoil, message):
    model = rewrite(*dit_call(), method_of("steps"), HALF)
    data = copy.deepcopy(model_to_dict(model))
    spoil(data)
    with pytest.raises(UsageError, match=message):
        model_from_dict(data, model_tensors(model))


def test_it_follows_its_weights_to_another_precision():
    model = rewrite(*dit_call(), method_of("steps"), HALF)
    wanted = model.spec.example(2)
    model.double()
    inputs = {n: v.double() if v.is_floating_point() else v for n, v in wanted.items()}
    run = model.start(2)
    full, skipped = (run.step(inputs, np.full(2, kept))[0] for kept in (model.spec.tokens, 0))
    assert full.dtype == skipped.dtype == torch.float64
    torch.testing.assert_close(full, model.original_graph(*inputs.values())[0])


@pytest.mark.parametrize("ratio", [1, 2, 4, 10])
def test_a_ratio_computes_that_share_of_the_steps(ratio):
    model = rewrite(*dit_call(), method_of("steps"), Policy("constant", ratio).timetable())
    counts = model.planner.run_counts(np.linspace(1, 0.02, 50))
    assert set(counts.tolist()) <= {0, model.spec.tokens}
    assert (counts > 0).sum() == -(-50 // ratio)
    assert model.planner.bucket_counts(np.linspace(1, 0.02, 50)).tolist() == [model.spec.tokens]
