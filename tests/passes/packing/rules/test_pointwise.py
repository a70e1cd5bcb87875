"""The rule of pointwise ops: elementwise on tokens, per-sample operands follow their sample, positions are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.planning.chunk_plan import Planner
from tests.passes.harness import BATCH, GRID, TOKENS, WIDTH, check_trunk, count, pack, run_packed, targets

aten = torch.ops.aten

H = torch.zeros(BATCH, TOKENS, WIDTH)

UNARY: list[tuple[Callable[[Tensor], Tensor], object]] = [
    (lambda h: F.gelu(h, approximate="tanh"), aten.gelu.default),
    (lambda h: F.silu(h), aten.silu.default),
    (lambda h: F.relu(h), aten.relu.default),
    (lambda h: torch.sigmoid(h), aten.sigmoid.default),
    (lambda h: torch.tanh(h), aten.tanh.default),
    (lambda h: torch.clamp(h, -0.5, 0.5), aten.clamp.default),
    (lambda h: h.square(), aten.square.default),
    (lambda h: h.abs().pow(1.5), aten.pow.Tensor_Scalar),
    (lambda h: torch.rsqrt(h.abs() + 1), aten.rsqrt.default),
    (lambda h: -h, aten.neg.default),
    (lambda h: 1 - h, aten.rsub.Scalar),
    (lambda h: h / 3, aten.div.Tensor),
]


@pytest.mark.parametrize(("body", "target"), UNARY, ids=[str(target) for _, target in UNARY])
def test_ops_of_one_operand(body, target):
    assert target in targets(body)
    check_trunk(body)


def test_two_token_operands_stay_aligned():
    check_trunk(lambda h: F.silu(h) * h + torch.maximum(h, -h))


def test_per_sample_operand_is_gathered_once_however_often_it_is_used():
    program = check_trunk(lambda h, c: h * (1 + c) + c, torch.randn(BATCH, 1, WIDTH))
    assert count(program.graph_module, aten.index_select.default, "sample_ids") == 2  # 1 + c, and c


def test_per_sample_operand_of_lower_width_broadcasts():
    check_trunk(lambda h, c: h * c, torch.randn(BATCH, 1, 1))


@pytest.mark.parametrize("shape", [(), (WIDTH,), (1, 1, WIDTH), (1, WIDTH)])
def test_constant_operand_is_left_alone(shape):
    program = check_trunk(lambda h, c: h + c, torch.randn(shape))
    assert "sample_ids" not in program.plan_inputs


def test_operands_in_keyword_and_condition_places():
    check_trunk(lambda h, c: torch.where(h > 0, h, c), torch.randn(BATCH, 1, WIDTH))
    check_trunk(lambda h, c: torch.addcmul(h, h, c, value=0.5), torch.randn(BATCH, 1, WIDTH))
    check_trunk(lambda h, c: torch.add(h, c, alpha=2), torch.randn(BATCH, 1, WIDTH))


def test_token_operand_of_one_feature_broadcasts():
    check_trunk(lambda h: h * h[:, :, :1])


def test_cast_to_another_type_and_back():
    check_trunk(lambda h: (h.double() * 2).float())


@pytest.mark.parametrize(
    ("shape", "axis"), [((1, TOKENS, WIDTH), 1), ((TOKENS, WIDTH), 0), ((TOKENS, 1), 0), ((BATCH, TOKENS, WIDTH), 1)]
)
def test_operand_that_varies_with_position_follows_the_tokens(shape, axis):
    check_trunk(lambda h, p: torch.sin(h) * p + p, torch.randn(shape), token_axis=axis)


def test_operand_that_varies_with_position_follows_heads():
    """Rotary embeddings: [N, d] against [B, H, N, d]."""

    def body(h: Tensor, angle: Tensor) -> Tensor:
        x = h.unflatten(2, (3, 4)).transpose(1, 2)
        even, odd = x.unflatten(3, (2, 2)).unbind(-1)
        turned = x * angle.cos() + torch.stack([-odd, even], -1).flatten(3) * angle.sin()
        return turned.transpose(1, 2).flatten(2)

    check_trunk(body, torch.randn(TOKENS, 4), token_axis=0)


def test_operands_on_different_axes_are_refused():
    def body(h: Tensor) -> Tensor:  # a token's feature n plus token n's feature
        square = h[:, :, :TOKENS]
        return torch.cat([square + square.transpose(1, 2), h[:, :, TOKENS:]], dim=2)

    with pytest.raises(UnsupportedModelError, match=r"aten\.add\.Tensor .*batch and token on different axes"):
        pack(body, H)


def test_broadcast_to_a_higher_rank_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"aten\.mul\.Tensor .*higher rank"):
        pack(lambda h, w: (h * w)[0], H, torch.randn(2, 1, 1, 1))


def test_a_table_whose_axes_are_all_as_long_as_the_tokens_is_read_along_theirs():
    """Before heads and tokens change places and behind it, as many heads as tokens."""

    def body(h: Tensor, table: Tensor) -> Tensor:
        heads = h.unflatten(2, (TOKENS, 2)) * table  # [B, N, H, 2]
        return (heads.transpose(1, 2) * table).transpose(1, 2).flatten(2)

    h, table = torch.randn(BATCH, TOKENS, 2 * TOKENS), torch.randn(TOKENS, TOKENS, 2)
    program = pack(body, h, table)
    found = run_packed(program, Planner(GRID, 2, 2).full_plan(BATCH), h, table)
    torch.testing.assert_close(found, body(h, table))
