"""Polishing: final images come nearer, on samples that were not seen too; derivatives are those of the run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dcconvert.sampling.fit_table import fitted, ridge_solution
from dcconvert.sampling.polish_table import RIDGE, Batch, added, changed, derivatives, log_error, polished
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.solver_rows import adams_table, graded_grid
from tests.dcconvert.sampling.test_fit_table import HALF, Field, error, reference, samples

FULL = [True] * 5


def structure(full: list[bool], guidance: float = 1.0) -> RunTable:
    return replace(adams_table(graded_grid(len(full)), 2, 2, full), guidance=guidance)


class Copied(Field):
    """A field in a run that can be copied; guidance has its halves one after the other."""

    def __init__(self, halves: int = 1) -> None:
        super().__init__()
        self.halves = halves

    def copies(self, times: int) -> Copied:
        other = Copied(self.halves)
        other.updates = [
            torch.cat([half.repeat(times, 1, 1, 1) for half in update.chunk(self.halves)]) for update in self.updates
        ]
        return other


@pytest.mark.parametrize("full", [FULL, HALF], ids=["original", "skips"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_images_that_were_not_seen_come_nearer(full, guidance):
    halves, wanted = (1 if guidance == 1 else 2), reference(0, guidance=guidance)
    before = fitted(structure(full, guidance), Copied(halves), *samples(0), wanted, null_class=2)
    rows: list[int] = []
    after = polished(
        before,
        lambda: Copied(halves),
        *samples(0),
        wanted.samples[-1],
        rounds=2,
        null_class=2,
        on_step=rows.append,
    )
    assert error(after, 0) < 0.8 * error(before, 0)
    assert error(after, 1) < 0.9 * error(before, 1)
    assert [row.full for row in after.rows] == full
    assert [row.t for row in after.rows] == [row.t for row in before.rows]
    assert rows[: len(full)] == list(range(len(full)))


@pytest.mark.parametrize("full", [FULL, HALF], ids=["original", "skips"])
def test_derivatives_are_those_of_whole_runs(full):
    """Each number of the table is changed by itself, and the run made again from its start."""
    table, (noise, labels) = structure(full), samples(0)
    changes, slopes = derivatives(table, Copied(), Batch(noise, labels, None), lambda _: None)
    end = table.run(Copied(), noise, labels)
    for number, slope in enumerate(slopes):
        tiny = np.zeros(len(changes))
        tiny[number] = 1e-6
        again = changed(table, changes, tiny).run(Copied(), noise, labels)
        torch.testing.assert_close(slope, (again - end) / 1e-6, rtol=0.05, atol=0.02 * float(slope.abs().max()))


def test_every_number_of_a_table_can_move():
    """A row has the sample, the noise, its outputs, and a skipped row its weights."""
    changes, _ = derivatives(structure(HALF), Copied(), Batch(*samples(0), None), lambda _: None)
    moving = [[c for c in changes if c.number == row] for row in range(len(HALF))]
    computed = np.cumsum(HALF)
    assert [len(row) for row in moving] == [
        2 + min(i + 1, 5) + (0 if full else min(computed[i], 3)) for i, full in enumerate(HALF)
    ]


def test_a_table_that_cannot_be_better_stays_what_it_is():
    table, (noise, labels) = structure(FULL), samples(0)
    wanted = table.run(Copied(), noise, labels)
    assert polished(table, Copied, noise, labels, wanted) == table


def test_gauss_newton_solves_what_is_linear():
    slopes = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    moves = torch.tensor([0.5, -2.0, 1.0])
    missing = -torch.einsum("p,pbe->be", moves, slopes)
    np.testing.assert_allclose(-ridge_solution(slopes, missing, RIDGE), moves, rtol=5e-3)


def test_changes_may_name_more_than_there_is():
    assert added((1.0, 2.0), (0.0, 1.0, -1.0), 0.5) == (1.0, 2.5, -0.5)
    assert added((1.0, 2.0), (), 0.5) == (1.0, 2.0)


def test_images_that_are_not_finite_count_as_the_worst():
    assert log_error(torch.full((2, 3), float("nan"))) == np.inf
    assert log_error(torch.full((2, 3), float("inf"))) == np.inf
    assert log_error(Tensor([[1.0, 1.0]])) == 0
