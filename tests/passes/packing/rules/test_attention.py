"""The attention rule: each sample's kept tokens among themselves, or against keys from outside the trunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.packing.rules.registry import RULES
from tests.passes.harness import BATCH, TOKENS, WIDTH, check_trunk, count, pack, targets

aten = torch.ops.aten
ops = torch.ops.dcconvert

H = torch.zeros(BATCH, TOKENS, WIDTH)
KEYS = 5


def heads(x: Tensor) -> Tensor:
    """[B, N, 12] -> [B, 2, N, 6]."""
    return x.unflatten(2, (2, 6)).transpose(1, 2)


def self_attention(h: Tensor, **options: Any) -> Tensor:
    q, k, v = heads(h), heads(h * 2), heads(torch.sin(h))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def cross_attention(h: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
    k = heads(text)
    return F.scaled_dot_product_attention(heads(h), k, k.sin(), attn_mask=mask).transpose(1, 2).flatten(2)


def test_every_rule_of_the_family_is_tested():
    family = {target for target, rule in RULES.items() if rule.apply.__module__.endswith(".attention")}
    assert family == {aten.scaled_dot_product_attention.default} <= targets(self_attention)


@pytest.mark.parametrize(
    ("packing", "op", "separator"),
    [
        ("rows", ops.padded_attention.default, "row_lengths"),
        ("bins", ops.segment_attention.default, "segment_ids"),
        ("varlen", ops.varlen_attention.default, "cu_seqlens"),
    ],
)
def test_self_attention_stays_within_each_sample(packing, op, separator):
    program = check_trunk(self_attention, packing=packing)
    assert count(program.graph_module, op, separator) == 1
    assert count(program.graph_module, aten.scaled_dot_product_attention.default) == 0


@pytest.mark.parametrize("packing", ["rows", "bins", "varlen"])
def test_a_scale_of_its_own_is_kept(packing):
    check_trunk(lambda h: self_attention(h, scale=1.0), packing=packing)


def test_cross_attention_keeps_its_scale():
    def body(h: Tensor, text: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(heads(h), heads(text), heads(text), scale=1.0).transpose(1, 2).flatten(2)

    check_trunk(body, torch.randn(BATCH, KEYS, WIDTH))


def test_queries_and_keys_normalised_by_head():
    def body(h: Tensor) -> Tensor:
        q, k = (F.rms_norm(heads(x), (6,)) for x in (h, h * 2))
        return F.scaled_dot_product_attention(q, k, heads(h)).transpose(1, 2).flatten(2)

    check_trunk(body)


def test_attention_after_attention():
    program = check_trunk(lambda h: self_attention(h + self_attention(h)))
    assert count(program.graph_module, ops.padded_attention.default) == 2


@pytest.mark.parametrize("counts", [(1, KEYS), (BATCH, KEYS)], ids=["shared", "per sample"])
def test_cross_attention_takes_the_keys_of_the_sample(counts):
    program = check_trunk(cross_attention, torch.randn(*counts, WIDTH))
    assert count(program.graph_module, aten.scaled_dot_product_attention.default) == 1


@pytest.mark.parametrize("kind", ["seen", "added"])
def test_self_attention_with_a_mask_over_the_keys(kind):
    """Kept tokens are hidden or not, wherever they are laid out; slots without a token are never seen."""
    hidden = torch.arange(TOKENS).expand(BATCH, TOKENS) % 5 == torch.arange(1, BATCH + 1).unsqueeze(1)
    mask = ~hidden if kind == "seen" else torch.zeros(BATCH, TOKENS).masked_fill(hidden, -1e4)

    def body(h: Tensor, mask: Tensor) -> Tensor:
        wide = mask.expand(-1, 2, h.shape[1], -1)  # for every head and query, as some models do
        return self_attention(h, attn_mask=wide)

    check_trunk(body, mask[:, None, None, :], token_axis=3)


def test_cross_attention_with_a_mask_over_the_keys():
    mask = torch.zeros(BATCH, 1, 1, KEYS).masked_fill(torch.arange(KEYS) > 2, -1e4)
    check_trunk(cross_attention, torch.randn(BATCH, KEYS, WIDTH), mask)


def test_cross_attention_needs_one_sample_a_row():
    with pytest.raises(UsageError, match="packing='rows'"):
        pack(cross_attention, H, torch.randn(BATCH, KEYS, WIDTH), packing="bins")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"is_causal": True}, "causal"),
        ({"dropout_p": 0.5}, "dropout"),
        ({"attn_mask": torch.zeros(TOKENS, TOKENS)}, "only key masks"),
    ],
)
def test_self_attention_with_extras_is_refused(options, reason):
    with pytest.raises(UnsupportedModelError, match=rf"aten\.scaled_dot_product_attention\.default in .*{reason}"):
        pack(lambda h: self_attention(h, **options), H)


def test_grouped_queries_are_refused():
    def body(h: Tensor) -> Tensor:
        k = heads(h)[:, :1]
        return F.scaled_dot_product_attention(heads(h), k, k, enable_gqa=True).transpose(1, 2).flatten(2)

    with pytest.raises(UnsupportedModelError, match="grouped queries"):
        pack(body, H)


@pytest.mark.parametrize("shape", [(BATCH, 1, TOKENS, KEYS), (TOKENS, KEYS)], ids=str)
def test_a_cross_attention_mask_that_varies_with_position_is_refused(shape):
    with pytest.raises(UnsupportedModelError, match="depends on the token's position"):
        pack(cross_attention, H, torch.randn(BATCH, KEYS, WIDTH), torch.zeros(shape))


def test_attention_across_heads_is_refused():
    def body(h: Tensor) -> Tensor:
        q = h.unflatten(2, (2, 6))  # [B, N, 2, 6]: the heads of one token attend to each other
        return F.scaled_dot_product_attention(q, q, q).flatten(2)

    with pytest.raises(UnsupportedModelError, match=r"queries must be laid out \[B, H, N, d\]"):
        pack(body, H)


def test_keys_with_tokens_on_another_axis_are_refused():
    """Possible where the number of tokens equals the width of a head."""

    def body(h: Tensor) -> Tensor:
        q = h.unsqueeze(1)
        return F.scaled_dot_product_attention(q, q.transpose(2, 3), q).squeeze(1)

    with pytest.raises(UnsupportedModelError, match=r"aten\.scaled_dot_product_attention\.default in .*laid out"):
        pack(body, torch.zeros(BATCH, TOKENS, TOKENS))


def test_keys_from_tokens_with_values_from_outside_are_refused():
    def body(h: Tensor, table: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(heads(h), heads(h), heads(table)).transpose(1, 2).flatten(2)

    with pytest.raises(UnsupportedModelError, match="both come from the tokens or both from outside"):
        pack(body, H, torch.randn(BATCH, TOKENS, WIDTH))
