"""The ops that a converted graph has and an ordinary DiT does not, each with a reference implementation.

Every op is a `torch.library` custom op in the namespace `dcconvert`, with a plain PyTorch reference (the
kernel used on every device unless a faster one is registered), a fake kernel for tracing, a gradient and
a FLOP formula. Their ONNX lowerings are in `dcconvert.export.onnx.lowerings`.

Shapes: B samples of N grid tokens of width D; packed tokens in G tiles of L, each tile of one sample
(T = G*L); R attention rows of S slots; H heads of d; a state of P slots holds C x E values of every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "dcconvert"


@torch.library.custom_op(f"{NAMESPACE}::chunk", mutates_args=())
def chunk(h: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Pack tokens: each packed token is a weighted mean of grid tokens.

    h [B, N, D]; index int64 [G, L, M] into the flattened B*N grid; weight [G, L, M]. Returns [G, L, D].
    """
    packed = weighted_gather(h.flatten(0, 1), index.flatten(0, 1), weight.flatten(0, 1))
    return packed.view(*index.shape[:2], h.shape[2])


@chunk.register_fake
def _(h: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return h.new_empty((index.shape[0], index.shape[1], h.shape[2]))


@torch.library.custom_op(f"{NAMESPACE}::dechunk", mutates_args=())
def dechunk(h: Tensor, update: Tensor, fill_index: Tensor, fill_weight: Tensor) -> Tensor:
    """Give every grid token a new value: its own plus the trunk's update near it.

    h [B, N, D]; update [G, L, D] (trunk output minus trunk input); fill_index int64 [B, N, K] of packed
    tokens, fill_weight [B, N, K] with rows that sum to one. Returns [B, N, D].
    """
    filled = weighted_gather(update.flatten(0, 1), fill_index.flatten(0, 1), fill_weight.flatten(0, 1))
    return h + filled.view(h.shape)


@dechunk.register_fake
def _(h: Tensor, update: Tensor, fill_index: Tensor, fill_weight: Tensor) -> Tensor:
    return h + update.new_empty(h.shape)


@torch.library.custom_op(f"{NAMESPACE}::gather_tokens", mutates_args=())
def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rearrange tokens: x [A, B, ...], index int64 [C, D] of flat a*B + b -> [C, D, ...].

    Takes packed tokens to attention rows (grid_index) and back (packed_index).
    """
    return x.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, *x.shape[2:])


@gather_tokens.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((*index.shape, *x.shape[2:]))


@torch.library.custom_op(f"{NAMESPACE}::padded_attention", mutates_args=())
def padded_attention(q: Tensor, k: Tensor, v: Tensor, row_lengths: Tensor, scale: float) -> Tensor:
    """Self-attention with one sample per row: q, k, v [R, H, S, d]; the first row_lengths[r] keys count."""
    slots = torch.arange(k.shape[2], device=k.device)
    mask = (slots < row_lengths.unsqueeze(1)).view(k.shape[0], 1, 1, -1)
    # Full rows need no mask. The mask stays on CUDA, where checking would wait for the device, and under a tracer.
    full = type(mask) is Tensor and mask.device.type == "cpu" and bool(mask.all())
    return slots_first(F.scaled_dot_product_attention(q, k, v, attn_mask=None if full else mask, scale=scale))


@padded_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, row_lengths: Tensor, scale: float) -> Tensor:
    return slots_first(torch.empty_like(q))


@torch.library.custom_op(f"{NAMESPACE}::segment_attention", mutates_args=())
def segment_attention(q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor, scale: float) -> Tensor:
    """Self-attention with several samples per row: slots of a row attend to each other if their ids match.

    q, k, v [R, H, S, d]; segment_ids int64 [R, S]. Krell et al. (arXiv 2107.02027) separate packed sequences with the
    same mask.
    """
    mask = (segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)).unsqueeze(1)
    return slots_first(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))


@segment_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor, scale: float) -> Tensor:
    return slots_first(torch.empty_like(q))


def slots_first(x: Tensor) -> Tensor:
    """[R, H, S, d] with the memory layout of [R, S, H, d], which most kernels return and models need next.

    The layout must always be the same, because compilers rely on the strides of an op's fake kernel.
    """
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.custom_op(f"{NAMESPACE}::varlen_attention", mutates_args=())
def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, scale: float) -> Tensor:
    """Self-attention within segments of the packed axis: q, k, v [G, L, H, d] -> [G, L, H, d].

    cu_seqlens int32: segment s is cu_seqlens[s] to cu_seqlens[s+1] of the T = G*L tokens; none is longer than max_len
    or L. On CUDA in half precision, this is torch's variable-length flash attention (`torch.nn.attention.varlen`,
    compute capability 8.0 and later), with no padding and no mask; elsewhere, all T x T pairs are computed and masked.
    """
    place = torch.arange(q.shape[0] * q.shape[1], device=q.device, dtype=cu_seqlens.dtype)
    segment = torch.searchsorted(cu_seqlens, place, right=True)
    mask = segment.unsqueeze(1) == segment
    one, keys, values = (x.flatten(0, 1).transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, T, d]
    out = F.scaled_dot_product_attention(one, keys, values, attn_mask=mask, scale=scale)
    return out.squeeze(0).transpose(0, 1).contiguous().view(q.shape)


@varlen_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@varlen_attention.register_kernel("cuda")
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, scale: float) -> Tensor:
    if q.dtype not in (torch.float16, torch.bfloat16):
        return REFERENCES["varlen_attention"](q, k, v, cu_seqlens, max_len, scale)
    from torch.nn.attention.varlen import varlen_attn  # imports torch._dynamo, which takes seconds

    longest = max(max_len, q.shape[1])
    queries, keys, values = (x.flatten(0, 1) for x in (q, k, v))
    found: Any = varlen_attn(queries, keys, values, cu_seqlens, cu_seqlens, longest, longest, scale=scale)
    return found.contiguous().view(q.shape)


@torch.library.custom_op(f"{NAMESPACE}::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, query_lengths: Tensor, key_lengths: Tensor, scale: float
) -> Tensor:
    """`varlen_attention` in the form of TensorRT 11's layer: q, k, v [G, L, H, d] -> [G, L, H, d].

    query_lengths and key_lengths int32: bounds of the segments of queries and keys. The values are the same, but
    TensorRT needs two tensors.
    """
    tokens = q.shape[0] * q.shape[1]
    return REFERENCES["varlen_attention"](q, k, v, query_lengths, tokens, scale)


@packed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, query_lengths: Tensor, key_lengths: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::cache_index", mutates_args=())
def cache_index(index: Tensor, channels: int) -> Tensor:
    """Where the packed tokens go in a state: index int64 [G, L, 4] of (slot, sample, 0, token) -> [G, C, L, 4]."""
    every = index.unsqueeze(1).repeat(1, channels, 1, 1)
    every[..., 2] += torch.arange(channels, device=index.device).unsqueeze(1)
    return every


@cache_index.register_fake
def _(index: Tensor, channels: int) -> Tensor:
    return index.new_empty((index.shape[0], channels, index.shape[1], 4))


@torch.library.custom_op(f"{NAMESPACE}::cache_write", mutates_args=())
def cache_write(state: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """Write the values of packed tokens to the state.

    state [P, B, C, N, E]; values [G, C, L, E], which under autocast may be of another precision; index int64
    [G, C, L, 4] of (slot, sample, c, token). Returns the new state, in its own precision. A pad writes the same value
    to the same place as the token that it copies, so the order of writes does not matter.
    """
    written = state.clone(memory_format=torch.contiguous_format)
    written[index.unbind(-1)] = values.to(state.dtype)
    return written


@cache_write.register_fake
def _(state: Tensor, values: Tensor, index: Tensor) -> Tensor:
    return torch.empty_like(state, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::cache_write_", mutates_args=("state",))
def cache_write_(state: Tensor, values: Tensor, index: Tensor) -> None:
    """`cache_write` without a copy: it writes to the given state. For inference only; see `WriteInPlace`."""
    state[index.unbind(-1)] = values.to(state.dtype)


@torch.library.custom_op(f"{NAMESPACE}::cache_read", mutates_args=())
def cache_read(state: Tensor, weight: Tensor) -> Tensor:
    """Read every token from the state: sum_p weight[p, b, 0, n] * state[p, b, :, n].

    state [P, B, C, N, E]; weight [P, B, 1, N, E], constant along E (it is not broadcast, because ONNX Runtime is slow
    at that). Returns [B, C, N, E] in the weights' precision. The weights are those of a Lagrange extrapolation in time:
    1 and 0 for a token computed at this step.
    """
    terms = (part.to(weight.dtype) * w for part, w in zip(state, weight, strict=True))
    total = next(terms)
    for term in terms:
        total += term
    return total.contiguous()


@cache_read.register_fake
def _(state: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(state.shape[1:])


def weighted_gather(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """sum_m weight[i, m] * rows[index[i, m]]: rows [X, D], index and weight [Y, M] -> [Y, D]."""
    if index.shape[1] == 1:
        return rows.index_select(0, index.squeeze(1)) * weight.to(rows.dtype)
    return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weight.to(rows.dtype))


REFERENCES: dict[str, Callable[..., Tensor]] = {
    op._name: op._init_fn
    for op in (
        chunk,
        dechunk,
        gather_tokens,
        padded_attention,
        segment_attention,
        varlen_attention,
        packed_attention,
        cache_write,
        cache_read,
    )
}


def _register_gradient(name: str) -> None:
    """Differentiate an op by re-running its reference, which is correct for every input and needs no second formula."""
    reference = REFERENCES[name]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.inputs = inputs

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            args = [leaf(value) for value in ctx.inputs]
            wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
            found = iter(torch.autograd.grad(reference(*args), wanted, grad, allow_unused=True))
        return tuple(next(found) if isinstance(a, Tensor) and a.requires_grad else None for a in args)

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup)


def leaf(value: Any) -> Any:
    """A tensor detached from its history, requiring a gradient if it can have one; other values as they are."""
    return value.detach().requires_grad_(value.is_floating_point()) if isinstance(value, Tensor) else value


for _name in REFERENCES:
    _register_gradient(_name)


def attention_flops(q: Any, k: Any, v: Any, *_: object, **__: object) -> int:
    """Two matrix products over all slots, padding included: 4 R H S^2 d."""
    rows, heads, slots, width = q
    return 4 * rows * heads * slots * k[2] * width


@register_flop_formula([torch.ops.dcconvert.chunk])
def chunk_flops(h: Any, index: Any, *_: object, **__: object) -> int:
    """One multiply-add for each gathered value: 2 G L M D."""
    return 2 * math.prod(index) * h[2]


@register_flop_formula([torch.ops.dcconvert.dechunk])
def dechunk_flops(h: Any, update: Any, fill_index: Any, *_: object, **__: object) -> int:
    """One multiply-add for each gathered value: 2 B N K D."""
    return 2 * math.prod(fill_index) * h[2]


@register_flop_formula([torch.ops.dcconvert.cache_read])
def cache_read_flops(state: Any, *_: object, **__: object) -> int:
    """One multiply-add for each value of the state: 2 P B C N E."""
    return 2 * math.prod(state)


@register_flop_formula([torch.ops.dcconvert.varlen_attention])
def varlen_flops(q: Any, k: Any, v: Any, cu_seqlens: Any, max_len: int, *_: object, **__: object) -> int:
    """Two matrix products, as if all segments had the longest one's length, since shapes do not tell: 4 T H S d."""
    return 4 * math.prod(q) * max_len


@register_flop_formula([torch.ops.dcconvert.packed_attention])
def packed_flops(q: Any, *_: object, **__: object) -> int:
    """Two matrix products over all pairs, an upper bound, since shapes do not tell the lengths: 4 T H T d."""
    return 4 * math.prod(q) * q[0] * q[1]


register_flop_formula([torch.ops.dcconvert.padded_attention, torch.ops.dcconvert.segment_attention])(attention_flops)
