"""The planners of token merging and of DC-DiT, against slow definitions and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dcconvert.passes.methods import method_of
from dcconvert.passes.modules.routers import MergeRouter, merge_cell
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.planners import MergePlanner, PatchPlanner, SmoothedPlanner
from dcconvert.passes.planning.pooled_planner import PooledPlanner

GRIDS = [(1, 5), (2, 2), (4, 4), (3, 6), (8, 8)]


def test_which_planner():
    wanted = {
        "chunk": Planner,
        "tome": MergePlanner,
        "dc-dit": SmoothedPlanner,
        "sparsedit": PooledPlanner,
        "ddit": PatchPlanner,
    }
    assert {name: type(method_of(name).planner((4, 4))) for name in wanted} == wanted


# Token merging


def merged(h: np.ndarray, cell: int, grid: tuple[int, int], count: int) -> tuple[set[int], dict[int, int]]:
    """Kept tokens, and whom each other one joins, of one sample h [N, D]: destinations, and the least like the rest."""
    tokens = np.arange(len(h))
    y, x = tokens // grid[1], tokens % grid[1]
    destinations = [int(n) for n in tokens if y[n] % cell == 0 and x[n] % cell == 0]
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    sources = [int(n) for n in tokens if n not in destinations]
    match = {n: max(destinations, key=lambda d: unit[n] @ unit[d]) for n in sources}
    spared = sorted(sources, key=lambda n: unit[n] @ unit[match[n]])[: count - len(destinations)]
    return {*destinations, *spared}, {n: match[n] for n in sources if n not in spared}


@pytest.mark.parametrize(("grid", "cell"), [((4, 4), 2), ((3, 6), 2), ((8, 8), 4), ((2, 2), 2)])
def test_tokens_join_the_one_they_are_most_like(grid, cell):
    tokens, members = grid[0] * grid[1], grid[0] * grid[1]
    h = torch.randn(2, tokens, 6)
    router = MergeRouter(grid, cell)
    scores = router(h).numpy()
    planner = MergePlanner(grid, members=members, neighbours=1, coverage=False)
    least = len(router.destinations)
    for count in {least, min(tokens, least + 2), tokens}:
        plan = planner(scores, [count, count])
        for sample in range(2):
            kept, match = merged(h[sample].numpy(), cell, grid, count)
            assert set(np.flatnonzero(plan.keep[sample]).tolist()) == kept
            places = dict(
                zip(np.flatnonzero(plan.keep[sample]).tolist(), range(sample * count, tokens * 2), strict=False)
            )
            for n in range(tokens):
                assert plan.fill_index[sample, n, 0] == places[match.get(n, n)]
                assert plan.fill_weight[sample, n, 0] == 1
            for n, place in places.items():
                group = [n, *(other for other, owner in match.items() if owner == n)]
                index, weight = (a.reshape(-1, members)[place] for a in (plan.chunk_index, plan.chunk_weight))
                assert sorted(index[weight > 0].tolist()) == sorted(sample * tokens + m for m in group)
                np.testing.assert_allclose(weight[weight > 0], 1 / len(group), rtol=1e-6)


def test_a_token_whose_match_is_dropped_goes_to_the_nearest_kept_one():
    planner = MergePlanner((1, 4), members=4, neighbours=1, coverage=False)
    scores = np.array([[[0.9, 0], [0.1, 3], [0.2, 3], [0.5, 3]]], np.float32)
    plan = planner(scores, [1])  # token 3, which the others would join, is not kept
    assert np.flatnonzero(plan.keep[0]).tolist() == [0]
    assert plan.fill_index[0, :, 0].tolist() == [0, 0, 0, 0]
    plan = planner(scores, [2])
    assert plan.fill_index[0, :, 0].tolist() == [0, 1, 1, 1]


def test_merge_scores():
    router = MergeRouter((4, 4), 2)
    h = torch.randn(1, 16, 5)
    h[0, 5] = 2 * h[0, 10]  # the same direction as a destination
    h[0, 6] = -h[0, 10]
    score, owner = router(h).unbind(-1)
    chosen = {0, 2, 8, 10}
    assert set(score[0].topk(4).indices.tolist()) == chosen
    assert score[0, 5] == pytest.approx(0, abs=1e-6)
    assert owner[0, 5] == 10
    assert owner[0, 6] != 10
    assert {int(n) for n in owner.unique()} <= chosen
    assert 0 <= score.min() <= score.max() <= 1


def test_cells_of_a_ratio():
    assert [merge_cell(fewest) for fewest in (1, 0.5, 0.25, 0.2, 1 / 16)] == [1, 2, 2, 3, 4]


# DC-DiT


def smoothed(p: np.ndarray, keep: np.ndarray, update: np.ndarray, grid: tuple[int, int], sigma: float) -> np.ndarray:
    """DC-DiT's de-chunk as it is written (all kept tokens smoothed over all kept tokens), of one sample."""
    kept = np.flatnonzero(keep)
    place = np.stack([np.arange(len(p)) // grid[1], np.arange(len(p)) % grid[1]], 1)
    distance = ((place[:, None] - place[None]) ** 2).sum(-1)
    weight = np.exp(-distance[np.ix_(kept, kept)] / (2 * sigma**2)) * p[kept]
    weight /= weight.sum(1, keepdims=True)
    own = p[kept, None] * update + (1 - p[kept, None]) * (weight @ update)
    nearest = distance[:, kept].argmin(1)
    return own[nearest]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(GRIDS), st.integers(0, 2**32 - 1), st.data())
def test_smoothing_is_that_of_the_paper(grid, seed, data):
    rng = np.random.default_rng(seed)
    tokens = grid[0] * grid[1]
    count = data.draw(st.integers(min(2, tokens), min(tokens, 9)))  # all kept ones are among the neighbours
    scores = rng.uniform(0.01, 0.99, (2, tokens)).astype(np.float32)
    planner = method_of("dc-dit").planner(grid)
    plan = planner(scores, [count, count])
    for sample in range(2):
        keep, p = plan.keep[sample], scores[sample].astype(np.float64)
        p[[0, -1]] = 1 - 1e-4
        wanted = {0, tokens - 1, *np.argsort(-p, kind="stable")[:count].tolist()}
        assert keep.sum() == count
        assert set(np.flatnonzero(keep).tolist()) <= wanted
        update = rng.normal(size=(count, 3))
        values = np.concatenate([np.zeros((sample * count, 3)), update, np.zeros((2 * count, 3))])
        found = (values[plan.fill_index[sample]] * plan.fill_weight[sample][..., None]).sum(1)
        np.testing.assert_allclose(found, smoothed(p, keep, update, grid, 1.0), atol=1e-5)
        assert plan.chunk_index.shape[-1] == 1


def test_everything_kept_with_certainty_is_left_alone():
    planner = method_of("dc-dit").planner((4, 4))
    plan = planner.full_plan(2)
    assert (plan.fill_index[..., 0] == np.arange(32).reshape(2, 16)).all()
    np.testing.assert_array_equal(plan.fill_weight[..., 0], 1)
    np.testing.assert_array_equal(plan.fill_weight[..., 1:], 0)


def test_sigma_of_the_published_sizes():
    sizes = {side: SmoothedPlanner((side, side)).sigma for side in (16, 32, 64)}
    assert sizes == {16: 1.0, 32: 1.0, 64: 2.0}


def test_natural_threshold_and_tail_dropping():
    planner = SmoothedPlanner((2, 5), members=1, coverage=False)
    scores = np.array(
        [[0.1, 0.6, 0.7, 0.2, 0.9, 0.5, 0.51, 0.3, 0.4, 0.1], [0.1] * 10, [0.9] * 10],
    )
    # First and last count; 0.5 itself does not.
    assert planner.natural(scores, 0.0).tolist() == [6, 2, 10]
    assert planner.natural(scores, 0.5).tolist() == [3, 1, 5]
    assert planner.natural(scores, 0.3).tolist() == [6 - 1, 2, 7]
    assert planner.natural(scores, 0.99).tolist() == [1, 1, 1]
    keep = planner.select(scores, [3, 2, 10])
    assert np.flatnonzero(keep[0]).tolist() == [0, 4, 9]  # the lowest scores went
    assert np.flatnonzero(keep[1]).tolist() == [0, 9]


def test_smoothing_reaches_as_far_as_torchs_filter():
    """One kept token in a row of equal ones: its update spreads with Gaussian weights."""
    planner = method_of("dc-dit").planner((1, 9))
    scores = np.full((1, 9), 0.5)
    plan = planner(scores, [9])
    update = F.one_hot(torch.tensor(4), 9).double().numpy()
    found = (update[plan.fill_index[0]] * plan.fill_weight[0]).sum(-1)
    around = np.exp(-((np.arange(9) - 4) ** 2) / 2)
    p = np.array([1 - 1e-4, *[0.5] * 7, 1 - 1e-4])
    total = (np.exp(-((np.arange(9)[:, None] - np.arange(9)) ** 2) / 2) * p).sum(1)
    np.testing.assert_allclose(found, p * update + (1 - p) * around * 0.5 / total, atol=1e-6)
