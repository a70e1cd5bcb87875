"""WriteAttention and MergeLater on attention as people write it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.capture import capture
from dcconvert.passes.frontend.merged_batch import MergeLater
from dcconvert.passes.frontend.write_attention import WriteAttention
from dcconvert.passes.ir.pass_runner import run_passes
from dcconvert.passes.methods import method_of
from dcconvert.passes.numeric_gate import NumericGate
from tests.passes.harness import TOKENS, WIDTH, Block, TinyModel, count, tiny_inputs

aten = torch.ops.aten
HEADS, SIZE = 2, WIDTH // 2
SCALE = SIZE**-0.5

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, N, H, d] three times -> [B, N, H, d]


def heads_first(attend: Attend) -> Attend:
    """The same for tensors [B, H, N, d]."""
    return lambda *given: attend(*(x.transpose(1, 2) for x in given)).transpose(1, 2)


def merged(attend: Attend) -> Attend:
    """The same for tensors [B*H, N, d]."""

    def whole(*given: Tensor) -> Tensor:
        one = [x.transpose(1, 2).reshape(-1, TOKENS, SIZE) for x in given]
        return attend(*one).reshape(-1, HEADS, TOKENS, SIZE).transpose(1, 2)

    return whole


def heads_then_samples(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    one = [x.permute(2, 0, 1, 3).reshape(-1, TOKENS, SIZE) for x in (q, k, v)]
    weights = torch.einsum("bid,bjd->bij", one[0], one[1] * SCALE).softmax(-1)
    return torch.einsum("bij,bjd->bid", weights, one[2]).reshape(HEADS, -1, TOKENS, SIZE).permute(1, 2, 0, 3)


def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head: no axis for it."""
    q, k, v = (x.flatten(2) for x in (q, k, v))
    return (q @ k.mT / math.sqrt(WIDTH)).softmax(-1) @ v


def in_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.baddbmm(torch.empty(q.shape[0], TOKENS, TOKENS), q, k.mT, beta=0, alpha=SCALE)
    return torch.bmm(F.softmax(scores, dim=-1), v)


def hidden_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * SCALE).masked_fill(torch.eye(TOKENS, dtype=torch.bool), -torch.inf)
    return scores.softmax(-1) @ v


def all_hidden(value: float) -> Attend:
    """The keys of some queries are all hidden, by a number that is not infinite: these see all keys alike."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = (torch.arange(TOKENS) % 3 == 0)[:, None] | torch.eye(TOKENS, dtype=torch.bool)
        return (q @ k.mT * SCALE).masked_fill(hidden, value).softmax(-1) @ v

    return heads_first(attend)


FORMS: dict[str, Attend] = {
    "matmul": heads_first(lambda q, k, v: (q @ k.transpose(-2, -1) * SCALE).softmax(-1) @ v),
    "divided": heads_first(lambda q, k, v: F.softmax(q @ k.mT / math.sqrt(SIZE), dim=3) @ v),
    "scaled queries": heads_first(lambda q, k, v: (q * SCALE @ k.mT).softmax(-1) @ v),
    "no scale": heads_first(lambda q, k, v: (q @ k.mT).softmax(-1) @ v),
    "keys transposed first": lambda q, k, v: (
        ((q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * SCALE).softmax(-1) @ v.transpose(1, 2)
    ).transpose(1, 2),
    "in double precision": heads_first(lambda q, k, v: (q @ k.mT * SCALE).softmax(-1, torch.float64).to(q.dtype) @ v),
    "dropout": heads_first(lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1, training=False) @ v),
    "einsum": heads_first(
        lambda q, k, v: torch.einsum(
            "b h i j, b h j d -> b h i d", (torch.einsum("b h i d, b h j d -> b h i j", q, k) * SCALE).softmax(-1), v
        )
    ),
    "einsum, tokens first": lambda q, k, v: torch.einsum(
        "bhqk,bkhd->bqhd", torch.einsum("bqhd,bkhd->bhqk", q, k).mul(SCALE).softmax(-1), v
    ),
    "einsum, keys first": lambda q, k, v: torch.einsum(
        "nlhd,nqhl->nqhd", v, torch.einsum("nlhd,nqhd->nqhl", k, q).softmax(-1)
    ),
    "bmm": merged(lambda q, k, v: torch.bmm((torch.bmm(q, k.transpose(1, 2)) * SCALE).softmax(2), v)),
    "baddbmm": merged(in_baddbmm),
    "heads merged before samples": heads_then_samples,
    "one head": alone,
    "a temperature": heads_first(lambda q, k, v: (q @ k.mT * torch.full((HEADS, 1, 1), 0.3)).softmax(-1) @ v),
    "a bias": heads_first(lambda q, k, v: (q @ k.mT * SCALE + torch.linspace(0, 1, TOKENS)).softmax(-1) @ v),
    "masked": heads_first(hidden_diagonal),
    "all keys masked": all_hidden(-1e9),
    "all keys masked by the least number": all_hidden(torch.finfo(torch.float32).min),
}


class HandBlock(Block):
    """A block whose attention is one of FORMS."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = F.layer_norm(x, (WIDTH,)) * (1 + self.modulation(c).unsqueeze(1)[..., :WIDTH])
        q, k, v = self.qkv(y).reshape(-1, TOKENS, 3, HEADS, SIZE).unbind(2)
        x = x + self.proj(self.attend(q, k, v).reshape(-1, TOKENS, WIDTH))
        return x + F.silu(self.mlp(x))


class Layer(nn.Module):
    """torch's own layer, called for its weights too, as many people do without using them."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0] * c.unsqueeze(1)
        return x + F.silu(self.mlp(x.reshape(-1, WIDTH)).reshape(x.shape))


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    block = (lambda: HandBlock(FORMS[kind])) if kind in FORMS else Layer
    return TinyModel([block()])


@pytest.mark.parametrize("kind", [*FORMS, "layer"])
def test_attention_written_by_hand_becomes_the_op(kind):
    program = capture(model(kind), tiny_inputs(), {}, method_of("chunk"))
    assert count(program.graph_module, aten.scaled_dot_product_attention.default) == 0
    records = run_passes(program, (Normalise(), WriteAttention(), MergeLater()), gate=NumericGate(program))
    assert records[1].matches == 1
    assert count(program.graph_module, aten.scaled_dot_product_attention.default) == 1
    assert count(program.graph_module, aten.softmax.int) == 0


@pytest.mark.parametrize(
    "attend",
    [
        heads_first(lambda q, k, v: (q @ k.mT).softmax(-2) @ v),
        heads_first(lambda q, k, v: ((q @ k.mT + torch.linspace(0, 1, TOKENS)) * SCALE).softmax(-1) @ v),
        heads_first(lambda q, k, v: torch.relu(q @ k.mT) @ v),
        heads_first(lambda q, k, v: q.softmax(-1) @ (k.mT @ v)),
        all_hidden(-100.0),
    ],
    ids=["over queries", "a scaled bias", "no softmax", "linear attention", "a mask of small numbers"],
)
def test_what_is_no_such_attention_stays(attend):
    program = capture(TinyModel([HandBlock(attend)]), tiny_inputs(), {}, method_of("chunk"))
    records = run_passes(program, (Normalise(), WriteAttention()), gate=NumericGate(program))
    assert records[1].matches == 0
