"""The packing plan, against a slow definition of it and by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.planning.bin_packing import shortest_pack_first
from dcconvert.passes.planning.chunk_plan import PLAN_ARRAYS, Planner, fill_sigma
from dcconvert.passes.planning.layout import MIXED_TILE, Bucket


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
    tile = draw(st.sampled_from([1, 3, MIXED_TILE, row_tokens]))
    tiles = sum(-(-count // tile) for count in plan.counts.tolist())
    grow = st.integers(0, 5)
    batch = len(plan.keep)
    return Bucket(batch, (tiles + draw(grow)) * tile, batch + draw(grow), row_tokens + draw(grow), tile)


def kept_places(plan):
    """Packed position of every kept token, in order of sample and index: each sample begins on a new tile."""
    tile = plan.packed_index.shape[1]
    places: list[int] = []
    tiles = 0
    for count in plan.counts.tolist():
        places += range(tiles * tile, tiles * tile + count)
        tiles += -(-count // tile)
    return np.array(places)


def token_samples(plan):
    """The sample of every packed token [T]."""
    return np.repeat(plan.sample_ids, plan.packed_index.shape[1])


def nearest_by_definition(planner, kept, token):
    """Kept tokens by (squared distance, index)."""
    width = planner.grid[1]
    return sorted(((k // width - token // width) ** 2 + (k % width - token % width) ** 2, k) for k in kept)


@settings(max_examples=100)
@given(cases(), st.data())
def test_invariants_for_any_bucket_that_is_large_enough(case, data):
    planner, keep = case
    batch, tokens = keep.shape
    bucket = larger_bucket(data.draw, planner.plan(keep))
    plan = planner.plan(keep, bucket)
    arrays = plan.arrays()
    assert tuple(arrays) == PLAN_ARRAYS
    tiled = (bucket.tokens // bucket.tile, bucket.tile)
    assert {name: array.shape for name, array in arrays.items()} == {
        "chunk_index": (*tiled, planner.members),
        "chunk_weight": (*tiled, planner.members),
        "sample_ids": tiled[:1],
        "grid_index": (bucket.rows, bucket.row_tokens),
        "packed_index": tiled,
        "row_lengths": (bucket.rows,),
        "segment_ids": (bucket.rows, bucket.row_tokens),
        "fill_index": (batch, tokens, planner.neighbours),
        "fill_weight": (batch, tokens, planner.neighbours),
        **dict.fromkeys(("cu_seqlens", "cu_seqlens_kv"), (batch + tiled[0] + 1,)),
    }
    for name, array in arrays.items():
        wanted = np.int32 if name.startswith("cu_") else np.float32 if "weight" in name else np.int64
        assert array.dtype == wanted, name
        assert array.flags.c_contiguous, name
    assert plan.kept == keep.sum()
    place, samples = kept_places(plan), token_samples(plan)
    real = np.zeros(bucket.tokens, dtype=bool)
    real[place] = True

    # Every kept token is packed exactly once, a tile holds one sample only, and every pad copies token 0.
    index, weight = (a.reshape(bucket.tokens, planner.members) for a in (plan.chunk_index, plan.chunk_weight))
    assert index[place, 0].tolist() == np.flatnonzero(keep).tolist()
    assert (index[place] // tokens == samples[place, None]).all()
    assert (index[~real] == index[0, 0]).all()
    assert (weight[~real] == np.eye(1, planner.members)).all()
    np.testing.assert_allclose(weight.sum(axis=1), 1, rtol=1e-6)
    assert ((weight > 0) | (index == index[:, :1])).all()

    # Segments tile the packed axis, the tokens of one sample each or pads alone, and fit the longest row or tile.
    assert plan.cu_seqlens[0] == 0
    assert plan.cu_seqlens[-1] == bucket.tokens
    segments = [np.arange(*bounds) for bounds in pairwise(plan.cu_seqlens) if bounds[0] < bounds[1]]
    assert [place.tolist() for place in segments if real[place].any()] == [
        place[samples[place] == sample].tolist() for sample in range(batch)
    ]
    assert max(map(len, segments)) <= max(bucket.row_tokens, bucket.tile)

    # The two layouts are inverses; no slot refers to a pad, and unused ones stay in their row where possible.
    grid, slots = plan.grid_index.ravel(), plan.packed_index.ravel()
    assert (grid[slots[place]] == place).all()
    assert len(set(slots[place].tolist())) == plan.kept
    assert np.isin(slots[~real], slots[place]).all()
    assert real[grid].all()
    used = np.zeros(grid.size, dtype=bool)
    used[slots[place]] = True
    used = used.reshape(plan.grid_index.shape)
    for row, mask in zip(plan.grid_index, used, strict=True):
        assert set(row[~mask].tolist()) <= (set(row[mask].tolist()) if mask.any() else {0})

    # Rows are used from the front; segments name the samples.
    assert (plan.row_lengths == np.maximum(used.sum(axis=1), 1)).all()
    assert (used == (np.arange(bucket.row_tokens) < used.sum(axis=1)[:, None])).all()
    assert (plan.segment_ids == np.where(used, samples[plan.grid_index], -1)).all()
    if planner.packing == "rows":
        assert (slots[place] // bucket.row_tokens == samples[place]).all()

    # Dechunk reads kept tokens of the same sample only, never a pad.
    assert real[plan.fill_index].all()
    assert (samples[plan.fill_index] == np.arange(batch)[:, None, None]).all()
    np.testing.assert_allclose(plan.fill_weight.sum(axis=2), 1, rtol=1e-6)
    assert (plan.fill_weight >= 0).all()


@settings(max_examples=60)
@given(cases())
def test_tiles(case):
    planner, keep = case
    plan = planner.plan(keep)
    tiles, tile = plan.packed_index.shape
    counts = keep.sum(axis=1)
    if len(set(counts.tolist())) == 1:
        assert (tiles, tile) == (len(keep), counts[0])
        assert plan.sample_ids.tolist() == list(range(len(keep)))
        assert plan.token_waste == 0
    else:
        assert tile == MIXED_TILE
        assert plan.sample_ids.tolist() == np.repeat(np.arange(len(keep)), -(-counts // tile)).tolist()
        padding = np.bincount(plan.sample_ids, minlength=len(keep)) * tile - counts
        assert ((padding >= 0) & (padding < tile)).all()
        assert plan.token_waste == pytest.approx(padding.sum() / plan.kept)


@settings(max_examples=60)
@given(cases())
def test_neighbours_and_members_match_their_definition(case):
    planner, keep = case
    tokens = planner.tokens
    plan = planner.plan(keep)
    packed = dict(zip(np.flatnonzero(keep).tolist(), kept_places(plan).tolist(), strict=True))
    chunk_index, chunk_weight = (a.reshape(-1, planner.members) for a in (plan.chunk_index, plan.chunk_weight))
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
            assert chunk_index[row, : len(members)].tolist() == [sample * tokens + m for m in members]
            weights = np.pad(np.full(len(members), 1 / len(members)), (0, planner.members - len(members)))
            np.testing.assert_allclose(chunk_weight[row], weights, rtol=1e-6)


@settings(max_examples=40)
@given(cases())
def test_segment_rule_isolates_samples(case):
    planner, keep = case
    plan = planner.plan(keep)
    rows, slots = plan.segment_ids.shape
    same = plan.segment_ids[:, :, None] == plan.segment_ids[:, None, :]
    assert same.any(axis=2).all()  # no slot is without keys
    place, owner = kept_places(plan), token_samples(plan)
    samples = owner[plan.grid_index]
    for row in range(rows):
        for slot in range(slots):
            if plan.segment_ids[row, slot] >= 0:
                seen = plan.grid_index[row, same[row, slot]]
                assert (samples[row, same[row, slot]] == samples[row, slot]).all()
                assert sorted(seen.tolist()) == place[owner[place] == samples[row, slot]].tolist()


@settings(max_examples=40)
@given(cases(), st.randoms(use_true_random=False))
def test_a_sample_does_not_depend_on_its_batch(case, random):
    planner, keep = case
    order = list(range(len(keep)))
    random.shuffle(order)
    plan, shuffled = planner.plan(keep), planner.plan(keep[order])
    tokens = planner.tokens
    ours, theirs = sample_chunks(plan), sample_chunks(shuffled)
    for new, old in enumerate(order):
        (first, index, weight), (other_first, other_index, other_weight) = ours[old], theirs[new]
        np.testing.assert_array_equal(index - old * tokens, other_index - new * tokens)
        np.testing.assert_array_equal(weight, other_weight)
        np.testing.assert_array_equal(plan.fill_index[old] - first, shuffled.fill_index[new] - other_first)
        np.testing.assert_array_equal(plan.fill_weight[old], shuffled.fill_weight[new])


def sample_chunks(plan):
    """First packed position, members and weights of each sample's kept tokens."""
    place, members = kept_places(plan), plan.chunk_index.shape[2]
    ends = np.cumsum(plan.counts)[:-1]
    parts = (place, plan.chunk_index.reshape(-1, members)[place], plan.chunk_weight.reshape(-1, members)[place])
    return [(p[0], i, w) for p, i, w in zip(*(np.split(part, ends) for part in parts), strict=True)]


@pytest.mark.parametrize("packing", ["rows", "bins"])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (16, 16)])
@pytest.mark.parametrize("batch", [1, 3])
def test_full_plan_is_the_identity(packing, grid, batch):
    planner = Planner(grid, members=3, neighbours=2, packing=packing)
    plan = planner.full_plan(batch)
    everything = np.arange(batch * planner.tokens).reshape(batch, planner.tokens)
    assert (plan.chunk_index == everything[:, :, None]).all()
    assert (plan.chunk_weight == [1, 0, 0]).all()
    assert (plan.packed_index == everything).all()
    assert (plan.grid_index == everything).all()
    assert (plan.fill_index == everything[:, :, None]).all()
    assert (plan.fill_weight == [1, 0]).all()
    assert plan.token_waste == plan.slot_waste == 0


def test_two_by_two_by_hand():
    plan = Planner((2, 2), members=3, neighbours=2).plan(
        np.array([[True, False, False, True], [False, False, True, False]]), Bucket(2, 4, 2, 2, 2)
    )
    # Tokens 1 and 2 of sample 0 are as far from 0 as from 3: both go to 0. Sample 1 keeps 2; 0 and 3 are its nearest.
    # The second tile has a pad, a copy of packed token 0.
    assert plan.chunk_index.tolist() == [[[0, 1, 2], [3, 3, 3]], [[6, 4, 7], [0, 0, 0]]]
    third, alone = np.full(3, 1 / 3), np.eye(1, 3)[0]
    np.testing.assert_allclose(plan.chunk_weight, [[third, alone], [third, alone]], rtol=1e-6)
    assert plan.sample_ids.tolist() == [0, 1]
    assert plan.grid_index.tolist() == [[0, 1], [2, 2]]
    assert plan.packed_index.ravel()[:3].tolist() == [0, 1, 2]  # what the pad refers to nobody reads
    assert plan.row_lengths.tolist() == [2, 1]
    assert plan.segment_ids.tolist() == [[0, 0], [1, -1]]
    assert plan.fill_index[0].tolist() == [[0, 0], [0, 1], [0, 1], [1, 1]]
    assert plan.fill_weight[0].tolist() == [[1, 0], [0.5, 0.5], [0.5, 0.5], [1, 0]]
    assert (plan.fill_index[1] == 2).all()
    assert (plan.fill_weight[1] == [1, 0]).all()
    assert plan.counts.tolist() == [2, 1]
    assert plan.slot_waste == plan.token_waste == pytest.approx(1 / 3)


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
    assert (plan.fill_index[1] == MIXED_TILE).all()  # the one kept token of sample 1 begins the second tile


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
    plan = Planner((2, 4), packing="bins").plan(keep, Bucket(4, 12, 3, 6, 1))
    assert plan.segment_ids.tolist() == [[1, 1, 1, 1, 1, 3], [2, 2, 2, 0, 0, -1], [-1] * 6]
    assert plan.grid_index.tolist() == [[2, 3, 4, 5, 6, 10], [7, 8, 9, 0, 1, 7], [0] * 6]
    assert plan.row_lengths.tolist() == [6, 5, 1]
    assert plan.packed_index[-1] == plan.packed_index[0] == 9
    assert plan.token_waste == pytest.approx(1 / 11)


def test_bins_skip_the_pads_of_tiles():
    keep = np.arange(8) < np.array([[2], [5], [3], [1]])
    plan = Planner((2, 4), packing="bins").plan(keep, Bucket(4, 24, 2, 6, 4))
    assert plan.sample_ids.tolist() == [0, 1, 1, 2, 3, 0]  # the last tile belongs to nobody
    assert plan.segment_ids.tolist() == [[1, 1, 1, 1, 1, 3], [2, 2, 2, 0, 0, -1]]
    assert plan.grid_index.tolist() == [[4, 5, 6, 7, 8, 16], [12, 13, 14, 0, 1, 12]]
    filled = np.where(np.arange(4) < np.array([2, 4, 1, 3, 1, 0])[:, None], plan.packed_index, -1)
    assert filled.tolist() == [
        [9, 10, -1, -1], [0, 1, 2, 3], [4, -1, -1, -1], [6, 7, 8, -1], [5, -1, -1, -1], [-1, -1, -1, -1]
    ]  # fmt: skip


@settings(max_examples=20)
@given(cases())
def test_call_selects_and_plans(case):
    planner, keep = case
    plan = planner(keep.astype(np.float32), keep.sum(axis=1))
    assert plan.counts.tolist() == keep.sum(axis=1).tolist()
    again = planner(keep.astype(np.float32), keep.sum(axis=1))
    for name, array in plan.arrays().items():
        np.testing.assert_array_equal(array, again.arrays()[name])


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
    planner.plan(keep, Bucket(2, 5, 2, 3, 1))
    planner.plan(keep, Bucket(2, 6, 2, 3, 3))
    with pytest.raises(UsageError, match="batch of 2 cannot run in a bucket of batch 3"):
        planner.plan(keep, Bucket(3, 12, 3, 4, 4))
    short = (Bucket(2, 4, 2, 3, 1), Bucket(2, 5, 1, 3, 1), Bucket(2, 5, 2, 2, 1), Bucket(2, 4, 2, 3, 4))
    for bucket in short:
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


@pytest.mark.parametrize("sizes", [(1, 6, 1, 4, 4), (0, 4, 1, 4, 4), (1, 4, 1, 4, 0)])
def test_bucket_refuses_sizes_that_make_no_tiles(sizes):
    with pytest.raises(UsageError, match="multiple of"):
        Bucket(*sizes)


def test_the_same_scores_give_the_plan_they_gave_lately():
    planner = Planner((2, 4))
    scores = np.random.default_rng(0).random((2, 8), np.float32)
    first = planner(scores, [3, 5])
    assert planner(scores.copy(), [3, 5]) is first
    assert planner(scores, [5, 3]).counts.tolist() == [5, 3]
    assert planner(scores[::-1].copy(), [3, 5]) is not first
    assert planner(scores, [3, 5], Bucket(2, 16, 2, 8, 8)).packed_index.shape == (2, 8)
    for shift in range(1, 20):
        planner(scores + shift, [3, 5])
    again = planner(scores, [3, 5])
    assert again is not first  # forgotten by now
    assert all(np.array_equal(a, b) for a, b in zip(again.arrays().values(), first.arrays().values(), strict=True))


def test_another_bucket_is_another_plan():
    planner, scores = Planner((4, 4)), np.random.default_rng(0).random((2, 16))
    for bucket in (None, Bucket(2, 12, 2, 6, 6), Bucket(2, 16, 2, 8, 8)):
        found, wanted = planner(scores, [5, 6], bucket), Planner((4, 4))(scores, [5, 6], bucket)
        for name, array in wanted.arrays().items():
            np.testing.assert_array_equal(found.arrays()[name], array, name)
