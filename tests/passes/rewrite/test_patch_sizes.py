"""DDiT's patch sizes: the algebra of patches, plans, and the trunk against the original on a coarser grid."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconvert.export.checks.parity import check_identity
from dcconvert.models.dit import DiT
from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.methods import method_of
from dcconvert.passes.modules.patch_resize import PatchSkip, enlarging, noise_levels, reducing, spreading
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.planners import PatchPlanner, cells_of
from dcconvert.passes.planning.schedule import Policy
from tests.passes.harness import (
    WIDTH,
    Block,
    Call,
    TinyModel,
    diffusers_call,
    dit_call,
    pixart_call,
    relative,
    tiny_inputs,
)


def with_sizes(call, prediction: str = ""):
    module, args, kwargs = call
    return rewrite(module, args, kwargs, method_of("ddit", prediction=prediction), Policy("constant", 4).timetable())


def in_patches(model, inputs, scales) -> Tensor:
    """One call with patches of these scales, one a sample."""
    tokens = model.spec.tokens
    with torch.no_grad():
        scores, live = model.route(inputs)
        plan = model.planner.plan(scores.numpy(), np.array([tokens // scale**2 for scale in scales]))
        return model.denoise(inputs, live, plan)[0]


def patches(x: Tensor, side: int) -> Tensor:
    """[B, C, H, W] -> [B, C, H / side, W / side, side^2]."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // side, side, w // side, side).permute(0, 1, 2, 4, 3, 5).flatten(-2)


def image_of(cells: Tensor, side: int) -> Tensor:
    b, c, h, w, _ = cells.shape
    return cells.reshape(b, c, h, w, side, side).permute(0, 1, 2, 4, 3, 5).reshape(b, c, h * side, w * side)


def on_a_coarser_grid(model: Any, inputs, scale: int) -> Tensor:
    """The original on the image with its patches reduced, positions interpolated, and what it says enlarged."""
    x, t, y = inputs
    cfg, patch = model.cfg, model.cfg.patch
    small = DiT(replace(cfg, image_size=cfg.image_size // scale))
    positions = model.pos_embed[0].T.reshape(1, cfg.width, cfg.grid, cfg.grid)
    # Bilinear between the middles of cells: the mean of the four in the middle of a patch.
    low = scale // 2 - 1
    corners = [positions[:, :, low + dy :: scale, low + dx :: scale] for dy in (0, 1) for dx in (0, 1)]
    weights = {**model.state_dict(), "pos_embed": torch.stack(corners).mean(0).flatten(2).transpose(1, 2)}
    small.load_state_dict(weights)
    reduced = image_of(patches(x, scale * patch) @ reducing(patch, scale).T.float(), patch)
    return image_of(patches(small(reduced, t, y), patch) @ enlarging(patch, scale).T.float(), scale * patch)


@pytest.mark.parametrize("scale", [2, 4])
def test_a_coarser_step_is_the_original_on_the_reduced_image(scale):
    call = dit_call(image_size=16)
    model = with_sizes(call)
    inputs = model.flat_inputs(*call[1:])
    with torch.no_grad():
        wanted = on_a_coarser_grid(call[0], call[1], scale)
    assert relative(in_patches(model, inputs, [scale] * 3), wanted) < 1e-5


def test_samples_of_one_batch_have_sizes_of_their_own():
    call = dit_call(image_size=16)
    model = with_sizes(call)
    inputs = model.flat_inputs(*call[1:])
    mixed = in_patches(model, inputs, [4, 1, 2])
    with torch.no_grad():
        original = call[0](*call[1])
        for sample, scale in ((0, 4), (2, 2)):
            assert relative(mixed[sample], on_a_coarser_grid(call[0], call[1], scale)[sample]) < 1e-5
    assert relative(mixed[1], original[1]) < 1e-5


@pytest.mark.parametrize("call", [dit_call, diffusers_call, pixart_call])
def test_with_the_models_own_patches_it_is_the_original(call):
    model = with_sizes(call(16) if call is dit_call else call(sample_size=16), "eps")
    check = check_identity(model, model.spec.example(3))
    assert check.value < 1e-5


def test_what_is_enlarged_reduces_to_what_it_was():
    for patch, scale in ((1, 2), (2, 2), (2, 4), (4, 2)):
        both = reducing(patch, scale) @ enlarging(patch, scale)
        torch.testing.assert_close(both, torch.eye(patch**2, dtype=torch.float64))
    torch.testing.assert_close(enlarging(1, 2), torch.ones(4, 1, dtype=torch.float64))
    torch.testing.assert_close(reducing(1, 2), torch.full((1, 4), 0.25, dtype=torch.float64))


def test_features_spread_like_pixels():
    """Features in the order (dy, dx, c) of two channels: the tokens of a large patch are the enlarged small one."""
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # feature f is pixel f // 2 of channel f % 2
    small = torch.randn(8, dtype=torch.float64)
    found = (spreading(order, 2, 2) @ small).view(2, 2, 2, 2, 2)  # token y, x, pixel y, x, channel
    image = small.view(2, 2, 2).permute(2, 0, 1)[None]
    large = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found.permute(4, 0, 2, 1, 3).reshape(2, 4, 4), large)


@pytest.mark.parametrize(("prediction", "timestep_scale"), [("eps", 1000.0), ("flow", 1000.0), ("flow", 1.0)])
def test_the_skip_gives_the_best_linear_guess_of_what_a_patch_loses(prediction, timestep_scale):
    grid, order = (4, 4), torch.arange(8)  # channel, dy, dx; the second channel is not in the input
    skip = PatchSkip(grid, order, 2, (1, 2), prediction, 1, timestep_scale)
    variance = 0.3
    skip.detail[1] = variance
    clean, noise = torch.randn(4000, 1, 8, 8) * math.sqrt(variance), torch.randn(4000, 1, 8, 8)
    alpha, sigma = (float(level[600]) for level in noise_levels(prediction))
    x = alpha * clean + sigma * noise
    wanted = noise - clean if prediction == "flow" else noise
    rows = skip(x, torch.full((4000,), 0.6 * timestep_scale)).view(4000, 16, 2, 8)
    assert not rows[:, :, 0].any()
    assert not rows[:, :, 1, 4:].any()
    found = rows[:, :, 1, :4].reshape(4000, 1, 4, 4, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(4000, 1, 8, 8)
    lost = image_of(patches(wanted, 4) @ (torch.eye(16) - enlarging(2, 2) @ reducing(2, 2)).float().T, 4)
    torch.testing.assert_close(skip.lost(wanted, 2), lost)
    seen = skip.lost(x, 2)
    slope = float((seen * lost).sum() / seen.square().sum())
    assert float((seen * found).sum() / seen.square().sum()) == pytest.approx(slope, abs=0.02)
    for factor in (0.9, 1.1):
        assert (factor * found - lost).square().mean() > (found - lost).square().mean()


def test_noise_levels_are_the_samplers():
    from dcconvert.sampling.samplers import eps_scheduler

    alpha, sigma = noise_levels("eps")
    kept = eps_scheduler(10, "euler").alphas_cumprod
    torch.testing.assert_close(alpha[:1000].square(), kept)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(1001))
    alpha, sigma = noise_levels("flow")
    torch.testing.assert_close(alpha[[0, 250, 1000]], torch.tensor([1.0, 0.75, 0.0]))
    torch.testing.assert_close(sigma[[250, 1000]], torch.tensor([0.25, 1.0]))


def test_the_plan_by_hand():
    planner = PatchPlanner((2, 4))
    assert planner.scales == (1, 2)
    assert planner.sizes == {2: 1, 8: 0}
    plan = planner.plan(planner.mask(np.array([2, 8])))
    assert plan.chunk_index.shape == (2, 8, 1)
    # Ten embedded tokens a sample: eight small ones, two large ones.
    assert plan.chunk_index[0, :2, 0].tolist() == [8, 9]
    assert plan.chunk_index[1, :, 0].tolist() == list(range(10, 18))
    # Five values a packed token: itself, then the four of a large patch.
    assert plan.fill_index[0, :, 0].tolist() == [1, 2, 6, 7, 3, 4, 8, 9]
    assert plan.fill_index[1, :, 0].tolist() == [5 * place for place in range(8, 16)]
    assert plan.fill_index[0, :, 1].tolist() == [2 * n + 1 for n in range(8)]
    assert plan.fill_index[1, :, 1].tolist() == [2 * (8 + n) for n in range(8)]
    roomy = planner.plan(plan.keep, Bucket(2, 24, 2, 9, 4))
    assert roomy.chunk_index[:1].ravel().tolist() == [8, 9, 8, 8]


def test_cells():
    cell, within = cells_of((2, 4), 2)
    assert cell.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert within.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


class Image(TinyModel):
    """A TinyModel that gives an image."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = super().forward(x, t)
        return tokens.reshape(-1, 2, 4, 2, 2, 2).permute(0, 5, 1, 3, 2, 4).reshape(-1, 2, 4, 8)


def test_a_grid_that_is_no_square():
    model = with_sizes((Image(Block() for _ in range(3)), tiny_inputs(), {}))
    assert model.planner.patches == (2, 4)
    assert check_identity(model, model.spec.example(3)).value < 1e-5


@pytest.mark.parametrize("timestep_scale", [1.0, 1000.0])
def test_the_skip_goes_by_the_timesteps_of_the_model(timestep_scale):
    """Of a flow it adds what the patches lose of the input, by one over the noise level."""

    def made(prediction: str):
        options = method_of("ddit", prediction=prediction)
        return rewrite(*call, options, Policy("constant", 4).timetable(), timestep_scale=timestep_scale)

    levels = torch.tensor([0.25, 0.5, 1.0])
    call: Call = Image(Block() for _ in range(3)), (tiny_inputs()[0], levels * timestep_scale), {}
    plain, skipping = (
        in_patches(made(kind), dict(zip(("x", "t"), call[1], strict=True)), [2] * 3) for kind in ("", "flow")
    )
    lost = (torch.eye(16) - enlarging(2, 2) @ reducing(2, 2)).float()
    wanted = image_of(patches(call[1][0], 4) @ lost.T, 4) / levels.view(-1, 1, 1, 1)
    torch.testing.assert_close(skipping - plain, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_the_skip_is_finite_at_both_ends_of_a_run(prediction):
    skip = PatchSkip((4, 4), torch.arange(4), 2, (1, 2), prediction, 1)
    assert skip(torch.randn(2, 1, 8, 8), torch.tensor([0.0, 1000.0])).isfinite().all()


def refused(call, match):
    with pytest.raises(UnsupportedModelError, match=match):
        with_sizes(call)


def test_what_has_no_rule_is_refused():
    refused((TinyModel(Block() for _ in range(3)), tiny_inputs(), {}), "not an image")
    refused(dit_call(image_size=6), "no patches of twice the size")

    class Normed(Image):
        def __init__(self) -> None:
            super().__init__(Block() for _ in range(3))
            self.patchify: Any = nn.Sequential(self.patchify, nn.GroupNorm(2, self.patchify.out_channels))

    refused((Normed(), tiny_inputs(), {}), "does more than add positions")

    class Timed(Image):
        def __init__(self) -> None:
            super().__init__(Block() for _ in range(3))
            self.positions_of = nn.Linear(1, WIDTH)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            own = self.positions
            tokens = self.patchify(x).flatten(2).transpose(1, 2) + own + self.positions_of(t[:, None])[:, None]
            c = torch.sin(t.unsqueeze(1) * torch.arange(tokens.shape[2]))
            for block in self.blocks:
                tokens = block(tokens, c)
            made = self.final(tokens)
            return made.reshape(-1, 2, 4, 2, 2, 2).permute(0, 5, 1, 3, 2, 4).reshape(-1, 2, 4, 8)

    refused((Timed(), tiny_inputs(), {}), "depend on t")
