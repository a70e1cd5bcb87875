"""Packed attention for TensorRT gives what rows give, in torch and on ONNX Runtime, or is refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcconvert.export.engines.index import Device
from dcconvert.export.onnx.export import export_onnx
from dcconvert.export.onnx.lowerings import TENSORRT
from dcconvert.export.onnx.packed_attention import PackAttention, attention_sizes, refusal, with_packed_attention
from dcconvert.export.onnx.trt_attention_op import probe
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.rewritten import example_of
from tests.export.harness import TOKENS, convert
from tests.passes.contract_harness import check_contract
from tests.passes.harness import pixart_call

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def packed(rows_model) -> DynamicModel:
    return with_packed_attention(rows_model)


@pytest.fixture(scope="module")
def packed_onnx(packed, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    export_onnx(packed, folder, TENSORRT)
    return folder / "denoise.onnx"


def step(model: DynamicModel, counts: list[int], bucket: Bucket | None):
    """Inputs of denoise for samples that keep so many tokens."""
    inputs = model.spec.example(len(counts))
    with torch.no_grad():
        scores, live = model.route(inputs)
    keep = model.planner.planner.select(scores.numpy(), np.array(counts))
    return inputs, live, model.planner.planner.plan(keep, bucket)


COUNTS = st.lists(st.integers(1, TOKENS), min_size=1, max_size=4)
SPARE = st.tuples(st.integers(0, 3), st.integers(0, 5))


@settings(max_examples=15, deadline=None)
@given(counts=COUNTS, spare=SPARE, tile=st.integers(1, 8))
def test_it_gives_what_rows_give(rows_model, packed, counts, spare, tile):
    tiles = sum(-(-count // tile) for count in counts) + spare[0]
    bucket = Bucket(len(counts), tiles * tile, len(counts), max(counts) + spare[1], tile)
    inputs, live, plan = step(rows_model, counts, bucket)
    with torch.no_grad():
        wanted, found = (model.denoise(inputs, live, plan)[0] for model in (rows_model, packed))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [[1], [TOKENS, TOKENS], [3, 16, 1, 9]])
def test_onnx_runtime_runs_the_function(packed, packed_onnx, counts):
    inputs, live, plan = step(packed, counts, None)
    given = {**inputs, **live, **plan.arrays()}
    session = onnxruntime.InferenceSession(str(packed_onnx), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {node.name: np.asarray(given[node.name]) for node in session.get_inputs()})
    with torch.no_grad():
        wanted = packed.denoise(inputs, live, plan)[0]
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_lengths_of_queries_and_keys_are_inputs_of_their_own(packed_onnx):
    onnx.checker.check_model(str(packed_onnx), full_check=True)
    model = onnx.load(str(packed_onnx))
    nodes = [node for node in model.graph.node if node.domain == "trt"]
    assert nodes
    assert {tuple(node.input[4:]) for node in nodes} == {("cu_seqlens", "cu_seqlens_kv")}
    names = {value.name for value in model.graph.input}
    assert {"cu_seqlens", "cu_seqlens_kv"} <= names
    assert not names & {"grid_index", "packed_index", "row_lengths"}  # nothing is laid out in rows
    assert [(function.domain, function.name) for function in model.functions] == [("trt", "TRT_Attention")]


@pytest.mark.parametrize("options", [{"mode": "carry"}, {"packing": "bins"}])
def test_what_needs_rows_is_refused(options):
    with pytest.raises(UsageError, match="has no packed attention: use masks"):
        with_packed_attention(convert(**options))


def test_cross_attention_needs_rows():
    module, args, kwargs = pixart_call()
    model = rewrite(module, args, kwargs, method_of("chunk"), Policy("constant", 2).timetable())
    with pytest.raises(UsageError, match=r"because it uses aten\.scaled_dot_product_attention"):
        with_packed_attention(model)


def test_a_broken_one_is_stopped(rows_model):
    check_contract(PackAttention(), rows_model.denoise_graph, example_of(rows_model))


@needs_rtx
def test_tensorrt_rtx_parses_it_and_has_no_kernel(packed):
    """When this fails because there is a kernel, `dcconvert build` will have begun to use it: say so in the docs."""
    import tensorrt_rtx as trt

    heads, width = attention_sizes(packed)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse(probe(heads, width, "fp16").SerializeToString())
    said = refusal(packed, "fp16", Device("tensorrt-rtx", trt.__version__))
    assert "no fused kernel is available" in said
    assert "\n" not in said
