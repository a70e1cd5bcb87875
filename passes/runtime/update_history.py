"""The host's record of runs with full and skipped steps: when each sample's trunk was computed, and in which slot.

The updates themselves are in the runtime's memory, in as many slots as a skipped step reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dcconvert.passes.planning.nearest_kept import Ints, Mask
from dcconvert.passes.planning.token_history import REACH, Doubles, check_falling


class UpdateHistory:
    """Bookkeeping of one batch of samples. Times are noise levels, 1 for noise and 0 for clean."""

    def __init__(self, batch: int, slots: int) -> None:
        self.slots = slots
        self.steps: Ints = np.zeros(batch, np.int64)  # steps each sample has made
        self.tau: Doubles = np.full(batch, np.inf)  # noise level of its last step
        self.levels: Doubles = np.zeros((slots, batch))  # noise levels of its computed steps, newest first
        self.computed: Ints = np.zeros(batch, np.int64)  # how many of its steps were computed
        self.newest: Ints = np.full(batch, slots - 1)  # the slot of its last update
        self.owed: Doubles = np.zeros(batch)  # computed steps that the schedule asks for and that were not made yet

    def copied(self, samples: Ints) -> UpdateHistory:
        """The history of these samples [b], each repeated as often as it is listed."""
        other = UpdateHistory(len(samples), self.slots)
        for name in ("steps", "tau", "levels", "computed", "newest", "owed"):
            setattr(other, name, getattr(self, name)[..., samples].copy())
        return other

    def restart(self, samples: Sequence[int] | Ints) -> None:
        """Clear these samples: their next step is the first of a run and is computed."""
        self.steps[samples] = 0
        self.tau[samples] = np.inf
        self.computed[samples] = 0
        self.owed[samples] = 0

    def check(self, tau: Doubles) -> None:
        """Raises UsageError if the noise of a sample rose since its last step."""
        check_falling(self.tau, tau, "forecasts need")

    def due(self, fraction: Doubles) -> Mask:
        """Which samples [B] a step computes, for a `fraction` [B] of computed steps; the first step is always computed.

        Fractions are accumulated, so that a fraction of 1/4 computes every fourth step.
        """
        first = self.computed == 0
        self.owed = np.where(first, 1.0, self.owed + fraction)
        due: Mask = first | (self.owed >= 1 - 1e-9)
        self.owed -= due
        return due

    def line(self, tau: Doubles) -> Doubles:
        """Weights of the last updates [slots, B], newest first: a straight line in the noise level through the last
        two.

        The line is extrapolated at most REACH times the distance between these two. Samples with one update hold it.
        """
        weights = np.zeros_like(self.levels)
        gap = self.levels[1] - self.levels[0]
        known = (self.computed > 1) & (gap > 0)
        ahead = np.divide(self.levels[0] - tau, gap, out=np.zeros_like(gap), where=known).clip(0, REACH)
        weights[0], weights[1] = 1 + ahead, -ahead
        return weights

    def by_slot(self, weights: Doubles) -> Doubles:
        """Weights [slots, B], newest first, in the order of the slots that hold the updates."""
        found = np.empty_like(weights)
        slots = (self.newest - np.arange(self.slots)[:, None]) % self.slots
        found[slots, np.arange(len(self.newest))] = weights
        return found

    def note(self, tau: Doubles, full: Mask) -> None:
        """Record a step at noise levels [B] that computed some samples [B]."""
        self.steps += 1
        self.tau = tau.copy()
        self.levels[:, full] = np.concatenate([tau[None, full], self.levels[:-1, full]])
        self.computed += full
        self.newest = np.where(full, (self.newest + 1) % self.slots, self.newest)
