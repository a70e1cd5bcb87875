"""Where a router gives detail too few tokens: the figures of a stress test, for each case and as means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.evaluate.detail_kinds import on_tokens
from dcconvert.images.pixels import decibels, psnr, squared_error
from dcconvert.records import Record, stated

if TYPE_CHECKING:
    from dcconvert.evaluate.stress_cases import Cases
    from dcconvert.sampling.run_table import RunTable
    from dcconvert.sampling.samplers import Sampler

ALL = "all"  # the kind of a row over all cases
WORST = 6  # cases of each ratio in failures.json
MEANS = ("psnr", "detail_psnr", "control_psnr", "control_detail_psnr", "full_psnr", "full_detail_psnr")
LOOKED = (
    "attention_to_detail",
    "one_step_error",
    "dropped_error",
    "error_with_detail",
    "error_with_dropped",
    "mean_age",
    "detail_age",
)


@dataclass(frozen=True)
class Look:
    """What the converted model did at one step, for all cases.

    `keep` bool [n, h, w]: tokens that were computed. `error` [n, h, w]: of the prediction, squared, mean over the
    pixels of a token, relative to the mean square of the original's prediction for the same input. `age` [n, h, w]:
    steps since a token was computed; None in mode chunk, which has no state.
    """

    tau: float
    timestep: float
    keep: np.ndarray
    error: Tensor
    age: np.ndarray | None


@dataclass(frozen=True)
class Outcome:
    """All cases at one ratio: final images [n, C, H, W], looks at an early and a late step, and the control.

    `cost`: what the run of one case costs, in steps of the original. `controls`: images of the original by its number
    of steps, for the whole numbers next to `cost`. In mode steps there are no looks, because no step chooses tokens,
    and `in_full` are the images of the original's own run.
    """

    ratio: float
    cost: float
    images: Tensor
    controls: dict[int, Tensor]
    looks: list[Look]
    in_full: Tensor | None = None

    @property
    def control_shares(self) -> dict[int, float]:
        """The weights of the controls, chosen so that together they cost as much as the run."""
        low, high = min(self.controls), max(self.controls)
        upper = min(1.0, max(0.0, self.cost - low))
        return {low: 1.0} if low == high else {low: 1 - upper, high: upper}


@dataclass(frozen=True)
class CaseLook(Record):
    """One case at one step: which tokens were computed, how much of the detail they hold, and where the error is.

    `attention_to_detail`: share of the detail in computed tokens over the share of tokens that were computed; 1 is
    chance, less means that detail is starved. `dropped_error`: mean error of dropped tokens over that of computed ones.
    `error_with_detail`, `error_with_dropped`: correlation of the tokens' errors with their detail, and with being
    dropped. `mean_age`, `detail_age`: steps since a token was computed, mean, and mean weighted by detail. A figure is
    None where it is undefined: nothing was dropped, or mode chunk, which has no ages.
    """

    noise_level: float
    timestep: float
    kept_tokens: int
    kept: tuple[int, ...]
    detail_kept: float
    attention_to_detail: float
    one_step_error: float
    dropped_error: float | None
    error_with_detail: float | None
    error_with_dropped: float | None
    mean_age: float | None
    detail_age: float | None


@dataclass(frozen=True)
class CaseFigures(Record):
    """One case at one ratio, as failures.json lists it. `source_index` is its place among the images to choose from.

    Mode steps has no looks, but the figures of the original in full.
    """

    kind: str
    seed: int
    source_index: int
    class_: int
    class_name: str | None
    ratio: float
    cost: float
    psnr: float
    detail_psnr: float
    control_psnr: float
    control_detail_psnr: float
    control_steps: tuple[int, ...]
    looks: tuple[CaseLook, ...]
    full_psnr: float | None = None
    full_detail_psnr: float | None = None

    @property
    def gain(self) -> float:
        """How much better than the control, in dB."""
        return self.psnr - self.control_psnr

    @property
    def detail_gain(self) -> float:
        return self.detail_psnr - self.control_detail_psnr


@dataclass(frozen=True, kw_only=True)
class StressRow(Record):
    """Means over the cases of one kind of detail at one ratio; None where there is no such figure.

    Fields with a default are those that old reports may lack. `gain` and `detail_gain`: how much better than the
    control, paired over the cases, with standard errors.
    """

    ratio: float
    kind: str
    cases: int = 0
    cost: float
    control_steps: tuple[int, ...]
    psnr: float | None
    detail_psnr: float | None
    control_psnr: float | None
    control_detail_psnr: float | None
    attention_to_detail_early: float | None
    one_step_error_early: float | None = stated()
    dropped_error_early: float | None = stated()
    error_with_detail_early: float | None = stated()
    error_with_dropped_early: float | None = stated()
    mean_age_early: float | None = stated()
    detail_age_early: float | None = stated()
    attention_to_detail_late: float | None
    one_step_error_late: float | None = stated()
    dropped_error_late: float | None = stated()
    error_with_detail_late: float | None = stated()
    error_with_dropped_late: float | None = stated()
    mean_age_late: float | None = stated()
    detail_age_late: float | None = stated()
    full_psnr: float | None = None
    full_detail_psnr: float | None = None
    gain: float | None = None
    gain_error: float | None = None
    detail_gain: float | None = None
    detail_gain_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Skipping(Record):
    """Mode steps: the run that was tested, and what its images were compared with.

    `full_steps`, `full_solver`: the original's own run. `reference_steps`: of the original, with Adams, that is taken
    as converged; `converged`: PSNR in the detail, in dB, between it and a run of half as many steps.
    """

    computed: int
    skipped: int
    fitted: bool
    guidance: float
    full_steps: int
    full_solver: str
    reference_steps: int
    converged: float | None


@dataclass(frozen=True)
class Tested:
    """What a stress test ran: the bundle's run, the cases, an outcome for each ratio, and what was left out."""

    run: Sampler | RunTable
    cases: Cases
    outcomes: list[Outcome]
    left_out: list[str]
    skipping: Skipping | None = None


def detail_psnr(found: Tensor, wanted: Tensor, detail: Tensor) -> Tensor:
    """PSNR [n] in dB in which the squared error of every token is weighted by its detail [n, h, w]."""
    grid = (detail.shape[1], detail.shape[2])
    weights = detail / detail.sum((1, 2), keepdim=True)
    area = found.shape[2] // grid[0] * (found.shape[3] // grid[1])
    return decibels((on_tokens(squared_error(found, wanted), grid) / area * weights).sum((1, 2)))


def judged(cases: Cases, outcome: Outcome, class_names: Sequence[str]) -> list[CaseFigures]:
    """The figures of every case at one ratio."""
    wanted, detail, shares = cases.wanted, cases.detail, outcome.control_shares

    def control(values: dict[int, Tensor]) -> Tensor:
        return torch.stack([share * values[steps] for steps, share in shares.items()]).sum(0)

    columns = {
        "psnr": psnr(outcome.images, wanted),
        "detail_psnr": detail_psnr(outcome.images, wanted, detail),
        "control_psnr": control({n: psnr(images, wanted) for n, images in outcome.controls.items()}),
        "control_detail_psnr": control({n: detail_psnr(i, wanted, detail) for n, i in outcome.controls.items()}),
    }
    if (full := outcome.in_full) is not None:
        columns |= {"full_psnr": psnr(full, wanted), "full_detail_psnr": detail_psnr(full, wanted, detail)}
    return [
        CaseFigures(
            kind=cases.kinds[i],
            seed=cases.seeds[i],
            source_index=cases.sources[i],
            class_=label,
            class_name=class_names[label] if label < len(class_names) else None,
            ratio=outcome.ratio,
            cost=outcome.cost,
            control_steps=tuple(shares),
            looks=tuple(look_at(look, i, detail[i]) for look in outcome.looks),
            **{name: float(values[i]) for name, values in columns.items()},
        )
        for i, label in enumerate(cases.labels.tolist())
    ]


def look_at(look: Look, i: int, detail: Tensor) -> CaseLook:
    """The figures of case `i`, whose detail is [h, w]."""
    keep, error = torch.from_numpy(look.keep[i]), look.error[i]
    share, weights = float(keep.float().mean()), detail / detail.sum()
    held = float(weights[keep].sum())
    age = None if look.age is None else torch.from_numpy(look.age[i]).float()
    return CaseLook(
        noise_level=look.tau,
        timestep=round(look.timestep, 3),
        kept_tokens=int(keep.sum()),
        kept=tuple(keep.flatten().nonzero().flatten().tolist()),
        detail_kept=held,
        attention_to_detail=held / share,
        one_step_error=float(error.mean()),
        dropped_error=float(error[~keep].mean() / error[keep].mean().clamp_min(1e-12)) if share < 1 else None,
        error_with_detail=correlation(error, detail),
        error_with_dropped=correlation(error, (~keep).float()),
        mean_age=None if age is None else float(age.mean()),
        detail_age=None if age is None else float((age * weights).sum()),
    )


def correlation(first: Tensor, second: Tensor) -> float | None:
    """Pearson's correlation of two maps; None if one of them is the same everywhere."""
    a, b = (part.double().flatten() - part.double().mean() for part in (first, second))
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 1e-12 else None


def worst_of(cases: Sequence[CaseFigures]) -> list[CaseFigures]:
    """The cases of each ratio with the lowest PSNR in the detail, lowest first; NaN is the worst."""

    def value(case: CaseFigures) -> float:
        return case.detail_psnr if math.isfinite(case.detail_psnr) else -math.inf

    found = []
    for ratio in dict.fromkeys(case.ratio for case in cases):
        found += sorted((case for case in cases if case.ratio == ratio), key=value)[:WORST]
    return found


def summary(cases: Sequence[CaseFigures], *, total: bool = False) -> list[StressRow]:
    """A row for each ratio and kind, with means over its cases; `total`: and one over all cases of each ratio."""
    groups: dict[tuple[float, str], list[CaseFigures]] = {}
    for case in cases:
        groups.setdefault((case.ratio, case.kind), []).append(case)
    for case in cases if total else ():
        groups.setdefault((case.ratio, ALL), []).append(case)
    return [row_of(some, kind) for (_, kind), some in groups.items()]


def row_of(cases: Sequence[CaseFigures], kind: str) -> StressRow:
    """A row of means over cases of one ratio."""
    means: dict[str, Any] = {name: mean(cases, name) for name in MEANS}
    for name in ("gain", "detail_gain"):
        means |= {name: mean(cases, name), f"{name}_error": standard_error(cases, name)}
    for number, when in enumerate(("early", "late")):
        looks = [case.looks[number] for case in cases if case.looks]
        means |= {f"{name}_{when}": mean(looks, name) for name in LOOKED}
    first = cases[0]  # cost and steps are the same for all of a ratio
    return StressRow(
        ratio=first.ratio, kind=kind, cases=len(cases), cost=first.cost, control_steps=first.control_steps, **means
    )


def standard_error(cases: Sequence[CaseFigures], name: str) -> float | None:
    """Of the mean of one figure; None for a single case, or where it is not finite."""
    values = np.array([getattr(case, name) for case in cases])
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    return float(values.std(ddof=1) / len(values) ** 0.5)


def mean(records: Sequence[Record], name: str) -> float | None:
    """The mean of one figure; None if no record has it, or if the mean is not finite."""
    known = [value for value in (getattr(record, name) for record in records) if value is not None]
    found = float(np.mean(known)) if known else math.nan
    return found if math.isfinite(found) else None
