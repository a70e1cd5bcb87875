"""The flat form of a plan, in Megatron-Core's format for packed sequences: THD layout with cumulative lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcconvert.passes.planning.carry_plan import CarryPlan
from dcconvert.passes.planning.chunk_plan import Plan
from dcconvert.passes.planning.nearest_kept import Ints


@dataclass(frozen=True)
class PackedSeqParams:
    """Packed sequences on one axis of T tokens, [T, heads, width]; the names are Megatron-Core's `PackedSeqParams`.

    - cu_seqlens_q, cu_seqlens_kv int32 [B+1]: 0 and the sums of the samples' lengths.
    - cu_seqlens_q_padded, cu_seqlens_kv_padded int32 [B+1]: where each sample begins on the packed axis, which has pads
      at the end of a sample's last tile, and where the last one ends.
    - max_seqlen_q, max_seqlen_kv: the longest sample. total_tokens: T, pads at the end included.
    - seq_idx int32 [1, T]: the sample of each place; places after the last sample count as one more.

    Attention is within a sample. In a plan that drops tokens, queries and keys are the same tokens. In a plan of mode
    carry, the keys are all N tokens of each sample, without pads.
    """

    cu_seqlens_q: NDArray[np.int32]
    cu_seqlens_kv: NDArray[np.int32]
    cu_seqlens_q_padded: NDArray[np.int32]
    cu_seqlens_kv_padded: NDArray[np.int32]
    max_seqlen_q: int
    max_seqlen_kv: int
    total_tokens: int
    seq_idx: NDArray[np.int32]
    qkv_format: str = "thd"


def packed_seq_params(plan: Plan | CarryPlan) -> PackedSeqParams:
    """The flat form of a plan's packed axis."""
    total, tile = plan.packed_index.size, plan.packed_index.shape[1]
    lengths, padded = cumulated(plan.counts), cumulated(-(-plan.counts // tile) * tile)
    seq_idx = np.searchsorted(padded[1:], np.arange(total), side="right").astype(np.int32)
    longest = int(plan.counts.max())
    if not isinstance(plan, CarryPlan):
        return PackedSeqParams(lengths, lengths, padded, padded, longest, longest, total, seq_idx[None])
    samples, tokens = plan.keep.shape
    keys = cumulated(np.full(samples, tokens))
    return PackedSeqParams(lengths, keys, padded, keys, longest, tokens, total, seq_idx[None])


def cumulated(lengths: Ints) -> NDArray[np.int32]:
    """Cumulative sums, starting at 0: [B] -> [B+1]."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
