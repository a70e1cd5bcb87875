"""The flat form of a plan, by hand and against the plan's own arrays."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.megatron_thd import packed_seq_params
from dcconvert.passes.planning.carry_plan import carry_plan
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.token_history import History


def test_by_hand():
    keep = np.arange(8) < np.array([[5], [2], [4]])
    found = packed_seq_params(Planner((2, 4)).plan(keep, Bucket(3, 24, 3, 8, 4)))
    assert found.qkv_format == "thd"
    assert found.cu_seqlens_q.tolist() == found.cu_seqlens_kv.tolist() == [0, 5, 7, 11]
    assert found.cu_seqlens_q_padded.tolist() == found.cu_seqlens_kv_padded.tolist() == [0, 8, 12, 16]
    assert (found.max_seqlen_q, found.max_seqlen_kv, found.total_tokens) == (5, 5, 24)
    assert found.seq_idx.tolist() == [[0] * 8 + [1] * 4 + [2] * 4 + [3] * 8]
    assert {a.dtype for a in (found.cu_seqlens_q, found.cu_seqlens_q_padded, found.seq_idx)} == {np.dtype(np.int32)}


def test_keys_of_a_carry_plan_are_all_tokens():
    keep = np.arange(8) < np.array([[8], [3], [1]])
    history = History(3, 8)
    carry_plan(history, np.ones((3, 8), bool), np.full(3, 0.9))
    found = packed_seq_params(carry_plan(history, keep, np.full(3, 0.8)))
    assert found.cu_seqlens_q.tolist() == [0, 8, 11, 12]
    assert found.cu_seqlens_kv.tolist() == found.cu_seqlens_kv_padded.tolist() == [0, 8, 16, 24]
    assert (found.max_seqlen_q, found.max_seqlen_kv) == (8, 8)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=5))
def test_samples_lie_where_the_plan_puts_them(counts):
    plan = Planner((2, 4)).plan(np.arange(8) < np.array(counts)[:, None])
    found = packed_seq_params(plan)
    tile = plan.packed_index.shape[1]
    assert found.seq_idx[0, ::tile].tolist() == plan.sample_ids.tolist()  # a tight plan has no tiles to spare
    assert np.diff(found.cu_seqlens_q).tolist() == counts
    assert found.cu_seqlens_q_padded[-1] == found.total_tokens == plan.packed_index.size
    assert (np.diff(found.cu_seqlens_q_padded) >= counts).all()
