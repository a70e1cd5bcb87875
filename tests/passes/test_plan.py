"""The packing plan, against a slow definition of it and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcconvert.passes.errors import CheckFailedError, UsageError
from dcconvert.passes.plan import PLAN_ARRAYS, Bucket, Planner, fill_sigma, shortest_pack_first


@st.composite
def cases(draw):
    """A planner and a keep mask for it; small grids, a few large enough to leave the nearest-position window."""
    height, width = draw(st.sampled_from([(1, 1), (1, 7), (2, 2), (3, 5), (4, 4), (8, 8), (9, 12), (16, 16)]))
    planner = Planner(
        (height, width),
        members=draw(st.integers(1, 6)),
        neighbours=draw(st.integers(1, 6)),
        packing=draw(st.sampled_from(["rows", "bins"])),
        coverage=draw(st.booleans()),
    )
    tokens = height * width
    counts = draw(st.lists(st.integers(1, tokens), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keep = np.zeros((len(counts), tokens), dtype=bool)
    for row, count in zip(keep, counts, strict=True):
        row[rng.permutation(tokens)[:count]] = True
    return planner, keep


def larger_bucket(draw, plan):
    row_tokens = plan.grid_index.shape[1]
    grow = st.integers(0, 5)
    return Bucket(
        len(plan.keep), plan.packed_index.size + draw(grow), len(plan.keep) + draw(grow), row_tokens + draw(grow)
    )


def nearest_by_definition(planner, kept, token):
    """Kept tokens by (squared distance, index)."""
    width = planner.grid[1]
    return sorted(((k // width - token // width) ** 2 + (k % width - token % width) ** 2, k) for k in kept)


@settings(max_examples=100, deadline=None)
@given(cases(), st.data())
def test_invariants_for_any_bucket_that_is_large_enough(case, data):
    planner, keep = case
    batch, tokens = keep.shape
    bucket = larger_bucket(data.draw, planner.plan(keep))
    plan = planner.plan(keep, bucket)
    arrays = plan.arrays()
    assert tuple(arrays) == PLAN_ARRAYS
    assert {name: array.shape for name, array in arrays.items()} == {
        "chunk_index": (bucket.tokens, planner.members),
        "chunk_weight": (bucket.tokens, planner.members),
        "sample_ids": (bucket.tokens,),
        "grid_index": (bucket.rows, bucket.row_tokens),
        "packed_index": (bucket.tokens,),
        "row_lengths": (bucket.rows,),
        "segment_ids": (bucket.rows, bucket.row_tokens),
        "fill_index": (batch, tokens, planner.neighbours),
        "fill_weight": (batch, tokens, planner.neighbours),
    }
    for name, array in arrays.items():
        assert array.dtype == (np.float32 if "weight" in name else np.int64), name
        assert array.flags.c_contiguous, name
    kept = plan.kept
    assert kept == keep.sum()

    # Every kept token is packed exactly once, and padding copies token 0.
    assert plan.chunk_index[:kept, 0].tolist() == np.flatnonzero(keep).tolist()
    assert (plan.chunk_index[kept:] == plan.chunk_index[0, 0]).all()
    assert (plan.chunk_weight[kept:] == np.eye(1, planner.members)).all()
    assert (plan.sample_ids == plan.chunk_index[:, 0] // tokens).all()
    assert (plan.chunk_index // tokens == plan.sample_ids[:, None]).all()
    np.testing.assert_allclose(plan.chunk_weight.sum(axis=1), 1, rtol=1e-6)
    assert ((plan.chunk_weight > 0) | (plan.chunk_index == plan.chunk_index[:, :1])).all()

    # The two layouts are inverses; unused slots are valid and, where possible, of the same row.
    grid = plan.grid_index.ravel()
    assert (grid[plan.packed_index[:kept]] == np.arange(kept)).all()
    assert len(set(plan.packed_index[:kept].tolist())) == kept
    assert (plan.packed_index[kept:] == plan.packed_index[0]).all()
    used = np.zeros(grid.size, dtype=bool)
    used[plan.packed_index[:kept]] = True
    used = used.reshape(plan.grid_index.shape)
    assert ((plan.grid_index >= 0) & (plan.grid_index < kept)).all()
    for row, mask in zip(plan.grid_index, used, strict=True):
        assert set(row[~mask].tolist()) <= (set(row[mask].tolist()) if mask.any() else {0})

    # Rows are used from the front; segments name the samples.
    assert (plan.row_lengths == np.maximum(used.sum(axis=1), 1)).all()
    assert (used == (np.arange(bucket.row_tokens) < used.sum(axis=1)[:, None])).all()
    assert (plan.segment_ids == np.where(used, plan.sample_ids[plan.grid_index], -1)).all()
    if planner.packing == "rows":
        assert (plan.packed_index // bucket.row_tokens == plan.sample_ids).all()

    # Dechunk reads kept tokens of the same sample only, never padding.
    assert ((plan.fill_index >= 0) & (plan.fill_index < kept)).all()
    assert (plan.sample_ids[plan.fill_index] == np.arange(batch)[:, None, None]).all()
    np.testing.assert_allclose(plan.fill_weight.sum(axis=2), 1, rtol=1e-6)
    assert (plan.fill_weight >= 0).all()


@settings(max_examples=60, deadline=None)
@given(cases())
def test_neighbours_and_members_match_their_definition(case):
    planner, keep = case
    tokens = planner.tokens
    plan = planner.plan(keep)
    packed = {flat: index for index, flat in enumerate(np.flatnonzero(keep).tolist())}
    for sample, mask in enumerate(keep):
        kept = np.flatnonzero(mask).tolist()
        sigma = float(fill_sigma(tokens / len(kept)))
        owned: dict[int, list[tuple[int, int]]] = {token: [] for token in kept}
        for token in range(tokens):
            near = nearest_by_definition(planner, kept, token)[: planner.neighbours]
            expected = np.zeros(planner.neighbours)
            if mask[token]:
                expected[0] = 1
            else:
                owned[near[0][1]].append((near[0][0], token))
                expected[: len(near)] = [np.exp((near[0][0] - d) / (2 * sigma**2)) for d, _ in near]
                index = plan.fill_index[sample, token, : len(near)].tolist()
                assert index == [packed[sample * tokens + k] for _, k in near]
            np.testing.assert_allclose(plan.fill_weight[sample, token], expected / expected.sum(), rtol=1e-4, atol=1e-6)
        for token, others in owned.items():
            row = packed[sample * tokens + token]
            members = [token] + [other for _, other in sorted(others)[: planner.members - 1]]
            assert plan.chunk_index[row, : len(members)].tolist() == [sample * tokens + m for m in members]
            weights = np.pad(np.full(len(members), 1 / len(members)), (0, planner.members - len(members)))
            np.testing.assert_allclose(plan.chunk_weight[row], weights, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_segment_rule_isolates_samples(case):
    planner, keep = case
    plan = planner.plan(keep)
    rows, slots = plan.segment_ids.shape
    same = plan.segment_ids[:, :, None] == plan.segment_ids[:, None, :]
    assert same.any(axis=2).all()  # no slot is without keys
    samples = plan.sample_ids[plan.grid_index]
    for row in range(rows):
        for slot in range(slots):
            if plan.segment_ids[row, slot] >= 0:
                seen = plan.grid_index[row, same[row, slot]]
                assert (samples[row, same[row, slot]] == samples[row, slot]).all()
                assert sorted(seen.tolist()) == np.flatnonzero(plan.sample_ids == samples[row, slot]).tolist()


@settings(max_examples=40, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_a_sample_does_not_depend_on_its_batch(case, random):
    planner, keep = case
    order = list(range(len(keep)))
    random.shuffle(order)
    plan, shuffled = planner.plan(keep), planner.plan(keep[order])
    tokens = planner.tokens
    for new, old in enumerate(order):
        ours, theirs = plan.sample_ids == old, shuffled.sample_ids == new
        np.testing.assert_array_equal(
            plan.chunk_index[ours] - old * tokens, shuffled.chunk_index[theirs] - new * tokens
        )
        np.testing.assert_array_equal(plan.chunk_weight[ours], shuffled.chunk_weight[theirs])
        first, other_first = np.flatnonzero(ours)[0], np.flatnonzero(theirs)[0]
        np.testing.assert_array_equal(plan.fill_index[old] - first, shuffled.fill_index[new] - other_first)
        np.testing.assert_array_equal(plan.fill_weight[old], shuffled.fill_weight[new])


@pytest.mark.parametrize("packing", ["rows", "bins"])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (16, 16)])
@pytest.mark.parametrize("batch", [1, 3])
def test_full_plan_is_the_identity(packing, grid, batch):
    planner = Planner(grid, members=3, neighbours=2, packing=packing)
    plan = planner.full_plan(batch)
    everything = np.arange(batch * planner.tokens)
    assert (plan.chunk_index == everything[:, None]).all()
    assert (plan.chunk_weight == [1, 0, 0]).all()
    assert (plan.packed_index == everything).all()
    assert (plan.grid_index.ravel() == everything).all()
    assert (plan.fill_index.reshape(-1, 2) == everything[:, None]).all()
    assert (plan.fill_weight == [1, 0]).all()
    assert plan.token_waste == plan.slot_waste == 0


def test_two_by_two_by_hand():
    plan = Planner((2, 2), members=3, neighbours=2).plan(
        np.array([[True, False, False, True], [False, False, True, False]])
    )
    # Tokens 1 and 2 of sample 0 are as far from 0 as from 3: both go to 0. Sample 1 keeps 2; 0 and 3 are its nearest.
    assert plan.chunk_index.tolist() == [[0, 1, 2], [3, 3, 3], [6, 4, 7]]
    np.testing.assert_allclose(plan.chunk_weight, [[1 / 3] * 3, [1, 0, 0], [1 / 3] * 3], rtol=1e-6)
    assert plan.sample_ids.tolist() == [0, 0, 1]
    assert plan.grid_index.tolist() == [[0, 1], [2, 2]]
    assert plan.packed_index.tolist() == [0, 1, 2]
    assert plan.row_lengths.tolist() == [2, 1]
    assert plan.segment_ids.tolist() == [[0, 0], [1, -1]]
    assert plan.fill_index[0].tolist() == [[0, 0], [0, 1], [0, 1], [1, 1]]
    assert plan.fill_weight[0].tolist() == [[1, 0], [0.5, 0.5], [0.5, 0.5], [1, 0]]
    assert (plan.fill_index[1] == 2).all()
    assert (plan.fill_weight[1] == [1, 0]).all()
    assert plan.counts.tolist() == [2, 1]
    assert plan.slot_waste == pytest.approx(1 / 3)


def test_gaussian_by_hand():
    # 4x on a 4x4 grid: sigma is 1. Token 5 is at squared distance 2, 2, 2, 2 from the corners of its 3x3 block.
    keep = np.zeros((1, 16), dtype=bool)
    keep[0, [0, 2, 8, 10]] = True
    plan = Planner((4, 4), neighbours=2).plan(keep)
    assert plan.fill_index[0, 5].tolist() == [0, 1]
    np.testing.assert_allclose(plan.fill_weight[0, 5], [0.5, 0.5])
    assert plan.fill_index[0, 3].tolist() == [1, 3]  # squared distances 1 and 5
    ratio = np.exp((1 - 5) / 2)
    np.testing.assert_allclose(plan.fill_weight[0, 3], [1 / (1 + ratio), ratio / (1 + ratio)], rtol=1e-6)


def test_sigma_follows_the_spacing():
    np.testing.assert_allclose(fill_sigma([1, 2, 4, 16]), [0, 0.5, 1, 2])


def test_sparse_masks_leave_the_window():
    keep = np.zeros((2, 1024), dtype=bool)
    keep[0, [0, 1023]] = True
    keep[1, 33] = True
    plan = Planner((32, 32), neighbours=3).plan(keep)
    assert plan.fill_index[0, 1022, 0] == 1
    assert plan.fill_index[0, 40, 0] == 0
    assert (plan.fill_index[1] == 2).all()


def test_keys_too_wide_for_32_bits():
    planner = Planner((2, 1500), neighbours=2)
    keep = np.zeros((1, 3000), dtype=bool)
    keep[0, [0, 1499, 2999]] = True
    plan = planner.plan(keep)
    assert plan.fill_index[0, 1400].tolist() == [1, 2]
    assert plan.fill_index[0, 1501].tolist()[0] == 0


def test_bins_share_rows_longest_first():
    assert [a.tolist() for a in shortest_pack_first([2, 5, 3, 1], 6)] == [[1, 0, 1, 0], [3, 0, 0, 5]]
    keep = np.arange(8) < np.array([[2], [5], [3], [1]])
    plan = Planner((2, 4), packing="bins").plan(keep, Bucket(4, 12, 3, 6))
    assert plan.segment_ids.tolist() == [[1, 1, 1, 1, 1, 3], [2, 2, 2, 0, 0, -1], [-1] * 6]
    assert plan.grid_index.tolist() == [[2, 3, 4, 5, 6, 10], [7, 8, 9, 0, 1, 7], [0] * 6]
    assert plan.row_lengths.tolist() == [6, 5, 1]
    assert plan.packed_index[-1] == plan.packed_index[0] == 9
    assert plan.token_waste == pytest.approx(1 / 11)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(20, 40))
def test_bins_never_overlap(lengths, capacity):
    row, start = shortest_pack_first(lengths, capacity)
    slots = [(r, s + i) for r, s, n in zip(row, start, lengths, strict=True) for i in range(n)]
    assert len(set(slots)) == sum(lengths)
    assert max(slot for _, slot in slots) < capacity
    assert set(row.tolist()) == set(range(row.max() + 1))
    assert (row.max() + 1) * capacity < 2 * sum(lengths) + capacity


def test_selection_covers_the_grid_first():
    scores = np.zeros((1, 16), dtype=np.float32)
    scores[0, [0, 1, 4, 5]] = [4, 3, 2, 1]  # all in the first 2x2 cell
    scores[0, [7, 13, 10]] = 0.5
    planner = Planner((4, 4))
    assert np.flatnonzero(planner.select(scores, [4])).tolist() == [0, 7, 10, 13]
    assert np.flatnonzero(planner.select(scores, [6])).tolist() == [0, 1, 4, 7, 10, 13]
    assert np.flatnonzero(Planner((4, 4), coverage=False).select(scores, [4])).tolist() == [0, 1, 4, 5]


def test_equal_scores_go_by_index():
    assert np.flatnonzero(Planner((4, 4)).select(np.zeros((1, 16)), [5])).tolist() == [0, 1, 2, 8, 10]
    assert np.flatnonzero(Planner((4, 4), coverage=False).select(np.zeros((1, 16)), [3])).tolist() == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(1, 1), (1, 7), (3, 5), (8, 8), (6, 10)]),
    st.booleans(),
    st.sampled_from([np.float32, np.float64, np.float16]),
    st.data(),
)
def test_selection_keeps_the_counts_and_is_deterministic(grid, coverage, dtype, data):
    planner = Planner(grid, coverage=coverage)
    counts = data.draw(st.lists(st.integers(1, planner.tokens), min_size=1, max_size=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    scores = rng.integers(0, 5, (len(counts), planner.tokens)).astype(dtype)  # many ties
    keep = planner.select(scores, counts)
    assert keep.sum(axis=1).tolist() == counts
    np.testing.assert_array_equal(keep, Planner(grid, coverage=coverage).select(scores.copy(), counts))
    np.testing.assert_array_equal(keep[::-1], planner.select(scores[::-1], counts[::-1]))
    if not coverage:
        for mask, row in zip(keep, scores, strict=True):
            assert mask.all() or row[mask].min() >= row[~mask].max()


@pytest.mark.parametrize("grid", [(8, 8), (5, 9)])
def test_every_cell_has_a_token(grid):
    planner = Planner(grid)
    scores = np.random.default_rng(0).random((1, planner.tokens))
    for count in range(1, planner.tokens + 1):
        side = next(c for c in range(1, 20) if -(-grid[0] // c) * -(-grid[1] // c) <= count)
        y, x = np.divmod(np.flatnonzero(planner.select(scores, [count])), grid[1])
        cells = set(zip((y // side).tolist(), (x // side).tolist(), strict=True))
        assert len(cells) == -(-grid[0] // side) * -(-grid[1] // side)


@settings(max_examples=20, deadline=None)
@given(cases())
def test_call_selects_and_plans(case):
    planner, keep = case
    plan = planner(keep.astype(np.float32), keep.sum(axis=1))
    assert plan.counts.tolist() == keep.sum(axis=1).tolist()
    again = planner(keep.astype(np.float32), keep.sum(axis=1))
    for name, array in plan.arrays().items():
        np.testing.assert_array_equal(array, again.arrays()[name])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_name_the_sample(bad):
    scores = np.zeros((3, 4))
    scores[1, 2] = bad
    with pytest.raises(CheckFailedError, match="sample 1 has a non-finite keep score"):
        Planner((2, 2)).select(scores, [1, 1, 1])


def test_select_refuses():
    planner = Planner((2, 2))
    for scores in (np.zeros(4), np.zeros((1, 5)), np.zeros((0, 4))):
        with pytest.raises(UsageError, match=r"expected \[batch, 4\]"):
            planner.select(scores, [1])
    for counts in ([0], [5], [1, 1], 1):
        with pytest.raises(UsageError, match="each from 1 to 4"):
            planner.select(np.zeros((1, 4)), counts)


def test_plan_refuses():
    planner = Planner((2, 2))
    with pytest.raises(UsageError, match=r"expected \[batch, 4\]"):
        planner.plan(np.ones((1, 3), dtype=bool))
    with pytest.raises(CheckFailedError, match="sample 1 keeps no token"):
        planner.plan(np.array([[True] * 4, [False] * 4]))


@pytest.mark.parametrize("packing", ["rows", "bins"])
def test_bucket_must_fit(packing):
    planner = Planner((2, 2), packing=packing)
    keep = np.array([[True, True, True, False], [True, True, False, False]])
    planner.plan(keep, Bucket(2, 5, 2, 3))
    with pytest.raises(UsageError, match="batch of 2 cannot run in a bucket of batch 3"):
        planner.plan(keep, Bucket(3, 12, 3, 4))
    for bucket in (Bucket(2, 4, 2, 3), Bucket(2, 5, 1, 3), Bucket(2, 5, 2, 2)):
        with pytest.raises(UsageError, match="do not fit"):
            planner.plan(keep, bucket)


def test_planner_refuses():
    for grid, members, neighbours in (((0, 4), 1, 1), ((2, 2), 0, 1), ((2, 2), 1, 0)):
        with pytest.raises(UsageError, match="at least 1"):
            Planner(grid, members, neighbours)
    with pytest.raises(UsageError, match="rows, bins"):
        Planner((2, 2), packing="boxes")
    with pytest.raises(UsageError, match="rows hold 4"):
        shortest_pack_first([5], 4)


def test_any_object_with_the_four_sizes_is_a_bucket():
    class Shape:
        batch, tokens, rows, row_tokens = 1, 6, 1, 5

    keep = np.ones((1, 4), dtype=bool)
    assert Planner((2, 2)).plan(keep, Shape()).grid_index.shape == (1, 5)
