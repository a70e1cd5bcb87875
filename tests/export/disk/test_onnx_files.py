"""ONNX files from somebody else: what they would do on loading is found out before they are loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from dcconvert.export.disk.onnx_files import checked_onnx
from dcconvert.export.runtimes.ort import OrtModel
from dcconvert.passes.ir.errors import UsageError
from tests.export.harness import convert

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)


def write(path: Path, nodes: Sequence[Any], constants: Sequence[Any] = (), functions: Sequence[Any] = ()) -> Path:
    graph = helper.make_graph(nodes, "graph", [X], [Y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("own", 1)])
    model.functions.extend(functions)
    path.write_bytes(model.SerializeToString())
    return path


def ints(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as error:
        checked_onnx(path)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("; convert the model again")
    return str(error.value)


def doubled(times: int) -> list[Any]:
    nodes = [helper.make_node("Concat", [f"d{n}", f"d{n}"], [f"d{n + 1}"], axis=0) for n in range(times)]
    return [helper.make_node("Shape", ["w"], ["d0"]), *nodes, helper.make_node("Cast", [f"d{times}"], ["y"], to=1)]


def test_what_we_write_is_accepted(rows_onnx, carry_onnx):
    for path in (*rows_onnx.glob("*.onnx"), *carry_onnx.glob("*.onnx")):
        assert checked_onnx(path).graph.node


@pytest.mark.parametrize("kind", ["Loop", "If", "Scan"])
@pytest.mark.parametrize("hidden", [False, True])
def test_control_flow_is_refused(kind, hidden, tmp_path):
    body = helper.make_graph([], "body", [], [])
    node = helper.make_node(kind, ["x"], ["y"], body=body)
    functions = []
    if hidden:
        functions = [helper.make_function("own", "Plain", ["x"], ["y"], [node], [helper.make_opsetid("", 21)])]
        node = helper.make_node("Plain", ["x"], ["y"], domain="own")
    path = write(tmp_path / "a.onnx", [node], functions=functions)
    assert f"holds a node {kind}, which dcconvert does not write" in refused(path)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([helper.make_node("ConstantOfShape", ["huge"], ["y"])], "y has 17179869184 numbers"),
        ([helper.make_node("Expand", ["w", "huge"], ["y"])], "y has 17179869184 numbers"),
        ([helper.make_node("Tile", ["m", "huge"], ["y"])], "y has 17179869184 numbers"),
        (doubled(60), r"d\d+ has \d+ numbers"),
        (
            [helper.make_node("NonZero", ["w"], ["n"]), helper.make_node("Cast", ["n"], ["y"], to=1)],
            "is a constant of unknown size",
        ),
    ],
    ids=["constant", "expand", "tile", "doubling", "unknown"],
)
def test_constants_that_need_absurd_memory_are_refused(nodes, said, tmp_path):
    constants = [ints("huge", 1 << 17, 1 << 17), numpy_helper.from_array(np.ones(1, np.float32), "w")]
    constants.append(numpy_helper.from_array(np.ones((1, 1), np.float32), "m"))
    text = refused(write(tmp_path / "a.onnx", nodes, constants))
    assert re.search(said, text), text


def test_weights_that_the_file_does_not_hold_are_refused(tmp_path):
    big = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 20, 1 << 14], raw_data=b"\0" * 16)
    path = write(tmp_path / "a.onnx", [helper.make_node("Identity", ["w"], ["y"])], [big])
    assert "for which the file has too few bytes" in refused(path)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"location": "../secret"}, "has weights in '../secret', not in a.onnx.data"),
        ({"location": "/etc/passwd"}, "not in a.onnx.data"),
        ({"location": "a.onnx.data", "offset": "100", "length": "16"}, "w lies outside a.onnx.data"),
        ({"location": "a.onnx.data", "length": "4"}, "too few bytes"),
    ],
)
def test_external_weights_lie_beside_the_file(entries, said, tmp_path):
    (tmp_path / "a.onnx.data").write_bytes(b"\0" * 16)
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        weight.external_data.add(key=key, value=value)
    path = write(tmp_path / "a.onnx", [helper.make_node("Identity", ["w"], ["y"])], [weight])
    assert said in refused(path)


def test_external_weights_are_no_link(tmp_path):
    (tmp_path / "secret").write_bytes(b"\0" * 16)
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "a.onnx.data").symlink_to(tmp_path / "secret")
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="a.onnx.data")
    path = write(folder / "a.onnx", [helper.make_node("Identity", ["w"], ["y"])], [weight])
    with pytest.raises(UsageError, match="is a link that leads out of its folder"):
        checked_onnx(path)


def test_exchanged_graphs_are_refused(rows_onnx, tmp_path):
    for name, other in (("route", "denoise"), ("denoise", "route")):
        (tmp_path / f"{name}.onnx").write_bytes((rows_onnx / f"{other}.onnx").read_bytes())
    with pytest.raises(UsageError, match=r"route\.onnx is not the graph route of this bundle"):
        OrtModel(tmp_path, convert().planner)


def test_a_file_that_is_no_onnx(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"\xff" * 100)
    assert "cannot read" in refused(tmp_path / "a.onnx")
