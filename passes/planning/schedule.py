"""When tokens are spent: the kept fraction as a function of the noise level.

``tau`` is the noise level of the sample, 1 for pure noise and 0 for clean data, however the model measures time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.levels import diffused, levels_of, nearest

KINDS = ("constant", "rising", "falling")
CURVE = "curve"  # made by `dcconvert calibrate`
NATURAL = "natural"  # as many as the router scores above 0.5 (DC-DiT)
DIFFERENCE = "difference"  # patches as large as the third difference of the latents allows (DDiT)
DATA_DEPENDENT = (NATURAL, DIFFERENCE)  # the number is found at every step; the expected one is what runs kept
AUTO = -1  # warm-up steps chosen from the run's budget
LEVELS = 6  # different numbers of kept tokens in a run; each is a shape to export, compile and capture
WARM_UP = 3  # steps needed to see how values change; more would take compute from later steps (docs/carry.md)

# A time in float32 may overshoot the ends of [0, 1] by its rounding.
_TAU_SLACK = 1e-6
_OUT_OF_RANGE = "warm-up and refresh steps must not be negative, the mean kept fraction from 0 to 1"
_KNOTS = "a curve needs knots of positive kept fractions, and no other schedule has them"


def noise_levels(steps: int) -> NDArray[np.float64]:
    """The evenly spaced noise levels [steps] at which a run calls the model: from 1 to 1 / steps."""
    return 1 - np.arange(steps) / steps


def parse_ratio(text: str | float) -> float:
    """Read a ratio written as ``4x``, ``4`` or ``2.5x``; raises UsageError unless it is finite and at least 1."""
    try:
        ratio = float(text.strip().lower().removesuffix("x")) if isinstance(text, str) else float(text)
    except (TypeError, ValueError):
        ratio = math.nan
    if not math.isfinite(ratio) or ratio < 1:
        raise UsageError(
            f"ratio {text!r} is not a number of at least 1: write it as 4x, 4 or 2.5x (1 keeps everything)"
        )
    return ratio


Knots = tuple[tuple[float, float], ...]  # pairs of tau and kept fraction, by rising tau


@dataclass(frozen=True)
class Policy:
    """How a sampling run should spend its tokens, whatever its steps are: on average, it keeps 1/ratio of them.

    ``rising`` keeps more tokens toward clean samples, ``falling`` fewer. Both range from 0.5 to 1.5 times the mean; if
    the upper end would exceed 1, it is 1 and the lower end is higher, so that the mean stays the same. ``curve`` is
    linear between ``knots``, pairs of tau and kept fraction, scaled to the mean and cut off at 1. The first ``warm_up``
    steps of a run, and after them every ``refresh``-th (0: none), are dense: they keep everything. ``AUTO`` stands for
    three, but no more than half of the run's budget.

    ``natural`` and ``difference`` find the number of tokens at every step. ``base`` is the ratio that a router was made
    for: at a larger one, the fraction 1 - base/ratio of the tokens that it scores above 0.5 is dropped, the lowest
    first (tail dropping). ``threshold``: that of DDiT's criterion.

    ``timetable`` gives the numbers of tokens that result. Raises UsageError for an unknown kind, a ratio below 1, and
    knots or numbers out of range.
    """

    kind: str
    ratio: float
    warm_up: int = 0
    refresh: int = 0
    knots: Knots = ()
    base: float = 0.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, CURVE, *DATA_DEPENDENT):
            raise UsageError(f"unknown schedule {self.kind!r}: choose one of {', '.join(KINDS)}")
        object.__setattr__(self, "ratio", parse_ratio(self.ratio))
        object.__setattr__(self, "knots", _checked_knots(self.knots))
        if self.warm_up < AUTO or self.refresh < 0:
            raise UsageError(_OUT_OF_RANGE)
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
        if (self.kind == CURVE) != bool(self.knots):
            raise UsageError(_KNOTS)

    @property
    def data_dependent(self) -> bool:
        """Whether the numbers of kept tokens are found at every step."""
        return self.kind in DATA_DEPENDENT

    @property
    def dropped(self) -> float:
        """The fraction of the natural tokens that is dropped."""
        return 1 - self.base / self.ratio if self.base else 0.0

    def check(self, tokens: int) -> None:
        """Raise UsageError if the ratio leaves a sample less than one of its ``tokens`` tokens."""
        if self.ratio > tokens:
            raise UsageError(
                f"ratio {self.ratio:g}x leaves less than one of the {tokens} tokens of a sample: "
                f"the largest ratio for this model is {tokens}x"
            )

    def is_dense(self, step: NDArray[np.int64], warm_up: int) -> NDArray[np.bool_]:
        """Whether the steps with these numbers keep everything, in a run with `warm_up` warm-up steps."""
        warm = step < warm_up
        return warm | ((step - warm_up + 1) % self.refresh == 0) if self.refresh else warm

    def timetable(self, taus: ArrayLike | None = None) -> Timetable:
        """The policy fitted to ``taus``, the steps of one sampling run in order: their mean is 1/ratio.

        Raises UsageError if the dense steps alone cost more. With None, it is not fitted to a particular sampler: the
        mean is 1/ratio over evenly spread noise levels and sparse steps, a curve stays as it is, and ``AUTO`` means no
        warm-up.
        """
        if taus is None:
            return Timetable(self, mean=1 / self.ratio, dense_first=max(self.warm_up, 0))
        if self.ratio == 1:  # no step can be denser than the others
            return Timetable(replace(self, knots=tuple((tau, 1.0) for tau, _ in self.knots)), mean=1.0)
        taus = _checked_tau(taus).ravel()
        steps, budget = len(taus), len(taus) / self.ratio
        first = min(WARM_UP, max(1, int(budget / 2))) if self.warm_up == AUTO else self.warm_up
        dense = self.is_dense(np.arange(steps), first)
        sparse = ~dense
        if not sparse.any() or budget <= dense.sum():
            raise UsageError(
                f"{dense.sum()} steps that keep everything, of {steps}, leave nothing for the others at "
                f"{self.ratio:g}x: fewer warm-up or refresh steps, a lower ratio, or more sampling steps"
            )
        mean = min(1.0, float((budget - dense.sum()) / sparse.sum()))
        policy = replace(self, knots=_scaled(self.knots, taus[sparse], mean)) if self.knots else self
        return Timetable(policy, mean, float(np.mean(taus[sparse])), first)


@dataclass(frozen=True)
class Timetable:
    """How many tokens each step keeps: a policy fitted to the steps of one sampler, or to none in particular.

    ``mean`` and ``centre``: mean kept fraction and mean tau of the sparse steps; ``dense_first``: the number of warm-up
    steps. The knots of the policy's curve are scaled to that mean. ``levels``: each step keeps the nearest of these
    numbers of tokens, so that the static shapes of an exported model need no padding; empty: any number.

    If the numbers are found at every step, the fraction is what a run is expected to keep: once runs have been
    observed, ``seen`` has the fractions that they kept, as knots, and ``mean`` is their mean. Raises UsageError for
    numbers out of range.
    """

    policy: Policy
    mean: float
    centre: float = 0.5
    dense_first: int = 0
    levels: tuple[int, ...] = ()
    seen: Knots = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(int(level) for level in self.levels))
        object.__setattr__(self, "seen", _checked_knots(self.seen))
        _checked_tau(self.centre)
        if any(low >= high for low, high in pairwise((0, *self.levels))):
            raise UsageError(f"levels {list(self.levels)}: numbers of tokens must be positive and rising")
        if self.dense_first < 0 or not 0 < self.mean <= 1:
            raise UsageError(_OUT_OF_RANGE)
        if self.seen and not self.data_dependent:
            raise UsageError(_KNOTS)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timetable:
        """Undo ``as_dict``; in older files, a mean of 0 means that the schedule was not fitted to a sampler."""
        own = {field.name: data[field.name] for field in fields(Policy) if field.name in data}
        if unknown := data.keys() - own.keys() - {"centre", "mean", "dense_first", "levels"}:
            raise TypeError(f"a schedule has no {', '.join(sorted(unknown))}")
        seen = own.pop("knots", ()) if own["kind"] in DATA_DEPENDENT else ()
        made = replace(Policy(**own).timetable(), levels=data.get("levels", ()), seen=seen)
        made = replace(made, centre=data.get("centre", made.centre))
        return replace(made, mean=data["mean"], dense_first=data["dense_first"]) if data.get("mean") else made

    def as_dict(self) -> dict[str, Any]:
        """The fields as a bundle stores them."""
        own = {name: getattr(self, name) for name in ("mean", "centre", "dense_first", "knots", "levels")}
        return asdict(self.policy) | own

    @property
    def kind(self) -> str:
        return self.policy.kind

    @property
    def ratio(self) -> float:
        return self.policy.ratio

    @property
    def data_dependent(self) -> bool:
        """Whether the numbers of kept tokens are found at every step."""
        return self.policy.data_dependent

    @property
    def knots(self) -> Knots:
        """The knots of a curve, or of what runs were seen to keep; empty if there is neither."""
        return self.policy.knots or self.seen

    @property
    def expected(self) -> float:
        """The mean fraction that a run keeps: as observed if it is found at every step, otherwise 1 / ratio."""
        return self.mean if self.data_dependent else 1 / self.ratio

    def fitted(self, taus: ArrayLike) -> Timetable:
        """The same timetable for the steps of another run; errors as in ``Policy.timetable``."""
        made = replace(self.policy.timetable(taus), levels=self.levels)
        if not self.seen:
            return made
        if self.ratio == 1:
            return replace(made, seen=tuple((tau, 1.0) for tau, _ in self.seen))
        return replace(made, seen=self.seen, mean=self.mean)

    def dropping(self, ratio: float) -> Timetable:
        """The same timetable at a larger ratio, by tail dropping; raises UsageError if that needs a new threshold."""
        if self.kind == DIFFERENCE:
            raise UsageError(
                f"patch sizes are chosen by a threshold found for {self.ratio:g}x: convert again for {ratio:g}x"
            )
        less = self.ratio / ratio
        seen = tuple((tau, kept * less) for tau, kept in self.seen)
        fewer = {math.ceil(level * less - 1e-9) for level in self.levels[:-1]}  # the last one keeps everything
        levels = tuple(sorted({*fewer, *self.levels[-1:]}))
        mean = self.mean * less if seen else 1 / ratio
        return replace(self, policy=replace(self.policy, ratio=ratio), seen=seen, mean=mean, levels=levels)

    def levelled(self, taus: ArrayLike, tokens: int, most: int = LEVELS, sizes: Sequence[int] = ()) -> Timetable:
        """The same timetable with at most ``most`` numbers of kept tokens in a run, including ``tokens``.

        They are the ones nearest to a run fitted to ``taus``, so that only rounding changes its mean; they come from
        ``sizes`` if the model can keep only certain numbers. If the numbers are found at every step, the levels are all
        sizes, or evenly spaced. Errors as in ``fitted``.
        """
        if self.data_dependent:
            even = np.geomspace(max(1, tokens / self.ratio / 2), tokens, most).round().astype(int)
            return replace(self, levels=tuple(sorted(sizes) if sizes else np.unique(even).tolist()))
        counts = self.policy.timetable(taus).run_counts(taus, tokens)
        return replace(self, levels=levels_of(counts, tokens, most, sizes))

    def fraction(self, tau: ArrayLike) -> NDArray[np.float64]:
        """Kept fraction, in (0, 1], of a sparse step, in the shape of ``tau``; raises UsageError outside [0, 1]."""
        tau = _checked_tau(tau)
        if self.knots:
            return _interpolated(self.knots, tau)
        # Dividing by the longer side keeps both ends of [0, 1] inside the bounds when the run is off centre.
        slope = (min(1.0, 1.5 * self.mean) - self.mean) / max(self.centre, 1 - self.centre)
        sign = {"constant": 0, "rising": -1, "falling": 1}.get(self.kind, 0)
        return np.minimum(self.mean + sign * slope * (tau - self.centre), 1.0)

    def step_fraction(self, tau: ArrayLike, step: ArrayLike) -> NDArray[np.float64]:
        """Kept fraction, in (0, 1], at each ``tau``, ``step`` steps after a run began; 1 for the dense steps."""
        return np.where(self.policy.is_dense(np.asarray(step), self.dense_first), 1.0, self.fraction(tau))

    def counts(self, tau: ArrayLike, tokens: int, step: ArrayLike | None = None) -> NDArray[np.int64]:
        """Kept tokens per sample at each ``tau``, out of ``tokens``: rounded, at least 1, one of the levels if there
        are any. Errors as in ``Policy.check``.

        ``step`` counts the steps since each run began, which decides which are dense; without it, none is.
        """
        self.policy.check(tokens)
        counts = np.maximum(np.rint(self.fraction(tau) * tokens), 1).astype(np.int64)
        if self.levels and not self.data_dependent:  # if they are found at every step, only their mean is known
            counts = nearest(self.levels, counts)
        if step is None:
            return counts
        return np.where(self.policy.is_dense(np.asarray(step), self.dense_first), tokens, counts)

    def run_counts(self, taus: ArrayLike, tokens: int) -> NDArray[np.int64]:
        """Kept tokens per sample at every step of a run; for ``difference``, levels that add up to the expected
        number."""
        counts = self.counts(taus, tokens, np.arange(np.size(taus)))
        return diffused(counts, self.levels) if self.kind == DIFFERENCE and self.levels else counts


def _interpolated(knots: Knots, tau: NDArray[np.float64]) -> NDArray[np.float64]:
    """The curve through knots at each ``tau``, cut off at 1."""
    levels, kept = np.transpose(knots)
    return np.minimum(np.interp(tau, levels, kept), 1.0)


def _scaled(knots: Knots, taus: NDArray[np.float64], mean: float) -> Knots:
    """Knots whose curve, cut off at 1, has this mean over ``taus``; the cut-off requires a search for their scale."""
    for _ in range(60):
        scale = mean / float(np.mean(_interpolated(knots, taus)))
        knots = tuple((tau, kept * scale) for tau, kept in knots)
    return knots


def _checked_knots(knots: Iterable[Sequence[float]]) -> Knots:
    """Knots as plain numbers; raises UsageError if they do not form a curve."""
    checked = tuple((float(tau), float(kept)) for tau, kept in knots)
    if any(not 0 < kept < math.inf for _, kept in checked):
        raise UsageError(_KNOTS)
    if checked and not np.all(np.diff(_checked_tau([tau for tau, _ in checked])) > 0):
        raise UsageError("the knots of a curve must have rising noise levels")
    return checked


def _checked_tau(tau: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(tau, dtype=np.float64)
    if values.size == 0 or not np.all((values >= -_TAU_SLACK) & (values <= 1 + _TAU_SLACK)):
        raise UsageError(f"noise level {tau!r} is outside [0, 1]: pass 1 for pure noise and 0 for clean data")
    return np.clip(values, 0.0, 1.0)
