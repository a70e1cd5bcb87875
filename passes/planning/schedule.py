"""When tokens are spent: the kept fraction as a function of the noise level.

``tau`` is the noise level of the sample, 1 for pure noise and 0 for clean data, whatever time the model counts in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcconvert.passes.ir.errors import UsageError

KINDS = ("constant", "rising", "falling")
CURVE = "curve"  # made by `dcconvert calibrate`
NATURAL = "natural"  # as many as the router scores above 0.5 (DC-DiT)
DIFFERENCE = "difference"  # patches as large as the third difference of the latents allows (DDiT)
DATA_DEPENDENT = (NATURAL, DIFFERENCE)  # how many is found at every step; knots, if there are any, say what is expected
AUTO = -1  # warm-up steps chosen from what the run may cost
LEVELS = 6  # numbers of kept tokens that a run uses, each of them a shape to export, compile and capture
WARM_UP = 3  # steps it takes to know how things change; more cost what later steps need (docs/carry.md)

# A time in float32 may overshoot the ends of [0, 1] by its rounding.
_TAU_SLACK = 1e-6


def noise_levels(steps: int) -> NDArray[np.float64]:
    """The evenly spaced noise levels [steps] at which a run of so many steps calls the model: from 1 to 1 / steps."""
    return 1 - np.arange(steps) / steps


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
    steps of one sampler. ``levelled`` sets ``levels``: each step keeps the nearest of these numbers of tokens, so that
    the static shapes of an exported model need no padding. UsageError for an unknown kind, a ratio below 1, knots or
    numbers out of range.

    ``natural`` and ``difference`` find their numbers at every step; the fraction is then what a run is expected to
    keep. ``base`` is the ratio that a router was made for: at a larger one the fraction 1 - base/ratio of the tokens
    that it scores above 0.5 is dropped, the lowest first (tail dropping). ``threshold``: that of DDiT's criterion.
    """

    kind: str
    ratio: float
    centre: float = 0.5
    warm_up: int = 0
    refresh: int = 0
    mean: float = 0.0  # 0: 1 / ratio
    dense_first: int = 0
    knots: tuple[tuple[float, float], ...] = ()
    levels: tuple[int, ...] = ()
    base: float = 0.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, CURVE, *DATA_DEPENDENT):
            raise UsageError(f"unknown schedule {self.kind!r}: choose one of {', '.join(KINDS)}")
        object.__setattr__(self, "ratio", parse_ratio(self.ratio))
        object.__setattr__(self, "knots", tuple((float(tau), float(kept)) for tau, kept in self.knots))
        object.__setattr__(self, "levels", tuple(int(level) for level in self.levels))
        _checked_tau(self.centre)
        if any(low >= high for low, high in pairwise((0, *self.levels))):
            raise UsageError(f"levels {list(self.levels)}: numbers of tokens must be positive and rising")
        if self.warm_up < AUTO or self.refresh < 0 or not 0 <= self.mean <= 1:
            raise UsageError("warm-up and refresh steps must not be negative, the mean kept fraction from 0 to 1")
        if (self.kind == NATURAL and not 1 <= self.base < math.inf) or (
            self.kind == DIFFERENCE and not 0 <= self.threshold < math.inf
        ):
            raise UsageError(
                "a natural schedule needs the base that its router was made for, one by differences a threshold"
            )
        if self.kind == NATURAL and self.ratio < self.base:
            raise UsageError(
                f"the router keeps the tokens it scores above 0.5, one in {self.base:g}: a ratio of {self.ratio:g}x "
                f"would need more of them; choose {self.base:g}x or more, or convert again"
            )
        if (
            (self.kind == CURVE and not self.knots)
            or (self.kind in KINDS and self.knots)
            or any(not 0 < kept < math.inf for _, kept in self.knots)
        ):
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
        if self.data_dependent and self.knots:  # what was seen
            return replace(fit, mean=self.mean)
        if not self.knots:
            return fit
        kept = fit.fraction(taus[sparse])
        for _ in range(60):  # scaled until the mean is right, which the cut at 1 makes a search
            scale = mean / float(np.mean(kept))
            fit = replace(fit, knots=tuple((tau, level * scale) for tau, level in fit.knots))
            kept = fit.fraction(taus[sparse])
        return fit

    @property
    def data_dependent(self) -> bool:
        """Whether the numbers of kept tokens are found at every step."""
        return self.kind in DATA_DEPENDENT

    @property
    def expected(self) -> float:
        """The mean fraction that a run keeps: as was seen where it is found at every step, else 1 / ratio."""
        return self.mean if self.data_dependent and self.mean else 1 / self.ratio

    def dropping(self, ratio: float) -> Schedule:
        """The same at a larger ratio, by tail dropping; UsageError where only a new threshold could do that."""
        if self.kind == DIFFERENCE:
            raise UsageError(
                f"patch sizes are chosen by a threshold found for {self.ratio:g}x: convert again for {ratio:g}x"
            )
        less = self.ratio / ratio
        knots = tuple((tau, kept * less) for tau, kept in self.knots)
        fewer = {math.ceil(level * less - 1e-9) for level in self.levels[:-1]}  # the last one keeps everything
        levels = tuple(sorted({*fewer, *self.levels[-1:]}))
        return replace(self, ratio=ratio, knots=knots, mean=self.mean * less, levels=levels)

    @property
    def dropped(self) -> float:
        """The fraction of the natural tokens that is dropped."""
        return 1 - self.base / self.ratio if self.base else 0.0

    def levelled(self, taus: ArrayLike, tokens: int, most: int = LEVELS, sizes: Sequence[int] = ()) -> Schedule:
        """Return the same schedule with at most ``most`` numbers of kept tokens in a run, ``tokens`` among them.

        Those that a run fitted to ``taus`` is closest to, so that its mean stays what it was but for the rounding; of
        ``sizes``, where a model can only keep some numbers. Where the numbers are found at every step the levels are
        all sizes, or evenly spaced ones. UsageError as ``fitted``.
        """
        if self.data_dependent:
            even = np.geomspace(max(1, tokens / self.ratio / 2), tokens, most).round().astype(int)
            return replace(self, levels=tuple(sorted(sizes) if sizes else np.unique(even).tolist()))
        counts = replace(self, levels=()).fitted(taus).run_counts(taus, tokens)
        sparse = counts[counts < tokens]
        if sizes:
            known = np.array(sorted(sizes))
            sparse = known[np.abs(sparse[:, None] - known).argmin(1)]
            sparse = sparse[sparse < tokens]
        chosen = nearest_levels(sparse, most - 1).tolist() if sparse.size else []
        if sizes:
            chosen = np.unique([known[np.abs(known - level).argmin()] for level in chosen]).tolist()
        return replace(self, levels=(*chosen, tokens))

    def _dense(self, step: NDArray[np.int64], first: int) -> NDArray[np.bool_]:
        """Whether the steps with these numbers keep everything."""
        warm = step < first
        if not self.refresh:
            return warm
        return warm | ((step - first + 1) % self.refresh == 0)

    def fraction(self, tau: ArrayLike) -> NDArray[np.float64]:
        """Kept fraction, in (0, 1], of a sparse step at each ``tau``, in its shape; UsageError outside [0, 1]."""
        tau = _checked_tau(tau)
        if self.knots:
            levels, kept = np.transpose(self.knots)
            return np.minimum(np.interp(tau, levels, kept), 1.0)
        mean = self.mean or 1 / self.ratio
        # Dividing by the longer side keeps both ends of [0, 1] inside the bounds when the run is off centre.
        slope = (min(1.0, 1.5 * mean) - mean) / max(self.centre, 1 - self.centre)
        sign = {"constant": 0, "rising": -1, "falling": 1}.get(self.kind, 0)
        return np.minimum(mean + sign * slope * (tau - self.centre), 1.0)

    def step_fraction(self, tau: ArrayLike, step: ArrayLike) -> NDArray[np.float64]:
        """Kept fraction, in (0, 1], at each ``tau`` and so many steps after a run began; 1 for the dense steps."""
        return np.where(
            self._dense(np.asarray(step), self.dense_first or max(self.warm_up, 0)), 1.0, self.fraction(tau)
        )

    def counts(self, tau: ArrayLike, tokens: int, step: ArrayLike | None = None) -> NDArray[np.int64]:
        """Kept tokens a sample at each ``tau``, out of ``tokens``: rounded, at least 1, one of the levels if there are
        any. UsageError as ``check``.

        ``step`` counts the steps since each run began and says which are dense; without it none is.
        """
        self.check(tokens)
        counts = np.maximum(np.rint(self.fraction(tau) * tokens), 1).astype(np.int64)
        if self.levels and not self.data_dependent:  # where they are found, their mean over samples is expected
            levels = np.asarray(self.levels)
            counts = levels[np.abs(counts[..., None] - levels).argmin(-1)]
        if step is None:
            return counts
        return np.where(self._dense(np.asarray(step), self.dense_first or max(self.warm_up, 0)), tokens, counts)

    def run_counts(self, taus: ArrayLike, tokens: int) -> NDArray[np.int64]:
        """Kept tokens a sample at every step of a run; of ``difference`` levels that add up to what is expected."""
        counts = self.counts(taus, tokens, np.arange(np.size(taus)))
        return diffused(counts, self.levels) if self.kind == DIFFERENCE and self.levels else counts

    def check(self, tokens: int) -> None:
        """Raise UsageError if the ratio leaves less than one of ``tokens`` tokens a sample."""
        if self.ratio > tokens:
            raise UsageError(
                f"ratio {self.ratio:g}x leaves less than one of the {tokens} tokens of a sample: "
                f"the largest ratio for this model is {tokens}x"
            )


def diffused(counts: NDArray[np.int64], levels: Sequence[int]) -> NDArray[np.int64]:
    """Numbers among ``levels`` that stay as near as they can to the running sum of ``counts``."""
    known, found, owed = np.asarray(levels), [], 0.0
    for count in counts.tolist():
        owed += count
        found.append(int(known[np.abs(known - owed).argmin()]))
        owed -= found[-1]
    return np.array(found, np.int64)


def nearest_levels(counts: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most ``most`` numbers, ascending, with the least squared distance of ``counts`` to the nearest of them.

    Exact k-means on a line, by dynamic programming over the sorted distinct counts: least[j] is the least cost of the
    counts up to j in the groups so far. Each number is the rounded mean of its group, which keeps the mean of all.
    """
    values, weights = np.unique(counts, return_counts=True)
    heads, sums, squares = (
        np.concatenate([[0.0], np.cumsum(weights * np.power(values, power, dtype=np.float64))]) for power in (0, 1, 2)
    )
    # cost[i, j]: squared distances of counts i..j to their mean.
    size, total, square = (part[None, 1:] - part[:-1, None] for part in (heads, sums, squares))
    cost = square - np.divide(total**2, size, out=np.zeros_like(total), where=size > 0)
    cost[np.tril_indices(len(values), -1)] = np.inf
    least, cuts = cost[0], []
    for _ in range(min(most, len(values)) - 1):
        before = np.concatenate([[np.inf], least[:-1]])[:, None] + cost  # one more group, which begins at i
        cuts.append(before.argmin(axis=0))
        least = before.min(axis=0)
    ends, last = [len(values)], len(values) - 1
    for cut in reversed(cuts):
        ends.append(int(cut[last]))
        last = ends[-1] - 1
    parts = [slice(start, end) for start, end in pairwise([0, *reversed(ends)])]
    return np.unique([round(np.average(values[part], weights=weights[part])) for part in parts])


def _checked_tau(tau: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(tau, dtype=np.float64)
    if values.size == 0 or not np.all((values >= -_TAU_SLACK) & (values <= 1 + _TAU_SLACK)):
        raise UsageError(f"noise level {tau!r} is outside [0, 1]: pass 1 for pure noise and 0 for clean data")
    return np.clip(values, 0.0, 1.0)
