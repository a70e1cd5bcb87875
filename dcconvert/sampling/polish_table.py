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
from dcconvert.sampling.fit_table import OUTPUTS, differences, ridge_solution
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


@dataclass(frozen=True)
class Batch:
    """What every run of some images has: noise [B, C, H, W], labels [B], and the class that stands for none."""

    noise: Tensor
    labels: Tensor
    null_class: int | None

    def repeated(self, times: int) -> Batch:
        return Batch(repeated(self.noise, times), repeated(self.labels, times), self.null_class)


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

    batch = Batch(noise, labels, null_class)

    def left(candidate: RunTable) -> Tensor:
        return candidate.run(new_model(), noise, labels, null_class=null_class) - wanted

    error = left(table)
    for _ in range(rounds):
        changes, slopes = derivatives(table, new_model(), batch, on_step)
        step = -ridge_solution(slopes, error, RIDGE)
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
    table: RunTable, model: CopiedModel, batch: Batch, on_step: Callable[[int], None]
) -> tuple[list[Change], Tensor]:
    """The directions in which the table can move, and what each does to the final images [P, B, C, H, W]."""
    x, outputs, skips = batch.noise, deque[Tensor](maxlen=max(OUTPUTS, table.memory)), table.updates > 0
    found: list[tuple[Branch, Tensor]] = []
    for number, row in enumerate(table.rows):
        outputs.appendleft(evaluated(model, x, row, batch.labels, table.guidance, batch.null_class, skips))
        after = moved(row, x, batch.noise, outputs)
        branches = [*moves(number, x, after, outputs, batch)]
        if not row.full:
            branches += forecasts(number, table, x, outputs, model, batch)
        for start in range(0, len(branches), AT_ONCE):
            some = branches[start : start + AT_ONCE]
            found += zip(some, ended(table, model.copies(len(some)), some, outputs, batch), strict=True)
        x = after
        on_step(number)
    slopes = [(end - x) / branch.size for branch, end in found]
    return [branch.change for branch, _ in found], torch.stack(slopes)


def moves(number: int, x: Tensor, after: Tensor, outputs: Sequence[Tensor], batch: Batch) -> Iterator[Branch]:
    """Changes of how a row takes the sample from `x` to `after`. Neighbouring outputs are much alike: differences are
    not."""
    parts = [(Change(number, state=1.0), x), (Change(number, noise=1.0), batch.noise)]
    parts += [(Change(number, outputs=unit), part) for unit, part in differences(list(outputs)[:OUTPUTS])]
    for change, part in parts:
        size = SMALL * float(after.norm() / part.norm().clamp_min(1e-12))
        yield Branch(change, size, after + size * part, outputs[0])


def forecasts(
    number: int, table: RunTable, x: Tensor, outputs: Sequence[Tensor], model: CopiedModel, batch: Batch
) -> Iterator[Branch]:
    """Changes of the weights of the trunk's last updates in a skipped step."""
    row, known = table.rows[number], list(model.updates)[:UPDATES]
    for unit, part in differences(known):
        change = Change(number, weights=unit)
        size = SMALL * float(known[0].norm() / part.norm().clamp_min(1e-12))
        again = change.of(row, size)
        made = evaluated(model.copies(1), x, again, batch.labels, table.guidance, batch.null_class, True)
        yield Branch(change, size, moved(row, x, batch.noise, [made, *list(outputs)[1:]]), made)


def ended(
    table: RunTable, model: CopiedModel, branches: Sequence[Branch], outputs: Sequence[Tensor], batch: Batch
) -> Sequence[Tensor]:
    """The final images [B, C, H, W] of changed runs, which go on as one batch."""
    times, first = len(branches), branches[0].change.number + 1
    x = torch.cat([branch.x for branch in branches])
    newest = torch.cat([branch.output for branch in branches])
    older = [repeated(output, times) for output in list(outputs)[1 : table.memory]]
    history, many = deque([newest, *older], maxlen=table.memory), batch.repeated(times)
    rest = table.continued(model, first, x, history, many.noise, many.labels, null_class=many.null_class)
    for after in rest:
        x = after
    return x.chunk(times)


def repeated(value: Tensor, times: int) -> Tensor:
    """Every sample so many times [times * B]."""
    return value.repeat(times, *[1] * (value.ndim - 1))


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
