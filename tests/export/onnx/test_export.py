"""The ONNX files: plain ONNX at opset 20, named symbolic axes, nothing that depends on values."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from polygraphy.json import load_json

from dcconvert.export.onnx import example_inputs
from dcconvert.export.onnx.export import export_graph, export_original, export_route, quiet_exporter
from dcconvert.export.onnx.lowerings import PORTABLE
from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.plan_inputs import PLAN_INPUTS, SYMBOLIC, symbolic_axes
from dcconvert.passes.ir.spec import count_outputs, output_names
from dcconvert.passes.planning.carry_plan import CARRY_ARRAYS
from dcconvert.passes.planning.chunk_plan import PLAN_ARRAYS
from tests.export.harness import CONFIG, TOKENS, arrays, inputs, tensors

DATA_DEPENDENT = {"NonZero", "Loop", "If", "Scan", "Compress", "Unique", "NonMaxSuppression"}
IMAGE = ["batch", CONFIG.in_channels, CONFIG.image_size, CONFIG.image_size]
TILES = ["tiles", "tile_tokens"]
ROWS = {"rows": ["batch", "row_tokens"], "bins": ["rows", "row_tokens"]}  # rows: one sample a row


@pytest.fixture(scope="module", params=["rows", "bins"])
def packing(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(packing, request) -> Path:
    return request.getfixturevalue(f"{packing}_onnx")


@pytest.fixture(scope="module", params=["route", "denoise"])
def graph(request, folder) -> onnx.ModelProto:
    return onnx.load(folder / f"{request.param}.onnx")


@pytest.fixture(scope="module")
def original(rows_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("original") / "original.onnx"
    export_original(rows_model, path, inputs())
    return path


def sides(values: Any) -> dict[str, list[str | int]]:
    """Name and shape of inputs or outputs, symbolic axes by name."""
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def run(path: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)


# Graphs


def test_the_checker_is_content(graph):
    onnx.checker.check_model(graph, full_check=True)


def test_plain_onnx_of_one_opset(graph):
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == PORTABLE.opset == 20
    assert {node.domain for node in graph.graph.node} == {""}
    assert not graph.functions


def test_no_shape_depends_on_values(graph):
    assert not DATA_DEPENDENT & {node.op_type for node in graph.graph.node}


def test_one_attention_for_each_block(folder):
    types = {name: [node.op_type for node in onnx.load(folder / f"{name}.onnx").graph.node] for name in
             ("route", "denoise")}  # fmt: skip
    assert (types["route"].count("Softmax"), types["denoise"].count("Softmax")) == (1, CONFIG.depth - 1)
    assert not [kind for kinds in types.values() for kind in kinds if kind == "Attention"]


@pytest.mark.parametrize("graph", ["route", "denoise"])
def test_example_inputs_run(folder, graph):
    """Random indices, which other tools would make up, point outside the arrays."""
    (given,) = load_json(str(folder / "example_inputs" / f"{graph}.json"))
    session = onnxruntime.InferenceSession(str(folder / f"{graph}.onnx"), providers=["CPUExecutionProvider"])
    assert set(given) == {value.name for value in session.get_inputs()}
    assert all(np.isfinite(value).all() for value in session.run(None, dict(given)))


def test_example_inputs_larger_than_useful_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(example_inputs, "MOST_BYTES", 15)
    example_inputs.write_example_inputs(tmp_path / "g.onnx", {"x": torch.zeros(4)})
    assert not list(tmp_path.iterdir())
    example_inputs.write_example_inputs(tmp_path / "g.onnx", {"x": torch.zeros(3), "scale": 2})
    assert [path.name for path in (tmp_path / "example_inputs").iterdir()] == ["g.json"]


def test_the_sides_of_route(folder):
    graph = onnx.load(folder / "route.onnx").graph
    assert sides(graph.input) == {"x": IMAGE, "t": ["batch"], "y": ["batch"]}
    found = sides(graph.output)
    assert list(found)[:2] == ["scores", "h"]
    assert found.pop("scores") == ["batch", TOKENS]
    assert found.pop("h") == ["batch", TOKENS, CONFIG.width]
    assert list(found.values()) == [["batch", CONFIG.width]]  # the conditioning


def test_the_sides_of_denoise(packing, folder, request):
    graph = onnx.load(folder / "denoise.onnx").graph
    options = request.getfixturevalue(f"{packing}_model").method
    wanted: dict[str, list[str | int]] = {
        "h": ["batch", TOKENS, CONFIG.width],
        "live_0": ["batch", CONFIG.width],
        "chunk_index": [*TILES, options.members],
        "chunk_weight": [*TILES, options.members],
        "sample_ids": ["tiles"],
        "grid_index": [*ROWS[packing]],
        "packed_index": [*TILES],
        "row_lengths": ["batch"],
        "segment_ids": [*ROWS[packing]],
        "fill_index": ["batch", TOKENS, options.neighbours],
        "fill_weight": ["batch", TOKENS, options.neighbours],
    }
    del wanted["segment_ids" if packing == "rows" else "row_lengths"]
    assert sides(graph.input) == wanted
    assert sides(graph.output) == {"output": ["batch", CONFIG.out_channels, *IMAGE[2:]]}


def test_names_are_those_of_the_model(folder, packing, request):
    spec = request.getfixturevalue(f"{packing}_model").spec
    route, denoise = (onnx.load(folder / f"{name}.onnx").graph for name in ("route", "denoise"))
    assert tuple(sides(route.input)) == spec.route_inputs
    assert tuple(sides(route.output)) == ("scores", *spec.live)
    assert tuple(sides(denoise.input)) == spec.denoise_inputs


def test_every_array_of_a_plan_has_named_axes():
    assert {*PLAN_INPUTS} == {*PLAN_ARRAYS, *CARRY_ARRAYS}
    named = {axis for name in PLAN_INPUTS for axis in symbolic_axes(name) if axis}
    assert named == {*SYMBOLIC} == {"batch", "tiles", "tile_tokens", "rows", "row_tokens", "segments"}
    assert symbolic_axes("recall_weight") == ("", "batch")
    assert symbolic_axes("fill_index") == ("batch",)
    assert symbolic_axes("chunk_index") == ("tiles", "tile_tokens")


def test_types(graph):
    integer, floating = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    for value in (*graph.graph.input, *graph.graph.output):
        whole = value.name in {"y", *PLAN_ARRAYS} - {"chunk_weight", "fill_weight"}
        assert value.type.tensor_type.elem_type == (integer if whole else floating), value.name


def test_no_paths_of_this_machine(graph):
    assert b'File "' not in graph.SerializeToString()
    assert str(Path(torch.__file__).parent).encode() not in graph.SerializeToString()


# The original


@pytest.mark.parametrize("batch", [1, 5])
def test_the_original_keeps_its_call_and_its_results(batch, original, rows_model):
    graph = onnx.load(original).graph
    assert sides(graph.input) == {"x": IMAGE, "t": ["batch"], "y": ["batch"]}
    assert sides(graph.output) == {"output": ["batch", CONFIG.out_channels, *IMAGE[2:]]}
    given = arrays(batch)
    with torch.no_grad():
        wanted = rows_model.original(*tensors(given).values()).numpy()
    np.testing.assert_allclose(run(original, given)[0], wanted, rtol=1e-4, atol=1e-4)


# Weights in a file of their own


def test_small_weights_are_in_the_graph(folder):
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["denoise.onnx", "route.onnx"]


def test_large_weights_are_beside_the_graph(rows_model, rows_onnx, tmp_path):
    path, module = tmp_path / "route.onnx", rows_model.route_graph
    given = rows_model.feed("route", inputs())
    names = output_names(count_outputs(module))
    export_graph(module, path, list(given.values()), [("batch",)] * len(given), names, most_inside=1000)
    assert sorted(other.name for other in tmp_path.iterdir()) == ["route.onnx", "route.onnx.data"]
    weights = onnx.load(path, load_external_data=False).graph.initializer
    large = [tensor for tensor in weights if np.prod(tensor.dims) >= 1000]
    assert len(large) > 3
    assert {tensor.data_location for tensor in large} == {onnx.TensorProto.EXTERNAL}
    onnx.checker.check_model(str(path), full_check=True)
    given = arrays(2)
    for found, wanted in zip(run(path, given), run(rows_onnx / "route.onnx", given), strict=True):
        np.testing.assert_array_equal(found, wanted)


# The exporter


def test_an_exporter_that_gives_nothing(rows_model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    with pytest.raises(CheckFailedError, match=r"returned nothing to write to route\.onnx"):
        export_route(rows_model, tmp_path / "route.onnx", inputs())
    assert not list(tmp_path.iterdir())


def test_the_exporter_is_quiet_and_left_as_it_was(capfd):
    logger = logging.getLogger("torch.onnx")
    before = logger.level, list(warnings.filters)
    with quiet_exporter():
        logger.warning("a note")
        warnings.warn("another", stacklevel=1)
    assert (logger.level, list(warnings.filters)) == before
    assert capfd.readouterr() == ("", "")


def test_output_names(rows_model):
    assert output_names(count_outputs(rows_model.original_graph)) == ("output",)
    assert output_names(count_outputs(rows_model.route_graph)) == ("output_0", "output_1", "output_2")
