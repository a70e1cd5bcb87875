"""Rules of ops that mix the features of a token: allowed along features, refused along tokens and samples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.packing.rules.registry import RULES
from tests.passes.harness import BATCH, TOKENS, WIDTH, check_trunk, pack, targets

aten = torch.ops.aten

H = torch.zeros(BATCH, TOKENS, WIDTH)


def swapped(h: Tensor) -> Tensor:
    """Written in place, as some rotary embeddings are."""
    out = torch.empty_like(h)
    out[..., ::2], out[..., 1::2] = h[..., 1::2], -h[..., ::2]
    return out


BODIES = {
    aten.linear.default: lambda h, w: F.linear(F.linear(h, w.t(), w[0, :7]), w),
    aten.layer_norm.default: lambda h, w: F.layer_norm(h, (WIDTH,), w[:, 0], w[:, 1], 1e-3),
    aten.rms_norm.default: lambda h, w: F.rms_norm(h, (WIDTH,), w[:, 0], 1e-3),
    aten.softmax.int: lambda h, w: h.softmax(-1),
    aten.mean.dim: lambda h, w: h - h.mean(-1, keepdim=True),
    aten.sum.dim_IntList: lambda h, w: h * h.sum(2, keepdim=True),
    aten.amax.default: lambda h, w: h - h.amax(-1, keepdim=True),
    aten.amin.default: lambda h, w: h - h.amin(-1, keepdim=True),
    aten.var.correction: lambda h, w: h * h.var(-1, keepdim=True),
    aten.std.correction: lambda h, w: h / h.std(-1, keepdim=True),
    aten.linalg_vector_norm.default: lambda h, w: F.normalize(h, dim=-1),
    aten.matmul.default: lambda h, w: (h @ w) @ w.T,
    aten.glu.default: lambda h, w: F.linear(F.glu(h, -1), w[:, :6]),
    aten.constant_pad_nd.default: lambda h, w: F.pad(h, (3, 0))[..., :WIDTH],
    aten.cumsum.default: lambda h, w: h.cumsum(-1),
    aten.zeros_like.default: lambda h, w: torch.where(h > 0, h, torch.zeros_like(h)),
    aten.ones_like.default: lambda h, w: torch.where(h > 0, h, torch.ones_like(h)),
    aten.cat.default: lambda h, w: torch.cat([h[..., 4:], -h[..., :4]], -1),
    aten.empty_like.default: lambda h, w: swapped(h),
    aten.slice_scatter.default: lambda h, w: swapped(h),
    aten.stack.default: lambda h, w: torch.stack([h[..., ::2], -h[..., 1::2]], -1).flatten(2),
}


def test_every_rule_of_the_family_is_tested():
    family = {target for target, rule in RULES.items() if rule.apply.__module__.endswith(".features")}
    assert family == set(BODIES)


@pytest.mark.parametrize("target", BODIES, ids=str)
def test_along_features(target):
    weight = torch.randn(WIDTH, 7)
    assert target in targets(BODIES[target], weight)
    check_trunk(BODIES[target], weight)


def test_softmax_of_another_feature_axis():
    check_trunk(lambda h: h.reshape(h.shape[0], h.shape[1], 3, 4).softmax(2).flatten(2))


def test_softmax_in_another_type():
    check_trunk(lambda h: h.softmax(dim=-1, dtype=torch.float32))


def test_norm_of_a_head_keeps_batch_and_token_in_place():
    def body(h: Tensor) -> Tensor:
        heads = h.reshape(h.shape[0], h.shape[1], 3, 4).transpose(1, 2)  # [B, 3, N, 4], as in q-k norm
        return F.rms_norm(heads, (4,)).transpose(1, 2).flatten(2)

    check_trunk(body)


def test_linear_over_tokens_is_refused():
    mix = torch.randn(TOKENS, TOKENS)
    with pytest.raises(UnsupportedModelError, match=r"aten\.linear\.default .*batch or token axis"):
        pack(lambda h: F.linear(h.transpose(1, 2), mix).transpose(1, 2), H)


def test_linear_with_a_weight_made_of_tokens_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"aten\.linear\.default .*depends on the tokens"):
        pack(lambda h: F.linear(h, h.select(2, 0)), torch.zeros(BATCH, TOKENS, TOKENS))


@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm])
def test_norm_over_tokens_is_refused(norm):
    with pytest.raises(UnsupportedModelError, match=rf"aten\.{norm.__name__}\.default .*batch or token axis"):
        pack(lambda h: norm(h, (TOKENS, WIDTH)), H)


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_softmax_over_tokens_or_samples_is_refused(axis):
    with pytest.raises(UnsupportedModelError, match=r"aten\.softmax\.int .*over tokens or samples"):
        pack(lambda h: h.softmax(axis), H)


@pytest.mark.parametrize("axes", [(1,), (1, 3)])
def test_axes_that_a_reduction_drops_shift_those_behind(axes):
    def body(h: Tensor) -> Tensor:
        heads = h.unflatten(2, (3, 2, 2)).permute(0, 3, 1, 2, 4)  # [B, 2, N, 3, 2]
        return heads.sum(axes).flatten(2)

    check_trunk(lambda h: h + body(h).sum(-1, keepdim=True))


@pytest.mark.parametrize("axis", [0, 1])
def test_reductions_over_tokens_or_samples_are_refused(axis):
    with pytest.raises(UnsupportedModelError, match=r"aten\.mean\.dim .*batch or token axis"):
        pack(lambda h: h - h.mean(axis, keepdim=True), H)


def test_a_new_axis_before_the_tokens_shifts_them():
    check_trunk(lambda h: torch.stack([h, h.sin()], 1)[:, 1])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda h: torch.cat([h, h], 1)[:, :TOKENS], "tokens with tokens"),
        (lambda h: torch.cat([h, torch.ones(1).expand(h.shape[0], TOKENS, 1)], 2)[..., :WIDTH], "not computed from"),
        (lambda h: torch.stack([h[..., :TOKENS], h[..., :TOKENS].transpose(1, 2)], 0).sum(0), "different axes"),
    ],
)
def test_what_is_not_side_by_side_is_refused(body, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        pack(body, H)


def test_writing_over_tokens_is_refused():
    def body(h: Tensor) -> Tensor:
        out = torch.empty_like(h)
        out[:, ::2], out[:, 1::2] = h[:, 1::2], h[:, ::2]
        return out

    with pytest.raises(UnsupportedModelError, match=r"token axis|tokens or samples"):
        pack(body, H)
