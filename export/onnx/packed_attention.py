"""A converted model with attention directly on packed tokens, for TensorRT's layer (`trt_attention_op`)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from dcconvert.export.engines.build import Engine, build_engine
from dcconvert.export.engines.index import Device
from dcconvert.export.onnx.mixed_precision import PASSING
from dcconvert.export.onnx.trt_attention_op import INPUTS, PROBE_TOKENS, probe
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.fake_values import renew_fake_values
from dcconvert.passes.ir.graph_tools import add_input, placeholders
from dcconvert.passes.ir.node_args import operand
from dcconvert.passes.ir.pass_runner import GraphPass, PassResult
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.rewritten import rewritten

aten, own = torch.ops.aten, torch.ops.dcconvert

LENGTHS = ("cu_seqlens", "cu_seqlens_kv")


def with_packed_attention(model: DynamicModel) -> DynamicModel:
    """The model with attention directly on its packed tokens; weights are shared.

    Raises UsageError for a model whose attention needs rows: mode carry, packing by bins, cross-attention.
    """
    if model.method.stateful or model.method.row_packing != "rows":
        raise UsageError(
            f"mode {model.method.mode} with packing {model.method.row_packing} has no packed attention: use masks"
        )
    return rewritten(model, {"denoise": PackAttention()})


class PackAttention(GraphPass):
    """Remove the layout in rows from a `denoise` graph.

    1. The ops that lay packed tokens out in rows, and split rows again, are removed.
    2. Attention over rows becomes attention over segments of the packed tokens. Their bounds are two new inputs.
    3. Inputs that only described the rows are removed.
    """

    exact = True

    def requires(self, module: GraphModule) -> None:
        """Raises UsageError if values laid out in rows are used by anything except self-attention and moves."""
        laid: set[Node] = set()
        rows = inputs_of(module.graph).get("grid_index")
        for node in module.graph.nodes:
            if node.target is own.gather_tokens.default and node.args[1] is rows:
                laid.add(node)
            elif node.target is own.gather_tokens.default or not laid.intersection(node.all_input_nodes):
                continue
            elif node.target in PASSING or node.target is own.padded_attention.default:
                laid.add(node)
            else:
                raise UsageError(
                    f"this model has no packed attention, because it uses {node.target} on rows: use masks"
                )
        if not any(node.target is own.padded_attention.default for node in module.graph.nodes):
            raise UsageError("this model has no self-attention over packed tokens: use masks")

    def call(self, module: GraphModule) -> PassResult:
        graph, given = module.graph, inputs_of(module.graph)
        rows, packed = given.get("grid_index"), given["packed_index"]
        attentions = [node for node in graph.nodes if node.target is own.padded_attention.default]
        lengths = add_lengths(graph, packed, operand(attentions[0], 3).meta["val"])
        for node in list(graph.nodes):
            if node.target is own.gather_tokens.default and node.args[1] in (rows, packed):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
            elif node.target is aten.sym_size.int and node.args[0] in (rows, packed):
                node.replace_input_with(node.args[0], given["chunk_index"])
            elif node in attentions:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(packed_call(graph, node, lengths))
                graph.erase_node(node)
        for node in given.values():
            if not node.users and node.name in ("grid_index", "packed_index", "row_lengths"):
                graph.erase_node(node)
        graph.eliminate_dead_code()
        renew_fake_values(module)  # moves now have packed tokens where they had rows
        return PassResult(len(attentions))


def inputs_of(graph: Graph) -> dict[str, Node]:
    return {node.name: node for node in placeholders(graph)}


def add_lengths(graph: Graph, packed: Node, row_lengths: Tensor) -> list[Node]:
    """Inputs for the bounds of the segments of queries and of keys [R + 1], after `packed`."""
    like = torch.empty(0, dtype=torch.int32, device=row_lengths.device)
    found = [packed]
    for name in LENGTHS:
        found.append(add_input(graph, name, (row_lengths.shape[0] + 1,), like, after=found[-1]))
    return found[1:]


def packed_call(graph: Graph, node: Node, lengths: list[Node]) -> Node:
    """The node's self-attention, q, k, v [G, H, L, d], over the packed tokens."""
    *operands, _, scale = node.args
    tokens_first = [graph.call_function(aten.transpose.int, (value, 1, 2)) for value in operands]
    found = graph.call_function(own.packed_attention.default, (*tokens_first, *lengths, scale))
    return graph.call_function(aten.transpose.int, (found, 1, 2))


def refusal(model: DynamicModel, precision: str, device: Device) -> str:
    """Why a backend cannot build packed attention of this model's sizes for a device (tested on one node), or ""."""
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
    """Heads and their width in the self-attention of a model with packed attention."""
    graph = model.denoise_graph.graph
    value = next(node.meta["val"] for node in graph.nodes if node.target is own.packed_attention.default)
    return int(value.shape[2]), int(value.shape[3])
