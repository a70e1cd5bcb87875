"""SparseDiT's trunk against a forward pass written by hand after the paper."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconvert.export.checks.flops import converted_gmacs, original_gmacs
from dcconvert.models.dit import modulate
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.ir.graph_tools import attributes
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.pooled_planner import PooledPlanner
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.rewrite.sparse_dense import Group, arrange
from tests.passes.harness import WIDTH, TinyModel, diffusers_call, dit_call, pixart_call, relative, tiny_inputs

GRID = 8


def sparse(call, **options):
    chosen = {"mode": "sparsedit", "fewest": 0.1, "head_blocks": 1, "tail_blocks": 1, **options}
    module, args, kwargs = call
    return rewrite(module, args, kwargs, method_of(**{"mode": "carry", **chosen}), Policy("constant", 4).timetable())


def attend(block, x: Tensor, q: Tensor, kv: Tensor, c: Tensor) -> Tensor:
    """A DiT block on tokens x whose queries come from q, keys and values from kv."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
    width, heads = x.shape[2], block.attn.heads
    rows = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)

    def project(part: int, tokens: Tensor) -> Tensor:
        normed = modulate(block.norm1(tokens), shift1, scale1)
        made = F.linear(normed, rows[0][part], rows[1][part])
        return made.unflatten(2, (heads, width // heads)).transpose(1, 2)

    found = F.scaled_dot_product_attention(project(0, q), project(1, kv), project(2, kv))
    x = x + gate1.unsqueeze(1) * block.attn.proj(found.transpose(1, 2).flatten(2))
    return x + gate2.unsqueeze(1) * block.mlp(modulate(block.norm2(x), shift2, scale2))


def pooling(block, x: Tensor, c: Tensor) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
    values = F.linear(
        modulate(block.norm1(x), shift1, scale1), block.attn.qkv.weight.chunk(3)[2], block.attn.qkv.bias.chunk(3)[2]
    )
    x = x + gate1.unsqueeze(1) * block.attn.proj(values.mean(1, keepdim=True).expand_as(x))
    return x + gate2.unsqueeze(1) * block.mlp(modulate(block.norm2(x), shift2, scale2))


def pooled(x: Tensor, side: int) -> Tensor:
    image = x.transpose(1, 2).unflatten(2, (GRID, GRID))
    return F.adaptive_avg_pool2d(image, side).flatten(2).transpose(1, 2)


def brought_up(x: Tensor, side: int) -> Tensor:
    image = x.transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(image, size=(GRID, GRID), mode="nearest").flatten(2).transpose(1, 2)


def by_hand(
    model: Any, inputs, side: int, weights: list[tuple[Tensor, Tensor]], head: int = 1, tail: int = 1
) -> Tensor:
    x, t, y = inputs
    tokens, c = model.x_embedder(x) + model.pos_embed, model.t_embedder(t) + model.y_embedder(y)
    for block in model.blocks[:head]:
        tokens = pooling(block, tokens, c)
    for group, (w1, w2) in zip(arrange(len(model.blocks), head, tail), weights, strict=True):
        few = pooled(tokens, side)
        few = attend(model.blocks[group.generation], few, few, tokens, c)
        for number in group.sparse:
            few = attend(model.blocks[number], few, few, few, c)
        many = F.linear(brought_up(few, side), w1) + F.linear(tokens, w2)
        tokens = attend(model.blocks[group.recovery], many, many, few, c)
        tokens = attend(model.blocks[group.dense], tokens, tokens, tokens, c)
    for block in model.blocks[len(model.blocks) - tail :]:
        tokens = attend(block, tokens, tokens, tokens, c)
    return model.unpatchify(model.final_layer(tokens, c))


def recovery(model, group: int) -> tuple[Tensor, Tensor]:
    tensors = attributes(model.denoise_graph)
    return tensors[f"recovery.{group}.sparse"], tensors[f"recovery.{group}.dense"]


@pytest.mark.parametrize("side", [2, 3, 5, 8])
@pytest.mark.parametrize("depth", [6, 10])
def test_it_is_what_the_paper_says(side, depth):
    call = dit_call(image_size=16, depth=depth)
    model = sparse(call)
    groups = range(len(arrange(depth, 1, 1)))
    for group in groups:
        w1, w2 = recovery(model, group)
        assert not w1.any()
        torch.testing.assert_close(w2, torch.eye(32))
        with torch.no_grad():
            w1 += 0.1 * torch.randn(32, 32)
            w2 += 0.1 * torch.randn(32, 32)
    inputs = model.flat_inputs(*call[1:])
    with torch.no_grad():
        scores, live = model.route(inputs)
        plan = model.planner.plan(scores.numpy(), np.full(3, side**2))
        found = model.denoise(inputs, live, plan)[0]
        wanted = by_hand(call[0], call[1], side, [recovery(model, group) for group in groups])
    assert relative(found, wanted) < 1e-5


def test_samples_at_different_grids_in_one_batch():
    call = dit_call(image_size=16, depth=6)
    model = sparse(call)
    inputs = model.flat_inputs(*call[1:])
    with torch.no_grad():
        scores, live = model.route(inputs)
        mixed = model.denoise(inputs, live, model.planner.plan(scores.numpy(), np.array([9, 64, 25])))[0]
        for sample, side in enumerate((3, 8, 5)):
            wanted = by_hand(call[0], call[1], side, [recovery(model, 0)])
            assert relative(mixed[sample], wanted[sample]) < 1e-5


def test_groups_of_the_published_model_and_of_small_ones():
    groups = arrange(28, 2, 2)  # DiT-XL: 2 + 4 x 6 + 2
    assert [len(group.sparse) for group in groups] == [3, 3, 3, 3]
    assert groups[0] == Group(2, (3, 4, 5), 6, 7)
    assert groups[-1] == Group(20, (21, 22, 23), 24, 25)
    assert arrange(6, 1, 1) == [Group(1, (2,), 3, 4)]
    with pytest.raises(UsageError, match="needs 4; 2 head and 2 tail blocks leave 3 of 7"):
        arrange(7, 2, 2)


def test_operations_are_those_of_the_formula():
    """Dense 12 D^2 N + 2 N^2 D a block and so on, less what does not depend on the tokens."""
    depth, width, tokens, cells = 10, 32, 64, 25
    call = dit_call(image_size=16, depth=depth)
    model = sparse(call)
    inputs = model.flat_inputs(*call[1:])
    dense = 12 * width**2 * tokens + 2 * tokens**2 * width
    blocks = {
        "pooling": 9 * width**2 * tokens,  # projection and MLP
        "generation": 10 * width**2 * cells + 2 * width**2 * tokens + 2 * cells * tokens * width,
        "sparse": 12 * width**2 * cells + 2 * cells**2 * width,
        "recovery": 11 * width**2 * tokens + 3 * width**2 * cells + 2 * cells * tokens * width,
    }
    wanted = original_gmacs(model, inputs) * 1e9 - (depth - 1 - 2) * dense  # one dense block at the end, two of groups
    wanted += blocks["pooling"] + 2 * (blocks["generation"] + blocks["sparse"] + blocks["recovery"])
    found = converted_gmacs(model, inputs, cells) * 1e9
    extra = (9 * cells + tokens) * width * 2  # gathers of both groups
    small = 4 * width**2 * 3  # the means of the pooling block, one token of three projections
    assert abs(found - wanted - extra) < small + 0.002 * wanted


@pytest.mark.parametrize("call", [diffusers_call, pixart_call])
def test_other_layouts_of_attention(call):
    """Separate projections; cross-attention to text stays what it is. The same result for any packing of a batch."""
    made = call(sample_size=16)
    if call is diffusers_call:
        made[0].transformer_blocks.extend([made[0].transformer_blocks[0], made[0].transformer_blocks[1]])
    model = sparse(made, head_blocks=0, tail_blocks=0) if call is diffusers_call else None
    if model is None:
        with pytest.raises(UsageError, match="needs 4"):
            sparse(made, head_blocks=0, tail_blocks=0)
        made[0].transformer_blocks.append(made[0].transformer_blocks[0])
        model = sparse(made, head_blocks=0, tail_blocks=0)
    inputs = model.flat_inputs(*made[1:])
    with torch.no_grad():
        scores, live = model.route(inputs)
        even = model.denoise(inputs, live, model.planner.plan(scores.numpy(), np.full(3, 16)))[0]
        mixed = model.denoise(inputs, live, model.planner.plan(scores.numpy(), np.array([16, 49, 9])))[0]
        original = model.original_graph(*inputs.values())[0]
    assert relative(mixed[0], even[0]) < 1e-5
    assert relative(mixed[1], even[1]) > 1e-3
    assert relative(even, original) > 1e-3


class TwoLayerValues(nn.Module):
    """A block whose values are no linear function of its tokens, but one of what their last layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.first, self.second, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def values(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(3 * self.first(x)))

    def forward(self, x: Tensor, c: Tensor, source: Tensor | None = None) -> Tensor:
        source = x if source is None else source
        q, k, v = (y.unflatten(2, (2, 6)).transpose(1, 2) for y in (self.q(x), self.k(source), self.values(source)))
        found = F.scaled_dot_product_attention(q, k, v, scale=1.5).transpose(1, 2).flatten(2)
        return x + self.proj(found) * c.unsqueeze(1)

    def pooling(self, x: Tensor, c: Tensor) -> Tensor:
        return x + self.proj(self.values(x).mean(1, keepdim=True)) * c.unsqueeze(1)


def test_values_of_two_layers_and_a_scale_of_attention():
    """All three kinds of attention keep the scale, and a pooling block takes the mean of what the last layer reads."""
    module, (x, t) = TinyModel(TwoLayerValues() for _ in range(5)), tiny_inputs()
    model = sparse((module, (x, t), {}), head_blocks=1, tail_blocks=0)
    inputs = model.flat_inputs((x, t), {})
    first, *group, recovering, dense = (cast(TwoLayerValues, block) for block in module.blocks)
    with torch.no_grad():
        scores, live = model.route(inputs)
        found = model.denoise(inputs, live, model.planner.plan(scores.numpy(), np.full(3, 8)))[0]
        c = torch.sin(t.unsqueeze(1) * torch.arange(WIDTH))
        tokens = first.pooling(module.patchify(x).flatten(2).transpose(1, 2) + module.positions, c)
        few = tokens
        for block in group:
            few = block(few, c)
        wanted = module.final(dense(recovering(tokens, c, few), c))
    assert relative(found, wanted) < 1e-5


def test_text_among_the_tokens_is_refused():
    from benchmarks.families import sd3

    with pytest.raises(UnsupportedModelError, match="tokens beside the grid"):
        sparse(sd3(), head_blocks=0, tail_blocks=0)


def test_pooling_is_torchs():
    planner = PooledPlanner((8, 8), fewest=0.05)
    assert list(planner.sizes) == [4, 9, 16, 25, 36, 49, 64]
    x = torch.randn(2, 64, 5)
    for count, (side, _) in planner.sizes.items():
        pool = planner.pooling(count)
        found = (x[:, torch.from_numpy(pool.index)] * torch.from_numpy(pool.weight)[..., None]).sum(2)
        torch.testing.assert_close(found, pooled(x, side))
        torch.testing.assert_close(found[:, torch.from_numpy(pool.cell)], brought_up(found, side))


def test_a_count_between_two_grids_becomes_the_smaller():
    planner = PooledPlanner((4, 8), fewest=0.2)
    assert planner.sizes == {6: (2, 3), 8: (2, 4), 15: (3, 5), 18: (3, 6), 28: (4, 7), 32: (4, 8)}
    assert planner.allowed([32, 31, 28, 17, 8, 3]).tolist() == [32, 28, 28, 15, 8, 6]
    keep = planner.select(np.zeros((2, 32)), [16, 32])
    assert keep.sum(1).tolist() == [15, 32]
    plan = planner.plan(keep)
    assert plan.counts.tolist() == [15, 32]
    np.testing.assert_allclose(plan.chunk_weight.sum(-1), 1, rtol=1e-6)
