"""The plan of a carry step: where kept tokens go, where they are written, how the others are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.ir.spec import SLOTS
from dcconvert.passes.planning.carry_plan import CARRY_ARRAYS, CarryPlan, carry_plan, full_carry_plan
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.token_history import History
from tests.passes.carry_harness import Memory, roomy
from tests.passes.harness import random_keep

TOKENS = 8


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    counts = draw(st.lists(st.integers(1, TOKENS), min_size=1, max_size=4))
    return random_keep(counts, TOKENS, draw(st.integers(0, 1000)))


def after_a_full_step(batch: int) -> History:
    history = History(batch, TOKENS)
    history.write(np.ones((batch, TOKENS), bool), np.ones(batch))
    return history


@given(masks(), st.booleans(), st.integers(1, 5))
def test_arrays_and_their_shapes(keep, padded, tile):
    batch = len(keep)
    bucket = roomy(keep, tile) if padded else None
    plan = carry_plan(after_a_full_step(batch), keep, np.full(batch, 0.5), bucket)
    arrays = plan.arrays()
    assert tuple(arrays) == CARRY_ARRAYS
    tiles, tile = plan.packed_index.shape
    slots = bucket.row_tokens if bucket else int(keep.sum(1).max())
    assert bucket is None or (tiles * tile, tile) == (bucket.tokens, bucket.tile)
    assert {name: array.shape for name, array in arrays.items()} == {
        "token_index": (tiles, tile),
        "sample_ids": (tiles,),
        "grid_index": (batch, slots),
        "packed_index": (tiles, tile),
        "write_index": (tiles, tile, 4),
        "recall_weight": (SLOTS, batch, TOKENS),
    }
    for name, array in arrays.items():
        assert array.dtype == (np.float32 if "weight" in name else np.int64), name
        assert array.flags.c_contiguous, name
    assert plan.counts.tolist() == keep.sum(1).tolist()
    np.testing.assert_array_equal(plan.keep, keep)


def places(plan: CarryPlan) -> np.ndarray:
    """Packed place of every kept token: each sample starts on a new tile."""
    tile = plan.packed_index.shape[1]
    first = np.cumsum([0, *(-(-plan.counts // tile) * tile)])
    return np.concatenate([np.arange(start, start + n) for start, n in zip(first[:-1], plan.counts, strict=True)])


@given(masks(), st.booleans())
def test_the_layout_is_that_of_mode_chunk(keep, padded):
    bucket = roomy(keep) if padded else None
    found = carry_plan(after_a_full_step(len(keep)), keep, np.full(len(keep), 0.5), bucket)
    wanted = Planner((2, 4), 1, 1).plan(keep, bucket)
    for name in ("sample_ids", "grid_index"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), name)
    place = places(found)
    np.testing.assert_array_equal(found.packed_index.ravel()[place], wanted.packed_index.ravel()[place])
    np.testing.assert_array_equal(found.token_index.ravel()[place], np.flatnonzero(keep))


@given(masks(), st.booleans())
def test_pads_copy_a_token_of_the_sample_their_tile_belongs_to(keep, padded):
    """With another sample's modulation the copy would write something else to the token's place."""
    plan = carry_plan(after_a_full_step(len(keep)), keep, np.full(len(keep), 0.5), roomy(keep, 3) if padded else None)
    place, slots = places(plan), plan.packed_index.ravel()
    token_index, address = plan.token_index.ravel(), plan.write_index.reshape(-1, 4)
    samples = np.repeat(plan.sample_ids, plan.token_index.shape[1])
    np.testing.assert_array_equal(token_index // TOKENS, samples)
    for pad in np.setdiff1d(np.arange(token_index.size), place):
        (original,) = place[token_index[place] == token_index[pad]]
        assert slots[pad] == slots[original]
        assert address[pad].tolist() == address[original].tolist()


@given(masks(), st.booleans())
def test_every_kept_token_is_written_to_its_older_slot(keep, padded):
    history = after_a_full_step(len(keep))
    before = history.newest.copy()
    plan = carry_plan(history, keep, np.full(len(keep), 0.5), roomy(keep, 3) if padded else None)
    address, token_index = plan.write_index.reshape(-1, 4), plan.token_index.ravel()
    np.testing.assert_array_equal(token_index, address[:, 1] * TOKENS + address[:, 3])
    assert (address[:, 2] == 0).all()
    assert set(token_index.tolist()) == set(np.flatnonzero(keep).tolist())
    slot, sample, _, token = address.T
    assert (slot == 1 - before[sample, token]).all()
    assert (slot == history.newest[sample, token]).all()


def follow(plans: list[CarryPlan], values: np.ndarray) -> list[np.ndarray]:
    """What the arrays alone make of values [steps, B*N]: written by address, read by weight."""
    state = np.zeros((SLOTS, *plans[0].keep.shape))
    found = []
    for plan, value in zip(plans, values, strict=True):
        slot, sample, _, token = np.moveaxis(plan.write_index, -1, 0)
        state[slot, sample, token] = value[plan.token_index]
        found.append((plan.recall_weight * state).sum(0))
    return found


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.booleans())
def test_steps_against_the_definition(seed, padded):
    """Five steps with random masks: kept tokens have their value, the others lie on the line through their last two."""
    rng = np.random.default_rng(seed)
    batch, steps = 3, 5
    taus = 1 - np.cumsum(rng.choice([0.02, 0.1, 0.3], (steps, batch)), 0) / 2
    values = rng.normal(size=(steps, batch * TOKENS))
    history, memory = History(batch, TOKENS), Memory()
    plans, wanted = [], []
    for step in range(steps):
        counts = rng.integers(1, TOKENS + 1, batch) if step else [TOKENS] * batch
        keep = random_keep(counts, TOKENS, int(rng.integers(1000)))
        plans.append(carry_plan(history, keep, taus[step], roomy(keep) if padded else None))
        for b, n in np.argwhere(keep).tolist():
            memory.write((b, n), taus[step, b], values[step, b * TOKENS + n])
        wanted.append([[memory.read((b, n), taus[step, b]) for n in range(TOKENS)] for b in range(batch)])
    np.testing.assert_allclose(follow(plans, values), wanted, atol=1e-5)


def test_the_first_step_keeps_everything():
    plan = full_carry_plan(2, TOKENS)
    assert plan.keep.all()
    assert plan.token_index.tolist() == [list(range(TOKENS)), list(range(TOKENS, 2 * TOKENS))]
    value = np.random.default_rng(0).normal(size=(1, 2 * TOKENS))
    np.testing.assert_array_equal(follow([plan], value)[0], value.reshape(2, TOKENS))
    padded = full_carry_plan(2, TOKENS, Bucket(2, 24, 2, 9, 4))
    np.testing.assert_array_equal(follow([padded], value)[0], value.reshape(2, TOKENS))


def test_a_mask_of_numbers_is_read_as_true_and_false():
    keep = random_keep((3, 5), TOKENS)
    numbers: Any = keep.astype(np.int64)
    found, wanted = (carry_plan(after_a_full_step(2), mask, np.full(2, 0.5)).arrays() for mask in (numbers, keep))
    for name in CARRY_ARRAYS:
        np.testing.assert_array_equal(found[name], wanted[name])


@pytest.mark.parametrize(
    ("keep", "tau", "bucket", "error", "message"),
    [
        (random_keep((2, 0), TOKENS), 0.4, None, CheckFailedError, "sample 1 keeps no token"),
        (random_keep((2, 2), 9), 0.4, None, UsageError, r"shape \[2, 9\]: expected \[batch, 8\]"),
        (random_keep((2, 2), TOKENS)[0], 0.4, None, UsageError, "expected"),
        (random_keep((8, 8), TOKENS), 0.4, Bucket(2, 8, 2, 8, 4), UsageError, "do not fit"),
        (random_keep((2, 2), TOKENS), 0.4, Bucket(3, 24, 3, 8, 8), UsageError, "pad it first"),
        (random_keep((2, 2), TOKENS), 0.6, None, UsageError, "rose from 0.5 to 0.6"),
    ],
    ids=["nothing kept", "tokens", "one axis", "bucket too small", "other batch", "rising noise"],
)
def test_refusals_leave_the_history_as_it_was(keep, tau, bucket, error, message):
    history = after_a_full_step(2)
    history.write(random_keep((3, 4), TOKENS), np.full(2, 0.5))
    before = {name: np.copy(value) for name, value in vars(history).items()}
    with pytest.raises(error, match=message):
        carry_plan(history, keep, np.full(2, tau), bucket)
    for name, value in vars(history).items():
        np.testing.assert_array_equal(value, before[name], name)
