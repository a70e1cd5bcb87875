"""The worked example of docs/adding_a_method.md does what the page says."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import dcconvert
from dcconvert.passes.methods import METHODS, method_of
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.serialise.graph_json import model_from_dict, model_tensors, model_to_dict
from tests.passes.harness import dit_call

PAGE = (Path(__file__).parents[3] / "docs" / "adding_a_method.md").read_text()


def loaded(path: Path, text: str) -> ModuleType:
    """A file of the page as a module."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The example's tests, with its method in the registry."""
    folder = tmp_path_factory.mktemp("example")
    method, line, tests = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert "Scatter" in line
    made = loaded(folder / "example_scatter.py", method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "scatter", made.Scatter)
        yield loaded(folder / "example_test_scatter.py", tests)


@pytest.mark.parametrize("name", re.findall(r"def (test_scatter_\w+)", PAGE))
def test_its_own_tests_pass(example, name):
    getattr(example, name)()


def test_its_model_can_be_stored_and_its_options_are_checked(example):
    model = dcconvert.convert(dit_call()[0], 4, options=method_of("scatter", neighbours=2))
    assert isinstance(model, DynamicModel)
    back = model_from_dict(model_to_dict(model), model_tensors(model))
    assert back.method == model.method == method_of("scatter", neighbours=2)
    with pytest.raises(dcconvert.UsageError, match="neighbours 0 must be at least 1"):
        method_of("scatter", neighbours=0)


def test_every_member_that_the_page_names_is_there():
    table = PAGE.split("## What a method can define")[1].split("If your method needs a new rewrite")[0]
    names = {name for row in table.splitlines() if row.startswith("|") for name in re.findall(r"`(\w+)`", row)}
    methods = METHODS.values()
    missing = {n for n in names - {"upcycle"} if not any(hasattr(m, n) for m in methods)}
    assert not missing
