"""The grid of the tokens, as calls of pipelines give it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcconvert.models.pipelines.calls import batch_of, grid_of, scale_of
from dcconvert.passes.ir.errors import UsageError


def ids(height: int, width: int, image: int = 0) -> Tensor:
    return torch.tensor([[image, y, x] for y in range(height) for x in range(width)])


def tokens(count: int) -> Tensor:
    return torch.zeros(2, count, 8)


SIX = ids(2, 3)


@pytest.mark.parametrize(
    ("count", "given", "grid"),
    [
        (6, {"img_ids": SIX}, (2, 3)),
        (6, {"img_ids": SIX.float().expand(2, 6, 3)}, (2, 3)),
        (6, {"img_ids": torch.cat([SIX, SIX[:, :1]], 1)}, (2, 3)),  # FLUX.2 has a fourth axis
        (12, {"img_ids": torch.cat([SIX, ids(2, 3, 1)])}, (4, 3)),
        (18, {"img_ids": torch.cat([SIX, ids(4, 3, 1)])}, (6, 3)),
        (10, {"img_ids": torch.cat([SIX, ids(2, 2, 1)])}, (10, 1)),  # of two widths
        (5, {"img_ids": SIX[:5]}, (5, 1)),
        (8, {"img_shapes": [(1, 2, 4)] * 2}, (2, 4)),
        (8, {"img_shapes": [[(1, 2, 4)]] * 2}, (2, 4)),
        (20, {"img_shapes": [[(1, 2, 4), (1, 3, 4)]] * 2}, (5, 4)),
        (24, {"img_shapes": [[(3, 2, 4)]] * 2}, (6, 4)),
        (24, {"num_frames": 3, "height": 2, "width": 4}, (6, 4)),
        (8, {"height": 2, "width": 4}, (2, 4)),
        (10, {"height": 2, "width": 4}, (10, 1)),  # sizes of something else
        (7, {}, (7, 1)),
        (9, {}, None),  # the model takes it for a square
    ],
)
def test_grids(count, given, grid):
    assert grid_of({"hidden_states": tokens(count), **given}) == grid


def test_a_model_that_makes_its_own_tokens_needs_no_grid():
    assert grid_of({"hidden_states": torch.zeros(2, 4, 8, 8), "encoder_hidden_states": tokens(7)}) is None
    assert grid_of({}) is None


def test_the_scale_of_timesteps():
    assert [scale_of(torch.tensor([t])) for t in (1.0, 0.3, 999.0)] == [1.0, 1.0, 1000.0]
    assert scale_of(torch.tensor([1])) == 1000.0


def test_a_call_without_samples():
    for given in ({}, {"a": 1}, {"x": torch.zeros(0, 4)}):
        with pytest.raises(UsageError, match="batch size is unknown"):
            batch_of(given)
