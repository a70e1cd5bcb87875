"""Routers on grids small enough to compute by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dcconvert.passes.modules.routers import (
    CARRY_ROUTERS,
    CosineRouter,
    MergeRouter,
    PredictabilityRouter,
    even_priorities,
    make_router,
    random_priorities,
    window_mean,
)


def test_window_mean_is_smaller_at_the_border():
    h = torch.arange(9.0).view(1, 9, 1)  # 0 1 2 / 3 4 5 / 6 7 8
    mean = window_mean(h, (3, 3)).view(3, 3)
    assert mean[0, 0] == (0 + 1 + 3 + 4) / 4
    assert mean[0, 1] == (0 + 1 + 2 + 3 + 4 + 5) / 6
    assert mean[1, 1] == 4


def test_predictability_by_hand():
    """Two tokens in a row: each window holds both, so both residuals are half the difference."""
    h = torch.tensor([[[1.0, 3.0], [7.0, 5.0]]])  # layer norm: (-1, 1) and (1, -1), up to its epsilon
    p = PredictabilityRouter((1, 2))(h)
    torch.testing.assert_close(p, torch.tensor([[0.5, 0.5]]), atol=1e-5, rtol=0)


def test_predictability_of_an_odd_token_by_hand():
    """A 1 x 4 grid a a a b. Residuals: 0, 0, |b - a|/3 and |b - a|/2 of layer-normalised a and b."""
    a, b = [1.0, -1.0], [-1.0, 1.0]
    p = PredictabilityRouter((1, 4))(torch.tensor([[a, a, a, b]]))[0]
    third, half = 2 * math.sqrt(2) / 3, 2 * math.sqrt(2) / 2
    mean = (third + half) / 4
    wanted = torch.tensor([0, 0, third / (third + mean), half / (half + mean)])
    torch.testing.assert_close(p, wanted, atol=1e-4, rtol=0)


def test_predictability_ignores_offset_and_scale_of_a_token():
    h = torch.randn(2, 12, 8)
    router = PredictabilityRouter((3, 4))
    torch.testing.assert_close(router(h), router(h * 7 + 3), atol=1e-4, rtol=1e-4)


def test_cosine_by_hand():
    """a a b on a 1 x 3 grid with b at right angles to a: windows (a, a), (a, a, b), (a, b)."""
    a, b = [1.0, 0.0], [0.0, 1.0]
    p = CosineRouter((1, 3))(torch.tensor([[a, a, b]]))[0]
    similar = [1, 2 / math.sqrt(5), 1 / math.sqrt(2)]
    torch.testing.assert_close(p, torch.tensor([(1 - s) / 2 for s in similar]), atol=1e-6, rtol=0)


def test_cosine_is_against_the_neighbourhood():
    h = torch.randn(2, 12, 8)
    p = CosineRouter((3, 4))(h)
    torch.testing.assert_close(p, (1 - F.cosine_similarity(h, window_mean(h, (3, 4)), dim=-1)) / 2)


@pytest.mark.parametrize("name", CARRY_ROUTERS)
def test_scores_are_finite_and_between_zero_and_one(name):
    router = make_router(name, (3, 5), seed=0)
    for h in (torch.randn(2, 15, 8), torch.zeros(2, 15, 8), torch.full((2, 15, 8), 1e4)):
        p = router(h)
        assert p.shape == (2, 15)
        assert p.isfinite().all()
        assert ((p >= 0) & (p <= 1)).all()


@pytest.mark.parametrize("name", [*CARRY_ROUTERS, "merge"])
def test_a_sample_is_scored_alone(name):
    router = MergeRouter((4, 4), 2) if name == "merge" else make_router(name, (4, 4), seed=0)
    h = torch.randn(3, 16, 8)
    torch.testing.assert_close(router(h)[1:2], router(h[1:2]))


@pytest.mark.parametrize("power", [0, 1, 2, 3, 4])
def test_even_priorities_fill_every_cell_once(power):
    """The top 4^i of a 16 x 16 grid are one token of each of the 4^i square cells."""
    side, kept = 16, 4**power
    cell = side // 2**power
    top = even_priorities((side, side)).topk(kept).indices
    cells = {(int(i) // side // cell, int(i) % side // cell) for i in top}
    assert len(cells) == kept


def test_even_priorities_spread_any_budget():
    """Between the powers as well, no cell of a coarse 2 x 2 or 4 x 4 division gets more than one token extra."""
    order = even_priorities((8, 8)).argsort(descending=True)
    for kept in range(1, 65):
        top = order[:kept]
        for cell in (4, 2):
            per_cell = torch.bincount((top // 8 // cell) * (8 // cell) + top % 8 // cell, minlength=(8 // cell) ** 2)
            assert per_cell.max() - per_cell.min() <= 1, (kept, cell)


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 3), (6, 10)])
def test_priorities_are_distinct_on_any_grid(grid):
    for priorities in (even_priorities(grid), random_priorities(grid, 0)):
        assert priorities.shape == (grid[0] * grid[1],)
        assert len(priorities.unique()) == len(priorities)
        assert priorities.min() > 0
        assert priorities.max() < 1


def test_random_priorities_follow_the_seed():
    torch.testing.assert_close(random_priorities((4, 4), 7), random_priorities((4, 4), 7))
    assert not torch.equal(random_priorities((4, 4), 7), random_priorities((4, 4), 8))


def test_an_unknown_name_has_no_router():
    with pytest.raises(KeyError):
        make_router("norm", (2, 2), 0)
