"""Tokens beside the grid: they take part in attention, are never dropped, and get out of it again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.schedule import Policy
from tests.passes.carry_harness import MaskedRun
from tests.passes.harness import (
    BATCH,
    GRID,
    TOKENS,
    WIDTH,
    Call,
    TinyModel,
    check_trunk,
    count,
    pack,
    relative,
    run_packed,
    tiny_inputs,
)

aten = torch.ops.aten
ops = torch.ops.dcconvert

TEXT = 5
H = torch.zeros(BATCH, TOKENS, WIDTH)


def heads(x: Tensor) -> Tensor:
    """[B, N, 12] -> [B, 2, N, 6]."""
    return x.unflatten(2, (2, 6)).transpose(1, 2)


def attend(both: Tensor, turn: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    q, k, v = turn(heads(both)), turn(heads(both * 2)), heads(torch.sin(both))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def text_first(h: Tensor, text: Tensor) -> Tensor:
    """Two layers; the text of the first goes into the second, as in models with two streams."""
    for _ in range(2):
        out = attend(torch.cat([text, h], 1))
        more, own = out.split([text.shape[1], h.shape[1]], dim=1)
        h, text = h + own, text + torch.tanh(more)
    return h


def text_last(h: Tensor, text: Tensor) -> Tensor:
    for _ in range(2):
        out = attend(torch.cat([h, text], dim=-2))
        h, text = h + out[:, : h.shape[1]], text * out[:, h.shape[1] :]
    return h


def one_stream(h: Tensor, text: Tensor) -> Tensor:
    """Norms, layers and modulation on both at once."""
    both = torch.cat([text, h], 1)
    both = both + attend(F.layer_norm(both, (WIDTH,)) * text[:, :1].sin())
    both = F.linear(F.gelu(both), torch.eye(WIDTH) * 2)
    return both[:, -h.shape[1] :]


def joined_by_heads(h: Tensor, text: Tensor) -> Tensor:
    q, k, v = (torch.cat([heads(h * i), heads(text + i)], 2) for i in (1, 2, 3))
    out = F.scaled_dot_product_attention(q, k, v)
    return out[:, :, : h.shape[1]].transpose(1, 2).flatten(2)


def scaled(h: Tensor, text: Tensor) -> Tensor:
    both = heads(torch.cat([text, h], 1))
    return F.scaled_dot_product_attention(both, both * 2, both, scale=1.5).transpose(1, 2).flatten(2)[:, TEXT:]


@pytest.mark.parametrize("body", [text_first, text_last, one_stream, joined_by_heads, scaled])
@pytest.mark.parametrize("packing", ["rows", "varlen"])
def test_joint_attention(body, packing):
    program = check_trunk(body, torch.randn(BATCH, TEXT, WIDTH), packing=packing)
    assert count(program.graph_module, ops.padded_attention.default) in (1, 2)
    assert count(program.graph_module, aten.scaled_dot_product_attention.default) == 0


def test_the_grid_may_follow_what_the_text_became():
    def body(h: Tensor, text: Tensor) -> Tensor:
        out = attend(torch.cat([text, h], 1))
        return h * out[:, : text.shape[1]].mean(1, keepdim=True)

    check_trunk(body, torch.randn(BATCH, TEXT, WIDTH))


@pytest.mark.parametrize("text_at", ["start", "end"])
def test_rotary_positions_of_both(text_at):
    """Every token has an angle; those of the grid follow the kept tokens, those of the text stay."""

    def body(h: Tensor, grid: Tensor, text: Tensor, other: Tensor) -> Tensor:
        start = text_at == "start"
        angle = torch.cat([other, grid] if start else [grid, other])

        def turn(x: Tensor) -> Tensor:
            half = torch.cat([-x[..., 3:], x[..., :3]], -1)
            return x * angle.cos() + half * angle.sin()

        out = attend(torch.cat([text, h] if start else [h, text], 1), turn)
        return out[:, text.shape[1] :] if start else out[:, : h.shape[1]]

    outside = (torch.randn(TOKENS, 6), torch.randn(BATCH, TEXT, WIDTH), torch.randn(TEXT, 6))
    check_trunk(body, *outside, token_axis=0)


def test_one_table_for_either_order():
    """The text comes first in one layer and last in the next: the places of the grid's tokens are others."""

    def body(h: Tensor, angle: Tensor, text: Tensor) -> Tensor:
        h = h + attend(torch.cat([text, h], 1), lambda x: x * angle)[:, TEXT:]
        return h + attend(torch.cat([h, text], 1), lambda x: x * angle)[:, :TOKENS]

    given = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(TOKENS + TEXT, 6), torch.randn(BATCH, TEXT, WIDTH)
    found = run_packed(pack(body, *given), Planner(GRID, 2, 2).full_plan(BATCH), *given)
    torch.testing.assert_close(found, body(*given), rtol=1e-5, atol=1e-5)


def outer(h: Tensor, text: Tensor) -> Tensor:
    return torch.cat([text, h], 1)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            lambda h, text: outer(h, text)[:, 1:-4],
            r"selects tokens 1 to 9, which are neither the grid's nor all others",
        ),
        (lambda h, text: outer(outer(h, text), text)[:, 2 * TEXT :], "a second time"),
        (lambda h, text: torch.cat([h.transpose(1, 2), text.transpose(1, 2)], 2)[:, :, :TOKENS].sort(1)[0], "sort"),
    ],
)
def test_what_has_no_meaning_is_refused(body, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        pack(body, H, torch.zeros(BATCH, TEXT, WIDTH))


@pytest.mark.parametrize("text_at", ["start", "end"])
def test_a_mask_of_keys(text_at):
    """Padding of the text, and some of the grid's tokens as well; every sample has its own."""

    def body(h: Tensor, grid: Tensor, text: Tensor, other: Tensor) -> Tensor:
        start = text_at == "start"
        mask = torch.cat([other, grid] if start else [grid, other], 1)[:, None, None, :]
        q, k, v = (heads(torch.cat([text, h] if start else [h, text], 1) * i) for i in (1, 2, 3))
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return out[:, text.shape[1] :] if start else out[:, : h.shape[1]]

    grid, other = torch.rand(BATCH, TOKENS) > 0.3, torch.rand(BATCH, TEXT) > 0.3
    grid[:, 0] = other[:, 0] = True
    check_trunk(body, grid, torch.randn(BATCH, TEXT, WIDTH), other, token_axis=1)


@pytest.mark.parametrize("at", ["start", "end"])
def test_what_is_written_over_exactly_the_grid(at):
    """Rotary embeddings of the image alone, in a value that holds the text too."""

    def body(h: Tensor, text: Tensor) -> Tensor:
        begin, end = (TEXT, TEXT + h.shape[1]) if at == "start" else (0, h.shape[1])

        def turn(x: Tensor) -> Tensor:
            return torch.slice_scatter(x, torch.sin(x[:, :, begin:end]), 2, begin, end)

        both = torch.cat([text, h] if at == "start" else [h, text], 1)
        return attend(both, turn)[:, begin:end]

    check_trunk(body, torch.randn(BATCH, TEXT, WIDTH))


def test_what_is_written_over_other_tokens_is_refused():
    def body(h: Tensor, text: Tensor) -> Tensor:
        both = torch.cat([text, h], 1)
        return torch.slice_scatter(both, torch.sin(both[:, :TEXT]), 1, 0, TEXT)[:, TEXT:]

    with pytest.raises(UnsupportedModelError, match=r"writes over tokens 0 to 5, which are not exactly the grid's"):
        pack(body, H, torch.zeros(BATCH, TEXT, WIDTH))


@pytest.mark.parametrize("text_last", [False, True])
def test_queries_of_the_grid_alone(text_last):
    def body(h: Tensor, text: Tensor) -> Tensor:
        k = torch.cat([heads(h), heads(text)] if text_last else [heads(text), heads(h)], 2)
        return F.scaled_dot_product_attention(heads(h * 3), k, torch.sin(k)).transpose(1, 2).flatten(2)

    check_trunk(body, torch.randn(BATCH, TEXT, WIDTH))


def test_a_mask_of_pairs_is_refused():
    def body(h: Tensor, text: Tensor) -> Tensor:
        both = heads(outer(h, text))
        mask = torch.ones(TEXT + TOKENS, TEXT + TOKENS, dtype=torch.bool)
        return F.scaled_dot_product_attention(both, both, both, mask).transpose(1, 2).flatten(2)[:, TEXT:]

    with pytest.raises(UnsupportedModelError, match=r"only key masks"):
        pack(body, H, torch.zeros(BATCH, TEXT, WIDTH))


def test_cross_attention_from_the_grid_and_the_others():
    """A single stream looks at text that is no part of it."""

    def body(h: Tensor, others: Tensor, text: Tensor) -> Tensor:
        both = torch.cat([others, h], 1)
        k = heads(text)
        both = both + F.scaled_dot_product_attention(heads(both), k, k.sin()).transpose(1, 2).flatten(2)
        return attend(both)[:, TEXT:]

    check_trunk(body, torch.randn(BATCH, TEXT, WIDTH), torch.randn(BATCH, 7, WIDTH))


def test_keys_without_the_others_are_refused():
    def body(h: Tensor, text: Tensor) -> Tensor:
        both = heads(outer(h, text))
        return F.scaled_dot_product_attention(both, heads(h), heads(h)).transpose(1, 2).flatten(2)[:, TEXT:]

    with pytest.raises(UnsupportedModelError, match="must hold the same tokens beside the grid"):
        pack(body, H, torch.zeros(BATCH, TEXT, WIDTH))


def test_shared_rows_are_refused():
    with pytest.raises(UsageError, match="joint attention, which needs one sample per row"):
        pack(text_first, H, torch.zeros(BATCH, TEXT, WIDTH), packing="bins")


class JointBlock(nn.Module):
    """Image and text attend to each other, with a scale of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (heads(part) for part in self.qkv(torch.cat([text, h], 1)).chunk(3, dim=2))
        out = self.proj(F.scaled_dot_product_attention(q, k, v, scale=1.5).transpose(1, 2).flatten(2))
        return h + out[:, TEXT:] * c.unsqueeze(1), text + torch.tanh(out[:, :TEXT])


class JointModel(TinyModel):
    def __init__(self) -> None:
        super().__init__(JointBlock() for _ in range(4))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        c = torch.sin(t.unsqueeze(1) * torch.arange(WIDTH))
        x = self.patchify(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x, text = block(x, text, c)
        return self.final(x)


def joint_call() -> Call:
    return JointModel(), (*tiny_inputs(), torch.randn(BATCH, TEXT, WIDTH)), {}


def test_blocks_behind_the_trunk_get_the_text_that_left_it():
    """And not that of a trunk which was left as it was: every attention is there once."""
    call = joint_call()
    options = method_of("chunk", head_blocks=1, tail_blocks=1)
    model = rewrite(*call, options, Policy("constant", 2).timetable(), timestep_scale=1.0)
    assert model.spec.depth == 4
    assert count(model.denoise_graph, ops.padded_attention.default) == 2
    left = sum(
        count(graph, aten.scaled_dot_product_attention.default) for graph in (model.route_graph, model.denoise_graph)
    )
    assert left == 2


def test_steps_of_mode_carry_keep_the_scale():
    call = joint_call()
    model = rewrite(*call, method_of("carry"), Policy("constant", 2).timetable(), timestep_scale=1.0)
    run = MaskedRun(model)
    for tau in (0.9, 0.6):
        now: Call = call[0], (call[1][0], torch.full((BATCH,), tau), call[1][2]), {}
        with torch.no_grad():
            assert relative(run.step(now, np.ones((BATCH, TOKENS), bool)), now[0](*now[1])) < 1e-5
