"""Multiply-adds: the published figures, the closed formula, and what a dropped token saves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dcconvert.export.checks.flops import (
    batch_size,
    converted_bytes,
    converted_gmacs,
    count_bytes,
    count_macs,
    even_plan,
    held_bytes,
    live_values,
    original_gmacs,
)
from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel
from tests.export.harness import CONFIG, TOKENS, convert, inputs

# DiT's paper, table 4 (at 256 px, 32x32 latents): what it calls Gflops.
PUBLISHED = {
    "S/2": (DiTConfig(depth=12, width=384, heads=6, patch=2, image_size=32), 6.06),
    "B/2": (DiTConfig(depth=12, width=768, heads=12, patch=2, image_size=32), 23.01),
    "B/4": (DiTConfig(depth=12, width=768, heads=12, patch=4, image_size=32), 5.56),
    "L/2": (DiTConfig(depth=24, width=1024, heads=16, patch=2, image_size=32), 80.71),
    "XL/2": (DiTConfig(depth=28, width=1152, heads=16, patch=2, image_size=32), 118.64),
}
FREQUENCIES = 256


def block_macs(width: int, tokens: int) -> int:
    """qkv, projection and MLP, two attention products, and the modulation once a sample."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2


def dit_macs(config: DiTConfig) -> int:
    """One sample through a DiT, written out: patchify, timestep MLP, blocks, final layer."""
    n, d, pixels = config.grid**2, config.width, config.patch**2
    ends = n * d * pixels * (config.in_channels + config.out_channels) + 2 * d**2
    return config.depth * block_macs(d, n) + ends + FREQUENCIES * d + d**2


def args(config: DiTConfig, batch: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    with torch.device(device):
        x = torch.zeros(batch, config.in_channels, config.image_size, config.image_size)
        return x, torch.zeros(batch), torch.zeros(batch, dtype=torch.int64)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config, published = PUBLISHED[name]
    with torch.device("meta"):
        dit = DiT(config)
    macs = count_macs(dit, args(config, 2, "meta"))
    assert macs == 2 * dit_macs(config)
    assert macs / 2 / 1e9 == pytest.approx(published, rel=0.01)


@pytest.fixture(scope="module")
def small() -> DynamicModel:
    """DiT-S/2 at 4x."""
    config = PUBLISHED["S/2"][0]
    return rewrite(DiT(config), args(config, 3), {}, method_of("chunk"), Policy("constant", 4).timetable())


@pytest.fixture(scope="module")
def small_inputs() -> dict[str, torch.Tensor]:
    return dict(zip(("x", "t", "y"), args(PUBLISHED["S/2"][0], 2), strict=True))


def test_the_captured_original_of_dit_s_2(small, small_inputs):
    assert original_gmacs(small, small_inputs) == pytest.approx(6.06, rel=0.01)
    assert original_gmacs(small, small_inputs) == pytest.approx(dit_macs(PUBLISHED["S/2"][0]) / 1e9, rel=1e-9)


def test_everything_kept_costs_what_the_original_does(small, small_inputs):
    found = converted_gmacs(small, small_inputs, small.spec.tokens)
    assert found == pytest.approx(original_gmacs(small, small_inputs), rel=0.01)


@pytest.mark.parametrize("kept", [256, 128, 64, 16, 1])
def test_what_dropping_saves(kept, small, small_inputs):
    """The trunk shrinks to the kept tokens; chunk and dechunk cost one multiply-add for each value they gather."""
    config, options = PUBLISHED["S/2"][0], small.method
    trunk = config.depth - options.head_blocks - options.tail_blocks
    saved = trunk * (block_macs(config.width, 256) - block_macs(config.width, kept))
    gathered = config.width * (kept * options.members + 256 * options.neighbours)
    found = converted_gmacs(small, small_inputs, kept)
    assert found == pytest.approx((dit_macs(config) - saved + gathered) / 1e9, rel=1e-6)


def test_fewer_tokens_cost_less(small, small_inputs):
    curve = [converted_gmacs(small, small_inputs, kept) for kept in (256, 200, 128, 64, 32, 1)]
    assert curve == sorted(curve, reverse=True)
    assert len(set(curve)) == len(curve)


@pytest.mark.parametrize("packing", ["rows", "bins"])
def test_figures_are_those_of_one_sample(packing, request):
    model = request.getfixturevalue(f"{packing}_model")
    assert original_gmacs(model, inputs(1)) == pytest.approx(original_gmacs(model, inputs(5)))
    assert converted_gmacs(model, inputs(1), TOKENS) == pytest.approx(converted_gmacs(model, inputs(5), TOKENS))
    assert original_gmacs(model, inputs()) == pytest.approx(dit_macs(CONFIG) / 1e9, rel=1e-9)


def test_counting_runs_nothing():
    """A model of 6 TB: only its shapes exist."""
    with torch.device("meta"):
        layer = nn.Linear(1_200_000, 1_200_000, bias=False)
        value = torch.zeros(3, 1_200_000)
    assert count_macs(layer, (value,)) == 3 * 1_200_000**2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_on_a_gpu_costs_the_same():
    model = convert()
    wanted = converted_gmacs(model, inputs(2), 3), original_gmacs(model, inputs(2))
    model.cuda()
    assert (converted_gmacs(model, inputs(2), 3), original_gmacs(model, inputs(2))) == pytest.approx(wanted)


def test_counting_leaves_the_model_alone():
    model = convert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    original_gmacs(model, inputs())
    converted_gmacs(model, inputs(), 4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad():
        assert model(*inputs().values()).isfinite().all()


def test_even_plan(rows_model):
    plan = even_plan(rows_model, 2, 5)
    assert plan.counts.tolist() == [5, 5]
    np.testing.assert_array_equal(plan.keep, np.arange(TOKENS) < np.full((2, 1), 5))


def test_live_values_are_shaped_like_routes(rows_model):
    with torch.no_grad():
        _, live = rows_model.route(inputs(2))
    assert [v.shape for v in live_values(rows_model, 2)] == [v.shape for v in live.values()]


def test_batch_size():
    assert batch_size({"scale": 2.0, "guidance": torch.tensor(1.0), "x": torch.zeros(3, 4), "t": torch.zeros(5)}) == 3


def test_bytes_of_a_linear_layer_and_what_follows_it():
    module = nn.Sequential(nn.Linear(8, 4), nn.Flatten(0), nn.GELU())
    found = count_bytes(module, (torch.randn(3, 8),))
    weights, read, written = 4 * (8 * 4 + 4), 4 * 3 * 8, 4 * 3 * 4
    assert found.least == weights + read + written
    assert found.unfused == weights + read + written + 2 * written  # the flattening is a view and moves nothing


def test_an_expanded_tensor_is_read_once():
    assert held_bytes(torch.zeros(1, 5).expand(100, 5)) == 20
    assert held_bytes(torch.zeros(6, dtype=torch.int64)) == 48
    assert held_bytes("a word") == 0


def test_a_step_of_fewer_tokens_moves_fewer_bytes_and_the_same_weights():
    model = convert(mode="chunk")
    given = model.spec.example(2)
    few, all_tokens = (converted_bytes(model, given, kept) for kept in (TOKENS // 4, TOKENS))
    assert few.unfused < 0.85 * all_tokens.unfused
    assert few.least < all_tokens.least
