"""Fit the numbers of a run table to a model, by least squares and without a gradient.

A table is fitted step by step: after all earlier steps have been fitted, the move of this one is fitted to where a
converged run of the same noise is at the next noise level, and the forecast of a skipped step to the update that the
trunk would have made. This is the stagewise form of bespoke non-stationary solvers (Shaul et al., arXiv 2403.01329),
with steps that skip the trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.spec import UPDATES
from dcconvert.sampling.default_tables import levels_of
from dcconvert.sampling.run_table import Row, RunTable, both_halves, evaluated, moved

OUTPUTS = 5  # of the model, that a move is fitted to
RIDGE = 1e-4  # relative to a regressor's own size: outputs of neighbouring steps are nearly the same


class FittedModel(Protocol):
    """A model inside one run, as `run_table.Model`, that shows its trunk's updates."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor: ...

    @property
    def updates(self) -> Sequence[Tensor]:
        """The trunk's last updates [B, N, D], newest first."""

    def update(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The trunk's update at a step that is not part of the run."""


@dataclass(frozen=True)
class Trajectory:
    """A converged run: samples [L, B, C, H, W] at noise levels [L] (`levels_of`), falling to 0."""

    levels: np.ndarray
    samples: Tensor

    def at(self, level: float) -> Tensor:
        """The samples at a noise level, by a cubic through the four levels around it."""
        place = int(np.searchsorted(-self.levels, -level))
        first = min(max(place - 2, 0), len(self.levels) - 4)
        points = self.levels[first : first + 4]
        weights = [np.prod([(level - q) / (p - q) for q in points if q != p]) for p in points]
        return sum((w * s for w, s in zip(weights, self.samples[first : first + 4], strict=True)), 0 * self.samples[0])


@torch.no_grad()
def trajectory(
    table: RunTable,
    model: FittedModel,
    noise: Tensor,
    labels: Tensor,
    null_class: int | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> Trajectory:
    """Where a run from `noise` [B, C, H, W] is after each of its steps."""
    found = [noise]
    for number, x in enumerate(table.samples(model, noise, labels, null_class=null_class)):
        found.append(x)
        on_step(number)
    return Trajectory(levels_of(table), torch.stack(found))


@torch.no_grad()
def fitted(
    structure: RunTable,
    model: FittedModel,
    noise: Tensor,
    labels: Tensor,
    reference: Trajectory,
    *,
    null_class: int | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> RunTable:
    """The table with its numbers fitted on runs from `noise` [B, C, H, W]; its steps stay what they are.

    Each step regresses on the sample, the noise, the last OUTPUTS outputs of the model and, where it skips the trunk,
    on the last UPDATES updates. UsageError for a reference that is not finite.
    """
    if not torch.isfinite(reference.samples).all():
        raise UsageError("the reference run holds numbers that are not finite: the model cannot be sampled")
    x, rows, levels = noise, [], levels_of(structure)
    made: list[Tensor] = []
    for number, row in enumerate(structure.rows):
        if not row.full:
            row = with_forecast(row, model, x, labels, structure.guidance, null_class)
        made.insert(0, evaluated(model, x, row, labels, structure.guidance, null_class, structure.updates > 0))
        del made[max(OUTPUTS, len(row.outputs)) :]
        row = with_move(row, x, noise, made, reference.at(levels[number + 1]))
        x = moved(row, x, noise, made)
        rows.append(row)
        on_step(number)
    return replace(structure, rows=tuple(rows), fitted=True)


def with_forecast(
    row: Row, model: FittedModel, x: Tensor, labels: Tensor, guidance: float, null_class: int | None
) -> Row:
    """The row with its weights fitted to the update that the trunk would make."""
    if guidance != 1 and null_class is not None:
        x, labels = both_halves(x, labels, null_class)
    wanted = model.update(x, torch.full((len(x),), row.t, device=x.device), labels)
    known = list(model.updates)[:UPDATES]
    weights = padded(row.weights, len(known))
    missing = wanted - sum(w * u for w, u in zip(weights.tolist(), known, strict=True))
    return replace(row, weights=tuple((weights + least_squares([], known, missing, RIDGE)).tolist()))


def with_move(row: Row, x: Tensor, noise: Tensor, made: Sequence[Tensor], wanted: Tensor) -> Row:
    """The row with its move fitted to where the sample should be next."""
    known = list(made[:OUTPUTS])
    missing = wanted - moved(row, x, noise, made)
    found = least_squares([x, noise], known, missing, RIDGE)
    coefficients = padded(row.outputs, max(len(known), len(row.outputs)))
    coefficients[: len(known)] += found[2:]
    return replace(
        row, state=row.state + float(found[0]), noise=row.noise + float(found[1]), outputs=tuple(coefficients.tolist())
    )


def padded(values: Sequence[float], length: int) -> np.ndarray:
    """The values as an array, with zeros up to a length; values beyond it must be zero already."""
    return np.pad(np.array(values, np.float64)[:length], (0, max(0, length - len(values))))


def least_squares(plain: Sequence[Tensor], history: Sequence[Tensor], wanted: Tensor, ridge: float) -> np.ndarray:
    """Coefficients of `plain` and `history`, in this order, that add up to `wanted`, all of them [B, ...].

    The history enters as its newest member and differences between neighbours, which are nearly independent where its
    members are not. Otherwise as in `ridge_solution`.
    """
    units, steps = zip(*differences(history), strict=True)
    found = ridge_solution(torch.stack([*plain, *steps]), wanted, ridge)
    first = len(plain)
    coefficients = np.zeros(first + len(history))
    coefficients[:first] = found[:first]
    for unit, value in zip(units, found[first:], strict=True):
        coefficients[first : first + len(unit)] += value * np.array(unit)
    return coefficients


def differences(history: Sequence[Tensor]) -> Iterator[tuple[tuple[float, ...], Tensor]]:
    """The newest member and the differences between neighbours, each with its coefficients."""
    yield (1.0,), history[0]
    for age in range(1, len(history)):
        yield (*[0.0] * (age - 1), 1.0, -1.0), history[age - 1] - history[age]


def ridge_solution(parts: Tensor, wanted: Tensor, ridge: float) -> np.ndarray:
    """Coefficients [R] of `parts` [R, B, ...] whose sum is nearest to `wanted` [B, ...].

    Images count by the inverse of what is wanted of them, so that none outweighs the others. `ridge` is relative to a
    part's own size.
    """
    flat, goal = parts.flatten(2).double(), wanted.flatten(1).double()
    weight = 1 / goal.square().sum(1).clamp_min(1e-30)
    gram = torch.einsum("ibe,jbe,b->ij", flat, flat, weight).numpy()
    right = torch.einsum("ibe,be,b->i", flat, goal, weight).numpy()
    size = np.sqrt(np.diag(gram).clip(1e-30))
    found: np.ndarray = np.linalg.solve(gram / np.outer(size, size) + ridge * np.eye(len(size)), right / size) / size
    return found
