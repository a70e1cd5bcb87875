"""A converted model whose attention takes the packed tokens as they are, for TensorRT's layer (`trt_attention`)."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from dcconvert.export.engines.build import Engine, build_engine
from dcconvert.export.engines.index import Device
from dcconvert.export.onnx.mixed_precision import PASSING, known_types
from dcconvert.export.onnx.trt_attention_op import INPUTS, PROBE_TOKENS, probe
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.graph_tools import placeholders
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.runtime.model import DynamicModel

aten, own = torch.ops.aten, torch.ops.dcconvert

LENGTHS = ("cu_seqlens", "cu_seqlens_kv")


def with_packed_attention(model: DynamicModel) -> DynamicModel:
    """The model with attention on its packed tokens as they are; weights are shared.

    UsageError for one whose attention needs rows: mode carry, packing by bins, cross-attention.
    """
    if model.method.stateful or model.method.row_packing != "rows":
        raise UsageError(
            f"mode {model.method.mode} with packing {model.method.row_packing} has no packed attention: use masks"
        )
    graph = packed_graph(model.denoise_graph)
    denoise = GraphModule(model.denoise_graph, graph, model.denoise_graph._get_name())
    spec = replace(model.spec, denoise_inputs=tuple(node.name for node in placeholders(graph)))
    return model.with_graphs(spec, denoise=denoise)


def packed_graph(module: GraphModule) -> Graph:
    """A copy of a `denoise` graph that lays nothing out in rows."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    given = {node.name: node for node in placeholders(graph)}
    rows, packed = given.get("grid_index"), given["packed_index"]
    check_only_moves(graph, rows)
    with graph.inserting_after(packed):
        lengths = [graph.placeholder(name) for name in reversed(LENGTHS)][::-1]
    for node in list(graph.nodes):
        if node.target is own.gather_tokens.default and node.args[1] in (rows, packed):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.sym_size.int and node.args[0] in (rows, packed):
            node.replace_input_with(node.args[0], given["chunk_index"])
        elif node.target is own.padded_attention.default:
            with graph.inserting_before(node):
                node.replace_all_uses_with(packed_call(graph, node, lengths))
            graph.erase_node(node)
    for node in given.values():
        if not node.users and node.name in ("grid_index", "packed_index", "row_lengths"):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()
    return graph


def check_only_moves(graph: Graph, rows: Node | None) -> None:
    """UsageError if anything but self-attention and moves happens to values that are laid out in rows."""
    laid: set[Node] = set()
    for node in graph.nodes:
        if node.target is own.gather_tokens.default and node.args[1] is rows:
            laid.add(node)
        elif node.target is own.gather_tokens.default or not laid.intersection(node.all_input_nodes):
            continue
        elif node.target in PASSING or node.target is own.padded_attention.default:
            laid.add(node)
        else:
            raise UsageError(f"this model has no packed attention, because of {node.target} over rows: use masks")


def packed_call(graph: Graph, node: Node, lengths: list[Node]) -> Node:
    """The node's self-attention, q, k, v [G, H, L, d], over the packed tokens."""
    *operands, _, scale = node.args
    tokens_first = [graph.call_function(aten.transpose.int, (value, 1, 2)) for value in operands]
    found = graph.call_function(own.packed_attention.default, (*tokens_first, *lengths, scale))
    return graph.call_function(aten.transpose.int, (found, 1, 2))


def refusal(model: DynamicModel, precision: str, device: Device) -> str:
    """Why a backend builds no packed attention of this model's sizes for a device, tried on one node; "" if it does."""
    heads, width = attention_sizes(model)
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "probe.onnx"
        onnx.save(probe(heads, width, precision), str(path))
        shapes = {name: ([PROBE_TOKENS, heads, width],) * 3 for name in INPUTS[:3]}
        shapes |= {name: ([3],) * 3 for name in INPUTS[4:]}
        bucket = Bucket(2, PROBE_TOKENS, 2, PROBE_TOKENS // 2, PROBE_TOKENS // 2)
        try:
            build_engine(Engine("packed attention", path, "", (bucket,), (shapes,), precision, device), Path(work))
        except UsageError as error:
            return str(error)
    return ""


def attention_sizes(model: DynamicModel) -> tuple[int, int]:
    """Heads and their width in the trunk's self-attention; UsageError for a model that has none in packed form."""
    inputs = model.spec.example(2)
    _, live = model.route(inputs)
    plan = model.planner.full_plan(2)
    types = known_types(model.denoise_graph, list(model.feed("denoise", inputs, live, plan).values()))
    for node, value in types.items():
        if node.target is own.packed_attention.default:
            assert isinstance(value, Tensor)
            return int(value.shape[2]), int(value.shape[3])
    raise UsageError("this model has no self-attention over packed tokens: use masks")
