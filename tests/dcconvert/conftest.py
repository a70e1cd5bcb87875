"""The main job, run once in each mode for all tests of this floor: nothing may change what it left.

Every test process has its own copy.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from dcconvert.api import Converted, convert
from dcconvert.export.bundle import Bundle, read_bundle
from dcconvert.models.dit_checkpoint import load_checkpoint
from dcconvert.passes.methods import method_of
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.sampling.bundle_runs import run_planner
from dcconvert.sampling.steps import OrtPair
from tests.dcconvert.harness import Run, run_cli, write_checkpoint
from tests.sharing import made_once


@dataclass
class MainJob:
    """A conversion from the command line: its folder has the checkpoint, the bundle and what the command said."""

    mode: str
    work: Path

    @property
    def checkpoint(self) -> Path:
        return self.work / CHECKPOINT

    @property
    def folder(self) -> Path:
        return self.work / "tiny-dc4x"

    @property
    def run(self) -> Run:
        return Run.read(self.work)

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text())

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text())

    @cached_property
    def model(self) -> Converted:
        """The same conversion in Python, of which nothing was written."""
        facts = self.manifest["sampler"]
        return convert(
            load_checkpoint(self.checkpoint),
            4,
            schedule="falling",
            steps=facts["steps"],
            options=method_of(self.mode).with_prediction(facts["prediction"]),
        )


CHECKPOINT = "tiny.safetensors"
SHARED = ("--ratio", "4x", "--schedule", "falling", "--batch", 1, "--batch", 2, "--images", 3, "--reference-steps", 14)
WORDS = {
    "carry": ("--mode", "carry", "--steps", 12),
    "steps": ("--mode", "steps", "--steps", 50),
    "chunk": ("--mode", "chunk", "--steps", 4, "--solver", "dpm++"),
}


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def run_job(mode: str, shared: Path, own: Path) -> MainJob:
    def make(folder: Path) -> None:
        write_checkpoint(folder / CHECKPOINT)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "200")
            patch.chdir(folder)
            run = run_cli(CHECKPOINT, *SHARED, *WORDS[mode], "--dump-graphs", "graphs")
        assert run.code == 0, run.err
        run.write(folder)

    return MainJob(mode, shutil.copytree(made_once(shared / f"job-{mode}", make), own, dirs_exist_ok=True))


@pytest.fixture(scope="session")
def main_job(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MainJob:
    """In mode carry."""
    return run_job("carry", run_folder, tmp_path_factory.mktemp("main"))


@pytest.fixture(scope="session")
def chunk_job(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MainJob:
    return run_job("chunk", run_folder, tmp_path_factory.mktemp("chunk"))


@pytest.fixture(scope="session")
def steps_job(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MainJob:
    return run_job("steps", run_folder, tmp_path_factory.mktemp("steps"))


@pytest.fixture(params=("carry", "chunk"))
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def each_job(mode: str, request: pytest.FixtureRequest) -> MainJob:
    """The job of one mode after the other."""
    found = request.getfixturevalue({"carry": "main_job", "chunk": "chunk_job"}[mode])
    assert isinstance(found, MainJob)
    return found


@pytest.fixture
def bundle(each_job: MainJob) -> Bundle:
    return read_bundle(each_job.folder)


@pytest.fixture
def planner(bundle: Bundle) -> StepPlanner:
    """The one of the run that the bundle was made for."""
    return run_planner(bundle, None)[1]


@pytest.fixture(scope="session")
def original_onnx(main_job: MainJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original, exported once."""
    found = read_bundle(main_job.folder)
    work = tmp_path_factory.mktemp("original")
    OrtPair.open(found.model, found.model.planner, found.bucket_set, found.onnx, work, 1)
    return work / "original.onnx"


@pytest.fixture
def runtime(bundle: Bundle, planner: StepPlanner, original_onnx: Path) -> OrtPair:
    return OrtPair.open(bundle.model, planner, bundle.bucket_set, bundle.onnx, original_onnx.parent, threads=1)
