"""Rules of ops that only move data: in the packed layout, in the attention grid, and where they are refused."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.packing.rules.registry import RULES
from dcconvert.passes.packing.rules.shapes import follow_axis
from tests.passes.harness import BATCH, TOKENS, WIDTH, check_trunk, count, pack, targets

aten = torch.ops.aten
gather_tokens = torch.ops.dcconvert.gather_tokens.default

# Each body moves a token's features about with the op it is listed under.
PACKED: dict[Any, Callable[[Tensor], Tensor]] = {
    aten.reshape.default: lambda h: (h.reshape(*h.shape[:2], 3, 4) * 2).reshape(h.shape),
    aten.flatten.using_ints: lambda h: h.reshape(*h.shape[:2], 3, 4).softmax(3).flatten(2),
    aten.unflatten.int: lambda h: h.unflatten(2, (3, 4)).softmax(2).flatten(2),
    aten.permute.default: lambda h: h.permute(2, 0, 1).sigmoid().permute(1, 2, 0),
    aten.transpose.int: lambda h: h.transpose(1, 2).sigmoid().transpose(-1, -2),
    aten.unsqueeze.default: lambda h: h.unsqueeze(-2).unsqueeze(0).sigmoid().squeeze(0).squeeze(2),
    aten.squeeze.dim: lambda h: h.unsqueeze(1).sigmoid().squeeze(1),
    aten.select.int: lambda h: h * h.select(2, 7).sigmoid().unsqueeze(2),
    aten.unbind.int: lambda h: h * h.unbind(2)[1].sigmoid().unsqueeze(-1),
    aten.chunk.default: lambda h: h * h.chunk(WIDTH, dim=2)[3],
    aten.split.Tensor: lambda h: h * h.split(1, dim=-1)[2],
    aten.split_with_sizes.default: lambda h: h * torch.split_with_sizes(h, [1, WIDTH - 1], 2)[0],
    aten.split.sizes: lambda h: h * torch.ops.aten.split.sizes(h, [WIDTH - 1, 1], 2)[1],
    aten.slice.Tensor: lambda h: h * h[..., 5:6],
    aten.expand.default: lambda h: h.unflatten(2, (12, 1)).expand(-1, -1, -1, 2).mean(-1),
    aten.repeat.default: lambda h: h[..., :4].repeat(1, 1, 3),
    aten.flip.default: lambda h: h.flip(-1),
    aten.roll.default: lambda h: h.roll(5, 2),
    operator.getitem: lambda h: h.permute(2, 0, 1).unbind(0)[4].sigmoid().unsqueeze(2) * h,
}


def in_three(x: Tensor, axis: int = 2) -> tuple[Tensor, ...]:
    return tuple(part.unflatten(2, (2, 6)).transpose(1, 2) for part in x.chunk(3, axis))


# From x [B, N, 36], a fused qkv projection, to q, k and v [B, heads, N, d] by way of the op.
TO_HEADS: dict[Any, Callable[[Tensor], Sequence[Tensor]]] = {
    aten.reshape.default: lambda x: x.reshape(*x.shape[:2], 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0),
    aten.flatten.using_ints: lambda x: in_three(x.unflatten(2, (12, 3)).flatten(2)),
    aten.unflatten.int: in_three,
    aten.permute.default: lambda x: x.unflatten(2, (3, 2, 6)).permute(2, 0, -2, 1, 4).unbind(0),
    aten.transpose.int: lambda x: [
        part.transpose(2, 3).transpose(1, -1).transpose(3, 2) for part in x.unflatten(2, (6, 6)).chunk(3, 2)
    ],
    aten.unsqueeze.default: lambda x: [part.unsqueeze(1) for part in x.chunk(3, 2)],
    aten.squeeze.dim: lambda x: in_three(x.unsqueeze(1).squeeze(1)),
    aten.select.int: lambda x: [x.unflatten(2, (3, 2, 6)).select(-3, i).transpose(1, 2) for i in range(3)],
    aten.unbind.int: lambda x: x.unflatten(2, (2, 18)).transpose(1, 2).unflatten(3, (3, 6)).unbind(-2),
    aten.chunk.default: in_three,
    aten.split.Tensor: lambda x: [part.unsqueeze(1) for part in x.split(WIDTH, 2)],
    aten.split_with_sizes.default: lambda x: [p.unsqueeze(1) for p in torch.split_with_sizes(x, [12, 12, 12], -1)],
    aten.split.sizes: lambda x: [p.unsqueeze(1) for p in torch.ops.aten.split.sizes(x, [12, 12, 12], 2)],
    aten.slice.Tensor: lambda x: [x[..., i : i + WIDTH].unsqueeze(1) for i in (0, 12, 24)],
    aten.expand.default: lambda x: in_three(x.unflatten(2, (36, 1)).expand(-1, -1, -1, 1).flatten(2)),
    aten.repeat.default: lambda x: in_three(x.repeat(1, 1, 2)[..., :36]),
    aten.flip.default: lambda x: in_three(x.flip(2)),
    aten.roll.default: lambda x: in_three(x.roll(7, -1)),
    operator.getitem: in_three,
}


def attending(to_heads: Callable[[Tensor], Sequence[Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
    def body(h: Tensor, weight: Tensor) -> Tensor:
        q, k, v = to_heads(F.linear(h, weight))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return body


def test_every_rule_of_the_family_is_tested():
    family = {target for target, rule in RULES.items() if rule.apply.__module__.endswith(".shapes")}
    assert family == set(PACKED) == set(TO_HEADS)
    assert all(RULES[target].moves_only for target in family)


@pytest.mark.parametrize("target", PACKED, ids=str)
def test_in_the_packed_layout(target):
    assert target in targets(PACKED[target])
    program = check_trunk(PACKED[target])
    assert count(program.graph_module, gather_tokens) == 0


@pytest.mark.parametrize("target", TO_HEADS, ids=str)
def test_between_a_linear_and_attention_it_is_written_in_the_grid(target):
    body, weight = attending(TO_HEADS[target]), torch.randn(3 * WIDTH, WIDTH)
    assert target in targets(body, weight)
    program = check_trunk(body, weight)
    assert count(program.graph_module, gather_tokens, "grid_index") == 1  # one gather, at the linear's output
    assert count(program.graph_module, gather_tokens, "packed_index") == 1


REFUSED: dict[Any, Callable[[Tensor], Tensor]] = {
    aten.reshape.default: lambda h: h.reshape(h.shape[0], 2, 4, WIDTH),
    aten.flatten.using_ints: lambda h: h.flatten(1),
    aten.unflatten.int: lambda h: h.unflatten(1, (4, 2)),
    aten.select.int: lambda h: h.select(1, 0),
    aten.unbind.int: lambda h: h.unbind(1)[0],
    aten.chunk.default: lambda h: h.chunk(2, 1)[0],
    aten.split.Tensor: lambda h: h.split(4, 1)[0],
    aten.split_with_sizes.default: lambda h: torch.split_with_sizes(h, [4, 4], 1)[0],
    aten.split.sizes: lambda h: torch.ops.aten.split.sizes(h, [4, 4], 1)[0],
    aten.slice.Tensor: lambda h: h[:, ::2],
    aten.repeat.default: lambda h: h.repeat(1, 2, 1),
    aten.flip.default: lambda h: h.flip(1),
    aten.roll.default: lambda h: h.roll(1, 1),
}


def test_a_squeeze_of_the_token_axis_does_nothing():
    check_trunk(lambda h: h.squeeze(1).sigmoid())


@pytest.mark.parametrize("target", REFUSED, ids=str)
def test_on_the_token_axis_it_is_refused(target):
    with pytest.raises(UnsupportedModelError, match=rf"{target} .*token axis"):
        pack(REFUSED[target], torch.zeros(BATCH, TOKENS, WIDTH))


@pytest.mark.parametrize(
    ("body", "target"),
    [
        (lambda h: h.reshape(-1, WIDTH), "aten.reshape.default"),
        (lambda h: h.flatten(0, 1), "aten.flatten.using_ints"),
        (lambda h: h.select(0, 0), "aten.select.int"),
        (lambda h: h + h[:1], "aten.slice.Tensor"),
    ],
)
def test_on_the_batch_axis_it_is_refused(body, target):
    with pytest.raises(UnsupportedModelError, match=rf"{target} .*batch"):
        pack(body, torch.zeros(BATCH, TOKENS, WIDTH))


def test_refused_in_the_grid_as_well_when_tokens_are_split_into_windows():
    def windows(x: Tensor) -> Sequence[Tensor]:
        return [p.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2).unsqueeze(1) for p in x.chunk(3, 2)]

    with pytest.raises(UnsupportedModelError, match=r"aten\.unflatten\.int .*the token axis"):
        pack(attending(windows), torch.zeros(BATCH, TOKENS, WIDTH), torch.randn(3 * WIDTH, WIDTH))


@pytest.mark.parametrize(
    ("before", "after", "axis", "found"),
    [
        ([5, 8, 12], [5, 8, 3, 4], 1, 1),
        ([5, 8, 12], [1, 5, 8, 12], 0, 1),
        ([3, 5, 8, 4], [15, 8, 4], 2, 1),
        ([5, 8, 8], [5, 64], 1, None),  # merged
        ([5, 8, 12], [5, 2, 4, 12], 1, None),  # split
        ([5, 8, 12], [5, 12, 8], 1, None),  # a reinterpretation, not a transpose
        ([5, 8, 8], [5, 8, 8], 2, 2),  # equal sizes are told apart by what is to their left
    ],
)
def test_follow_axis(before, after, axis, found):
    assert follow_axis(before, after, axis) == found
