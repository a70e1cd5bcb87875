"""The host's record of every token in mode carry: when it was computed, and how fast it changes.

The values themselves stay on the device, in a state with two slots per token (`passes.rewrite.carry_trunk`). This
module decides which slot to write and with which weights to read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.spec import SLOTS
from dcconvert.passes.planning.nearest_kept import Ints, Mask

Doubles = NDArray[np.float64]


# A line through two values is followed no further than this many times their distance:  steep slopes between close
# neighbours would diverge (measured: benchmarks/carry_variants.py).
REACH = 2.0


def check_falling(before: Doubles, tau: Doubles, who: str) -> None:
    """Raises UsageError if the noise of a sample rose since its last step; `who` says what requires falling noise."""
    rose = np.flatnonzero(tau > before[: len(tau)] + 1e-6)
    if len(rose):
        sample = int(rose[0])
        raise UsageError(
            f"the noise level of sample {sample} rose from {before[sample]:.4g} to {tau[sample]:.4g} within a "
            f"run: {who} a sampler whose timesteps only fall; for another image, start a new run"
        )


class History:
    """Bookkeeping of one batch of samples on their way through a sampling run.

    Times are noise levels (1 for noise, 0 for clean). Arrays over tokens are [B, N].
    """

    def __init__(self, batch: int, tokens: int) -> None:
        self.batch = batch
        self.tokens = tokens
        self.steps: Ints = np.zeros(batch, np.int64)  # steps each sample has made
        self.tau: Doubles = np.full(batch, np.inf)  # noise level of its last step
        self.latest: Doubles = np.zeros((batch, tokens))  # when each token was last computed
        self.before: Doubles = np.zeros((batch, tokens))  # and the time before
        self.newest: Ints = np.zeros((batch, tokens), np.int64)  # the slot of its last value
        self.written: Ints = np.zeros((batch, tokens), np.int64)  # how often each token was computed
        self.age: Ints = np.zeros((batch, tokens), np.int64)  # steps since then
        self.distance: Doubles = np.zeros((batch, tokens))  # between the updates in the two slots

    def restart(self, samples: Sequence[int] | Ints) -> None:
        """Clear these samples: their next step is the first of a run and computes every token."""
        self.steps[samples] = 0
        self.tau[samples] = np.inf
        for array in (self.latest, self.before, self.newest, self.written, self.age, self.distance):
            array[samples] = 0

    def check(self, tau: Doubles) -> None:
        """Raises UsageError if the noise of a sample rose since its last step."""
        check_falling(self.tau, tau, "carry needs")

    def elapsed(self, tau: Doubles) -> Doubles:
        """Noise levels passed since each token was computed [B, N]."""
        return self.latest - tau[:, None]

    def gaps(self) -> Doubles:
        """Noise levels between the last two computations of each token [B, N]; 0 if there were fewer than two."""
        return (self.before - self.latest) * (self.written > 1)

    def drift(self) -> Doubles:
        """How much each token's update changed per unit of noise level [B, N].

        A token that was not computed twice yet gets the speed of the fastest token of its sample, or 1 if there is
        none.
        """
        gaps = self.gaps()
        known = gaps > 0
        drift = np.divide(self.distance, gaps, out=np.zeros_like(gaps), where=known)
        fastest = np.where(known.any(axis=1), drift.max(axis=1), 1.0)
        return np.where(known, drift, fastest[:, None])

    def write(self, keep: Mask, tau: Doubles) -> Ints:
        """Record that a step at `tau` [B] computes the tokens of `keep`; returns the slots to write them to [B, N]."""
        fresh = keep & (
            self.latest != tau[:, None]
        )  # if a solver calls the model twice at one noise level, the last call counts
        self.newest = self.newest ^ fresh
        np.copyto(self.before, self.latest, where=fresh)
        np.copyto(self.latest, tau[:, None], where=fresh)
        self.written += fresh
        self.age += 1
        self.age[keep] = 0
        self.steps += 1
        self.tau = tau.copy()
        return self.newest

    def weights(self, tau: Doubles) -> NDArray[np.float32]:
        """Weights [P, B, N] to read every token at `tau` [B]: linear in its two values, or 1 and 0 if fresh."""
        gaps = self.gaps()
        ahead = np.divide(self.elapsed(tau), gaps, out=np.zeros_like(gaps), where=gaps > 0).clip(0, REACH)
        weights = np.empty((SLOTS, self.batch, self.tokens), np.float32)
        weights[0] = np.where(self.newest == 0, 1 + ahead, -ahead)
        np.subtract(1, weights[0], out=weights[1])
        return weights
