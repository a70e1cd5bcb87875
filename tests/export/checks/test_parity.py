"""Each check passes on a sound model and fails on one that is broken in the way it is there to find."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from polygraphy.logger import G_LOGGER
from torch import Tensor

from dcconvert.export.buckets import Bucket
from dcconvert.export.checks.parity import (
    IDENTITY_TOLERANCE,
    RUNTIME_TOLERANCE,
    Case,
    Check,
    as_array,
    check_batch_invariance,
    check_identity,
    check_isolation,
    check_runtime,
    compare,
    denoise_case,
    relative_error,
    require,
)
from dcconvert.export.onnx.export import export_onnx
from dcconvert.export.onnx.lowerings import PORTABLE, Lowerings, op, padded_attention
from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.spec import output_names
from dcconvert.passes.planning.chunk_plan import Plan
from dcconvert.passes.runtime.model import DynamicModel
from tests.export.harness import BATCH, CONFIG, inputs

TORCH_CHECKS = (check_identity, check_isolation, check_batch_invariance)
BUCKETS = (Bucket(1, 6, 1, 6, 6), Bucket(3, 18, 3, 6, 6), Bucket(3, 60, 3, 16, 4))
LABELS = [
    "route, batch 1",
    "route, batch 3",
    "denoise, batch 1, 6 tokens per sample",
    "denoise, batch 3, 6 tokens per sample",
    "denoise, batch 3, 16 tokens per sample",
]


def run(check: Callable[..., Check], model: DynamicModel) -> Check:
    """A check on fresh inputs; it is consistent with `require` and fits into JSON."""
    result = check(model, inputs())
    if result.passed:
        require([result])
    else:
        with pytest.raises(CheckFailedError, match=result.name):
            require([result])
    return result


class Broken(DynamicModel):
    """A sound model whose outputs go through `spoil(output, live, plan)`, and whose plans through `replan(plan)`."""

    def __init__(self, model: DynamicModel, spoil: Callable[..., Tensor], replan: Callable[[Plan], Plan]) -> None:
        super().__init__(model.graphs, model.planner)
        self.spoil, self.replan = spoil, replan

    def denoise(self, inputs: Any, live: Any, plan: Any, state: Any = None) -> list[Any]:
        return [self.spoil(output, live, plan) for output in super().denoise(inputs, live, self.replan(plan), state)]


@pytest.fixture
def broken(rows_model) -> Callable[..., DynamicModel]:
    def make(spoil: Any = lambda output, live, plan: output, replan: Any = lambda plan: plan) -> DynamicModel:
        return Broken(rows_model, spoil, replan)

    return make


# Sound models


@pytest.mark.parametrize("check", TORCH_CHECKS)
@pytest.mark.parametrize("packing", ["rows", "bins"])
def test_a_sound_model_passes(check, packing, request):
    result = run(check, request.getfixturevalue(f"{packing}_model"))
    assert result.passed
    assert 0 <= result.value < result.tolerance / 3


def test_torch_and_onnx_runtime_agree(rows_model, rows_onnx):
    ticks: list[str] = []
    checks = check_runtime(rows_model, rows_onnx, inputs, BUCKETS, ticks.append)
    assert [check.name for check in checks] == LABELS
    assert ticks == LABELS[2:]
    require(checks)
    assert all(0 < check.value < RUNTIME_TOLERANCE / 3 for check in checks)


def test_torch_and_onnx_runtime_agree_in_bins(bins_model, bins_onnx):
    require(check_runtime(bins_model, bins_onnx, inputs, (Bucket(3, 36, 3, 12, 3), Bucket(3, 60, 4, 16, 4))))


def blind(q: Any, k: Any, v: Any, row_lengths: Any, scale: float) -> Any:
    """Row attention that attends to the padding of a row."""
    everything = op.Mul(row_lengths, op.Constant(value_int=0)) + op.Squeeze(op.Shape(k, start=2, end=3))
    return padded_attention(q, k, v, everything, scale)


def test_a_runtime_that_attends_to_padding_is_found(rows_model, tmp_path):
    blinded: Any = {**PORTABLE.functions, torch.ops.dcconvert.padded_attention.default: blind}
    export_onnx(rows_model, tmp_path, Lowerings(PORTABLE.opset, blinded))
    failed = [check.name for check in check_runtime(rows_model, tmp_path, inputs, BUCKETS) if not check.passed]
    assert failed == LABELS[2:]


# Broken models


def test_changed_weights_are_not_the_original(rows_model):
    model = rows_model.with_schedule(rows_model.schedule)
    model.denoise_graph = copy.deepcopy(model.denoise_graph)
    assert run(check_identity, model).passed
    with torch.no_grad():
        model.denoise_graph.get_parameter("blocks.1.mlp.fc1.weight").mul_(1.01)
    result = run(check_identity, model)
    assert not result.passed
    assert IDENTITY_TOLERANCE < result.value < 0.1


def test_outputs_in_another_order_are_not_the_original(broken):
    assert not run(check_identity, broken(lambda output, live, plan: output.flip(0))).passed


def test_a_packing_that_works_only_in_tight_plans_is_not_the_original(broken):
    def spoil(output: Tensor, live: dict[str, Tensor], plan: Plan) -> Tensor:
        return output * (1 + 1e-3 * (plan.packed_index.size > plan.kept))

    assert not run(check_identity, broken(spoil)).passed


def test_a_leak_between_samples_is_found(broken):
    def spoil(output: Tensor, live: dict[str, Tensor], plan: Plan) -> Tensor:
        return output + 1e-8 * live["h"].sum()

    model = broken(spoil)
    assert run(check_identity, model).passed  # far too little for the other checks to see
    assert not run(check_isolation, model).passed


def test_updates_of_another_sample_are_found(broken):
    def replan(plan: Plan) -> Plan:
        return replace(plan, fill_index=np.roll(plan.fill_index, 1, axis=0))

    for check in TORCH_CHECKS:
        assert not run(check, broken(replan=replan)).passed


def test_keys_of_another_sample_are_found(broken):
    """One slot too many: the unused one repeats a key of its own sample, so give it one of the next."""

    def replan(plan: Plan) -> Plan:
        grid = plan.grid_index.copy()
        grid[:, 0] = np.roll(grid[:, 0], 1)
        return replace(plan, grid_index=grid)

    assert not run(check_isolation, broken(replan=replan)).passed
    assert not run(check_batch_invariance, broken(replan=replan)).passed


def test_dependence_on_the_size_of_the_batch_is_found(broken):
    model = broken(lambda output, live, plan: output * (1 + 1e-4 * len(output)))
    assert not run(check_batch_invariance, model).passed
    assert run(check_isolation, model).passed


NEVER_FINITE = {
    "always": lambda plan: True,
    "in loose plans only": lambda plan: plan.packed_index.size > plan.kept,
    "alone only": lambda plan: len(plan.keep) == 1,
    "together only": lambda plan: len(plan.keep) > 1,
}


@pytest.mark.parametrize(
    ("check", "when"),
    [
        *((check, "always") for check in TORCH_CHECKS),
        (check_identity, "in loose plans only"),
        (check_batch_invariance, "alone only"),
        (check_batch_invariance, "together only"),
    ],
)
@pytest.mark.parametrize("everywhere", [True, False])
def test_nan_never_passes(check, when, everywhere, broken):
    def spoil(output: Tensor, live: dict[str, Tensor], plan: Plan) -> Tensor:
        if NEVER_FINITE[when](plan):
            output = output.clone()
            output[... if everywhere else (0, 0, 0, 0)] = math.nan
        return output

    assert not run(check, broken(spoil)).passed


def doctor(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change one weight of an ONNX file: the first layer of its first MLP, the only kind of this shape."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if list(t.dims) == [CONFIG.width, 4 * CONFIG.width])
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(model, path)


@pytest.mark.parametrize("change", [lambda w: w * np.float32(1.05), lambda w: w * np.float32(np.nan)])
@pytest.mark.parametrize("graph", ["route", "denoise"])
def test_a_doctored_onnx_file_is_found(graph, change, rows_model, rows_onnx, tmp_path):
    for name in ("route", "denoise"):
        (tmp_path / f"{name}.onnx").write_bytes((rows_onnx / f"{name}.onnx").read_bytes())
    doctor(tmp_path / f"{graph}.onnx", change)
    checks = check_runtime(rows_model, tmp_path, inputs, BUCKETS)
    assert [check.passed for check in checks] == [not check.name.startswith(graph) for check in checks]
    with pytest.raises(CheckFailedError, match=f"check '{graph}, batch 1"):
        require(checks)


# One comparison


@pytest.fixture(scope="module")
def identity(tmp_path_factory) -> Path:
    """x, y -> x, y as `first` and `second`."""
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y", "first", "second")]
    nodes = [helper.make_node("Identity", ["x"], ["first"]), helper.make_node("Identity", ["y"], ["second"])]
    graph = helper.make_graph(nodes, "identity", sides[:2], sides[2:])
    path = tmp_path_factory.mktemp("identity") / "identity.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def case(x: Any, first: Any, y: Any = (1, 2), second: Any = (1, 2), label: str = "one") -> Case:
    x, y, first, second = (np.asarray(value, np.float32) for value in (x, y, first, second))
    return Case(label, {"x": x, "y": y}, {"first": first, "second": second})


@pytest.mark.parametrize(
    ("found", "wanted", "value"),
    [
        ([0, 1], [0, 1], 0),
        ([0.5e-4, 1], [0, 1], 0.5e-4),  # small values, up to the tolerance itself
        ([3e-4, 1], [0, 1], 3e-4),
        ([0, 1000.05], [0, 1000], 0.5e-4),  # a large value, in proportion to it
        ([0, 1000.3], [0, 1000], 3e-4),
        ([0.05, 1000], [0, 1000], 0.05 / 707.1),  # a small value among large ones: to their root mean square
        ([0.3, 1000], [0, 1000], 0.3 / 707.1),
        ([3e-4, 0], [1e-4, 0], 2e-4),  # all values small: no smaller scale than one
    ],
)
def test_differences_are_measured_absolutely_or_relatively(found, wanted, value, identity):
    for comparison in (case(found, wanted), case([1, 2], [1, 2], found, wanted)):
        (check,) = compare(identity, [comparison])
        assert check.value == pytest.approx(value, rel=0.05, abs=1e-9)
        assert check.passed == (value <= RUNTIME_TOLERANCE)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_never_agree(bad, identity):
    sound, spoiled = [1.0, 2.0], [1.0, bad]
    for found, wanted in ((spoiled, sound), (sound, spoiled), (spoiled, spoiled)):
        for comparison in (case(found, wanted), case(sound, sound, found, wanted)):
            (check,) = compare(identity, [comparison])
            assert not check.passed


def test_every_case_is_judged_alone(identity):
    cases = [case([0], [0], label="a"), case([1], [1.1], label="b"), case([5], [5], label="c")]
    checks = compare(identity, cases)
    assert [(check.name, check.passed) for check in checks] == [("a", True), ("b", False), ("c", True)]


def test_an_output_of_another_shape_never_agrees(identity):
    """Though its values are equal where numpy repeats them: polygraphy's verdict counts too."""
    (check,) = compare(identity, [case([1, 1], [1])])
    assert not check.passed


def test_polygraphy_is_quiet_and_left_as_it_was(identity, capfd):
    before = G_LOGGER.module_severity.get()
    compare(identity, [case([1], [3])])
    assert G_LOGGER.module_severity.get() == before
    assert capfd.readouterr() == ("", "")


# Parts


def test_require_names_the_first_failure():
    sound, bad, worse = (Check(n, v, 0.5, f"how {n}") for n, v in (("fine", 0.5), ("bad", 0.75), ("worse", math.nan)))
    require([])
    require([sound])
    with pytest.raises(CheckFailedError, match=r"^check 'bad' failed: 0\.75 is above 0\.5 \(how bad\)$"):
        require([sound, bad, worse])
    with pytest.raises(CheckFailedError, match="check 'worse' failed: nan"):
        require([sound, worse])


def test_a_check_fits_into_the_report():
    data = json.loads(json.dumps(Check("name", 1e-7, 1e-5, "how").as_dict(), allow_nan=False))
    assert data == {"name": "name", "value": 1e-7, "tolerance": 1e-5, "detail": "how", "passed": True}


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.ones(1)))


def test_what_denoise_is_fed(rows_model):
    given = inputs()
    with torch.no_grad():
        _, live = rows_model.route(given)
    feed = denoise_case(
        "all", rows_model, given, live, rows_model.planner.full_plan(BATCH), rows_model.empty_state(BATCH)
    ).feed
    assert tuple(feed) == rows_model.spec.denoise_inputs
    assert all(isinstance(value, np.ndarray) and value.flags.c_contiguous for value in feed.values())


def test_arrays_and_names():
    assert as_array(torch.arange(6).view(2, 3).t()).flags.c_contiguous
    assert output_names(1) == ("output",)
    assert output_names(2) == ("output_0", "output_1")
