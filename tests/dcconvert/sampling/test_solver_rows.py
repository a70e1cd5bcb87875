"""Adams methods on any grid: hand-computed coefficients, and polynomials that they integrate exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.solver_rows import adams_table, even_grid, graded_grid, integral_weights, line_weights

NONE = torch.zeros(1)


def end_of(table: RunTable, speed: np.polynomial.Polynomial) -> float:
    """Where a run ends whose velocity is a polynomial in the noise level."""

    def model(x, t, y):
        return torch.tensor(speed(t.double().numpy() / 1000))[:, None]

    return table.run(model, torch.zeros(1, 1).double(), NONE).item()


@pytest.mark.parametrize(
    ("order", "wanted"), [(1, [1]), (2, [3 / 2, -1 / 2]), (3, [23 / 12, -16 / 12, 5 / 12])], ids=["AB1", "AB2", "AB3"]
)
def test_adams_bashforth_on_an_even_grid(order, wanted):
    row = adams_table(even_grid(10), order).rows[5]
    assert row.outputs == pytest.approx([-0.1 * w for w in wanted])


def test_a_corrected_euler_step_is_adams_bashforth_of_second_order():
    """The move is made again with the mean of both velocities once the second is known."""
    for corrected, plain in zip(adams_table(even_grid(8), 1, 2).rows, adams_table(even_grid(8), 2).rows, strict=True):
        assert corrected.outputs == pytest.approx(plain.outputs)


def test_the_corrector_of_third_order_by_hand():
    """The move from i - 1 to i again, by h / 12 (5 v_i + 8 v_{i-1} - v_{i-2}), in place of what was predicted."""
    row, h = adams_table(even_grid(10), 2, 3).rows[6], -0.1
    predicted_before = [0, 3 / 2, -1 / 2]
    better = [5 / 12, 8 / 12, -1 / 12]
    now = [3 / 2, -1 / 2, 0]
    wanted = [h * (a + b - c) for a, b, c in zip(now, better, predicted_before, strict=True)]
    assert row.outputs == pytest.approx(wanted)


@pytest.mark.parametrize("grid", [even_grid(9), graded_grid(9, 3), np.array([1, 0.9, 0.5, 0.45, 0.1, 0])])
@pytest.mark.parametrize(("order", "corrector"), [(1, 0), (2, 0), (3, 0), (1, 2), (2, 3), (2, 2)])
def test_what_an_order_integrates_exactly(grid, order, corrector):
    """From the first steps on, which know fewer outputs, only a constant; after them a polynomial of lower degree."""
    constant = np.polynomial.Polynomial([2.0])
    assert end_of(adams_table(grid, order, corrector), constant) == pytest.approx(-2.0)
    speed = np.polynomial.Polynomial([1.0, -2.0, 3.0][:order])
    table = adams_table(grid, order, corrector)
    outputs = [speed(level) for level in grid[:-1]]
    for i in range(max(order, corrector) + 1, table.steps):
        moved = sum(c * v for c, v in zip(table.rows[i].outputs, outputs[i::-1], strict=False))
        exact = speed.integ()
        assert moved == pytest.approx(exact(grid[i + 1]) - exact(grid[i]), abs=1e-9)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True).filter(
        lambda x: min(np.diff(sorted(x)), default=1) > 0.05
    )
)
def test_integral_weights_are_exact(points):
    points = np.array(points)
    weights = integral_weights(points, 0.7, 0.3)
    for power in range(len(points)):
        wanted = (0.3 ** (power + 1) - 0.7 ** (power + 1)) / (power + 1)
        assert weights @ points**power == pytest.approx(wanted, abs=1e-6)


def test_forecasts_are_straight_lines():
    assert line_weights(0.4, [0.5]) == (1.0,)
    assert line_weights(0.4, [0.5, 0.7]) == pytest.approx((1.5, -0.5))
    table = adams_table(even_grid(5), 2, 0, [True, True, False, True, False])
    assert [row.weights for row in table.rows if row.full] == [()] * 3
    assert table.rows[2].weights == pytest.approx((2, -1))
    assert table.rows[4].weights == pytest.approx((1.5, -0.5))  # the last computed steps are two levels apart


def test_grids():
    assert even_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert graded_grid(4, 2).tolist() == pytest.approx([1, 1 - 1 / 6, 1 - 2 / 6, 1 - 4 / 6, 0])
    for steps in (1, 2, 3, 50):
        levels = graded_grid(steps)
        assert levels[0] == 1
        assert levels[-1] == pytest.approx(0, abs=1e-12)
        assert (np.diff(levels) < 0).all()
