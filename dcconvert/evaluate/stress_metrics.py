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

if TYPE_CHECKING:
    from dcconvert.evaluate.stress_cases import Cases

WORST = 6  # cases of each ratio in failures.json
MEANS = ("psnr", "detail_psnr", "control_psnr", "control_detail_psnr")
LOOKED = ("attention_to_detail", "one_step_error", "dropped_error", "error_with_detail", "error_with_dropped")
AGES = ("mean_age", "detail_age")


@dataclass(frozen=True)
class Look:
    """What the converted model did at one step, for all cases.

    `keep` bool [n, h, w]: tokens that were computed. `error` [n, h, w]: of the prediction, squared, mean over the
    pixels of a token, relative to the mean square of the original's prediction for the same input. `age` [n, h, w]:
    steps since a token was computed; None in mode chunk, which remembers nothing.
    """

    tau: float
    timestep: float
    keep: np.ndarray
    error: Tensor
    age: np.ndarray | None


@dataclass(frozen=True)
class Outcome:
    """All cases at one ratio: final images [n, C, H, W], looks at an early and a late step, and the control.

    `cost`: of one case's run, in steps of the original. `controls`: images of the original with so many steps, the
    whole numbers next to `cost`.
    """

    ratio: float
    cost: float
    images: Tensor
    controls: dict[int, Tensor]
    looks: list[Look]

    @property
    def control_shares(self) -> dict[int, float]:
        """The weights of the controls, chosen so that together they cost as much as the run."""
        low, high = min(self.controls), max(self.controls)
        upper = min(1.0, max(0.0, self.cost - low))
        return {low: 1.0} if low == high else {low: 1 - upper, high: upper}


def detail_psnr(found: Tensor, wanted: Tensor, detail: Tensor) -> Tensor:
    """PSNR [n] in dB in which every token's squared error weighs as much as its detail [n, h, w]."""
    grid = (detail.shape[1], detail.shape[2])
    weights = detail / detail.sum((1, 2), keepdim=True)
    area = found.shape[2] // grid[0] * (found.shape[3] // grid[1])
    return decibels((on_tokens(squared_error(found, wanted), grid) / area * weights).sum((1, 2)))


def judged(cases: Cases, outcome: Outcome, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """The figures of every case at one ratio; `case` is its number."""
    wanted, detail, shares = cases.wanted, cases.detail, outcome.control_shares

    def control(values: dict[int, Tensor]) -> Tensor:
        return torch.stack([share * values[steps] for steps, share in shares.items()]).sum(0)

    columns = {
        "psnr": psnr(outcome.images, wanted),
        "detail_psnr": detail_psnr(outcome.images, wanted, detail),
        "control_psnr": control({n: psnr(images, wanted) for n, images in outcome.controls.items()}),
        "control_detail_psnr": control({n: detail_psnr(i, wanted, detail) for n, i in outcome.controls.items()}),
    }
    result = []
    for i in range(len(cases)):
        label = int(cases.labels[i])
        facts = {
            "case": i,
            "kind": cases.kinds[i],
            "seed": cases.seeds[i],
            "source_index": cases.sources[i],
            "class": label,
            "class_name": class_names[label] if label < len(class_names) else None,
            "ratio": outcome.ratio,
            "cost": outcome.cost,
            **{name: float(values[i]) for name, values in columns.items()},
            "control_steps": list(shares),
            "looks": [look_at(look, i, detail[i]) for look in outcome.looks],
        }
        result.append(facts)
    return result


def look_at(look: Look, i: int, detail: Tensor) -> dict[str, Any]:
    """One case at one step: which tokens were kept, how much of the detail [h, w] they hold, where the error is.

    `attention_to_detail`: share of the detail in kept tokens over the share of tokens that were kept; 1 is chance, less
    means that detail is starved. `dropped_error`: mean error of dropped tokens over that of kept ones.
    `error_with_detail`, `error_with_dropped`: correlation of the tokens' errors with their detail, and with being
    dropped. `mean_age`, `detail_age`: steps since a token was computed, mean, and mean weighted by detail. None if
    undefined: nothing was dropped, or mode chunk, which has no ages.
    """
    keep, error = torch.from_numpy(look.keep[i]), look.error[i]
    share, weights = float(keep.float().mean()), detail / detail.sum()
    held = float(weights[keep].sum())
    dropped = float(error[~keep].mean() / error[keep].mean().clamp_min(1e-12)) if share < 1 else None
    age = None if look.age is None else torch.from_numpy(look.age[i]).float()
    return {
        "noise_level": look.tau,
        "timestep": round(look.timestep, 3),
        "kept_tokens": int(keep.sum()),
        "kept": [int(token) for token in keep.flatten().nonzero()],
        "detail_kept": held,
        "attention_to_detail": held / share,
        "one_step_error": float(error.mean()),
        "dropped_error": dropped,
        "error_with_detail": correlation(error, detail),
        "error_with_dropped": correlation(error, (~keep).float()),
        "mean_age": None if age is None else float(age.mean()),
        "detail_age": None if age is None else float((age * weights).sum()),
    }


def correlation(first: Tensor, second: Tensor) -> float | None:
    """Pearson's correlation of two maps; None if one of them is the same everywhere."""
    a, b = (part.double().flatten() - part.double().mean() for part in (first, second))
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 1e-12 else None


def worst_of(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases of each ratio with the lowest PSNR in the detail, lowest first; NaN is the worst."""
    found = []
    for ratio in dict.fromkeys(facts["ratio"] for facts in cases):
        some = [facts for facts in cases if facts["ratio"] == ratio]
        found += sorted(some, key=lambda facts: rank(facts["detail_psnr"]))[:WORST]
    return found


def rank(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def summary(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each ratio and kind, with means over its cases; None if no case has the figure."""
    rows = []
    for ratio, kind in dict.fromkeys((facts["ratio"], facts["kind"]) for facts in cases):
        some = [facts for facts in cases if (facts["ratio"], facts["kind"]) == (ratio, kind)]
        row = {"ratio": ratio, "kind": kind, "cases": len(some)}
        row |= {name: some[0][name] for name in ("cost", "control_steps")}  # the same for all of a ratio
        row |= {name: mean([facts[name] for facts in some]) for name in MEANS}
        for number, when in enumerate(("early", "late")):
            looks = [facts["looks"][number] for facts in some]
            row |= {f"{name}_{when}": mean([look[name] for look in looks]) for name in (*LOOKED, *AGES)}
        rows.append(row)
    return rows


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
