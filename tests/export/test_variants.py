"""Variants agree with the model in fp32 and with ONNX Runtime, and one that does not is refused."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest

from dcconvert.export.onnx.mixed_precision import in_precision
from dcconvert.export.variants import VARIANTS, check_precision, write_variant
from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.planning.layout import Bucket

pytestmark = pytest.mark.slow

WRITTEN = (
    ("chunk", "ort-cuda"),
    ("chunk", "trt"),
    ("chunk", "trt-packed"),
    ("carry", "trt"),
    ("carry", "trt-bf16"),
    ("steps", "ort-cuda"),
    ("steps", "trt"),
    ("steps", "trt-bf16"),
)
BUCKETS = (Bucket(1, 6, 1, 6, 6), Bucket(3, 60, 3, 16, 4))


@pytest.fixture(scope="module")
def written(rows_model, carry_model, steps_model, tmp_path_factory):
    """Folders of all modes with some variants, and the checks that were made."""
    models, folder = (
        {"chunk": rows_model, "carry": carry_model, "steps": steps_model},
        tmp_path_factory.mktemp("variants"),
    )
    checks = {
        (mode, name): write_variant(VARIANTS[name], models[mode], folder / mode, BUCKETS) for mode, name in WRITTEN
    }
    return folder, checks


def attention_nodes(path):
    model = onnx.load(str(path))
    onnx.checker.check_model(str(path), full_check=True)
    return [node for node in model.graph.node if node.op_type == "Attention"], model


@pytest.mark.parametrize(("mode", "name"), WRITTEN)
def test_every_file_is_valid_and_in_its_precision(written, mode, name):
    folder = written[0] / mode
    wanted = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[VARIANTS[name].precision]
    for graph in ("full", "skip") if mode == "steps" else ("route", "denoise"):
        nodes, model = attention_nodes(folder / name / f"{graph}.onnx")
        types = {tensor.data_type for tensor in model.graph.initializer}
        if graph in ("full", "denoise"):
            assert nodes
            assert wanted in types
        assert all(value.type.tensor_type.elem_type != wanted for value in model.graph.input)


def test_tensorrt_gets_masks_and_onnx_runtime_lengths(written):
    folder = written[0] / "chunk"
    lengths, _ = attention_nodes(folder / "ort-cuda" / "denoise.onnx")
    masks, _ = attention_nodes(folder / "trt" / "denoise.onnx")
    assert any(len(node.input) == 7 and node.input[6] for node in lengths)
    assert all(len(node.input) < 7 for node in masks)
    assert sum(len(node.input) > 3 and bool(node.input[3]) for node in masks) == sum(
        len(node.input) == 7 for node in lengths
    )


@pytest.mark.parametrize(("mode", "name"), WRITTEN)
def test_what_can_be_compared_is_compared_in_every_bucket(written, mode, name):
    found = written[1][mode, name]
    assert found[0].name == f"{name}: {VARIANTS[name].precision} against fp32"
    assert found[0].value > 0
    assert all(check.passed for check in found)
    compared = [check for check in found if "denoise" in check.name or "skip" in check.name]
    assert len(compared) == (0 if VARIANTS[name].agreement is None else len(BUCKETS))


@pytest.mark.parametrize("spoilt", ["full_graph", "skip_graph"])
def test_a_graph_of_mode_steps_that_is_wrong_in_half_is_noticed(steps_model, spoilt):
    changed = in_precision(steps_model, "fp16")
    next(weight for name, weight in getattr(changed, spoilt).named_parameters() if name.endswith("_half")).mul_(1.5)
    assert not check_precision(steps_model, changed, VARIANTS["trt"]).passed


def test_a_variant_that_is_too_far_off_is_not_written(rows_model, tmp_path):
    strict = replace(VARIANTS["trt"], error=1e-9)
    with pytest.raises(CheckFailedError, match="fp16 against fp32"):
        write_variant(strict, rows_model, tmp_path, BUCKETS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckFailedError, match=r"trt: denoise|denoise, batch|route, batch"):
        write_variant(replace(VARIANTS["trt"], agreement=1e-9), rows_model, tmp_path, BUCKETS)


def test_wrong_weights_in_half_are_noticed(rows_model):
    changed = in_precision(rows_model, "fp16")
    name, weight = next((n, w) for n, w in changed.denoise_graph.named_parameters() if n.endswith("fc1.weight_half"))
    weight.data.neg_()
    check = check_precision(rows_model, changed, VARIANTS["trt"])
    assert not check.passed, name
