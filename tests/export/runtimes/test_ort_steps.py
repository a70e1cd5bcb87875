"""Mode steps on ONNX Runtime: the same outputs as in torch, with samples at steps of their own."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

from dcconvert.export.buckets import choose_buckets
from dcconvert.export.checks.parity import require
from dcconvert.export.checks.step_parity import check_step_runtime, check_steps
from dcconvert.export.runtimes.ort import CPU, OrtModel
from dcconvert.export.runtimes.ort_static import StaticModel
from dcconvert.passes.runtime.step_run import StepRun
from tests.export.harness import TOKENS, arrays, convert, tensors

BUCKETS = choose_buckets([1, 2, 4], [TOKENS], TOKENS)
ALL, NONE = (1, 1, 1), (0, 0, 0)


def at(step: int) -> dict[str, np.ndarray]:
    return {**arrays(3, step), "t": np.array([900.0, 800, 700], np.float32) - 60 * step}


def test_the_files_there_are(steps_onnx):
    assert sorted(path.name for path in steps_onnx.glob("*.onnx")) == ["full.onnx", "skip.onnx"]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_runs_give_what_torch_gives(kind, steps_model, steps_onnx):
    runtime: Any = (
        OrtModel(steps_onnx, steps_model.planner, threads=1)
        if kind == "dynamic"
        else StaticModel(steps_onnx, steps_model.planner, BUCKETS, CPU, threads=1)
    )
    run, beside = runtime.start(3), steps_model.start(3)
    for step, kept in enumerate([ALL, NONE, ALL, (1, 0, 0), (0, 1, 1), NONE, ALL, NONE, (1, 1, 0), NONE]):
        counts = np.array(kept) * TOKENS
        wanted = beside.step(tensors(at(step)), counts)[0].numpy()
        np.testing.assert_allclose(run.step(at(step), counts)[0], wanted, rtol=1e-4, atol=1e-5)
        assert run.kept.tolist() == beside.kept.tolist() == counts.tolist()


def test_a_static_runtime_binds_each_slot_once(steps_model, steps_onnx):
    """Full steps write to the three slots in turns, skipped steps read them where they are."""
    static = StaticModel(steps_onnx, steps_model.planner, BUCKETS, CPU, threads=1)
    run = static.start(3)
    for step in range(12):
        run.step(at(step), np.full(3, TOKENS if step % 2 == 0 else 0))
    assert sum(key[0] == "full" for key in static.steps) == 3
    assert sum(key[0] == "skip" for key in static.steps) == 1
    before = dict(static.steps)
    del run
    gc.collect()
    second = static.start(3)
    for step in range(4):
        second.step(at(step), np.full(3, TOKENS if step % 2 == 0 else 0))
    assert static.steps == before


def test_every_check_passes(steps_model, steps_onnx):
    checks = check_steps(steps_model, steps_model.spec.example(2))
    checks += check_step_runtime(steps_model, steps_onnx, steps_model.spec.example, BUCKETS.batches)
    require(checks)
    assert len(checks) == 4 + 2 * len(BUCKETS.batches)


def test_checks_see_samples_that_share_an_update():
    mixed = convert("steps")

    def share(graph: Any, given: Any, made: Any) -> Any:
        *others, update = made
        return (*others, 0.5 * update + 0.5 * update.mean(0, keepdim=True))

    mixed.full_graph.register_forward_hook(share)
    failed = {check.name for check in check_steps(mixed, mixed.spec.example(2)) if not check.passed}
    assert "no sample sees another" in failed
    assert "a sample does not depend on its batch" in failed


def test_weights_of_the_run_are_used(steps_model, steps_onnx):
    run = OrtModel(steps_onnx, steps_model.planner, threads=1).start(3)
    assert isinstance(run, StepRun)
    run.step(at(0), np.full(3, TOKENS))
    once, twice = (run.step(at(1), np.zeros(3, np.int64), weights=w)[0] for w in ((1.0,), (2.0,)))
    assert np.abs(once - twice).max() > 1e-3
    with torch.no_grad():
        assert once.shape == steps_model.original_graph(*tensors(at(1)).values())[0].shape
