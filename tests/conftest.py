"""Settings of the whole test suite: the same random numbers in every test, one thread, no examples database.

What takes long and is the same in many tests is shared by all test processes of a run (tests/sharing.py).
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from dcconvert.export.onnx import export
from dcconvert.passes.frontend import capture
from tests.shared_captures import SharedCaptures
from tests.sharing import SharedExports, read_translations_once

# Times vary on shared machines; a failing example is printed, and found again because the search is seeded.
settings.register_profile("dcconvert", deadline=None, derandomize=True, database=None)
settings.load_profile("dcconvert")

logging.getLogger("torch.__trace").setLevel(logging.WARNING)  # thousands of lines in every failure report

# A shell that starts the tests in the background lets them ignore signals, which some tests send.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all test processes of this run."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def shared_exports(run_folder: Path) -> Iterator[SharedExports]:
    """Every ONNX graph is exported once in a run; tests of the exporter itself import the real `export_graph`."""
    shared = SharedExports(run_folder / "onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export_graph", shared)
        read_translations_once(patch)
        yield shared


@pytest.fixture(scope="session", autouse=True)
def shared_captures() -> Iterator[SharedCaptures]:
    """Every model is captured once in a process; tests of capture itself import the real `export`."""
    shared = SharedCaptures()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "export", shared)
        yield shared


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
