"""When tokens are spent: the kept fraction as a function of the noise level.

``tau`` is the noise level of the sample, 1 for pure noise and 0 for clean data, whatever time the model counts in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcconvert.passes.errors import UsageError

KINDS = ("constant", "rising", "falling")
CURVE = "curve"  # made by `dcconvert calibrate`
AUTO = -1  # warm-up steps chosen from what the run may cost
WARM_UP = 3  # steps it takes to know how things change; more cost what later steps need (docs/carry.md)

# A time in float32 may overshoot the ends of [0, 1] by its rounding.
_TAU_SLACK = 1e-6


def parse_ratio(text: str | float) -> float:
    """Read a ratio written as ``4x``, ``4`` or ``2.5x``; UsageError unless it is a finite number of at least 1."""
    try:
        ratio = float(text.strip().lower().removesuffix("x")) if isinstance(text, str) else float(text)
    except (TypeError, ValueError):
        ratio = math.nan
    if not math.isfinite(ratio) or ratio < 1:
        raise UsageError(
            f"ratio {text!r} is not a number of at least 1: write it as 4x, 4 or 2.5x (1 keeps everything)"
        )
    return ratio


@dataclass(frozen=True)
class Schedule:
    """Kept fraction whose mean over a sampling run is 1/ratio.

    ``rising`` keeps more tokens toward clean samples, ``falling`` fewer. Both run between 0.5 and 1.5 times the mean;
    where the upper end would pass 1 it stops there and the lower end moves up, so that the mean stays. ``curve`` goes
    linearly through ``knots``, pairs of tau and kept fraction, scaled to the mean and cut off at 1.
    The first ``warm_up`` steps of a run, and after them every ``refresh``-th (0: none), are dense: they keep
    everything. ``AUTO`` stands for three, but no more than half of what the run may cost. ``fitted`` sets ``centre``,
    ``mean`` (mean tau and kept fraction of the sparse steps) and ``dense_first`` (the number of warm-up steps) for the
    steps of one sampler. UsageError for an unknown kind, a ratio below 1, knots or numbers out of range.
    """

    kind: str
    ratio: float
    centre: float = 0.5
    warm_up: int = 0
    refresh: int = 0
    mean: float = 0.0  # 0: 1 / ratio
    dense_first: int = 0
    knots: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, CURVE):
            raise UsageError(f"unknown schedule {self.kind!r}: choose one of {', '.join(KINDS)}")
        object.__setattr__(self, "ratio", parse_ratio(self.ratio))
        object.__setattr__(self, "knots", tuple((float(tau), float(kept)) for tau, kept in self.knots))
        _checked_tau(self.centre)
        if self.warm_up < AUTO or self.refresh < 0 or not 0 <= self.mean <= 1:
            raise UsageError("warm-up and refresh steps must not be negative, the mean kept fraction from 0 to 1")
        if (self.kind == CURVE) != bool(self.knots) or any(not 0 < kept < math.inf for _, kept in self.knots):
            raise UsageError("a curve needs knots of positive kept fractions, and no other schedule has them")
        if self.knots:
            taus = _checked_tau([tau for tau, _ in self.knots])
            if not np.all(np.diff(taus) > 0):
                raise UsageError("the knots of a curve must have rising noise levels")

    def fitted(self, taus: ArrayLike) -> Schedule:
        """Return the same schedule with a mean of 1/ratio over ``taus``, the steps of one sampling run in order.

        UsageError if the dense steps alone cost more.
        """
        taus = _checked_tau(taus).ravel()
        steps, budget = len(taus), len(taus) / self.ratio
        if self.ratio == 1:
            return replace(self, dense_first=0, mean=1.0, knots=tuple((tau, 1.0) for tau, _ in self.knots))
        first = min(WARM_UP, max(1, int(budget / 2))) if self.warm_up == AUTO else self.warm_up
        dense = self._dense(np.arange(steps), first)
        sparse = ~dense
        if not sparse.any() or budget <= dense.sum():
            raise UsageError(
                f"{dense.sum()} steps that keep everything, of {steps}, leave nothing for the others at "
                f"{self.ratio:g}x: fewer warm-up or refresh steps, a lower ratio, or more sampling steps"
            )
        mean = min(1.0, float((budget - dense.sum()) / sparse.sum()))
        fit = replace(self, dense_first=first, mean=mean, centre=float(np.mean(taus[sparse])))
        if self.kind != CURVE:
            return fit
        kept = fit.fraction(taus[sparse])
        for _ in range(60):  # scaled until the mean is right, which the cut at 1 makes a search
            scale = mean / float(np.mean(kept))
            fit = replace(fit, knots=tuple((tau, level * scale) for tau, level in fit.knots))
            kept = fit.fraction(taus[sparse])
        return fit

    def _dense(self, step: NDArray[np.int64], first: int) -> NDArray[np.bool_]:
        """Whether the steps with these numbers keep everything."""
        warm = step < first
        if not self.refresh:
            return warm
        return warm | ((step - first + 1) % self.refresh == 0)

    def fraction(self, tau: ArrayLike) -> NDArray[np.float64]:
        """Kept fraction, in (0, 1], of a sparse step at each ``tau``, in its shape; UsageError outside [0, 1]."""
        tau = _checked_tau(tau)
        if self.kind == CURVE:
            levels, kept = np.transpose(self.knots)
            return np.minimum(np.interp(tau, levels, kept), 1.0)
        mean = self.mean or 1 / self.ratio
        # Dividing by the longer side keeps both ends of [0, 1] inside the bounds when the run is off centre.
        slope = (min(1.0, 1.5 * mean) - mean) / max(self.centre, 1 - self.centre)
        sign = {"constant": 0, "rising": -1, "falling": 1}[self.kind]
        return np.minimum(mean + sign * slope * (tau - self.centre), 1.0)

    def counts(self, tau: ArrayLike, tokens: int, step: ArrayLike | None = None) -> NDArray[np.int64]:
        """Kept tokens a sample at each ``tau``, out of ``tokens``: rounded, at least 1. UsageError as ``check``.

        ``step`` counts the steps since each run began and says which are dense; without it none is.
        """
        self.check(tokens)
        counts = np.maximum(np.rint(self.fraction(tau) * tokens), 1).astype(np.int64)
        if step is None:
            return counts
        return np.where(self._dense(np.asarray(step), self.dense_first or max(self.warm_up, 0)), tokens, counts)

    def run_counts(self, taus: ArrayLike, tokens: int) -> NDArray[np.int64]:
        """Kept tokens a sample at every step of a run."""
        return self.counts(taus, tokens, np.arange(np.size(taus)))

    def check(self, tokens: int) -> None:
        """Raise UsageError if the ratio leaves less than one of ``tokens`` tokens a sample."""
        if self.ratio > tokens:
            raise UsageError(
                f"ratio {self.ratio:g}x leaves less than one of the {tokens} tokens of a sample: "
                f"the largest ratio for this model is {tokens}x"
            )


def _checked_tau(tau: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(tau, dtype=np.float64)
    if values.size == 0 or not np.all((values >= -_TAU_SLACK) & (values <= 1 + _TAU_SLACK)):
        raise UsageError(f"noise level {tau!r} is outside [0, 1]: pass 1 for pure noise and 0 for clean data")
    return np.clip(values, 0.0, 1.0)
