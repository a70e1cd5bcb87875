"""Engines as the backend of a run, with a stand-in for TensorRT: what is bound, which profile, and clear refusals."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcconvert.export.buckets import choose_buckets
from dcconvert.export.engines.build import plan_engines
from dcconvert.export.engines.index import INDEX, Built, Device, Index, write_index
from dcconvert.export.runtimes.ort import OrtModel
from dcconvert.export.runtimes.trt import TrtModel, open_engines
from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.runtime.model import DynamicModel
from tests.export import fake_trt
from tests.export.harness import TOKENS, arrays, tensors

BUCKET_SET = choose_buckets([1, 4], [5, 9], TOKENS)
COUNTS = (16, 5, 9, 3, 16, 9)
DEVICE = Device("tensorrt-rtx", fake_trt.__version__)


def build(graphs: Path, folder: Path, **options: bool) -> list[Built]:
    """Engines of the stand-in, and their index."""
    names = [path.stem for path in graphs.glob("*.onnx")]
    planned = plan_engines(graphs, names, BUCKET_SET.buckets, "fp16", DEVICE, **options)
    for engine in planned:
        (folder / engine.file).write_text(json.dumps({"onnx": str(engine.onnx), "profiles": engine.profiles}))
    entries = [engine.built(folder / engine.file, 1.0, 1) for engine in planned]
    write_index(folder, Index(DEVICE, options.get("ranges", False), tuple(entries)))
    return entries


@pytest.fixture(params=["rows", "carry"])
def mode(request: pytest.FixtureRequest) -> tuple[DynamicModel, Path]:
    return request.getfixturevalue(f"{request.param}_model"), request.getfixturevalue(f"{request.param}_onnx")


def opened(model: DynamicModel, graphs: Path, folder: Path) -> TrtModel:
    return TrtModel(folder, graphs.parent, model.planner, "cpu", fake_trt)


def at(step: int, batch: int = 3) -> dict[str, np.ndarray]:
    return arrays(batch, 17 * step) | {"t": np.full(batch, 990.0 - 110 * step, np.float32)}


@pytest.mark.parametrize("options", [{}, {"per_bucket": True}, {"ranges": True}])
def test_a_run_gives_what_onnx_runtime_gives(mode, options, tmp_path):
    model, graphs = mode
    build(graphs, tmp_path, **options)
    found, wanted = opened(model, graphs, tmp_path).start(3), OrtModel(graphs, model.planner, BUCKET_SET).start(3)
    kept = [(found.step(at(s), np.full(3, c))[0], wanted.step(at(s), np.full(3, c))[0]) for s, c in enumerate(COUNTS)]
    for mine, theirs in kept:
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_runs_do_not_mix(mode, tmp_path):
    model, graphs = mode
    build(graphs, tmp_path)
    runtime = opened(model, graphs, tmp_path)
    alone = runtime.start(3)
    wanted = [alone.step(at(s), np.full(3, 7))[0] for s in range(3)]
    runs = runtime.start(3), runtime.start(3)
    for s in range(3):
        np.testing.assert_array_equal(runs[0].step(at(s), np.full(3, 7))[0], wanted[s])
        runs[1].step(at(s + 4), np.full(3, 7))


@pytest.mark.parametrize("options", [{}, {"per_bucket": True}, {"ranges": True}])
def test_runs_of_mode_steps_give_what_torch_gives(steps_model, steps_onnx, options, tmp_path):
    """With samples that are computed while others are skipped, and two runs that take turns."""
    build(steps_onnx, tmp_path, **options)
    runtime = opened(steps_model, steps_onnx, tmp_path)
    runs, beside = [runtime.start(3), runtime.start(3)], [steps_model.start(3), steps_model.start(3)]
    for step, kept in enumerate([(1, 1, 1), (0, 0, 0), (1, 0, 0), (0, 1, 1), (0, 0, 0), (1, 1, 1), (0, 0, 0)]):
        counts = np.array(kept) * TOKENS
        for offset, (run, other) in enumerate(zip(runs, beside, strict=True)):
            given = at(step) | {"x": at(step + offset)["x"]}
            wanted = other.step(tensors(given), counts)[0].numpy()
            np.testing.assert_allclose(run.step(given, counts)[0], wanted, rtol=1e-4, atol=1e-5)


def test_updates_of_mode_steps_stay_where_they_are(steps_model, steps_onnx, tmp_path):
    """The engine writes each update into its slot, and reads it there: nothing is copied between steps."""
    build(steps_onnx, tmp_path)
    runtime = opened(steps_model, steps_onnx, tmp_path)
    run = runtime.start(4)
    before = {name: value.data_ptr() for name, value in run.state.values.items()}
    [skip] = {place.engine for (graph, _), place in runtime.places.items() if graph == "skip"}
    for step in range(8):
        run.step(at(step, 4), np.full(4, TOKENS if step % 2 == 0 else 0))
        assert {name: value.data_ptr() for name, value in run.state.values.items()} == before
        if step % 2:
            assert {name: skip.context.addresses[name] for name in before} == before


def test_engines_of_mode_steps_that_are_missing_are_one_line(steps_model, steps_onnx, tmp_path):
    entries = build(steps_onnx, tmp_path)
    for graph in ("full", "skip"):
        write_index(tmp_path, Index(DEVICE, False, tuple(e for e in entries if e.graph != graph)))
        with pytest.raises(UsageError, match=r"engines are missing in .*: build again"):
            opened(steps_model, steps_onnx, tmp_path)


def test_a_bucket_is_a_profile_and_buffers_stay(rows_model, rows_onnx, tmp_path):
    build(rows_onnx, tmp_path)
    runtime = opened(rows_model, rows_onnx, tmp_path)
    run = runtime.start(3)
    denoise = runtime.places["denoise", BUCKET_SET.buckets[0]].engine
    seen: dict[Any, int] = {}
    for step, count in enumerate(COUNTS):
        run.step(at(step), np.full(3, count))
        profile = denoise.context.profile
        expected = runtime.bucket(np.full(4, count))
        assert expected is not None
        assert runtime.places["denoise", expected].profile == profile
        address = denoise.context.addresses["chunk_index"]
        assert seen.setdefault(profile, address) == address
    assert len(seen) == 3


def test_a_missing_bucket_falls_to_the_next_larger(rows_model, rows_onnx, tmp_path):
    entries = build(rows_onnx, tmp_path, per_bucket=True)
    gone = next(e for e in entries if e.graph == "denoise" and e.buckets[0].row_tokens == 5 and e.buckets[0].batch == 4)
    entries.remove(gone)
    write_index(tmp_path, Index(DEVICE, False, tuple(entries)))
    runtime = opened(rows_model, rows_onnx, tmp_path)
    chosen = runtime.bucket(np.full(4, 5))
    assert chosen is not None
    assert chosen.row_tokens == 9
    wanted = OrtModel(rows_onnx, rows_model.planner, BUCKET_SET).start(4).step(at(0, 4), np.full(4, 5))[0]
    found = runtime.start(4).step(at(0, 4), np.full(4, 5))[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graph", ["denoise", "route"])
def test_engines_that_are_missing_are_one_line(rows_model, rows_onnx, tmp_path, graph):
    entries = [e for e in build(rows_onnx, tmp_path) if e.graph != graph]
    write_index(tmp_path, Index(DEVICE, False, tuple(entries)))
    with pytest.raises(UsageError, match=r"engines are missing in .*: build again"):
        opened(rows_model, rows_onnx, tmp_path)


def test_files_that_are_missing_or_damaged_are_one_line(rows_model, rows_onnx, tmp_path):
    route = next(entry for entry in build(rows_onnx, tmp_path) if entry.graph == "route")
    (tmp_path / route.file).write_bytes(b"not an engine")
    with pytest.raises(UsageError, match=r"route-.*\.engine cannot be loaded: it is damaged"):
        opened(rows_model, rows_onnx, tmp_path)
    (tmp_path / route.file).unlink()
    with pytest.raises(UsageError, match=r"cannot read .*\.engine: No such file"):
        opened(rows_model, rows_onnx, tmp_path)


def test_engines_older_than_the_graphs_are_one_line(rows_model, rows_onnx, carry_onnx, tmp_path):
    graphs, engines = tmp_path / "onnx" / "trt", tmp_path / "engines"
    shutil.copytree(rows_onnx, graphs)
    engines.mkdir()
    build(graphs, engines)
    opened(rows_model, graphs, engines)
    shutil.copy(carry_onnx / "denoise.onnx", graphs)
    with pytest.raises(UsageError, match=r"is older than .*: build again"):
        opened(rows_model, graphs, engines)


def test_an_engine_that_does_not_run_fails_the_check(rows_model, rows_onnx, tmp_path, monkeypatch):
    build(rows_onnx, tmp_path)
    runtime = opened(rows_model, rows_onnx, tmp_path)
    monkeypatch.setattr(fake_trt.Context, "execute_async_v3", lambda self, stream: False)
    with pytest.raises(CheckFailedError, match="did not run"):
        runtime.start(1).step(at(0, 1))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("set_input_shape", r"does not accept \w+ \["),
        ("set_tensor_address", "does not take a buffer for"),
        ("set_optimization_profile_async", "has no profile"),
    ],
)
def test_what_tensorrt_refuses_is_not_passed_over(rows_model, rows_onnx, tmp_path, monkeypatch, name, said):
    build(rows_onnx, tmp_path)
    runtime = opened(rows_model, rows_onnx, tmp_path)
    monkeypatch.setattr(fake_trt.Context, name, lambda self, *_: False)
    with pytest.raises(CheckFailedError, match=said):
        runtime.start(1).step(at(0, 1))


def test_inputs_of_another_type_are_refused(mode, tmp_path):
    """Engines are given addresses: numbers of another width would be read as nonsense."""
    model, graphs = mode
    build(graphs, tmp_path)
    runtime = opened(model, graphs, tmp_path)
    with pytest.raises(UsageError, match=r"input x is torch\.float64, but the engine needs torch\.float32: convert it"):
        runtime.route({**at(1, 4), "x": np.zeros((4, 1, 16, 16))})


def test_too_little_memory_is_one_line(rows_model, rows_onnx, tmp_path, monkeypatch):
    build(rows_onnx, tmp_path)
    monkeypatch.setattr(fake_trt.Engine, "create_execution_context", lambda self: None)
    with pytest.raises(UsageError, match="the GPU has too little free memory"):
        opened(rows_model, rows_onnx, tmp_path)


@pytest.fixture
def bundle(rows_onnx, tmp_path, monkeypatch) -> Path:
    """A folder with engines for the stand-in, which is what gets imported."""
    folder = tmp_path / "engines" / DEVICE.folder
    folder.mkdir(parents=True)
    build(rows_onnx, folder)
    monkeypatch.setattr(importlib, "import_module", lambda name: fake_trt)
    return tmp_path


def refused(bundle: Path, model: DynamicModel, graphs: Path) -> str:
    with pytest.raises(UsageError) as caught:
        open_engines(bundle, graphs.parent, model.planner)
    return str(caught.value)


def test_engines_of_another_version(bundle, rows_model, rows_onnx, monkeypatch):
    monkeypatch.setattr(fake_trt, "__version__", "9.9")
    said = refused(bundle, rows_model, rows_onnx)
    assert "is for tensorrt-rtx 1.2.3, but 9.9 is installed: build them here with 'dcconvert build'" in said


def test_engines_without_a_gpu(bundle, rows_model, rows_onnx, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "engines need an NVIDIA GPU, but torch" in refused(bundle, rows_model, rows_onnx)


def test_engines_of_another_gpu(bundle, rows_model, rows_onnx, monkeypatch):
    path = bundle / "engines" / DEVICE.folder / INDEX
    path.write_text(path.read_text().replace('"capability": ""', '"capability": "8.9"'))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    said = refused(bundle, rows_model, rows_onnx)
    assert "is for compute capability 8.9, but this GPU (H200) has 9.0" in said


def test_a_backend_that_is_not_installed(bundle, rows_model, rows_onnx, monkeypatch):
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert "is for tensorrt-rtx, which is not installed" in refused(bundle, rows_model, rows_onnx)


def test_a_bundle_without_engines(tmp_path, rows_model, rows_onnx):
    assert "has no engines: make them with 'dcconvert build" in refused(tmp_path, rows_model, rows_onnx)
