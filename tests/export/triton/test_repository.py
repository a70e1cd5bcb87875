"""A Triton model repository with a stand-in for the server: what it answers, sequences, refusals, configurations."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcconvert.export.buckets import choose_buckets
from dcconvert.export.bundle import GRAPH, Bundle
from dcconvert.export.engines.build import read_graph
from dcconvert.export.files import MANIFEST, write_json
from dcconvert.export.runtimes.ort import OrtModel, make_session
from dcconvert.export.triton.backend import END, IDLE_SECONDS, START
from dcconvert.export.triton.repository import MARK, Word, export_triton, text, warm_up
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.serialise.graph_json import model_to_dict
from tests.export.fake_triton import Server, request
from tests.export.harness import TOKENS, arrays

BUCKET_SET = choose_buckets([1, 4], [5, 8], TOKENS)


@dataclass
class Loaded:
    """A repository as a server has it, and the bundle it was made of."""

    bundle: Bundle
    repository: Path
    server: Server
    model: Any

    def ask(self, **values: Any) -> Any:
        [response] = self.model.execute([request(**values)])
        return response

    def images(self, **values: Any) -> np.ndarray:
        response = self.ask(**values)
        assert not response.has_error(), response.error().message()
        assert list(response.tensors) == ["output"]
        images: np.ndarray = response.tensors["output"].value
        return images

    def refusal(self, **values: Any) -> str:
        response = self.ask(**values)
        assert response.has_error()
        assert response.error().code == "invalid argument"
        said = response.error().message()
        assert "\n" not in said
        return said


def loaded(model: DynamicModel, onnx: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """Export a bundle and load the Python model as a server does."""
    folder = folder / model.method.mode
    source = folder / "bundle"
    source.mkdir(parents=True)
    (source / "onnx").symlink_to(onnx)
    manifest = {"buckets": BUCKET_SET.to_dict()}
    write_json(manifest, source / MANIFEST)
    write_json(model_to_dict(model), source / GRAPH)
    bundle = Bundle(source, manifest, model, BUCKET_SET)
    repository = folder / "repository"
    export_triton(bundle, repository, "dit", "cpu")
    server = Server(repository)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    spec = importlib.util.spec_from_file_location("served_model", repository / "dit" / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    served = module.TritonPythonModel()
    served.initialize({})
    return Loaded(bundle, repository, server, served)


@pytest.fixture
def chunk(rows_model, rows_onnx, tmp_path, monkeypatch) -> Loaded:
    return loaded(rows_model, rows_onnx, tmp_path, monkeypatch)


@pytest.fixture
def carry(carry_model, carry_onnx, tmp_path, monkeypatch) -> Loaded:
    return loaded(carry_model, carry_onnx, tmp_path, monkeypatch)


@pytest.fixture
def steps(steps_model, steps_onnx, tmp_path, monkeypatch) -> Loaded:
    return loaded(steps_model, steps_onnx, tmp_path, monkeypatch)


def at(step: int, batch: int = 3) -> dict[str, np.ndarray]:
    return arrays(batch, 17 * step) | {"t": np.full(batch, 990.0 - 110 * step, np.float32)}


def controls(sequence: int | str, step: int, last: int = 3) -> dict[str, Any]:
    return {"sequence": sequence, "flags": START * (step == 0) + END * (step == last)}


def runtime(found: Loaded) -> OrtModel:
    return OrtModel(found.bundle.onnx, found.bundle.model.planner, BUCKET_SET)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_every_request_of_mode_chunk_is_a_step(chunk, batch):
    for step in range(2):
        wanted = runtime(chunk).start(batch).step(at(step, batch))[0]
        np.testing.assert_allclose(chunk.images(**at(step, batch)), wanted, atol=1e-6)
    assert chunk.server.asked == ["dit_route", "dit_denoise"] * 2
    assert not chunk.model.served.runs


@pytest.mark.parametrize("mode", ["carry", "steps"])
def test_sequences_are_runs_that_do_not_mix(mode, request):
    found = request.getfixturevalue(mode)
    runs = [runtime(found).start(3), runtime(found).start(2)]
    for step in range(4):
        for number, run in enumerate(runs):
            given = at(step + number, run.batch)
            images = found.images(**given, **controls(("7", 7)[number], step))
            np.testing.assert_allclose(images, run.step(given)[0], atol=1e-6)
    assert not found.model.served.runs  # END frees them


def test_mode_steps_computes_what_its_schedule_says(steps):
    for step in range(4):
        steps.images(**at(step), **controls(1, step))
    assert steps.server.asked == ["dit_full", "dit_skip", "dit_full", "dit_skip"]  # 2x


def test_a_sequence_that_begins_anew_remembers_nothing(carry):
    for step in range(2):
        carry.images(**at(step), **controls(7, step))
    wanted = runtime(carry).start(3).step(at(0))[0]
    np.testing.assert_allclose(carry.images(**at(0), **controls(7, 0)), wanted, atol=1e-6)


def test_a_run_that_is_silent_is_forgotten(carry, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    carry.images(**at(0), **controls(1, 0))
    now[0] += IDLE_SECONDS / 2
    carry.images(**at(1), **controls(1, 1))
    now[0] += IDLE_SECONDS + 1
    assert "sequence 1 is unknown or has expired" in carry.refusal(**at(2), **controls(1, 2))


def test_a_step_that_takes_long_is_no_silence(carry, monkeypatch):
    """The clock starts when a step ends: under load a step may take longer than a run may be silent."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    answer = carry.server.answer

    def slow(*args: Any) -> Any:
        now[0] += IDLE_SECONDS
        return answer(*args)

    carry.server.answer = slow
    for step in range(3):
        carry.images(**at(step), **controls("a-b-c", step))


def test_a_failed_step_starts_the_run_anew_and_the_server_lives(carry):
    carry.images(**at(1), **controls(1, 0))
    assert "noise level of sample 0 rose" in carry.refusal(**at(0), **controls(1, 1))
    assert "this run has 3 samples" in carry.refusal(**at(2, 2), **controls(1, 1))
    carry.images(**at(2), **controls(1, 1))


def test_bad_requests_are_one_line(chunk, carry):
    given = at(0)
    del given["y"]
    assert "the request has no input y: it needs x, t, y" in chunk.refusal(**given)
    assert "batch 5 is outside the buckets" in chunk.refusal(**at(0, 5))
    assert "the request has no sequence id: call the model as a sequence" in carry.refusal(**at(0))
    assert "sequence 3 is unknown" in carry.refusal(**at(1), **controls(3, 1))
    wrong = at(0) | {"x": np.zeros((3, 1, 8, 8), np.float32)}
    assert "input x has shape [3, 1, 8, 8], but the model was captured for [batch, 4, 8, 8]" in chunk.refusal(**wrong)


def test_what_lies_in_the_repository(carry):
    files = [path for path in carry.repository.rglob("*") if path.is_file()]
    # Tests that run model.py from here make Python cache it.
    names = sorted(str(path.relative_to(carry.repository)) for path in files if path.parent.name != "__pycache__")
    plan = [f"dit/1/{name}" for name in (GRAPH, MANIFEST, "model.py", "outputs.json")]
    graphs = [f"dit_{graph}/{name}" for graph in ("denoise", "route") for name in ("1/model.onnx", "config.pbtxt")]
    assert names == sorted([MARK, *plan, "dit/config.pbtxt", *graphs])


def test_configurations(carry):
    front = (carry.repository / "dit" / "config.pbtxt").read_text()
    assert 'backend: "python"' in front
    assert "max_candidate_sequences: 64" in front
    assert "control_input" not in front  # one for the id would have a type, and mix runs whose ids have another
    denoise = (carry.repository / "dit_denoise" / "config.pbtxt").read_text()
    assert denoise.startswith('name: "dit_denoise"\nbackend: "onnxruntime"\nmax_batch_size: 0\n')
    assert denoise.count("model_warmup {") == denoise.count("batch_size: 1\n") == len(BUCKET_SET.buckets)
    assert "kind: KIND_CPU" in denoise


@pytest.mark.parametrize("graph", ["route", "denoise"])
@pytest.mark.parametrize("mode", ["chunk", "carry"])
def test_the_zeros_of_a_warm_up_run(request, mode, graph):
    """Zero tokens in a row included: a server that fails its warm-up does not load the model."""
    path = request.getfixturevalue(mode).bundle.onnx / f"{graph}.onnx"
    session = make_session(path)
    kinds = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}
    for bucket in BUCKET_SET.buckets:
        inputs = warm_up(read_graph(path).input, bucket)["inputs"]
        made = session.run(None, {n: np.zeros(i["dims"], kinds[i["data_type"]]) for n, i in inputs.items()})
        assert len(made[0]) == bucket.batch


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"junk")])
@pytest.mark.parametrize("graph", ["route", "denoise"])
def test_graphs_that_are_missing_or_damaged_are_one_line(chunk, tmp_path, damage, graph):
    folder = tmp_path / "bundle"
    shutil.copytree(chunk.bundle.folder, folder)
    damage(folder / "onnx" / f"{graph}.onnx")
    with pytest.raises(UsageError, match=rf"cannot read .*{graph}\.onnx: .*; convert the model again"):
        export_triton(replace(chunk.bundle, folder=folder), tmp_path / "out", "dit", "cpu")
    assert not (tmp_path / "out").exists()


def test_a_repository_is_replaced_only_when_asked(chunk, tmp_path):
    with pytest.raises(UsageError, match="exists already"):
        export_triton(chunk.bundle, chunk.repository, "dit", "cpu")
    export_triton(chunk.bundle, chunk.repository, "other", "gpu", force=True)
    assert (chunk.repository / "other_route").is_dir()
    assert "kind: KIND_GPU" in (chunk.repository / "other_route" / "config.pbtxt").read_text()
    with pytest.raises(UsageError, match="is not a Triton model repository of dcconvert and will not be replaced"):
        export_triton(chunk.bundle, chunk.bundle.folder, "dit", "cpu", force=True)


def test_text_format():
    message = {
        "name": 'a "b"',
        "input": [{"dims": [-1, 2], "data_type": Word("TYPE_FP32")}, {"on": True}],
        "inputs": {"x": {"zero_data": True}},
        "empty": [],
    }
    assert text(message) == (
        'name: "a \\"b\\""\n'
        "input {\n  dims: [-1, 2]\n  data_type: TYPE_FP32\n}\n"
        "input {\n  on: true\n}\n"
        'inputs {\n  key: "x"\n  value {\n    zero_data: true\n  }\n}\n'
        "empty: []\n"
    )
