"""The main job, run once for all tests of this floor: nothing may change what it left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dcconvert import api, job
from dcconvert.api import Converted
from dcconvert.evaluate import Runtime
from dcconvert.export.bundle import Bundle, read_bundle
from tests.dcconvert.harness import Run, run_cli, write_checkpoint


@dataclass
class MainJob:
    """A conversion from the command line, and the model as it was before it was written."""

    checkpoint: Path
    folder: Path
    run: Run
    model: Converted


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="session")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> MainJob:
    folder = tmp_path_factory.mktemp("main")
    checkpoint = write_checkpoint(folder / "tiny.safetensors")
    models: list[Converted] = []
    convert = api.convert

    def remember(*args: Any, **options: Any) -> Converted:
        models.append(convert(*args, **options))
        return models[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.chdir(folder)
        patch.setattr(job, "convert", remember)
        words = ("--ratio", "4x", "--schedule", "falling", "--batch", 1, "--batch", 2, "--steps", 4, "--images", 3)
        run = run_cli("tiny.safetensors", *words, "--reference-steps", 6, "--dump-graphs", "graphs")
    assert run.code == 0, run.err
    return MainJob(checkpoint, folder / "tiny-dc4x", run, models[0])


@pytest.fixture(scope="session")
def bundle(main_job: MainJob) -> Bundle:
    return read_bundle(main_job.folder)


@pytest.fixture(scope="session")
def original_onnx(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original, exported once."""
    work = tmp_path_factory.mktemp("original")
    Runtime.open(bundle.model, bundle.model.step_planner, bundle.ladder, bundle.onnx, work, 1)
    return work / "original.onnx"


@pytest.fixture
def runtime(bundle: Bundle, original_onnx: Path) -> Runtime:
    return Runtime.open(
        bundle.model, bundle.model.step_planner, bundle.ladder, bundle.onnx, original_onnx.parent, threads=1
    )
