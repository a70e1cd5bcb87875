"""`TRT_Attention`: the op that TensorRT 11 has a layer for, and a function that ONNX Runtime runs instead.

The node's domain is `trt`. A file with this node contains a function of the same name: ONNX Runtime runs its body,
which masks all pairs of tokens from different samples, and TensorRT's parser uses its own layer.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir
from onnx import TensorProto, helper
from onnx.defs import OpSchema

DOMAIN, NAME = "trt", "TRT_Attention"
OPSET = 24
ATTRIBUTES = {"query_form": "packed_nhd", "kv_form": "packed_nhd", "causal_kind": "none"}
INPUTS = ("query", "key", "value", "mask", "query_lengths", "key_lengths")
PROBE_TOKENS = 64


def register_schema() -> None:
    """Register the op with the exporter."""
    if not onnx.defs.has(NAME, domain=DOMAIN):
        floats, ints = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ["tensor(int32)"]
        kinds = {"query_lengths": "I", "key_lengths": "I", "mask": "M"}
        optional = OpSchema.FormalParameterOption.Optional
        inputs = [OpSchema.FormalParameter(n, kinds.get(n, "T"), param_option=optional) for n in INPUTS]
        constraints = [("T", floats, ""), ("I", ints, ""), ("M", ["tensor(bool)"], "")]
        attributes = [OpSchema.Attribute(n, OpSchema.AttrType.STRING, required=False) for n in ATTRIBUTES]
        outputs = [OpSchema.FormalParameter("output", "T")]
        onnx.defs.register_schema(
            OpSchema(
                NAME,
                DOMAIN,
                1,
                inputs=inputs,
                outputs=outputs,
                type_constraints=constraints,
                attributes=attributes,
            )
        )


def add_function(model: onnx_ir.Model) -> None:
    """Add the op's function for ONNX Runtime to a model that uses the op."""
    if any(node.domain == DOMAIN for node in model.graph):
        function = onnx_ir.serde.deserialize_function(function_body())
        model.functions[function.identifier()] = function
        model.graph.opset_imports[DOMAIN] = 1


def function_body() -> onnx.FunctionProto:
    """Attention of [T, H, d] with a mask over all pairs: correct everywhere, but with the cost of T x T products."""

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], **attributes)

    def constant(name: str, *values: int) -> onnx.NodeProto:
        return node("Constant", [], name, value=helper.make_tensor(name, TensorProto.INT64, [len(values)], values))

    nodes = [
        constant("zero", 0),
        constant("one", 1),
        node("Constant", [], "start", value=helper.make_tensor("start", TensorProto.INT32, [], [0])),
        node("Constant", [], "step", value=helper.make_tensor("step", TensorProto.INT32, [], [1])),
        node("Shape", ["query"], "size", start=0, end=1),
        node("Squeeze", ["size"], "scalar"),
        node("Cast", ["scalar"], "tokens", to=TensorProto.INT32),
        node("Range", ["start", "tokens", "step"], "places"),
        node("Unsqueeze", ["places", "one"], "place"),
    ]
    for side in ("query", "key"):  # a position's segment is the number of bounds at or below it
        nodes += [
            node("Unsqueeze", [f"{side}_lengths", "zero"], f"{side}_bounds"),
            node("GreaterOrEqual", ["place", f"{side}_bounds"], f"{side}_passed"),
            node("Cast", [f"{side}_passed"], f"{side}_counted", to=TensorProto.INT32),
            node("ReduceSum", [f"{side}_counted", "one"], f"{side}_segment", keepdims=0),
        ]
    nodes += [
        node("Unsqueeze", ["query_segment", "one"], "query_column"),
        node("Unsqueeze", ["key_segment", "zero"], "key_row"),
        node("Equal", ["query_column", "key_row"], "together"),
    ]
    for side in ("query", "key", "value"):
        nodes += [
            node("Transpose", [side], f"{side}_heads", perm=[1, 0, 2]),
            node("Unsqueeze", [f"{side}_heads", "zero"], f"{side}_batch"),
        ]
    nodes += [
        node("Attention", ["query_batch", "key_batch", "value_batch", "together"], "attended", scale=1.0),
        node("Squeeze", ["attended", "zero"], "heads_first"),
        node("Transpose", ["heads_first"], "output", perm=[1, 0, 2]),
    ]
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, NAME, list(INPUTS), ["output"], nodes, opsets, list(ATTRIBUTES))


def probe(heads: int, width: int, precision: str) -> onnx.ModelProto:
    """A model of one packed attention."""
    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    shape = [PROBE_TOKENS, heads, width]
    tensors = [helper.make_tensor_value_info(name, kind, shape) for name in INPUTS[:3]]
    bounds = [helper.make_tensor_value_info(name, TensorProto.INT32, [3]) for name in INPUTS[4:]]
    names = [name if name != "mask" else "" for name in INPUTS]
    node = helper.make_node(NAME, names, ["output"], name="attention", domain=DOMAIN, **ATTRIBUTES)
    output = helper.make_tensor_value_info("output", kind, shape)
    graph = helper.make_graph([node], "probe", [*tensors, *bounds], [output])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
