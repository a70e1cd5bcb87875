"""`dcconvert build`: engines that TensorRT-RTX builds without a GPU, what is kept and what goes, and clear refusals."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dcconvert.commands.build import find_device
from dcconvert.export.bundle import read_bundle
from dcconvert.export.engines.build import MODULES
from dcconvert.export.engines.index import Device, read_index
from dcconvert.export.runtimes.trt import check_graph
from dcconvert.export.variants import VARIANTS, write_variant
from dcconvert.passes.ir.errors import UsageError
from tests.dcconvert.fake_worker import FakeWorker
from tests.dcconvert.harness import contents, refusal, run_cli

pytestmark = pytest.mark.slow

NO_KERNEL = "tensorrt-rtx cannot build packed attention: it has [no] kernel"


@pytest.fixture(scope="module")
def rtx() -> str:
    module = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'dcconvert[rtx]'")
    return f"tensorrt-rtx-{module.__version__}"


@pytest.fixture(scope="module")
def built(rtx, chunk_job, tmp_path_factory) -> tuple[Path, Any]:
    """A bundle with its engines, and what the command said."""
    folder = tmp_path_factory.mktemp("build") / "bundle"
    shutil.copytree(chunk_job.folder, folder)
    run = run_cli("build", folder, "--backend", "tensorrt-rtx")
    assert run.code == 0, run.err
    return folder, run


def index_of(folder: Path, rtx: str) -> dict[str, Any]:
    found = json.loads((folder / "engines" / rtx / "engines.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture
def worker(tmp_path, monkeypatch) -> FakeWorker:
    """Engines for a TensorRT-RTX 1, made at once; it has no kernel for packed attention."""
    fake_backends(monkeypatch, tensorrt_rtx=SimpleNamespace(__version__="1"))
    made = FakeWorker(tmp_path / "worker")
    made.refuse(probe="it has [no] kernel")
    monkeypatch.setattr(sys, "executable", str(made.script))
    return made


def fake_backends(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """The only backends that are installed."""
    for name in MODULES.values():
        monkeypatch.setitem(sys.modules, name, modules.get(name))


@pytest.fixture
def machine_gpu(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Says which GPU the driver finds, as nvidia-smi does; torch sees none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def driver(says: str) -> None:
        script = tmp_path / "bin" / "nvidia-smi"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\necho '{says}'\n")
        script.chmod(0o755)

    return driver


@pytest.fixture(scope="module")
def with_graphs(chunk_job, tmp_path_factory) -> Path:
    """A bundle with the graphs for TensorRT and no engines."""
    folder = tmp_path_factory.mktemp("graphs") / "bundle"
    shutil.copytree(chunk_job.folder, folder)
    bundle = read_bundle(folder)
    write_variant(VARIANTS["trt"], bundle.model, bundle.onnx, bundle.bucket_set.buckets)
    return folder


@pytest.fixture
def copied(with_graphs, tmp_path) -> Path:
    return Path(shutil.copytree(with_graphs, tmp_path / "bundle"))


def test_every_bucket_gets_a_profile(built, rtx, chunk_job):
    folder, run = built
    found = index_of(folder, rtx)
    buckets = chunk_job.manifest["buckets"]["buckets"]
    assert [(entry["graph"], len(entry["buckets"])) for entry in found["engines"]] == [
        ("route", len({bucket["batch"] for bucket in buckets})),
        ("denoise", len(buckets)),
    ]
    assert sorted(found["engines"][1]["buckets"], key=str) == sorted(buckets, key=str)
    for entry in found["engines"]:
        assert (folder / "engines" / rtx / entry["file"]).stat().st_size == entry["bytes"]
    assert f"Engines: {folder / 'engines' / rtx}" in run.out
    assert "engine 2 of 2: denoise" in run.err
    assert (folder / "onnx" / "trt" / "denoise.onnx").is_file()


def test_what_is_there_is_not_built_again(built, rtx):
    folder, _ = built
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.engine")}
    run = run_cli("build", folder, "--backend", "tensorrt-rtx")
    assert run.code == 0
    assert "all 2 engines exist already" in run.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.engine")} == before


def test_a_dry_run_builds_nothing(copied, rtx):
    before = contents(copied)
    run = run_cli("build", copied, "--backend", "tensorrt-rtx", "--dry-run", "--ranges")
    assert run.code == 0
    assert "2 engines for tensorrt-rtx" in run.out
    assert "Nothing was built" in run.out
    assert " to 64" in run.out  # a range, up to everything
    assert contents(copied) == before


def test_a_dry_run_leaves_no_graphs(copied, worker):
    shutil.rmtree(copied / "onnx" / "trt")
    before = contents(copied)
    run = run_cli("build", copied, "--dry-run")
    assert run.code == 0, run.err
    assert "2 engines for tensorrt-rtx-1" in run.out
    assert contents(copied) == before


def test_graphs_that_are_incomplete_are_written_again(copied, worker):
    assert run_cli("build", copied).code == 0
    (copied / "onnx" / "trt" / "denoise.onnx").unlink()
    assert run_cli("build", copied).code == 0
    assert (copied / "onnx" / "trt" / "denoise.onnx").is_file()
    assert [e["graph"] for e in index_of(copied, "tensorrt-rtx-1")["engines"]] == ["route", "denoise"]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1] + b"?", lambda data: None])
def test_damaged_engines_are_built_again(copied, worker, damage):
    assert run_cli("build", copied).code == 0
    [engine] = (copied / "engines" / "tensorrt-rtx-1").glob("denoise-*.engine")
    data = damage(engine.read_bytes())
    engine.unlink() if data is None else engine.write_bytes(data)
    assert run_cli("build", copied).code == 0
    assert worker.done == ["route", "denoise", "denoise"]


def test_engines_go_on_serving_until_those_with_other_options_are_finished(copied, worker):
    assert run_cli("build", copied).code == 0
    folder = copied / "engines" / "tensorrt-rtx-1"
    before = read_index(folder)
    worker.interrupt_at(4)
    assert run_cli("build", copied, "--per-bucket", "--ranges").code == 130
    during = read_index(folder)
    assert (during.ranges, during.engines) == (False, before.engines)
    assert len(during.unfinished) == 2
    assert all(entry.intact(folder) for entry in (*during.engines, *during.unfinished))
    worker.interrupt_at(None)
    assert run_cli("build", copied, "--per-bucket", "--ranges").code == 0
    after = read_index(folder)
    assert (after.ranges, after.unfinished) == (True, ())
    assert set(during.unfinished) < set(after.engines)
    assert len(worker.done) == 2 + len(after.engines)  # none of them twice
    assert len(list(folder.glob("*.engine"))) == len(after.engines)


def test_masks_take_over_where_packed_attention_fails_in_the_whole_graph(copied, worker):
    """One node of it may be built, and the graph with its dynamic shapes not."""
    worker.refuse(**{"trt-packed": "no [kernel] for it"})
    run = run_cli("build", copied)
    assert run.code == 0, run.err
    assert "attention with masks, because tensorrt-rtx cannot build route: no [kernel] for it" in run.err
    assert denoise_variant(copied) == "trt"
    assert "no [kernel] for it" in refusal_of_packed(copied)


def refusal_of_packed(folder: Path) -> str:
    run = run_cli("build", folder, "--attention", "packed")
    assert run.code == 2
    return run.err.splitlines()[-1]


def test_what_builds_that_were_killed_left_goes(copied, worker):
    """Nobody else can be building there: the folder is locked."""
    for place, name in (("onnx", ".variant-old"), ("engines/tensorrt-rtx-1", ".building-old")):
        (copied / place / name).mkdir(parents=True)
    shutil.rmtree(copied / "onnx" / "trt")
    assert run_cli("build", copied).code == 0
    assert not list(copied.rglob(".*-old*"))


def test_sampling_looks_for_the_graphs_that_engines_were_built_from(built, rtx):
    folder, _ = built
    for entry in read_index(folder / "engines" / rtx).engines:
        check_graph(entry, folder / "onnx", folder)
        with pytest.raises(UsageError, match="is older than"):
            check_graph(replace(entry, onnx_sha256="0"), folder / "onnx", folder)


def test_packed_attention_is_used_where_it_is_built(copied, worker):
    run = run_cli("build", copied)
    assert f"attention with masks, because {NO_KERNEL}" in run.err
    assert denoise_variant(copied) == "trt"
    insisted = run_cli("build", copied, "--attention", "packed")
    assert (insisted.code, insisted.err.splitlines()[-1]) == (2, f"error: {NO_KERNEL}")
    worker.refuse()
    assert run_cli("build", copied).code == 0
    assert denoise_variant(copied) == "trt-packed"
    assert run_cli("build", copied, "--attention", "masks").code == 0
    assert denoise_variant(copied) == "trt"


def denoise_variant(folder: Path) -> str:
    [entry] = [e for e in index_of(folder, "tensorrt-rtx-1")["engines"] if e["graph"] == "denoise"]
    return str(entry["variant"])


def test_a_damaged_index_is_no_obstacle(copied, worker):
    assert run_cli("build", copied).code == 0
    index = copied / "engines" / "tensorrt-rtx-1" / "engines.json"
    index.write_text("{")
    run = run_cli("build", copied)
    assert run.code == 0, run.err
    assert worker.done == ["route", "denoise"] * 2


def test_an_engine_for_each_bucket(copied, worker, chunk_job):
    run = run_cli("build", copied, "--per-bucket")
    buckets = chunk_job.manifest["buckets"]["buckets"]
    batches = {bucket["batch"] for bucket in buckets}
    assert worker.done == ["route"] * len(batches) + ["denoise"] * len(buckets)
    assert f"engine {len(worker.done)} of {len(worker.done)}: denoise, bucket of batch" in run.err


def test_an_interrupt_leaves_finished_engines_valid(copied, worker):
    worker.interrupt_at(2)
    run = run_cli("build", copied, "--per-bucket")
    assert run.code == 130
    assert "interrupted: 2 of" in run.err
    assert len(index_of(copied, "tensorrt-rtx-1")["engines"]) == 2
    worker.interrupt_at(None)
    assert run_cli("build", copied, "--per-bucket").code == 0
    files = [entry["file"] for entry in index_of(copied, "tensorrt-rtx-1")["engines"]]
    assert len(worker.done) == len(set(files)) == len(files)  # none of them twice


def test_engines_of_no_use_any_more_go(copied, worker):
    assert run_cli("build", copied, "--per-bucket").code == 0
    assert run_cli("build", copied).code == 0
    folder = copied / "engines" / "tensorrt-rtx-1"
    assert sorted(path.name for path in folder.glob("*.engine")) == sorted(
        entry["file"] for entry in index_of(copied, "tensorrt-rtx-1")["engines"]
    )
    assert len(list(folder.glob("*.engine"))) == 2


def test_graphs_for_cuda(copied):
    run = run_cli("build", copied, "--runtime", "ort-cuda")
    assert run.code == 0, run.err
    assert (copied / "onnx" / "ort-cuda" / "denoise.onnx").is_file()
    assert not (copied / "engines").exists()


def test_mode_steps_has_engines_and_graphs_for_cuda(steps_job, worker, tmp_path):
    """One profile a batch size, and nothing is said of packed attention where nothing is packed."""
    folder = tmp_path / "bundle"
    shutil.copytree(steps_job.folder, folder)
    run = run_cli("build", folder)
    assert run.code == 0, run.err
    assert worker.done == ["full", "skip"]
    assert "packed" not in run.err
    entries = read_index(folder / "engines" / "tensorrt-rtx-1").engines
    batches = json.loads((folder / "manifest.json").read_text())["buckets"]["buckets"]
    assert [len(entry.buckets) for entry in entries] == [len({bucket["batch"] for bucket in batches})] * 2
    run = run_cli("build", folder, "--runtime", "ort-cuda")
    assert run.code == 0, run.err
    assert {path.name for path in (folder / "onnx" / "ort-cuda").iterdir()} == {
        "example_inputs",
        "full.onnx",
        "skip.onnx",
    }
    assert "has no packed attention" in refusal(2, "build", folder, "--attention", "packed")


@pytest.mark.parametrize(
    "words", [("--precision", "bf16"), ("--dry-run",), ("--attention", "packed"), ("--ranges",), ("--per-bucket",)]
)
def test_options_of_engines_are_refused_for_graphs(copied, words):
    said = refusal(2, "build", copied, "--runtime", "ort-cuda", *words)
    assert f"{words[0]} applies only to --runtime trt" in said


def test_without_a_backend_it_is_one_line(copied, monkeypatch):
    fake_backends(monkeypatch)
    said = refusal(2, "build", copied)
    assert re.search(r"no backend can build engines \(tensorrt: .*tensorrt .*; tensorrt-rtx: .*tensorrt_rtx ", said)
    assert "pip install 'dcconvert[gpu]' or pip install 'dcconvert[rtx]'" in said
    assert "dcconvert[gpu]" not in refusal(2, "build", copied, "--backend", "tensorrt-rtx")
    assert not (copied / "engines").exists()


def test_tensorrt_without_a_gpu_is_one_line(copied, machine_gpu, monkeypatch):
    fake_backends(monkeypatch, tensorrt=SimpleNamespace(__version__="11.4"))
    said = refusal(2, "build", copied, "--backend", "tensorrt")
    assert "there is no GPU here, and it builds only for the GPU of the machine" in said


def test_the_gpu_of_this_machine_is_what_engines_are_for(machine_gpu, monkeypatch):
    module = SimpleNamespace(__version__="11.4")
    fake_backends(monkeypatch, tensorrt=module, tensorrt_rtx=module)
    machine_gpu("NVIDIA H200, 9.0")
    assert find_device(None) == Device("tensorrt", "11.4", "9.0", "NVIDIA H200")
    assert find_device("tensorrt-rtx", "8.9") == Device("tensorrt-rtx", "11.4", "8.9")


def test_a_gpu_that_tensorrt_rtx_does_not_build_for(machine_gpu, monkeypatch):
    known = SimpleNamespace(__members__={"NONE": 0, "CURRENT": 1, "SM89": 2, "SM120": 3})
    fake_backends(monkeypatch, tensorrt_rtx=SimpleNamespace(__version__="1.7", ComputeCapability=known))
    machine_gpu("NVIDIA H200, 9.0")
    with pytest.raises(UsageError, match=r"the GPU here has compute capability 9\.0, but it builds for 8\.9, 12\.0"):
        find_device("tensorrt-rtx")
    for text in ("8.9", "89"):
        assert find_device("tensorrt-rtx", text).capability == "8.9"
    for text in ("9.0", "1.20", "x", "8"):
        with pytest.raises(UsageError, match="does not support compute capability"):
            find_device("tensorrt-rtx", text)
    machine_gpu("NVIDIA L40, 8.9")
    assert find_device("tensorrt-rtx") == Device("tensorrt-rtx", "1.7")


def test_bad_input_is_one_line(tmp_path, copied, rtx):
    assert "is not a bundle" in refusal(2, "build", tmp_path)
    (copied / "onnx" / "trt" / "denoise.onnx").write_bytes(b"no graph")
    assert "cannot read" in refusal(2, "build", copied, "--backend", "tensorrt-rtx", "--attention", "masks")


@pytest.mark.parametrize("capability", ["12.0", "1.0"])
def test_a_compute_capability_is_built_for_or_refused(rtx, copied, capability):
    words = ("build", copied, "--backend", "tensorrt-rtx", "--attention", "masks", "--compute-capability", capability)
    if capability == "12.0":
        assert run_cli(*words).code == 0
        assert index_of(copied, f"{rtx}-sm120")["device"]["capability"] == "12.0"
    else:
        assert "compute capability 1.0" in refusal(2, *words)


def test_engines_do_not_run_without_a_gpu(built, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    said = refusal(2, "sample", built[0], "--runtime", "trt", "-o", tmp_path / "s.png")
    assert "engines need an NVIDIA GPU" in said
    assert "has no graphs for ort-cuda" in refusal(
        2, "sample", built[0], "--runtime", "ort-cuda", "-o", tmp_path / "s.png"
    )
    assert not (tmp_path / "s.png").exists()
