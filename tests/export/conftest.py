"""One model and its ONNX files for each packing, made once: nothing may change them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcconvert.export.onnx.export import export_onnx
from dcconvert.passes.runtime.model import DynamicModel
from tests.export.harness import convert, export


@pytest.fixture(scope="session")
def rows_model() -> DynamicModel:
    return convert()


@pytest.fixture(scope="session")
def rows_onnx(rows_model: DynamicModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(rows_model, tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def carry_model() -> DynamicModel:
    return convert("carry")


@pytest.fixture(scope="session")
def carry_onnx(carry_model: DynamicModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(carry_model, tmp_path_factory.mktemp("carry"))


@pytest.fixture(scope="session")
def bins_model() -> DynamicModel:
    return convert(packing="bins")


@pytest.fixture(scope="session")
def bins_onnx(bins_model: DynamicModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(bins_model, tmp_path_factory.mktemp("bins"))


@pytest.fixture(scope="session")
def steps_model() -> DynamicModel:
    return convert("steps")


@pytest.fixture(scope="session")
def steps_onnx(steps_model: DynamicModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    export_onnx(steps_model, folder)
    return folder
