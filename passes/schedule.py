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
    """Linear or constant kept fraction whose mean over a sampling run is 1/ratio.

    ``rising`` keeps more tokens toward clean samples, ``falling`` fewer. Both run between 0.5/ratio and 1.5/ratio;
    where the upper end would pass 1 it stops there and the lower end moves up, so that the mean stays.
    ``centre`` is the mean tau of the run: 0.5 for all of [0, 1]; ``centred`` sets it for the steps of a given sampler.
    UsageError for an unknown kind, a ratio below 1 or a centre outside [0, 1].
    """

    kind: str
    ratio: float
    centre: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"unknown schedule {self.kind!r}: choose one of {', '.join(KINDS)}")
        object.__setattr__(self, "ratio", parse_ratio(self.ratio))
        _checked_tau(self.centre)

    def centred(self, taus: ArrayLike) -> Schedule:
        """Return the same schedule with its mean over ``taus``, the steps of one sampling run, equal to 1/ratio."""
        return replace(self, centre=float(np.mean(_checked_tau(taus))))

    def fraction(self, tau: ArrayLike) -> NDArray[np.float64]:
        """Kept fraction, in (0, 1], at each ``tau``; same shape. UsageError if a tau is outside [0, 1]."""
        tau = _checked_tau(tau)
        mean = 1 / self.ratio
        # Dividing by the longer side keeps both ends of [0, 1] inside the bounds when the run is off centre.
        slope = (min(1.0, 1.5 * mean) - mean) / max(self.centre, 1 - self.centre)
        sign = {"constant": 0, "rising": -1, "falling": 1}[self.kind]
        return np.minimum(mean + sign * slope * (tau - self.centre), 1.0)

    def counts(self, tau: ArrayLike, tokens: int) -> NDArray[np.int64]:
        """Kept tokens a sample at each ``tau``, out of ``tokens``: rounded, at least 1. UsageError as ``check``."""
        self.check(tokens)
        return np.maximum(np.rint(self.fraction(tau) * tokens), 1).astype(np.int64)

    def mean_fraction(self, taus: ArrayLike) -> float:
        """Mean kept fraction over the steps of a run."""
        return float(np.mean(self.fraction(taus)))

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
