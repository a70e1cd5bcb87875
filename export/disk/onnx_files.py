"""ONNX files that somebody else may have written: what a runtime would do on loading one is found out before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dcconvert.export.disk.json_text import AGAIN, part_of_folder, plain_file
from dcconvert.export.disk.targets import said
from dcconvert.passes.ir.errors import UsageError

DATA = ".data"  # external weights of x.onnx are in x.onnx.data
SMALL_NUMBERS = 1 << 26  # numbers in a value that is never refused
WIDEST = 64  # a value has at most so many times the numbers of the largest weight, input or output
MOST_PROTOBUF = 1 << 31
SHAPE_NUMBERS = 4096  # constants up to this size may be shapes, which shape inference has to see


class Refused(Exception):  # noqa: N818  (never leaves this module)
    """Why a model is refused."""


def checked_onnx(path: Path, again: str = AGAIN) -> Any:
    """The model in an ONNX file, without external weights.

    UsageError for a file that cannot be read, refers to other files than the one beside it, has nodes that hold graphs
    (Loop, If, Scan: dcconvert writes none), or has constants that need much more memory than its weights.
    """
    import onnx

    if plain_file(path, again) >= MOST_PROTOBUF:
        raise UsageError(f"cannot read {path}: it is larger than ONNX files can be; {again}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # the parser's errors and the system's
        raise UsageError(f"cannot read {path}: {said(error)}; {again}") from error
    try:
        check_nodes(model, path)
        check_weights(model, path)
        check_shapes(model, path)
    except Refused as error:
        raise UsageError(f"{error}; {again}") from None
    return model


def opset_of(model: Any) -> int:
    """The version of the standard operators that a model uses."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def check_nodes(model: Any, path: Path) -> None:
    """Refuse control flow: a node that holds graphs may run them any number of times."""
    if model.graph.sparse_initializer:
        raise Refused(f"{path} has sparse weights, which dcconvert does not write")
    for node in all_nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise Refused(f"{path} holds a node {node.op_type}, which dcconvert does not write")


def all_nodes(model: Any) -> Iterator[Any]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def check_weights(model: Any, path: Path) -> None:
    """Refuse tensors that are larger than the bytes that the files have for them, and weights in other files."""
    inside = [attribute.t for node in all_nodes(model) for attribute in node.attribute if attribute.HasField("t")]
    for tensor in (*model.graph.initializer, *inside):
        size = bytes_of(tensor)
        if tensor.data_location == tensor.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if where.get("location") != f"{path.name}{DATA}":
                raise Refused(f"{path} has weights in {where.get('location')!r}, not in {path.name}{DATA}")
            there = plain_file(part_of_folder(path.parent, f"{path.name}{DATA}"))
            start, length = (int(where.get(name) or 0) for name in ("offset", "length"))
            held = length or there - start
            if not 0 <= start <= start + held <= there:
                raise Refused(f"{path}: {tensor.name} lies outside {path.name}{DATA}")
        else:
            lists = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
            held = len(tensor.raw_data) or 8 * sum(map(len, lists)) or sum(map(len, tensor.string_data))
        if size > held:
            raise Refused(f"{path}: {tensor.name} is {list(tensor.dims)}, for which the file has too few bytes")


def bytes_of(tensor: Any) -> int:
    """Of a tensor of ONNX, as its type and dimensions say."""
    from onnx.helper import tensor_dtype_to_np_dtype

    if any(size < 0 for size in tensor.dims):
        raise Refused(f"the tensor {tensor.name} has a negative dimension")
    try:
        width = tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError) as error:
        raise Refused(f"the tensor {tensor.name} has an unknown type") from error
    return math.prod(tensor.dims) * width


def check_shapes(model: Any, path: Path) -> None:
    """Refuse values that are far larger than the weights, inputs and outputs. Symbolic axes count as 1; values that are
    computed from constants alone must have a known size, for runtimes compute them on loading.
    """
    import onnx

    light = without_weights(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(light).graph  # data propagation would build what is sought
    except Exception as error:  # of the inference, which raises many
        raise Refused(f"the shapes in {path} do not fit: {said(error)[:200]}") from error
    shapes = {value.name: value.type.tensor_type.shape for value in (*inferred.value_info, *inferred.output)}
    graph = model.graph
    known = [*graph.input, *graph.output]
    largest = max(
        [math.prod(tensor.dims) for tensor in graph.initializer]
        + [numbers(value.type.tensor_type.shape) for value in known],
        default=1,
    )
    limit = max(SMALL_NUMBERS, WIDEST * largest)
    constant = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        fixed = all(name in constant for name in node.input if name)
        for name in filter(None, node.output):
            shape = shapes.get(name)
            if shape is not None and numbers(shape) > limit:
                raise Refused(f"{path}: {name} has {numbers(shape)} numbers, and the largest weight {largest}")
            if fixed and node.op_type != "Constant" and not (shape is not None and is_known(shape)):
                raise Refused(f"{path}: {name} is a constant of unknown size")
            if fixed:
                constant.add(name)


def without_weights(model: Any) -> Any:
    """The same model with inputs in place of large constants, and no shapes but those of inputs and outputs."""
    import onnx

    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = model.graph
    light.graph.name = graph.name
    light.graph.node.extend(graph.node)
    light.graph.input.extend(graph.input)
    light.graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in graph.output)
    given = {value.name for value in graph.input}
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= SHAPE_NUMBERS and tensor.data_location != tensor.EXTERNAL:
            light.graph.initializer.append(tensor)
        elif tensor.name not in given:
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light


def numbers(shape: Any) -> int:
    return math.prod(max(dim.dim_value, 1) for dim in shape.dim)


def is_known(shape: Any) -> bool:
    return all(dim.HasField("dim_value") for dim in shape.dim)


def onnx_parts(path: Path) -> list[Path]:
    """An ONNX file, and its external data if it has any; UsageError for links that lead elsewhere."""
    parts: Iterable[Path] = (path, path.with_name(f"{path.name}{DATA}"))
    return [part_of_folder(part.parent, part.name) for part in parts if part.is_file()]
