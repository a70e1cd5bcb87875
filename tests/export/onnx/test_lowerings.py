"""Each op of the registry, alone in an ONNX graph, against its torch reference at sizes it was not exported with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.utils
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from dcconvert.export.onnx import export as onnx_export
from dcconvert.export.onnx.lowerings import FUSED, PORTABLE, Lowerings

ops = torch.ops.dcconvert
TOKENS, WIDTH, HEADS, HEAD_WIDTH = 12, 5, 2, 4
SCALE = 0.6
DATA_DEPENDENT = {"Loop", "If", "Scan", "NonZero", "Compress"}


@dataclass(frozen=True)
class Case:
    """An op, its inputs at given sizes, the symbolic leading axes of each, and sizes: the example's, then others."""

    op: Callable[..., Tensor]
    inputs: Callable[..., tuple[Tensor, ...]]
    axes: tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    constants: tuple[float | torch.dtype, ...] = ()


def rows_summing_to_one(*shape: int) -> Tensor:
    return torch.rand(shape).softmax(-1)


def chunk_inputs(members: int) -> Callable[..., tuple[Tensor, ...]]:
    def inputs(batch: int, tiles: int, tile: int) -> tuple[Tensor, ...]:
        index = torch.randint(batch * TOKENS, (tiles, tile, members))
        return torch.randn(batch, TOKENS, WIDTH), index, rows_summing_to_one(tiles, tile, members)

    return inputs


def dechunk_inputs(neighbours: int) -> Callable[..., tuple[Tensor, ...]]:
    def inputs(batch: int, tiles: int, tile: int) -> tuple[Tensor, ...]:
        index = torch.randint(tiles * tile, (batch, TOKENS, neighbours))
        update = torch.randn(tiles, tile, WIDTH)
        return torch.randn(batch, TOKENS, WIDTH), update, index, rows_summing_to_one(batch, TOKENS, neighbours)

    return inputs


def gather_tokens_inputs(*trailing: int) -> Callable[..., tuple[Tensor, ...]]:
    def inputs(tiles: int, tile: int, rows: int, slots: int) -> tuple[Tensor, ...]:
        return torch.randn(tiles, tile, *trailing), torch.randint(tiles * tile, (rows, slots))

    return inputs


def operands(rows: int, slots: int) -> list[Tensor]:
    return [torch.randn(rows, HEADS, slots, HEAD_WIDTH) for _ in range(3)]


def row_inputs(rows: int, slots: int) -> tuple[Tensor, ...]:
    """From one slot in use to all of them; keys that must not count are far off."""
    q, k, v = operands(rows, slots)
    lengths = torch.linspace(1, slots, rows).round().long()
    unused = torch.arange(slots) >= lengths[:, None]
    for x in (k, v):
        x.masked_fill_(unused[:, None, :, None], 1e4)
    return q, k, v, lengths


def full_rows(rows: int, slots: int) -> tuple[Tensor, ...]:
    return (*operands(rows, slots), torch.full((rows,), slots))


def segment_inputs(rows: int, slots: int) -> tuple[Tensor, ...]:
    """Up to three samples a row, the last row without any: its slots have the id -1."""
    ids = (torch.arange(rows * slots).view(rows, slots) * 3 // slots) % 7
    ids[-1] = -1
    return (*operands(rows, slots), ids)


def cache_index_inputs(tiles: int, tile: int) -> tuple[Tensor, ...]:
    return (torch.randint(9, (tiles, tile, 3, 1)).squeeze(3).repeat_interleave(torch.tensor([2, 1, 1]), 2)[..., :4],)


def remember_inputs(batch: int, tiles: int, tile: int) -> tuple[Tensor, ...]:
    """Every packed token to a place of its own."""
    places = torch.randperm(2 * batch * TOKENS)[: tiles * tile].view(tiles, tile)
    index = torch.stack([places // (batch * TOKENS), places // TOKENS % batch, 0 * places, places % TOKENS], 2)
    values = torch.randn(tiles, HEADS, tile, HEAD_WIDTH)
    return torch.randn(2, batch, HEADS, TOKENS, HEAD_WIDTH), values, ops.cache_index(index, HEADS)


def cache_read_inputs(batch: int) -> tuple[Tensor, ...]:
    weight = torch.randn(2, batch, 1, TOKENS, 1).expand(-1, -1, -1, -1, HEAD_WIDTH)
    return torch.randn(2, batch, HEADS, TOKENS, HEAD_WIDTH), weight.contiguous()


def masked_inputs(batch: int, queries: int) -> tuple[Tensor, ...]:
    """A mask of the keys alone, to be spread over the queries."""
    k, v = (torch.randn(batch, HEADS, TOKENS, HEAD_WIDTH) for _ in range(2))
    return torch.randn(batch, HEADS, queries, HEAD_WIDTH), k, v, torch.randn(batch, 1, 1, TOKENS)


def no_keys_inputs(batch: int, queries: int) -> tuple[Tensor, ...]:
    """A boolean mask that leaves no key to the last sample, as for an empty prompt."""
    *given, mask = masked_inputs(batch, queries)
    mask = mask > 0
    mask[:, ..., 0], mask[-1] = True, False
    return *given, mask


def rows_of_numbers(batch: int) -> tuple[Tensor, ...]:
    return (100 * torch.randn(batch, WIDTH),)


def infinite_inputs(batch: int, queries: int) -> tuple[Tensor, ...]:
    """The same as a bias of minus infinity."""
    *given, mask = no_keys_inputs(batch, queries)
    return *given, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


TILED = ("tiles", "tile_tokens")
ROWS = ("rows", "heads", "row_tokens")
CHUNK_SIZES = ((3, 4, 6), (1, 1, 1), (5, 2, 9), (2, 8, 3))
GRID_SIZES = ((3, 8), (1, 1), (1, 5), (6, 2), (2, 17))

CASES: dict[str, Case] = {
    "to half": Case(torch.ops.aten.to.dtype, rows_of_numbers, (("batch",),), ((3,), (1,), (7,)), (torch.float16,)),
    "to integers": Case(torch.ops.aten.to.dtype, rows_of_numbers, (("batch",),), ((3,), (5,)), (torch.int64,)),
    "chunk": Case(ops.chunk.default, chunk_inputs(3), (("batch",), TILED, TILED), CHUNK_SIZES),
    "chunk, one member": Case(ops.chunk.default, chunk_inputs(1), (("batch",), TILED, TILED), CHUNK_SIZES),
    "dechunk": Case(ops.dechunk.default, dechunk_inputs(4), (("batch",), TILED, ("batch",), ("batch",)), CHUNK_SIZES),
    "dechunk, one neighbour": Case(
        ops.dechunk.default, dechunk_inputs(1), (("batch",), TILED, ("batch",), ("batch",)), CHUNK_SIZES
    ),
    "gather_tokens": Case(
        ops.gather_tokens.default,
        gather_tokens_inputs(WIDTH),
        (TILED, ("rows", "row_tokens")),
        ((4, 6, 3, 8), (1, 1, 1, 1), (3, 8, 9, 2)),
    ),
    "gather_tokens, rank 5": Case(
        ops.gather_tokens.default,
        gather_tokens_inputs(3, HEADS, 2),
        (TILED, ("rows", "row_tokens")),
        ((4, 6, 3, 8), (2, 3, 1, 7)),
    ),
    "row attention": Case(
        ops.padded_attention.default, row_inputs, (ROWS, ROWS, ROWS, ("rows",)), GRID_SIZES, constants=(SCALE,)
    ),
    "row attention, full rows": Case(
        ops.padded_attention.default, full_rows, (ROWS, ROWS, ROWS, ("rows",)), GRID_SIZES, constants=(SCALE,)
    ),
    "segment attention": Case(
        ops.segment_attention.default,
        segment_inputs,
        (ROWS, ROWS, ROWS, ("rows", "row_tokens")),
        GRID_SIZES,
        constants=(SCALE,),
    ),
    "attention with a mask": Case(
        torch.ops.aten.scaled_dot_product_attention.default,
        masked_inputs,
        (("batch", "", "row_tokens"), ("batch",), ("batch",), ("batch",)),
        ((3, 8), (1, 1), (2, 17)),
    ),
    "attention with infinite biases": Case(
        torch.ops.aten.scaled_dot_product_attention.default,
        infinite_inputs,
        (("batch", "", "row_tokens"), ("batch",), ("batch",), ("batch",)),
        ((3, 8), (2, 17)),
    ),
    "attention with no keys": Case(
        torch.ops.aten.scaled_dot_product_attention.default,
        no_keys_inputs,
        (("batch", "", "row_tokens"), ("batch",), ("batch",), ("batch",)),
        ((3, 8), (2, 17)),
    ),
    "cache_index": Case(
        ops.cache_index.default, cache_index_inputs, (TILED,), ((4, 6), (1, 1), (3, 9)), constants=(HEADS,)
    ),
    "cache_write": Case(
        ops.cache_write.default,
        remember_inputs,
        (("", "batch"), ("tiles", "", "tile_tokens"), ("tiles", "", "tile_tokens")),
        ((3, 4, 6), (1, 1, 1), (2, 5, 7)),
    ),
    "cache_read": Case(ops.cache_read.default, cache_read_inputs, (("", "batch"), ("", "batch")), ((3,), (1,), (5,))),
}


@pytest.fixture(scope="module", params=[PORTABLE, FUSED], ids=["portable", "fused"])
def form(request: pytest.FixtureRequest) -> Lowerings:
    assert isinstance(request.param, Lowerings)
    return request.param


@pytest.fixture(scope="module")
def together(form: Lowerings) -> onnx.ModelProto:
    """All cases side by side in one graph, exported once: the exporter takes seconds to start."""
    torch.manual_seed(0)
    graph, results = Graph(), []
    args: list[Tensor] = []
    axes: list[tuple[str, ...]] = []
    for at, case in enumerate(CASES.values()):
        inputs = case.inputs(*case.sizes[0])
        names = [graph.placeholder(input_name(at, i)) for i in range(len(inputs))]
        results.append(graph.call_function(case.op, (*names, *case.constants)))
        args += inputs
        axes += case.axes
    graph.output(tuple(results))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ops.onnx"
        outputs = [output_name(at) for at in range(len(CASES))]
        onnx_export.export_graph(GraphModule(torch.nn.Module(), graph), path, args, axes, outputs, form)
        return onnx.load(path)


def input_name(case: int, number: int) -> str:
    return f"case_{case}_input_{number}"


def output_name(case: int) -> str:
    return f"case_{case}_output"


@pytest.fixture(scope="module", params=list(CASES))
def exported(request: pytest.FixtureRequest, together: onnx.ModelProto) -> tuple[Case, onnx.ModelProto]:
    """One case, and the part of the graph that leads from its inputs to its output."""
    at, case = list(CASES).index(request.param), CASES[request.param]
    names = [input_name(at, i) for i in range(len(case.axes))]
    return case, onnx.utils.Extractor(together).extract_model(names, [output_name(at)])


def test_every_lowering_has_a_case():
    assert {case.op for case in CASES.values()} == set(PORTABLE.functions) == set(FUSED.functions)


def test_other_sizes_than_the_example(exported):
    case, model = exported
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for sizes in case.sizes:
        inputs = case.inputs(*sizes)
        feed = {given.name: value.numpy() for given, value in zip(session.get_inputs(), inputs, strict=True)}
        (found,) = session.run(None, feed)
        wanted = case.op(*inputs, *case.constants).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=f"sizes {sizes}")


def test_the_graph_is_plain_onnx(exported, form):
    case, model = exported
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == form.opset
    assert not model.functions
    types = [node.op_type for node in model.graph.node]
    assert all(node.domain == "" for node in model.graph.node)
    attentions = 1 if "attention" in str(case.op) else 0
    assert types.count("Attention" if form is FUSED else "Softmax") == attentions
    assert types.count("Softmax" if form is FUSED else "Attention") == 0
    assert not DATA_DEPENDENT.intersection(types)


def test_the_named_axes_are_symbolic(exported):
    case, model = exported
    for given, named in zip(model.graph.input, case.axes, strict=True):
        dims = given.type.tensor_type.shape.dim
        assert [dim.dim_param for dim in dims] == [*named, *[""] * (len(dims) - len(named))]
