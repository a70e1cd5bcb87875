"""Polish a fitted run table: move all its numbers together, so that final images come nearer to converged ones.

The stagewise fit (`fit_table`) takes each step as near to a converged run as it can, and does not see what later steps
make of the rest. Here a Gauss-Newton step moves every number of the table at once. The derivatives are finite
differences: a number is changed a little, and the run goes on from there to its end. So the model is only called, as in
the fit, and may be an exported one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from dcconvert.passes.ir.spec import UPDATES
from dcconvert.sampling.fit_table import OUTPUTS
from dcconvert.sampling.run_table import Row, RunTable, evaluated, moved

SMALL = 3e-3  # how far a change moves the sample, relative to it: far above rounding, and still nearly linear
RIDGE = 1e-3  # relative to a direction's own size
STEPS = (1.0, 0.5, 0.25)  # of the Gauss-Newton step, which are tried in turn
AT_ONCE = 4  # changed runs in one batch


class CopiedModel(Protocol):
    """A model inside one run, as `run_table.Model`, that can be copied in the middle of it."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor: ...

    def copies(self, times: int) -> Self:
        """A model in a run of its own, which goes on from here with every sample so many times [times * B]."""

    @property
    def updates(self) -> Sequence[Tensor]:
        """The trunk's last updates [B, N, D], newest first."""


@dataclass(frozen=True)
class Change:
    """A direction in which the numbers of one row can move."""

    number: int
    state: float = 0.0
    noise: float = 0.0
    outputs: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()

    def of(self, row: Row, size: float) -> Row:
        return replace(
            row,
            state=row.state + size * self.state,
            noise=row.noise + size * self.noise,
            outputs=added(row.outputs, self.outputs, size),
            weights=added(row.weights, self.weights, size),
        )


@dataclass(frozen=True)
class Branch:
    """A run that was changed by `size` in some direction: its sample after that step, and the step's own output."""

    change: Change
    size: float
    x: Tensor
    output: Tensor


@torch.no_grad()
def polished(
    table: RunTable,
    new_model: Callable[[], CopiedModel],
    noise: Tensor,
    labels: Tensor,
    wanted: Tensor,
    *,
    rounds: int = 1,
    null_class: int | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> RunTable:
    """The table after some rounds of Gauss-Newton towards the images `wanted` [B, C, H, W], from `noise` of that shape.

    Images count by the inverse of their squared error, so that their mean PSNR rises. It ends early where no step along
    the direction that was found makes it rise. `on_step` is told the number of each row whose derivatives are known.
    """

    def left(candidate: RunTable) -> Tensor:
        return candidate.run(new_model(), noise, labels, null_class=null_class) - wanted

    error = left(table)
    for _ in range(rounds):
        changes, slopes = derivatives(table, new_model(), noise, labels, null_class, on_step)
        step = gauss_newton(slopes, error)
        for size in STEPS:
            candidate = changed(table, changes, size * step)
            found = left(candidate)
            if log_error(found) < log_error(error):
                break
        else:
            break
        table, error = candidate, found
    return table


def derivatives(
    table: RunTable,
    model: CopiedModel,
    noise: Tensor,
    labels: Tensor,
    null_class: int | None,
    on_step: Callable[[int], None],
) -> tuple[list[Change], Tensor]:
    """The directions in which the table can move, and what each does to the final images [P, B, C, H, W]."""
    x, outputs, skips = noise, deque[Tensor](maxlen=max(OUTPUTS, table.memory)), table.updates > 0
    found: list[tuple[Branch, Tensor]] = []
    for number, row in enumerate(table.rows):
        outputs.appendleft(evaluated(model, x, row, labels, table.guidance, null_class, skips))
        branches = [*moves(number, row, x, noise, outputs)]
        if not row.full:
            branches += forecasts(number, row, x, noise, outputs, model, labels, table.guidance, null_class)
        for start in range(0, len(branches), AT_ONCE):
            some = branches[start : start + AT_ONCE]
            ends = ended(table, model.copies(len(some)), some, noise, labels, outputs, null_class)
            found += zip(some, ends, strict=True)
        x = moved(row, x, noise, outputs)
        on_step(number)
    slopes = [(end - x) / branch.size for branch, end in found]
    return [branch.change for branch, _ in found], torch.stack(slopes)


def moves(number: int, row: Row, x: Tensor, noise: Tensor, outputs: Sequence[Tensor]) -> Iterator[Branch]:
    """Changes of how the outputs move the sample. Those of neighbouring steps are much alike: differences are not."""
    after = moved(row, x, noise, outputs)
    known = list(outputs)[:OUTPUTS]
    parts = [(Change(number, state=1.0), x), (Change(number, noise=1.0), noise)]
    parts += [(Change(number, outputs=unit), part) for unit, part in differences(known)]
    for change, part in parts:
        size = SMALL * float(after.norm() / part.norm().clamp_min(1e-12))
        yield Branch(change, size, after + size * part, outputs[0])


def forecasts(
    number: int,
    row: Row,
    x: Tensor,
    noise: Tensor,
    outputs: Sequence[Tensor],
    model: CopiedModel,
    labels: Tensor,
    guidance: float,
    null_class: int | None,
) -> Iterator[Branch]:
    """Changes of the weights of the trunk's last updates in a skipped step."""
    known = list(model.updates)[:UPDATES]
    for unit, part in differences(known):
        change = Change(number, weights=unit)
        size = SMALL * float(known[0].norm() / part.norm().clamp_min(1e-12))
        made = evaluated(model.copies(1), x, change.of(row, size), labels, guidance, null_class, True)
        yield Branch(change, size, moved(row, x, noise, [made, *list(outputs)[1:]]), made)


def differences(history: Sequence[Tensor]) -> Iterator[tuple[tuple[float, ...], Tensor]]:
    """The newest member and the differences between neighbours, each with its coefficients."""
    yield (1.0,), history[0]
    for age in range(1, len(history)):
        yield (*[0.0] * (age - 1), 1.0, -1.0), history[age - 1] - history[age]


def ended(
    table: RunTable,
    model: CopiedModel,
    branches: Sequence[Branch],
    noise: Tensor,
    labels: Tensor,
    outputs: Sequence[Tensor],
    null_class: int | None,
) -> Sequence[Tensor]:
    """The final images [B, C, H, W] of changed runs, which go on as one batch."""
    times = len(branches)

    def repeated(value: Tensor) -> Tensor:
        return value.repeat(times, *[1] * (value.ndim - 1))

    x = torch.cat([branch.x for branch in branches])
    newest = torch.cat([branch.output for branch in branches])
    history = deque([newest, *map(repeated, list(outputs)[1 : table.memory])], maxlen=table.memory)
    first = branches[0].change.number + 1
    for after in table.continued(model, first, x, history, repeated(noise), repeated(labels), null_class=null_class):
        x = after
    return x.chunk(times)


def gauss_newton(slopes: Tensor, error: Tensor) -> np.ndarray:
    """How far to move along each direction [P]; `slopes` [P, B, ...] and `error` [B, ...] are of the final images."""
    flat, missing = slopes.flatten(2).double(), error.flatten(1).double()
    weight = 1 / missing.square().sum(1).clamp_min(1e-30)
    gram = torch.einsum("ibe,jbe,b->ij", flat, flat, weight).numpy()
    right = torch.einsum("ibe,be,b->i", flat, missing, weight).numpy()
    size = np.sqrt(np.diag(gram).clip(1e-30))
    found: np.ndarray = -np.linalg.solve(gram / np.outer(size, size) + RIDGE * np.eye(len(size)), right / size) / size
    return found


def changed(table: RunTable, changes: Sequence[Change], sizes: np.ndarray) -> RunTable:
    rows = list(table.rows)
    for change, size in zip(changes, sizes.tolist(), strict=True):
        rows[change.number] = change.of(rows[change.number], size)
    return replace(table, rows=tuple(rows))


def added(values: Sequence[float], change: Sequence[float], size: float) -> tuple[float, ...]:
    """The values with a change, which may name more of them."""
    return tuple(value + size * part for value, part in zip_longest(values, change, fillvalue=0.0))


def log_error(error: Tensor) -> float:
    """Mean over the images of the logarithm of their squared error; not a number counts as the worst."""
    found = float(error.flatten(1).double().square().mean(1).log().mean())
    return found if np.isfinite(found) else np.inf
