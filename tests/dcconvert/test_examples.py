"""The loops in `examples/` give the images of dcconvert's own run, without a line of it."""

from __future__ import annotations

import http.client
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from dcconvert.export.bundle import read_bundle
from dcconvert.export.runtimes.ort import OrtModel
from dcconvert.sampling.bundle_runs import RUN, bundle_run, dit_config
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
PYTHON, NODE = EXAMPLES / "steps_onnxruntime.py", EXAMPLES / "steps_node.mjs"
BATCH = 3
GUIDANCE = (1.0, 2.5)


@pytest.fixture(scope="module")
def folder(steps_job, tmp_path_factory) -> Path:
    """A bundle whose table has something in every number of a row."""
    target = Path(shutil.copytree(steps_job.folder, tmp_path_factory.mktemp("examples") / "bundle"))
    table = RunTable.from_dict(json.loads((target / RUN).read_text()))
    rows = [replace(row, scale=1.01, shift=0.002, noise=0.003, state=row.state * 0.999) for row in table.rows]
    rows = [replace(row, weights=(*row.weights, 0.01)) if row.weights else row for row in rows]
    (target / RUN).write_text(json.dumps(replace(table, rows=tuple(rows)).to_dict()))
    return target


def drawn(folder: Path, guidance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise, labels, and the images that dcconvert draws from them."""
    bundle = read_bundle(folder)
    config, (table, planner) = dit_config(bundle), bundle_run(bundle)
    noise = initial_noise(0, BATCH, config.in_channels, config.image_size)
    labels = labels_for(BATCH, config.num_classes)
    runtime = OrtModel(bundle.onnx, planner, threads=1)
    step = ConvertedStep(bundle.model, runtime, 1 if guidance == 1 else 2)
    with torch.no_grad():
        images = table.run(step, noise, labels, guidance=guidance, null_class=config.num_classes)
    return noise.numpy(), labels.numpy(), images.numpy()


def imported(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_python_without_dcconvert(folder, guidance):
    example = imported(PYTHON)
    noise, labels, wanted = drawn(folder, guidance)
    np.testing.assert_allclose(example.sample(folder, noise, labels, guidance), wanted, rtol=1e-4, atol=1e-4)


def test_python_needs_numpy_and_onnxruntime_only(folder, tmp_path):
    names = set(re.findall(r"^(?:import|from) (\w+)", PYTHON.read_text(), re.MULTILINE))
    assert names - {*sys.stdlib_module_names} == {"numpy", "onnxruntime"}
    out = tmp_path / "images.npy"
    command = [sys.executable, str(PYTHON), str(folder), "--labels", "1", "0", "--seed", "5", "-o", str(out)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    images = np.load(out)
    assert np.isfinite(images).all()
    assert said == f"Images {list(images.shape)}: {out}\n"
    assert len(images) == 2


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_javascript(folder, guidance, tmp_path):
    if shutil.which("node") is None or not (EXAMPLES / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip("needs node, and onnxruntime-node in examples/: make node")
    noise, labels, wanted = drawn(folder, guidance)
    noise.tofile(tmp_path / "noise.f32")
    names = ",".join(map(str, labels))
    command = ["node", str(NODE), str(folder), str(tmp_path / "images.f32"), "--labels", names]
    command += ["--noise", str(tmp_path / "noise.f32"), "--guidance", str(guidance)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=EXAMPLES)
    assert run.returncode == 0, run.stderr
    images = np.fromfile(tmp_path / "images.f32", np.float32).reshape(wanted.shape)
    np.testing.assert_allclose(images, wanted, rtol=1e-4, atol=1e-4)


def test_the_page_in_a_browser(folder, tmp_path):
    """It draws from noise of its own what Python makes of the same noise."""
    if not all((EXAMPLES / "node_modules" / name).is_dir() for name in ("onnxruntime-web", "puppeteer-core")):
        pytest.skip("needs npm and chromium, and onnxruntime-web and puppeteer-core in examples/: make node")
    serve, example = (imported(EXAMPLES / name) for name in ("web/serve.py", "steps_onnxruntime.py"))
    server = serve.server(folder, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        command = ["node", "web/screenshot.mjs", f"http://localhost:{server.server_port}", tmp_path / "page.png"]
        subprocess.run([*command, tmp_path / "result.json"], check=True, cwd=EXAMPLES, timeout=300)
    finally:
        server.shutdown()
        server.server_close()
    found = json.loads((tmp_path / "result.json").read_text())
    size = dit_config(read_bundle(folder)).image_size
    noise = np.array(found["noise"], np.float32).reshape(-1, 1, size, size)
    wanted = example.sample(folder, noise, np.array(found["labels"], np.int64), 1.0)
    images = np.array(found["converted"]["images"], np.float32).reshape(wanted.shape)
    np.testing.assert_allclose(images, wanted, rtol=1e-3, atol=1e-3)
    assert np.array(found["original"]["images"]).shape == (wanted.size,)
    assert (tmp_path / "page.png").stat().st_size > 1000


def test_the_server_hands_out_nothing_else(folder):
    serve = imported(EXAMPLES / "web" / "serve.py")
    server = serve.server(folder, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for path, code in (("/", 200), ("/bundle/run.json", 200), ("/bundle/../../../etc/passwd", 404)):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
            connection.request("GET", path)
            assert connection.getresponse().status == code
            connection.close()
    finally:
        server.shutdown()
        server.server_close()
