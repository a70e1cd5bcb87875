"""Every custom op against loops over its definition; fake kernels, gradients and FLOP formulas."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import FlopCounterMode

from dcconvert.passes.ir import ops

B, N, D = 2, 6, 4  # samples, grid tokens, width
G, L, M, K = 3, 2, 3, 2  # tiles, tokens a tile, members, neighbours
R, H, S, d = 3, 2, 4, 5  # rows, heads, slots, width of a head
BOUNDS = (0, 4, 4, 5, 6)  # of segments of the packed axis, one of them empty
P, C, E = 2, 3, 2  # state slots, and C x E values of every token

Arguments = tuple[Tensor | float, ...]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def weights(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64).requires_grad_()


def places(channels: int = C) -> Tensor:
    """Addresses [G, C, L, 4] of tokens that are all different."""
    flat = torch.randperm(P * B * N)[: G * L].view(G, 1, L).expand(G, channels, L)
    c = torch.arange(channels).view(1, -1, 1).expand_as(flat)
    return torch.stack([flat // (B * N), flat // N % B, c, flat % N], dim=-1)


def spread(weight: Tensor) -> Tensor:
    """Weights [P, B, N] as cache_read takes them, [P, B, 1, N, E]."""
    return weight[:, :, None, :, None].repeat(1, 1, 1, 1, E)


def arguments() -> dict[str, list[Arguments]]:
    """Example arguments of every op, in double precision."""
    heads = (normal(R, H, S, d), normal(R, H, S, d), normal(R, H, S, d))
    segments = torch.tensor([[0, 0, 1, 1], [2, 2, 2, -1], [-1, -1, -1, -1]])
    return {
        "chunk": [
            (normal(B, N, D), torch.randint(0, B * N, (G, L, members)), weights(G, L, members)) for members in (1, M)
        ],
        "dechunk": [
            (normal(B, N, D), normal(G, L, D), torch.randint(0, G * L, (B, N, near)), weights(B, N, near))
            for near in (1, K)
        ],
        "gather_tokens": [
            (normal(G, L, D), torch.randint(0, G * L, (R, S))),
            (normal(R, S, H, d), torch.randint(0, R * S, (G, L))),
        ],
        "padded_attention": [(*heads, torch.tensor(lengths), 0.3) for lengths in ([4, 1, 3], [4, 4, 4])],
        "segment_attention": [(*heads, segments, 0.3)],
        "varlen_attention": [(*(normal(G, L, H, d) for _ in "qkv"), torch.tensor(BOUNDS, dtype=torch.int32), 4, 0.3)],
        "packed_attention": [
            (*(normal(G, L, H, d) for _ in "qkv"), *(torch.tensor(BOUNDS, dtype=torch.int32) for _ in "qk"), 0.3)
        ],
        "cache_write": [
            (normal(P, B, channels, N, E), normal(G, channels, L, E), places(channels)) for channels in (1, C)
        ],
        "cache_read": [
            (normal(P, B, C, N, E), spread(weights(P, B, N))),
            (normal(1, B, 1, N, E), spread(weights(1, B, N))),
        ],
    }


CASES = [(name, i) for name, cases in arguments().items() for i in range(len(cases))]
every_case = pytest.mark.parametrize(("name", "case"), CASES)


def chunk_by_hand(h, index, weight):
    out = torch.zeros(*index.shape[:2], D, dtype=h.dtype)
    for g, t, m in torch.cartesian_prod(*map(torch.arange, index.shape)).tolist():
        flat = int(index[g, t, m])
        out[g, t] += weight[g, t, m] * h[flat // N, flat % N]
    return out


def dechunk_by_hand(h, update, fill_index, fill_weight):
    out = h.clone()
    for b, n, k in torch.cartesian_prod(*map(torch.arange, fill_index.shape)).tolist():
        flat = int(fill_index[b, n, k])
        out[b, n] += fill_weight[b, n, k] * update[flat // L, flat % L]
    return out


def gather_tokens_by_hand(x, index):
    rows = [[x[flat // x.shape[1], flat % x.shape[1]] for flat in row] for row in index.tolist()]
    return torch.stack([torch.stack(row) for row in rows])


def attend_by_hand(q, k, v, visible, scale):
    """visible(r, query slot, key slot) says who attends to whom."""
    out = torch.zeros_like(q)
    for r, h, i in torch.cartesian_prod(torch.arange(R), torch.arange(H), torch.arange(S)).tolist():
        keys = [j for j in range(S) if visible(r, i, j)]
        shares = [math.exp(float(q[r, h, i] @ k[r, h, j]) * scale) for j in keys]
        for j, share in zip(keys, shares, strict=True):
            out[r, h, i] += share / sum(shares) * v[r, h, j]
    return out


def varlen_by_hand(q, k, v, bounds, longest, scale):
    out = torch.zeros_like(q).flatten(0, 1)
    for start, end in pairwise(bounds.tolist()):
        part = [x.flatten(0, 1)[start:end].transpose(0, 1) for x in (q, k, v)]
        shares = (part[0] @ part[1].transpose(1, 2) * scale).softmax(-1)
        out[start:end] = (shares @ part[2]).transpose(0, 1)
    return out.view(q.shape)


def cache_write_by_hand(state, values, index):
    out = state.clone()
    for g, c, t in torch.cartesian_prod(*map(torch.arange, index.shape[:3])).tolist():
        slot, sample, channel, token = index[g, c, t].tolist()
        out[slot, sample, channel, token] = values[g, c, t]
    return out


def cache_read_by_hand(state, weight):
    out = torch.zeros_like(state[0])
    slots, samples, _, tokens, _ = weight.shape
    for p, b, n in torch.cartesian_prod(*map(torch.arange, (slots, samples, tokens))).tolist():
        out[b, :, n] += weight[p, b, 0, n, 0] * state[p, b, :, n]
    return out


BY_HAND: dict[str, Callable[..., Tensor]] = {
    "chunk": chunk_by_hand,
    "dechunk": dechunk_by_hand,
    "gather_tokens": gather_tokens_by_hand,
    "padded_attention": lambda q, k, v, lengths, scale: attend_by_hand(q, k, v, lambda r, i, j: j < lengths[r], scale),
    "segment_attention": lambda q, k, v, ids, scale: attend_by_hand(
        q, k, v, lambda r, i, j: ids[r, i] == ids[r, j], scale
    ),
    "varlen_attention": varlen_by_hand,
    "packed_attention": varlen_by_hand,
    "cache_write": cache_write_by_hand,
    "cache_read": cache_read_by_hand,
}


def test_every_registered_op_is_tested():
    assert set(ops.REFERENCES) == set(BY_HAND) == set(arguments())


@every_case
def test_against_the_definition(name, case):
    args = arguments()[name][case]
    with torch.no_grad():
        found, wanted = getattr(torch.ops.dcconvert, name)(*args), BY_HAND[name](*args)
    torch.testing.assert_close(found, wanted)


@every_case
def test_schema_fake_kernel_and_autograd_registration(name, case):
    torch.library.opcheck(getattr(torch.ops.dcconvert, name).default, arguments()[name][case])


@every_case
def test_gradients(name, case):
    args = arguments()[name][case]
    assert torch.autograd.gradcheck(getattr(torch.ops.dcconvert, name), args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type(dtype):
    for name, cases in arguments().items():
        for args in cases:
            half = [a.detach().to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
            assert getattr(torch.ops.dcconvert, name)(*half).dtype == dtype, name


def test_unused_slots_never_reach_the_result():
    """A weight of zero, a key past the row's length and a foreign segment must not matter, whatever they hold."""
    q, k, v = (torch.randn(1, 1, 3, 2) for _ in range(3))
    wild_k, wild_v = k.clone(), v.clone()
    wild_k[:, :, 2] = wild_v[:, :, 2] = 1e6
    for op, separator in (
        (torch.ops.dcconvert.padded_attention, torch.tensor([2])),
        (torch.ops.dcconvert.segment_attention, torch.tensor([[0, 0, 1]])),
    ):
        plain, wild = op(q, k, v, separator, 1.0), op(q, wild_k, wild_v, separator, 1.0)
        torch.testing.assert_close(plain[:, :, :2], wild[:, :, :2], rtol=0, atol=0)


def test_variable_lengths_are_those_of_rows():
    """The same tokens packed end to end, and one sample a row with its length."""
    lengths = [4, 1, 3]
    rows = [torch.randn(len(lengths), H, S, d) for _ in range(3)]
    wanted = torch.ops.dcconvert.padded_attention(*rows, torch.tensor(lengths), 0.3)
    used = [(r, s) for r, length in enumerate(lengths) for s in range(length)]
    packed = [torch.stack([x[r, :, s] for r, s in used]).view(4, 2, H, d) for x in rows]
    bounds = torch.tensor([0, 4, 5, 8], dtype=torch.int32)
    found = torch.ops.dcconvert.varlen_attention(*packed, bounds, 4, 0.3).flatten(0, 1)
    torch.testing.assert_close(found, torch.stack([wanted[r, :, s] for r, s in used]))


def test_torchs_variable_length_attention_takes_what_the_kernel_gives_it():
    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "scale" in names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_variable_lengths_on_a_gpu(dtype):
    lengths = [40, 0, 64, 17, 7]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    q, k, v = (torch.randn(16, 8, 4, 64, dtype=dtype) for _ in range(3))
    wanted = torch.ops.dcconvert.varlen_attention(q.float(), k.float(), v.float(), bounds, 64, 0.125)
    found = torch.ops.dcconvert.varlen_attention(q.cuda(), k.cuda(), v.cuda(), bounds.cuda(), 64, 0.125)
    torch.testing.assert_close(found.cpu().float(), wanted, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-4)


@every_case
def test_memory_is_laid_out_as_the_fake_kernel_says(name, case):
    """A compiler takes it at its word, whatever the layout of the operands."""

    def turned(value):
        ranked = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2
        return value.detach().transpose(1, 2).contiguous().transpose(1, 2) if ranked else value

    for args in (arguments()[name][case], list(map(turned, arguments()[name][case]))):
        with torch.no_grad():
            found = getattr(torch.ops.dcconvert, name)(*args)
        mode = FakeTensorMode()
        fake = [mode.from_tensor(a.detach()) if isinstance(a, Tensor) else a for a in args]
        with mode, torch.no_grad():
            expected = getattr(torch.ops.dcconvert, name)(*fake)
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_an_address_is_repeated_for_every_channel():
    index = torch.randint(0, 6, (G, L, 4)) * torch.tensor([1, 1, 0, 1])
    for channels in (1, C):
        found = torch.ops.dcconvert.cache_index(index, channels)
        assert found.shape == (G, channels, L, 4)
        assert found.dtype == torch.int64
        for g, c, t in torch.cartesian_prod(*map(torch.arange, found.shape[:3])).tolist():
            slot, sample, _, token = index[g, t].tolist()
            assert found[g, c, t].tolist() == [slot, sample, c, token]
        torch.library.opcheck(torch.ops.dcconvert.cache_index.default, (index, channels))


def test_remember_leaves_its_inputs_alone():
    state, values = torch.zeros(P, B, C, N, E), torch.ones(G, C, L, E)
    written = torch.ops.dcconvert.cache_write(state, values, places())
    assert not state.any()
    assert written.sum() == values.numel()


def test_pads_that_copy_a_token_write_what_it_writes():
    """Whatever the order in which equal values are written to one place."""
    index = places(1)
    values = torch.randn(G, 1, L, E)
    pads = torch.tensor([[0, 0], [0, 0]])
    padded = torch.cat([index[:1, :, [0, 0]], index, index[pads[:, 0]][..., [0, 0], :]])
    copies = torch.cat([values[:1, :, [0, 0]], values, values[pads[:, 0]][..., [0, 0], :]])
    state = torch.randn(P, B, 1, N, E)
    found, wanted = (torch.ops.dcconvert.cache_write(state, *given) for given in ((copies, padded), (values, index)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_recall_computes_in_the_precision_of_the_weights():
    """A state in half precision is read exactly, and its extrapolation does not overflow."""
    state = torch.tensor([60000.0, 100.0]).view(P, 1, 1, 1, 1).half()
    weight = torch.tensor([3.0, -2.0]).view(P, 1, 1, 1, 1)
    found = torch.ops.dcconvert.cache_read(state, weight)
    assert found.dtype == torch.float32
    assert found.item() == 3 * 60000 - 2 * 100
    assert torch.ops.dcconvert.cache_read(state.float(), weight.half()).dtype == torch.float16


def test_a_weight_of_zero_hides_a_stale_slot():
    state = torch.randn(P, B, C, N, E)
    state[1] = 1e4
    weight = spread(torch.stack([torch.ones(B, N), torch.zeros(B, N)]))
    torch.testing.assert_close(torch.ops.dcconvert.cache_read(state, weight), state[0], rtol=0, atol=0)


def flops(name: str, *args: Tensor | float) -> int:
    with FlopCounterMode(display=False) as counter:
        getattr(torch.ops.dcconvert, name)(*args)
    return counter.get_total_flops()


def test_flop_formulas():
    plain = {name: cases[-1] for name, cases in arguments().items()}
    assert flops("chunk", *plain["chunk"]) == 2 * G * L * M * D
    assert flops("dechunk", *plain["dechunk"]) == 2 * B * N * K * D
    assert flops("gather_tokens", *plain["gather_tokens"]) == flops("cache_write", *plain["cache_write"]) == 0
    state, weight = arguments()["cache_read"][0]
    assert flops("cache_read", state, weight) == 2 * P * B * C * N * E
    attention = R * H * 2 * (2 * S * S * d)  # two products of S x S x d, two FLOPs each multiply-add
    assert flops("padded_attention", *plain["padded_attention"]) == attention
    assert flops("segment_attention", *plain["segment_attention"]) == attention
    assert flops("varlen_attention", *plain["varlen_attention"]) == G * L * H * 2 * (2 * 4 * d)  # 4: the longest
    assert flops("packed_attention", *plain["packed_attention"]) == G * L * H * 2 * (2 * G * L * d)
