"""One model and its ONNX files for each packing, made once: nothing may change them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcconvert.passes.model import ChunkedModel
from tests.export.harness import convert, export


@pytest.fixture(scope="session")
def rows_model() -> ChunkedModel:
    return convert()


@pytest.fixture(scope="session")
def rows_onnx(rows_model: ChunkedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(rows_model, tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def bins_model() -> ChunkedModel:
    return convert(packing="bins")


@pytest.fixture(scope="session")
def bins_onnx(bins_model: ChunkedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(bins_model, tmp_path_factory.mktemp("bins"))
