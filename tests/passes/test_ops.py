"""Every custom op against loops over its definition; fake kernels, gradients and FLOP formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dcconvert.passes import ops

B, N, D = 2, 6, 4  # samples, grid tokens, width
G, L, M, K = 3, 2, 3, 2  # tiles, tokens a tile, members, neighbours
R, H, S, d = 3, 2, 4, 5  # rows, heads, slots, width of a head

Arguments = tuple[Tensor | float, ...]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def weights(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64).requires_grad_()


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
        "regroup": [
            (normal(G, L, D), torch.randint(0, G * L, (R, S))),
            (normal(R, S, H, d), torch.randint(0, R * S, (G, L))),
        ],
        "row_attention": [(*heads, torch.tensor(lengths), 0.3) for lengths in ([4, 1, 3], [4, 4, 4])],
        "segment_attention": [(*heads, segments, 0.3)],
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


def regroup_by_hand(x, index):
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


BY_HAND: dict[str, Callable[..., Tensor]] = {
    "chunk": chunk_by_hand,
    "dechunk": dechunk_by_hand,
    "regroup": regroup_by_hand,
    "row_attention": lambda q, k, v, lengths, scale: attend_by_hand(q, k, v, lambda r, i, j: j < lengths[r], scale),
    "segment_attention": lambda q, k, v, ids, scale: attend_by_hand(
        q, k, v, lambda r, i, j: ids[r, i] == ids[r, j], scale
    ),
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
        (torch.ops.dcconvert.row_attention, torch.tensor([2])),
        (torch.ops.dcconvert.segment_attention, torch.tensor([[0, 0, 1]])),
    ):
        plain, wild = op(q, k, v, separator, 1.0), op(q, wild_k, wild_v, separator, 1.0)
        torch.testing.assert_close(plain[:, :, :2], wild[:, :, :2], rtol=0, atol=0)


def flops(name: str, *args: Tensor | float) -> int:
    with FlopCounterMode(display=False) as counter:
        getattr(torch.ops.dcconvert, name)(*args)
    return counter.get_total_flops()


def test_flop_formulas():
    plain = {name: cases[-1] for name, cases in arguments().items()}
    assert flops("chunk", *plain["chunk"]) == 2 * G * L * M * D
    assert flops("dechunk", *plain["dechunk"]) == 2 * B * N * K * D
    assert flops("regroup", *plain["regroup"]) == 0
    attention = R * H * 2 * (2 * S * S * d)  # two products of S x S x d, two FLOPs each multiply-add
    assert flops("row_attention", *plain["row_attention"]) == attention
    assert flops("segment_attention", *plain["segment_attention"]) == attention
