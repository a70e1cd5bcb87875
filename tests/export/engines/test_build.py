"""Profiles and keys of engines, the index, and TensorRT-RTX building ahead of time without a GPU."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import onnx
import pytest
from onnx import TensorProto, helper

from dcconvert.export.engines.build import build_engine, file_hash, io_bytes, plan_engines
from dcconvert.export.engines.index import INDEX, Built, Device, Index, read_index, write_index
from dcconvert.export.engines.worker import RTX
from dcconvert.export.onnx.export import export_onnx
from dcconvert.export.onnx.mixed_precision import in_precision
from dcconvert.export.variants import VARIANTS, write_variant
from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.planning.layout import Bucket

pytestmark = pytest.mark.slow

BUCKETS = (Bucket(1, 6, 1, 6, 6), Bucket(1, 16, 1, 16, 16), Bucket(3, 18, 3, 6, 6), Bucket(3, 48, 3, 16, 16))
DEVICE = Device(RTX, "1.2.3")
GRAPHS = ("route", "denoise")


def rtx_version() -> str:
    module = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'dcconvert[rtx]'")
    return str(module.__version__)


@pytest.fixture(scope="module")
def graphs(rows_model, tmp_path_factory):
    """The graphs of mode chunk for TensorRT."""
    folder = tmp_path_factory.mktemp("trt")
    export_onnx(in_precision(rows_model, "fp16"), folder, VARIANTS["trt"].lowerings)
    return folder


def planned(folder, *, per_bucket=False, ranges=False, device=DEVICE):
    return plan_engines(folder, GRAPHS, BUCKETS, "fp16", device, per_bucket=per_bucket, ranges=ranges)


def test_one_engine_a_graph_with_a_profile_for_every_bucket(graphs):
    route, denoise = planned(graphs)
    assert (route.graph, denoise.graph) == ("route", "denoise")
    assert route.buckets == (BUCKETS[1], BUCKETS[3])  # one for each batch size
    assert denoise.buckets == BUCKETS
    for bucket, shapes in zip(denoise.buckets, denoise.profiles, strict=True):
        assert all(low == best == high for low, best, high in shapes.values())
        assert shapes["grid_index"][1] == [bucket.rows, bucket.row_tokens]
        assert shapes["packed_index"][1] == [bucket.tokens // bucket.tile, bucket.tile]
        assert shapes["row_lengths"][1] == [bucket.rows]
        assert shapes["fill_index"][1][:2] == [bucket.batch, 16]
        assert shapes["h"][1] == [bucket.batch, 16, 32]


def test_an_engine_for_each_bucket_on_request(graphs):
    found = planned(graphs, per_bucket=True)
    assert [(engine.graph, engine.buckets) for engine in found] == [
        ("route", (BUCKETS[1],)),
        ("route", (BUCKETS[3],)),
        *(("denoise", (bucket,)) for bucket in BUCKETS),
    ]
    assert len({engine.file for engine in found}) == len(found)


def test_ranges_meet_without_a_gap(graphs):
    _, denoise = planned(graphs, ranges=True)
    lengths = [(s["grid_index"][0][1], s["grid_index"][2][1]) for s in denoise.profiles]
    assert lengths == [(1, 6), (7, 16), (1, 6), (7, 16)]
    assert all(s["packed_index"][0][0] == s["packed_index"][2][0] for s in denoise.profiles)  # as many tiles


def test_the_key_changes_with_everything_that_matters(graphs, tmp_path):
    _, denoise = planned(graphs)
    others = [
        replace(denoise, onnx_sha256="0" * 64),
        replace(denoise, buckets=BUCKETS[:1], profiles=denoise.profiles[:1]),
        replace(denoise, precision="bf16"),
        replace(denoise, device=Device(RTX, "1.2.4")),
        replace(denoise, device=Device("tensorrt", "1.2.3", "9.0", "NVIDIA H200")),
        replace(denoise, device=Device(RTX, "1.2.3", "8.9")),
    ]
    assert len({engine.key for engine in (denoise, *others)}) == 7
    assert planned(graphs)[1].key == denoise.key
    copy = tmp_path / "denoise.onnx"
    copy.write_bytes((graphs / "denoise.onnx").read_bytes())
    assert file_hash(copy) == denoise.onnx_sha256
    (tmp_path / "denoise.onnx.data").write_bytes(b"weights")
    assert file_hash(copy) != denoise.onnx_sha256


def test_folders_tell_devices_apart():
    assert Device("tensorrt", "11.4.0", "9.0", "NVIDIA H200").folder == "tensorrt-11.4.0-nvidia-h200-sm90"
    assert Device(RTX, "1.7.1").folder == "tensorrt-rtx-1.7.1"


def test_bytes_of_inputs_and_outputs(tmp_path):
    values = [
        helper.make_tensor_value_info("a", TensorProto.FLOAT16, ["batch", 4]),
        helper.make_tensor_value_info("b", TensorProto.INT64, ["batch"]),
    ]
    made = [helper.make_tensor_value_info("c", TensorProto.FLOAT, ["batch", 4])]
    graph = helper.make_graph([helper.make_node("Cast", ["a"], ["c"], to=TensorProto.FLOAT)], "g", values, made)
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph), str(path))
    assert io_bytes(path, Bucket(3, 18, 3, 6, 6)) == 3 * 4 * 2 + 3 * 8 + 3 * 4 * 4


def test_a_graph_that_is_missing_is_one_line(graphs, tmp_path):
    (tmp_path / "route.onnx").write_bytes((graphs / "route.onnx").read_bytes())
    with pytest.raises(UsageError, match=r"cannot read .*denoise\.onnx: No such file.*; remove its folder and build"):
        planned(tmp_path)


def entries(graphs) -> tuple[Built, ...]:
    return tuple(engine.built(engine.onnx, 1.25, 7) for engine in planned(graphs))


def test_the_index_is_read_as_it_was_written(graphs, tmp_path):
    index = Index(DEVICE, True, entries(graphs), entries(graphs)[:1])
    write_index(tmp_path, index)
    assert read_index(tmp_path) == index


def test_an_older_index_is_read(graphs, tmp_path):
    index = Index(DEVICE, True, entries(graphs))
    write_index(tmp_path, index)
    text = (tmp_path / INDEX).read_text()
    (tmp_path / INDEX).write_text(text.replace('"variant"', '"flavour"'))
    assert read_index(tmp_path) == index


@pytest.mark.parametrize("text", ["", "{", "[]", '{"engines": [{}]}', '{"engines": [], "device": {}}'])
def test_a_damaged_index_is_one_line(tmp_path, text):
    with pytest.raises(UsageError, match="has no engines: make them with 'dcconvert build'"):
        read_index(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UsageError, match="build the engines again"):
        read_index(tmp_path)


def test_an_index_with_anything_missing_or_wrong_is_one_line(graphs, tmp_path):
    write_index(tmp_path, Index(DEVICE, False, entries(graphs)))
    whole = json.loads((tmp_path / INDEX).read_text())
    for part in (whole, whole["device"], whole["engines"][0], whole["engines"][0]["buckets"][0]):
        for name, value in list(part.items()):
            part[name] = None
            refused(tmp_path, whole)
            del part[name]
            if name not in ("capability", "gpu"):  # which may be left out
                refused(tmp_path, whole)
            part[name] = value
    (tmp_path / INDEX).write_text(json.dumps(whole))
    assert read_index(tmp_path).engines == entries(graphs)


def refused(folder, index) -> None:
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UsageError, match="build the engines again"):
        read_index(folder)


def test_a_file_that_was_changed_is_not_intact(tmp_path, graphs):
    entry = entries(graphs)[0]
    assert not entry.intact(tmp_path)
    data = (graphs / "route.onnx").read_bytes()
    (tmp_path / entry.file).write_bytes(data)
    assert entry.intact(tmp_path)
    (tmp_path / entry.file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert not entry.intact(tmp_path)
    (tmp_path / entry.file).write_bytes(b"")
    assert not entry.intact(tmp_path)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("rows_model", "trt"),
        ("carry_model", "trt"),
        ("bins_model", "trt"),
        ("carry_model", "trt-bf16"),
        ("steps_model", "trt"),
        ("steps_model", "trt-bf16"),
    ],
)
def test_tensorrt_rtx_builds_every_bucket(request, mode, name, tmp_path):
    device = Device(RTX, rtx_version())
    model, variant = request.getfixturevalue(mode), VARIANTS[name]
    export_onnx(in_precision(model, variant.precision), tmp_path, variant.lowerings)
    buckets = BUCKETS[1:3] if mode != "bins_model" else (Bucket(3, 21, 2, 16, 7),)
    ticks: list[float] = []
    for engine in plan_engines(tmp_path, model.spec.graphs, buckets, variant.precision, device):
        entry = build_engine(engine, tmp_path, ticks.append)
        assert entry.intact(tmp_path)
        assert entry.bytes > 10_000
        assert entry.layers > 5
    assert ticks
    assert not list(tmp_path.glob(".building-*"))


def test_an_input_that_the_parser_leaves_out_is_noticed(rows_model, tmp_path):
    """TensorRT-RTX 1.7 parses `nonpad_kv_seqlen` and drops it: padding would be attended to."""
    device = Device(RTX, rtx_version())
    write_variant(VARIANTS["ort-cuda"], rows_model, tmp_path, BUCKETS[:1])
    *_, denoise = plan_engines(tmp_path / "ort-cuda", GRAPHS, BUCKETS[:1], "fp16", device)
    with pytest.raises(CheckFailedError, match=r"ignores input row_lengths of denoise\.onnx"):
        build_engine(denoise, tmp_path)
    assert not list(tmp_path.glob("*.engine"))


def test_a_builder_that_fails_names_the_bucket(rows_model, tmp_path):
    """Attention in fp32 has no kernel."""
    device = Device(RTX, rtx_version())
    export_onnx(rows_model, tmp_path, VARIANTS["trt"].lowerings)
    *_, denoise = plan_engines(tmp_path, GRAPHS, BUCKETS[2:], "fp32", device)
    with pytest.raises(UsageError, match=r"cannot build denoise, bucket of batch 3, 6 tokens per sample: .*Attention"):
        build_engine(denoise, tmp_path)


def test_a_graph_that_is_not_understood_names_node_and_op(tmp_path):
    device = Device(RTX, rtx_version())
    values = [helper.make_tensor_value_info("batch_of", TensorProto.FLOAT, ["batch"])]
    found = [helper.make_tensor_value_info("where", TensorProto.INT64, [1, "found"])]
    node = helper.make_node("NonZero", ["batch_of"], ["where"], name="look")
    model = helper.make_model(
        helper.make_graph([node], "g", values, found), opset_imports=[helper.make_opsetid("", 20)]
    )
    onnx.save(model, str(tmp_path / "route.onnx"))
    [route] = plan_engines(tmp_path, GRAPHS[:1], BUCKETS[:1], "fp16", device)
    with pytest.raises(UsageError, match=r"cannot build route: node 'look', op NonZero: .*plugin"):
        build_engine(route, tmp_path)


def test_a_worker_that_dies_is_one_line(graphs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UsageError, match="cannot build route: its process died: it printed nothing"):
        build_engine(planned(graphs)[0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_stops_the_worker_and_leaves_nothing(graphs, tmp_path, monkeypatch):
    script = tmp_path / "slow"
    script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    folder = tmp_path / "engines"
    folder.mkdir()

    def stop(seconds: float) -> None:
        if (tmp_path / "pid").is_file():
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build_engine(planned(graphs)[0], folder, stop)
    assert time.monotonic() - start < 300
    assert not list(folder.iterdir())
