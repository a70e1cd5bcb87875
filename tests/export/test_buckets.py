"""The choice of bucket shapes."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcconvert.export.buckets import Bucket, BucketSet, PaddedShapes, choose_buckets, choose_guided_buckets
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.schedule import AUTO, KINDS, Policy


def padding(lengths, counts):
    lengths = np.asarray(sorted(lengths))
    return int((lengths[np.searchsorted(lengths, counts)] - counts).sum())


@settings(max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 4))
def test_lengths_are_the_best_there_are(counts, max_lengths):
    found = choose_buckets([1], counts, 12, max_lengths).lengths
    best = min(
        padding({*chosen, 12}, counts)
        for size in range(max_lengths + 1)
        for chosen in itertools.combinations(range(1, 12), size)
    )
    assert found[-1] == 12
    assert len(found) <= max_lengths + 1
    assert padding(found, counts) == best


def test_hand_computed_buckets():
    bucket_set = choose_buckets([2, 1, 2], [4, 4, 5, 8, 9], tokens=16, max_lengths=2)
    assert bucket_set.lengths == (5, 9, 16)
    assert bucket_set.batches == (1, 2)
    assert Bucket(2, 18, 2, 9, 9) in bucket_set.buckets
    assert len(bucket_set.buckets) == 6
    assert bucket_set.expected_waste == pytest.approx((1 / 4 + 1 / 4 + 0 + 1 / 8 + 0) / 5)


def test_constant_schedule_has_two_lengths_and_no_waste():
    bucket_set = choose_buckets([1, 8], [64] * 50, tokens=256)
    assert bucket_set.lengths == (64, 256)
    assert bucket_set.expected_waste == 0


def test_everything_kept_has_one_length():
    assert choose_buckets([8], [256] * 5, tokens=256).buckets == (Bucket(8, 2048, 8, 256, 256),)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [1, 1.2, 2, 4, 16])
@pytest.mark.parametrize("steps", [4, 25, 250])
def test_levelled_schedules_need_six_buckets_and_no_padding(kind, ratio, steps):
    taus = 1 - np.arange(steps) / steps
    free = Policy(kind, ratio).timetable(taus)
    found = choose_buckets([8], free.levelled(taus, 256).run_counts(taus, 256), 256)
    assert found.expected_waste == 0
    assert len(found.buckets) <= 6
    assert choose_buckets([8], free.run_counts(taus, 256), 256).expected_waste < 0.11


@pytest.mark.parametrize("kind", KINDS)
def test_dense_steps_have_the_full_length_and_little_waste(kind):
    taus = 1 - np.arange(50) / 50
    counts = Policy(kind, 4, warm_up=AUTO, refresh=10).timetable(taus).run_counts(taus, 256)
    found = choose_buckets([1, 8], counts, 256)
    assert (counts == 256).sum() > 5
    assert found.lengths[-1] == 256
    assert found.expected_waste < 0.1


def test_choose():
    bucket_set = choose_buckets([1, 4, 8], [32, 64, 96], tokens=256)
    assert bucket_set.choose(8, 64) == Bucket(8, 512, 8, 64, 64)
    assert bucket_set.choose(1, [33]) == Bucket(1, 64, 1, 64, 64)
    assert bucket_set.choose(3, [10, 96, 20]) == Bucket(4, 384, 4, 96, 96)
    assert bucket_set.choose(5, 97) == Bucket(8, 2048, 8, 256, 256)


@given(st.integers(1, 8), st.data())
def test_choice_fits_and_is_smallest(batch, data):
    bucket_set = choose_buckets([2, 8], [3, 5, 9], tokens=16)
    counts = data.draw(st.lists(st.integers(1, 16), min_size=batch, max_size=batch))
    chosen = bucket_set.choose(batch, counts)
    assert chosen.fits(counts)
    assert not any(other.fits(counts) and other.tokens < chosen.tokens for other in bucket_set.buckets)


def test_every_bucket_has_one_tile_a_sample():
    for bucket in choose_buckets([1, 4], [32, 64, 96], tokens=256).buckets:
        assert bucket.tile == bucket.row_tokens
        assert bucket.tokens == bucket.batch * bucket.tile


def test_fits():
    bucket = Bucket(3, 12, 3, 5, 1)
    assert bucket.fits([5, 4, 3])
    assert not bucket.fits([5, 5, 3])  # 13 tokens
    assert not bucket.fits([6, 1, 1])  # a row too long
    assert bucket.fits([4, 4])  # the last repeated: 12
    assert not bucket.fits([3, 5])  # the last repeated: 13
    assert not bucket.fits([1, 1, 1, 1])
    assert not bucket.fits([])
    assert not Bucket(3, 12, 2, 5, 1).fits([1, 1, 1])


def test_fits_counts_whole_tiles():
    bucket = Bucket(3, 24, 3, 16, 8)
    assert bucket.fits([1, 8, 3])
    assert not bucket.fits([9, 1, 1])  # four tiles
    assert bucket.fits([8])  # the last repeated: three tiles
    assert not bucket.fits([1, 9])  # the last repeated: five tiles
    assert Bucket(2, 24, 2, 16, 8).fits([16, 8])
    assert not Bucket(3, 16, 3, 8, 8).fits([1])  # the last repeated: three tiles, not one and two tokens


@given(st.integers(1, 9), st.lists(st.integers(1, 16), min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 12))
def test_fits_exactly_what_can_be_planned(tile, counts, spare, tiles):
    bucket = Bucket(len(counts) + spare, tiles * tile, len(counts) + spare, 12, tile)
    filled = counts + counts[-1:] * spare
    keep = np.arange(16) < np.array(filled)[:, None]
    if bucket.fits(counts):
        assert Planner((4, 4)).plan(keep, bucket).packed_index.shape == (tiles, tile)
    else:
        with pytest.raises(UsageError, match="do not fit"):
            Planner((4, 4)).plan(keep, bucket)


def test_choose_refuses():
    bucket_set = choose_buckets([4], [8], tokens=16)
    with pytest.raises(UsageError, match=r"batch 5 .*from 1 to 4"):
        bucket_set.choose(5, 8)
    with pytest.raises(UsageError, match="batch 0"):
        bucket_set.choose(0, 8)
    for counts in (17, 0, [8, 8], [[8, 8, 8]]):
        with pytest.raises(UsageError, match="expected 3 of them, each from 1 to 16"):
            bucket_set.choose(3, counts)


def test_choosing_buckets_refuses():
    with pytest.raises(UsageError, match="batch sizes"):
        choose_buckets([], [8], 16)
    with pytest.raises(UsageError, match="batch sizes"):
        choose_buckets([0, 8], [8], 16)
    for counts in ([], [0], [17]):
        with pytest.raises(UsageError, match="from 1 to 16"):
            choose_buckets([1], counts, 16)
    with pytest.raises(UsageError, match="at least 1"):
        choose_buckets([1], [8], 16, max_lengths=0)


def test_manifest_round_trip():
    bucket_set = choose_buckets([1, 8], [32, 64, 96], tokens=256, max_lengths=2)
    assert BucketSet.from_dict(json.loads(json.dumps(bucket_set.to_dict()))) == bucket_set


@pytest.mark.parametrize(
    "change",
    [
        {"buckets": []},
        {"buckets": 3},
        {"buckets": [{"batch": 1}]},
        {"buckets": [{"batch": 1, "tokens": 16, "rows": 1, "row_tokens": 16}]},
        {"buckets": [{"batch": 1, "tokens": 17, "rows": 1, "row_tokens": 17, "tile": 16}]},
        {"tokens": "many"},
        {"tokens": 17},
        {"expected_waste": None},
    ],
)
def test_broken_manifest(change):
    with pytest.raises(UsageError, match="manifest"):
        BucketSet.from_dict({**choose_buckets([1], [8], 16).to_dict(), **change})


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_pairs_of_guidance_fit_their_buckets(pairs, batch):
    """Every step's pairs find a bucket no larger than the one that keeps everything, and fewer of them too."""
    first, second = np.transpose(pairs)
    found = choose_guided_buckets(batch, first, second, 40)
    assert found.batches == (2 * batch,)
    waste = []
    for one, other in pairs:
        counts = np.repeat([one, other], batch)
        bucket = found.choose(2 * batch, counts)
        assert bucket.fits(counts)
        waste.append(bucket.tokens / counts.sum() - 1)
        few = np.array([one, other])
        assert found.choose(2, few).fits(few)
    assert found.expected_waste == pytest.approx(np.mean(waste))
    assert found.choose(2 * batch, 40).tokens == 2 * batch * 40


def test_pairs_take_less_than_twice_the_longer():
    found = choose_guided_buckets(4, [64, 64], [16, 8], 256)
    assert Bucket(8, 4 * 80, 8, 64, 8) in found.buckets
    assert len(found.buckets) == 2


def test_padded_shapes():
    assert PaddedShapes(64).choose(2, [3, 10]) == Bucket(2, 20, 2, 10, 10)
    assert PaddedShapes(64, whole=True).choose(2, [3, 10]) == Bucket(2, 128, 2, 64, 64)
    assert PaddedShapes(64).choose(2, 64).batch == 2
