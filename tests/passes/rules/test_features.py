"""Rules of ops that mix the features of a token: allowed along features, refused along tokens and samples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcconvert.passes.errors import UnsupportedModelError
from dcconvert.passes.rules import RULES
from tests.passes.harness import BATCH, TOKENS, WIDTH, check_trunk, pack, targets

aten = torch.ops.aten

H = torch.zeros(BATCH, TOKENS, WIDTH)

BODIES = {
    aten.linear.default: lambda h, w: F.linear(F.linear(h, w.t(), w[0, :7]), w),
    aten.layer_norm.default: lambda h, w: F.layer_norm(h, (WIDTH,), w[:, 0], w[:, 1], 1e-3),
    aten.rms_norm.default: lambda h, w: F.rms_norm(h, (WIDTH,), w[:, 0], 1e-3),
    aten.softmax.int: lambda h, w: h.softmax(-1),
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
