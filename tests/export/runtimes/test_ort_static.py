"""Buffers that stay where they are: the same results, the same addresses, and one CUDA graph a bucket and state."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from benchmarks.families import FAMILIES, made
from dcconvert.export.buckets import choose_buckets
from dcconvert.export.checks.parity import as_array
from dcconvert.export.onnx.export import export_onnx
from dcconvert.export.runtimes.ort import CPU, CUDA, OrtModel
from dcconvert.export.runtimes.ort_static import BoundStep, StaticModel
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel
from tests.export.harness import TOKENS, arrays

BUCKET_SET = choose_buckets([1, 4], [5, 9], TOKENS)
COUNTS = (16, 5, 9, 3, 16, 9)
MODES = ["rows", "carry"]


@pytest.fixture(params=MODES)
def pair(request: pytest.FixtureRequest) -> tuple[OrtModel, StaticModel]:
    """A model on ordinary sessions and on static ones."""
    model: DynamicModel = request.getfixturevalue(f"{request.param}_model")
    folder: Path = request.getfixturevalue(f"{request.param}_onnx")
    plain = OrtModel(folder, model.planner, BUCKET_SET, threads=1)
    return plain, StaticModel(folder, model.planner, BUCKET_SET, CPU, threads=1)


def at(step: int, batch: int = 3) -> dict[str, np.ndarray]:
    return arrays(batch, 17 * step) | {"t": np.full(batch, 990.0 - 110 * step, np.float32)}


def addresses(step: BoundStep) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in {**step.inputs, **step.outputs}.items()}


def test_a_run_gives_what_ordinary_sessions_give(pair):
    plain, static = pair
    runs = plain.start(3), static.start(3)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for step, count in enumerate(COUNTS):
        wanted, found = (run.step(at(step), np.full(3, count))[0] for run in runs)
        kept.append((found, wanted))
    for found, wanted in kept:  # looked at when later steps have used the same buffers
        np.testing.assert_array_equal(found, wanted)


def test_two_runs_at_once_do_not_mix(pair):
    plain, static = pair

    def steps_of(runs: list[Any]) -> list[list[np.ndarray]]:
        """Three steps of each run, in turns; run i on other images than the others."""
        found: list[list[np.ndarray]] = [[] for _ in runs]
        for step in range(3):
            for i, run in enumerate(runs):
                found[i].append(run.step(at(step + i), np.full(3, 7))[0])
        return found

    wanted = steps_of([plain.start(3), plain.start(3)])
    np.testing.assert_array_equal(steps_of([static.start(3), static.start(3)]), wanted)


def test_a_step_is_bound_once_a_bucket(pair):
    _, static = pair
    run: Any = static.start(3)
    seen: dict[Any, dict[str, int]] = {}
    for step, count in enumerate(COUNTS):
        run.step(at(step), np.full(3, count))
        for key, bound in static.steps.items():
            assert seen.setdefault(key, addresses(bound)) == addresses(bound)
    assert sum(key[0] == "route" for key in seen) == 1
    assert sum(key[0] == "denoise" for key in seen) == 3  # lengths 5, 9 and 16


def test_buffers_go_to_the_next_run_when_one_is_over(carry_model, carry_onnx):
    static = StaticModel(carry_onnx, carry_model.planner, BUCKET_SET, CPU, threads=1)
    runs: list[Any] = [static.start(3), static.start(3)]
    wanted, _ = (run.step(at(0), np.full(3, 9))[0] for run in runs)
    values, steps = runs[0].state.values, dict(static.steps)
    assert values is not runs[1].state.values
    del runs[0]
    gc.collect()
    runs.append(static.start(3))
    assert runs[1].state.values == values
    assert all(not value.numpy().any() for value in values.values())
    np.testing.assert_array_equal(runs[1].step(at(0), np.full(3, 9))[0], wanted)
    assert static.steps == steps


@pytest.mark.slow
def test_text_of_the_next_run_is_copied_into_the_buffers_that_are_there(tmp_path):
    """Cross-attention's keys are computed once in a run; a new run takes over what is bound, with another text."""
    module, args, kwargs = made(FAMILIES["pixart"])
    model = rewrite(module, args, kwargs, method_of("carry"), Policy("constant", 2).timetable())
    export_onnx(model, tmp_path)
    shapes = choose_buckets([3], [8], model.spec.tokens)
    plain = OrtModel(tmp_path, model.planner, shapes, threads=1)
    static = StaticModel(tmp_path, model.planner, shapes, CPU, threads=1)
    one = {name: as_array(value) for name, value in model.spec.example(3).items() if isinstance(value, torch.Tensor)}
    [text] = [name for name, value in one.items() if value.shape[2:] == (24,)]
    two = {**one, text: one[text][::-1].copy()}
    seen, images = [], []
    for inputs in (one, two):
        runs: list[Any] = [plain.start(3), static.start(3)]
        for kept in (16, 8):
            wanted, found = (run.step(inputs, np.full(3, kept))[0] for run in runs)
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        seen.append([addresses(step) for key, step in static.steps.items() if key[0] == "denoise"])
        images.append(found)
        del runs
        gc.collect()
    assert model.spec.constants
    assert len(seen[0]) == 2
    assert seen[0] == seen[1]
    assert not np.allclose(images[0], images[1], rtol=1e-3)


def test_every_step_has_a_graph_of_its_own(rows_model, rows_onnx):
    """The ids are what ONNX Runtime tells CUDA graphs apart by; there is no GPU to capture one here."""
    static = StaticModel(rows_onnx, rows_model.planner, BUCKET_SET, CPU, threads=1)
    steps = [BoundStep(static.sessions["route"], {}, {}, graphs=True) for _ in range(3)]
    ids = [step.options.get_run_config_entry("gpu_graph_id") for step in steps]
    assert len(set(ids)) == len(ids) == 3


def test_without_cuda_it_is_one_line(rows_model, rows_onnx):
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(UsageError, match="has no CUDAExecutionProvider"):
        StaticModel(rows_onnx, rows_model.planner, BUCKET_SET)


@pytest.mark.gpu
def test_cuda_graphs_give_what_the_cpu_gives(rows_model, rows_onnx):
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu and an NVIDIA GPU")
    plain = OrtModel(rows_onnx, rows_model.planner, BUCKET_SET).start(3)
    static = StaticModel(rows_onnx, rows_model.planner, BUCKET_SET).start(3)
    for step, count in enumerate(COUNTS):
        wanted = plain.step(at(step), np.full(3, count))[0]
        np.testing.assert_allclose(static.step(at(step), np.full(3, count))[0], wanted, rtol=1e-2, atol=1e-2)
