"""OpenVINO: whole runs in every mode give what torch gives, on plans with padding too."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest

from dcconvert.export.runtimes.openvino import OpenVinoModel
from dcconvert.passes.ir.errors import UsageError
from tests.export.harness import TOKENS, arrays, tensors

pytest.importorskip("openvino", reason="OpenVINO is not installed")

KEPT = ((TOKENS,) * 3, (8, 2, 5), (TOKENS, 4, 4), (3, 3, 3))


def at(step: int) -> dict[str, np.ndarray]:
    return {**arrays(3, step), "t": np.full(3, 900.0 - 100 * step, np.float32)}


@pytest.mark.parametrize("mode", ["rows", "carry", "steps"])
def test_runs_give_what_torch_gives(mode, request):
    model, folder = (request.getfixturevalue(f"{mode}_{what}") for what in ("model", "onnx"))
    run, beside = OpenVinoModel(folder, model.planner, threads=1).start(3), model.start(3)
    for step, kept in enumerate(KEPT):
        counts = np.array(kept) // TOKENS * TOKENS if mode == "steps" else np.array(kept)
        wanted = beside.step(tensors(at(step)), counts)[0].detach().numpy()
        np.testing.assert_allclose(run.step(at(step), counts)[0], wanted, rtol=1e-4, atol=1e-5)
        assert run.kept.tolist() == beside.kept.tolist()


def test_a_result_is_not_changed_by_the_next_call(steps_model, steps_onnx):
    model = OpenVinoModel(steps_onnx, steps_model.planner, threads=1)
    first = model.start(3).step(at(0))[0]
    kept = first.copy()
    model.start(3).step(at(1))
    np.testing.assert_array_equal(first, kept)


def test_graphs_whose_masks_a_version_would_drop_are_refused(steps_model, steps_onnx, tmp_path):
    for path in steps_onnx.glob("*.onnx"):
        graph = onnx.load(str(path))
        graph.opset_import[0].version = 24
        onnx.save(graph, str(tmp_path / path.name))
    with pytest.raises(UsageError, match=r"opset 24.*convert the model again"):
        OpenVinoModel(tmp_path, steps_model.planner)


def test_what_is_missing_is_one_line(steps_model, tmp_path, steps_onnx, monkeypatch):
    with pytest.raises(UsageError, match=r"cannot read .*full\.onnx"):
        OpenVinoModel(tmp_path, steps_model.planner)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"pip install 'dcconvert\[openvino\]'"):
        OpenVinoModel(steps_onnx, steps_model.planner)
