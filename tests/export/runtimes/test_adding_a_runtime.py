"""The worked example of docs/adding_a_runtime.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dcconvert.export.runtimes.ort import OrtModel
from dcconvert.export.runtimes.ort_static import StaticModel
from dcconvert.export.runtimes.trt import TrtModel
from dcconvert.export.triton.backend import TritonModel
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.run import Runtime

PAGE = (Path(__file__).parents[3] / "docs" / "adding_a_runtime.md").read_text()


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """What the page's code defines."""
    names: dict[str, Any] = {}
    runtime, test = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(runtime, "reference.py", "exec"), names)
    exec(compile(test, "test_reference.py", "exec"), names)
    return names


@pytest.mark.parametrize("mode", ["carry", "rows"])
def test_its_own_test_passes(mode, example, request):
    model, folder = (request.getfixturevalue(f"{mode}_{kind}") for kind in ("model", "onnx"))
    example["test_reference_gives_what_onnx_runtime_gives"](model, folder)


def test_it_is_as_short_as_the_page_says(example):
    """Three methods, and nothing that a runtime shares with the others."""
    own = {name for name in vars(example["ReferenceModel"]) if not name.startswith("_")}
    assert own == {"call", "array", "empty_state"} == {*Runtime.__abstractmethods__}


def test_no_runtime_assembles_what_graphs_are_fed():
    for runtime in (DynamicModel, OrtModel, StaticModel, TrtModel, TritonModel):
        assert not {"feed", "prepare", "route", "denoise", "start"} & {*vars(runtime)}
