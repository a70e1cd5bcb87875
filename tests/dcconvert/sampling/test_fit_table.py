"""Fitting tables: exact where a table can be exact, better than the structure elsewhere, on images it did not see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dcconvert.passes.ir.errors import UsageError
from dcconvert.sampling.default_tables import on_levels, vp_coefficients
from dcconvert.sampling.fit_table import Trajectory, fitted, least_squares, trajectory
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.solver_rows import adams_table, even_grid, graded_grid

SHAPE = (6, 2, 3, 3)


class Field:
    """A flow towards tanh of a mixture, whose trunk's update is its output; skipped steps add up earlier ones."""

    def __init__(self) -> None:
        self.updates: list[Tensor] = []
        self.calls = 0

    def update(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        level = (t / 1000).reshape(-1, 1, 1, 1)
        return torch.tanh(2 * x) * (1 - level) + x.roll(1, 1) * level + 0.1 * y.reshape(-1, 1, 1, 1)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, weights: tuple[float, ...] = ()) -> Tensor:
        if weights:
            return sum(w * u for w, u in zip(weights, self.updates, strict=False))  # type: ignore[return-value]
        self.calls += 1
        self.updates = [self.update(x, t, y), *self.updates[:2]]
        return self.updates[0]


class Noise(Field):
    """The same field for samples of a variance-preserving diffusion, where the model predicts the noise."""

    def update(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha, sigma = (float(values[0]) for values in vp_coefficients(t[:1].long().numpy()))
        level, flow = sigma / (alpha + sigma), x / (alpha + sigma)
        return flow + (1 - level) * super().update(flow, torch.full_like(t, 1000 * level), y)


def samples(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator).double(), torch.arange(6) % 3


def reference(seed: int, **options: object) -> Trajectory:
    return trajectory(replace(adams_table(even_grid(200), 3), **options), Field(), *samples(seed), 2)  # type: ignore[arg-type]


def error(table: RunTable, seed: int) -> float:
    wanted = reference(seed, guidance=table.guidance).samples[-1]
    return float((table.run(Field(), *samples(seed), null_class=2) - wanted).norm() / wanted.norm())


HALF = [True, True, False, True, False, True]


@pytest.mark.parametrize("full", [[True] * 6, HALF], ids=["original", "skips"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_fit_is_better_on_samples_that_it_did_not_see(full, guidance):
    structure = replace(adams_table(graded_grid(6), 2, 2, full), guidance=guidance)
    made = fitted(structure, Field(), *samples(0), reference(0, guidance=guidance), null_class=2)
    assert [row.full for row in made.rows] == full
    assert [(row.t, row.tau) for row in made.rows] == [(row.t, row.tau) for row in structure.rows]
    assert error(made, 1) < error(structure, 1) / 2


@pytest.mark.parametrize("full", [[True] * 6, HALF], ids=["original", "skips"])
def test_a_fit_of_noise_predictions_is_better_too(full):
    wanted = [trajectory(on_levels("eps", even_grid(200), [True] * 200), Noise(), *samples(seed)) for seed in range(2)]
    structure = on_levels("eps", graded_grid(6), full)
    made = fitted(structure, Noise(), *samples(0), wanted[0])
    before, after = (
        float((table.run(Noise(), *samples(1)) - wanted[1].samples[-1]).norm()) for table in (structure, made)
    )
    assert after < before / 2


def test_a_fit_calls_the_model_once_a_computed_step_and_never_needs_a_gradient():
    field = Field()
    fitted(adams_table(graded_grid(6), 2, 2, HALF), field, *samples(0), reference(0))
    assert field.calls == sum(HALF)


def test_a_reference_that_is_not_finite_is_refused():
    found = reference(0)
    broken = Trajectory(found.levels, found.samples * float("nan"))
    with pytest.raises(UsageError, match="not finite"):
        fitted(adams_table(graded_grid(3)), Field(), *samples(0), broken)


def test_least_squares_finds_what_made_the_target():
    plain, history = [torch.randn(4, 7)], [torch.randn(4, 7) for _ in range(3)]
    wanted = 0.5 * plain[0] + 2 * history[0] - history[1] + 0.25 * history[2]
    assert least_squares(plain, history, wanted, 1e-12) == pytest.approx([0.5, 2, -1, 0.25], abs=1e-5)


def test_every_image_counts_alike():
    """One whose target is a hundred times larger does not decide alone."""
    part = torch.ones(2, 1)
    assert least_squares([], [part], torch.tensor([[1.0], [100.0]]), 0)[0] == pytest.approx(
        2 / (1 + 1e-4) * 0.505, rel=1e-3
    )


def test_a_trajectory_is_a_cubic_between_its_levels():
    levels = np.linspace(1, 0, 9)
    cubic = np.polynomial.Polynomial([1, -2, 0.5, 3])
    found = Trajectory(levels, torch.tensor(cubic(levels)).reshape(-1, 1))
    for level in (1.0, 0.93, 0.5, 0.31, 0.02, 0.0):
        assert found.at(level).item() == pytest.approx(cubic(level), abs=1e-9)


def test_a_trajectory_holds_the_noise_and_every_step():
    found = reference(3)
    assert found.samples.shape == (201, *SHAPE)
    assert torch.equal(found.samples[0], samples(3)[0])
    assert found.levels[0] == 1
    assert found.levels[-1] == 0
