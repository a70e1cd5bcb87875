"""How each dcconvert op is written in ONNX.

The exporter calls these functions with symbolic ONNX values. What differs between runtimes is attention:

- PORTABLE, opset 20: matrix products and a softmax, with masks. Every runtime knows these ops, and none can leave a
  mask out unnoticed, as three runtimes did with `nonpad_kv_seqlen`.
- FUSED, opset 24: the `Attention` op, which ONNX Runtime's CUDA provider has Flash kernels for. With one sample per
  row, its `nonpad_kv_seqlen` input says how many keys count; with several, a boolean mask keeps them apart.
- TENSORRT, opset 24: the `Attention` op with a mask in both cases, or TensorRT's layer for packed attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch
from onnxscript import values

from dcconvert.export.onnx.trt_attention_op import ATTRIBUTES, DOMAIN, register_schema
from dcconvert.passes.ir import ops  # noqa: F401  (registers torch.ops.dcconvert)
from dcconvert.passes.ir.errors import UsageError

# Added to the score of a key that does not count; minus infinity would make NaN where no key does.
MASKED, MASKED_HALF = -1e30, -6e4
op: Any = values.Opset("", 18)  # without the attributes of later opsets, which parsers of old ones refuse
op24: Any = values.Opset("", 24)
trt: Any = values.Opset(DOMAIN, 1)


def row(value: int) -> Any:
    """A 1-D integer constant."""
    return op.Constant(value_ints=[value])


def chunk(h: Any, index: Any, weight: Any) -> Any:
    """[B, N, D], [G, L, M] twice -> [G, L, D]."""
    return weighted_gather(flatten_pair(h), index, weight)


def dechunk(h: Any, update: Any, fill_index: Any, fill_weight: Any) -> Any:
    """[B, N, D], [G, L, D], [B, N, K] twice -> [B, N, D]."""
    return op.Add(h, weighted_gather(flatten_pair(update), fill_index, fill_weight))


def gather_tokens(x: Any, index: Any) -> Any:
    """[A, B, ...], [C, D] -> [C, D, ...]."""
    return op.Gather(flatten_pair(x), index, axis=0)


def flatten_pair(x: Any) -> Any:
    """[A, B, ...] -> [A*B, ...]; the trailing sizes are static."""
    return op.Reshape(x, op.Constant(value_ints=[-1, *(int(size) for size in x.shape[2:])]))


def weighted_gather(rows: Any, index: Any, weight: Any) -> Any:
    """sum_m weight[..., m] * rows[index[..., m]] as one gather for each member: [..., M] -> [..., D]."""
    total = None
    for member in range(int(index.shape[-1])):
        picked = op.Gather(rows, op.Gather(index, op.Constant(value_int=member), axis=-1), axis=0)
        term = op.Mul(picked, op.Slice(weight, row(member), row(member + 1), row(-1)))
        total = term if total is None else op.Add(total, term)
    return total


def key_mask(k: Any, row_lengths: Any) -> Any:
    """[G, H, L, d], [G] -> [G, 1, 1, L]: which keys count."""
    slots = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(k, start=2, end=3)), op.Constant(value_int=1))
    used = op.Less(op.Unsqueeze(slots, row(0)), op.Unsqueeze(row_lengths, row(1)))
    return op.Unsqueeze(used, op.Constant(value_ints=[1, 2]))


def segment_mask(segment_ids: Any) -> Any:
    """[G, L] -> [G, 1, L, L]: which keys are of the query's segment."""
    mask = op.Equal(op.Unsqueeze(segment_ids, row(2)), op.Unsqueeze(segment_ids, row(1)))
    return op.Unsqueeze(mask, row(1))


def padded_attention(q: Any, k: Any, v: Any, row_lengths: Any, scale: float) -> Any:
    return plain_attention(q, k, v, bias(key_mask(k, row_lengths)), scale)


def segment_attention(q: Any, k: Any, v: Any, segment_ids: Any, scale: float) -> Any:
    return plain_attention(q, k, v, bias(segment_mask(segment_ids)), scale)


def attention(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """q [B, H, S, d], k and v [B, H, N, d]; a query for which a boolean mask leaves no key gets zeros, as in torch."""
    if is_causal or enable_gqa:
        raise UsageError("attention that is causal or shares keys between heads is not supported in ONNX")
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    if attn_mask is None:
        return plain_attention(q, k, v, None, scale)
    if attn_mask.dtype == onnx_ir.DataType.BOOL:
        any_key, added = op.ReduceMax(op.CastLike(attn_mask, q), row(-1)), bias(attn_mask)
    else:
        seen = op.Greater(attn_mask, op.CastLike(op.Constant(value_float=float("-inf")), attn_mask))
        any_key, added = op.ReduceMax(op.CastLike(seen, q), row(-1)), attn_mask
    return op.Mul(plain_attention(q, k, v, added, scale), any_key)


def bias(mask: Any) -> Any:
    """What a boolean mask adds to the scores: nothing for the keys that count."""
    return op.Where(mask, op.Constant(value_float=0.0), op.Constant(value_float=MASKED))


def plain_attention(q: Any, k: Any, v: Any, added: Any, scale: float) -> Any:
    """softmax(q k^T * scale + added) v, in the types of q, k and v."""
    scores = op.MatMul(op.Mul(q, op.CastLike(op.Constant(value_float=scale), q)), op.Transpose(k, perm=[0, 1, 3, 2]))
    if added is not None:
        half = q.dtype == onnx_ir.DataType.FLOAT16
        lowest = op.CastLike(op.Constant(value_float=MASKED_HALF if half else MASKED), scores)
        scores = op.Add(scores, op.Max(op.CastLike(added, scores), lowest))
    return op.MatMul(op.Softmax(scores, axis=-1), v)


def fused_padded_attention(q: Any, k: Any, v: Any, row_lengths: Any, scale: float) -> Any:
    output, *_ = op24.Attention(q, k, v, None, None, None, row_lengths, scale=scale)
    return output


def masked_padded_attention(q: Any, k: Any, v: Any, row_lengths: Any, scale: float) -> Any:
    """Row attention with a mask: TensorRT-RTX 1.7 accepts `nonpad_kv_seqlen` but silently ignores it."""
    return fused_attention(q, k, v, key_mask(k, row_lengths), scale=scale)


def fused_segment_attention(q: Any, k: Any, v: Any, segment_ids: Any, scale: float) -> Any:
    output, *_ = op24.Attention(q, k, v, segment_mask(segment_ids), scale=scale)
    return output


def packed_attention(q: Any, k: Any, v: Any, query_lengths: Any, key_lengths: Any, scale: float) -> Any:
    """[G, L, H, d] as [T, H, d]; the layer itself does not scale."""
    register_schema()
    queries, keys, values = map(flatten_pair, (q, k, v))
    scaled = op.Mul(queries, op.CastLike(op.Constant(value_float=scale), queries))
    found = trt.TRT_Attention(scaled, keys, values, None, query_lengths, key_lengths, **ATTRIBUTES)
    return op.Reshape(found, op.Shape(q))


def fused_attention(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """q [B, H, S, d], k and v [B, H, N, d]; a mask is broadcast over the queries here, since ONNX Runtime does not."""
    if attn_mask is not None:
        queries = op.Concat(row(1), row(1), op.Shape(q, start=2, end=3), row(1), axis=0)
        attn_mask = op.Expand(attn_mask, queries)
    attributes = {"scale": scale} if scale is not None else {}
    output, *_ = op24.Attention(q, k, v, attn_mask, is_causal=int(is_causal), **attributes)
    return output


def cache_index(index: Any, channels: int) -> Any:
    """[G, L, 4] -> [G, C, L, 4]."""
    offsets = [value for channel in range(channels) for value in (0, 0, channel, 0)]
    shape = op.Constant(value_ints=[1, channels, 1, 4])
    return op.Add(op.Unsqueeze(index, row(1)), op.Reshape(op.Constant(value_ints=offsets), shape))


def cache_write(state: Any, values: Any, index: Any) -> Any:
    """[P, B, C, N, E], [G, C, L, E], [G, C, L, 4] -> [P, B, C, N, E]; in place if input and output share a buffer."""
    return op.ScatterND(state, index, values)


def cache_read(state: Any, weight: Any) -> Any:
    """[P, B, C, N, E], [P, B, 1, N, E] -> [B, C, N, E]."""
    total = None
    for slot in range(int(state.shape[0])):
        which = op.Constant(value_int=slot)
        part = op.CastLike(op.Gather(state, which, axis=0), weight)
        term = op.Mul(part, op.Gather(weight, which, axis=0))
        total = term if total is None else op.Add(total, term)
    return total


def to_dtype(x: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None) -> Any:
    return op.Cast(x, to=dtype)


Functions = Mapping[Callable[..., Any], Callable[..., Any]]  # op -> the function that writes it in ONNX


@dataclass(frozen=True)
class Lowerings:
    """The opset of a file, and how ops are written in it."""

    opset: int
    functions: Functions


PORTABLE = Lowerings(
    20,
    {
        torch.ops.dcconvert.chunk.default: chunk,
        torch.ops.dcconvert.dechunk.default: dechunk,
        torch.ops.dcconvert.gather_tokens.default: gather_tokens,
        torch.ops.dcconvert.padded_attention.default: padded_attention,
        torch.ops.dcconvert.segment_attention.default: segment_attention,
        torch.ops.aten.scaled_dot_product_attention.default: attention,
        torch.ops.aten.to.dtype: to_dtype,
        torch.ops.dcconvert.cache_index.default: cache_index,
        torch.ops.dcconvert.cache_write.default: cache_write,
        torch.ops.dcconvert.cache_read.default: cache_read,
    },
)

FUSED = Lowerings(
    24,
    {
        **PORTABLE.functions,
        torch.ops.dcconvert.padded_attention.default: fused_padded_attention,
        torch.ops.dcconvert.segment_attention.default: fused_segment_attention,
        torch.ops.aten.scaled_dot_product_attention.default: fused_attention,
    },
)

TENSORRT = Lowerings(
    24,
    {
        **FUSED.functions,
        torch.ops.dcconvert.padded_attention.default: masked_padded_attention,
        torch.ops.dcconvert.packed_attention.default: packed_attention,
    },
)
