"""Packing of lengths into rows: nothing lost, nothing over the edge, by hand, and how full the rows get."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.bin_packing import (
    PACKERS,
    efficiency,
    exact_packs,
    first_fit,
    nnlshp,
    shortest_pack_first,
    spfhp,
)

pytest.importorskip("scipy", reason="scipy does the fit of NNLSHP")
batches = st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(20, 32)


@pytest.mark.parametrize("name", PACKERS)
@settings(max_examples=40)
@given(*batches)
def test_every_sample_has_its_slots(name, lengths, capacity):
    row, start = PACKERS[name](lengths, capacity)
    slots = [(r, s + i) for r, s, n in zip(row, start, lengths, strict=True) for i in range(n)]
    assert len(set(slots)) == sum(lengths)
    assert max(slot for _, slot in slots) < capacity
    assert set(row.tolist()) == set(range(row.max() + 1))
    assert row.max() + 1 <= len(lengths)
    if name in ("first fit", "SPFHP"):
        assert (row.max() + 1) * capacity < 2 * sum(lengths) + capacity
    first = {r: s for r, s in sorted(zip(row.tolist(), start.tolist(), strict=True), reverse=True)}
    assert set(first.values()) == {0}  # a row begins with a sample


@pytest.mark.parametrize("pack", [spfhp, nnlshp])
@settings(max_examples=40)
@given(*batches)
def test_histograms_keep_every_sample(pack, lengths, capacity):
    packs = pack(Counter(lengths), capacity, 3)
    assert Counter(n for pack, count in packs.items() for n in pack * count) == Counter(lengths)
    assert all(sum(pack) <= capacity and 1 <= len(pack) <= 3 for pack in packs)
    assert efficiency(packs, capacity) == pytest.approx(sum(lengths) / (capacity * sum(packs.values())))


def test_hand_computed_rows():
    lengths = [6, 3, 5, 4, 2]
    assert [a.tolist() for a in first_fit(lengths, 10)] == [[0, 1, 1, 0, 1], [0, 5, 0, 6, 8]]
    assert [a.tolist() for a in shortest_pack_first(lengths, 10)] == [[0, 0, 1, 1, 2], [0, 6, 0, 5, 0]]


def test_hand_computed_histograms():
    # Two of 6 open packs; of the three 4s two fill them and one is alone; the 3 joins the pack with most room, of 4.
    assert spfhp({6: 2, 4: 3, 3: 1}, 10) == Counter({(6, 4): 2, (4, 3): 1})
    assert spfhp({5: 4}, 10) == Counter({(5,): 4})  # all of one length are placed at once
    assert spfhp({8: 1, 2: 1, 1: 2}, 12, depth=2) == Counter({(8, 2): 1, (1,): 2})
    assert nnlshp({6: 2, 4: 2}, 10) == Counter({(6, 4): 2})
    assert nnlshp({5: 4}, 10) == Counter({(5, 5): 2})


def test_packs_are_all_partitions_into_three():
    assert sorted(exact_packs(6, 3, 6)) == [(2, 2, 2), (3, 2, 1), (3, 3), (4, 1, 1), (4, 2), (5, 1), (6,)]
    assert sum(1 for _ in exact_packs(512, 3, 512)) == 22102  # as many as the paper counts


def test_least_squares_fills_rows_better_than_greed():
    rng = np.random.default_rng(0)
    lengths = Counter(np.minimum(rng.integers(1, 90, 4000), 64).tolist())
    alone = sum(n * c for n, c in lengths.items()) / (64 * sum(lengths.values()))
    packed = efficiency(spfhp(lengths, 64, 3), 64), efficiency(nnlshp(lengths, 64), 64)
    assert alone + 0.1 < packed[0] < packed[1]
    assert packed[1] > 0.98


@pytest.mark.parametrize("name", PACKERS)
def test_a_sample_that_is_too_long_is_refused(name):
    with pytest.raises(UsageError, match="keeps 9 tokens and rows hold 8"):
        PACKERS[name]([3, 9], 8)


def test_without_scipy_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UsageError, match="needs scipy: pip install scipy"):
        nnlshp({3: 1}, 8)
