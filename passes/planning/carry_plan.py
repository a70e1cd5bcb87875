"""The plan of a `carry` step: which tokens are computed, where they are written and how the others are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcconvert.passes.ir.plan_inputs import CARRY_INPUTS
from dcconvert.passes.planning.layout import Bucket, lay_out
from dcconvert.passes.planning.nearest_kept import Ints, Mask
from dcconvert.passes.planning.token_history import Doubles, History

CARRY_ARRAYS = tuple(CARRY_INPUTS)


@dataclass(frozen=True)
class CarryPlan:
    """Index arrays of one step, int64 (weights float32), and the keep mask they were made from.

    G tiles of L packed tokens, B x S slots of query rows, P state slots:

    - token_index [G, L]: flat b*N+n of each packed token.
    - sample_ids [G], grid_index [B, S], packed_index [G, L]: as in `chunk_plan.Plan`, except for pads.
    - write_index [G, L, 4]: state slot, sample, 0 and token that each packed token is written to.
    - recall_weight [P, B, N]: weights of the state's slots in each token's value at this step.

    Pads copy everything from the first kept token of their tile's sample, so they write the same values to the state.
    """

    keep: Mask
    counts: Ints
    token_index: Ints
    sample_ids: Ints
    grid_index: Ints
    packed_index: Ints
    write_index: Ints
    recall_weight: NDArray[np.float32]

    def arrays(self) -> dict[str, np.ndarray]:
        """The plan's inputs of `denoise`, by name."""
        return {name: getattr(self, name) for name in CARRY_ARRAYS}


def carry_plan(history: History, keep: Mask, tau: Doubles, bucket: Bucket | None = None) -> CarryPlan:
    """Plan a step at noise levels `tau` [B] that computes the tokens of `keep` [B, N], and record it in the history.

    Raises CheckFailedError if a sample keeps nothing, and UsageError if the mask has the wrong shape or does not fit
    the bucket, or if the noise rose.
    """
    history.check(tau)
    keep = np.ascontiguousarray(keep, dtype=bool)
    laid = lay_out(keep, history.tokens, "rows", bucket)
    slot = history.write(keep, tau)
    address = np.zeros((len(laid.kept), 4), np.int64)
    address[:, 0] = slot.ravel()[laid.kept]
    np.divmod(laid.kept, history.tokens, out=(address[:, 1], address[:, 3]))
    return CarryPlan(
        keep,
        laid.counts,
        laid.spread(laid.kept),
        laid.sample_ids,
        laid.grid_index,
        laid.spread(laid.packed_index.ravel()[laid.place]),
        laid.spread(address),
        history.weights(tau),
    )


def full_carry_plan(batch: int, tokens: int, bucket: Bucket | None = None) -> CarryPlan:
    """The first step of a run: every token computed."""
    return carry_plan(History(batch, tokens), np.ones((batch, tokens), bool), np.ones(batch), bucket)
