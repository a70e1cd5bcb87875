"""Distances between sets of features, against closed forms and written-out definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcconvert.evaluate.set_metrics import frechet_distance, inception_score, kernel_distance, precision_recall, radii


def normal(count, width, mean=0.0, scale=1.0, seed=0):
    return np.random.default_rng(seed).normal(mean, scale, (count, width))


def test_frechet_distance_of_normals_is_the_closed_form():
    """Independent coordinates: the sum of (difference of means)^2 + (difference of deviations)^2."""
    one, other = normal(40_000, 3), normal(40_000, 3, mean=0.5, scale=2.0, seed=1)
    assert frechet_distance(one, other) == pytest.approx(3 * 0.25 + 3 * 1.0, rel=0.03)


def test_frechet_distance_sees_correlation():
    one = normal(1000, 2)
    turned = one[:, ::-1] * [1, -1] + [3, 0]
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    mixed = one @ np.array([[1, 0.9], [0, 0.1]])
    assert frechet_distance(one, mixed) > 0.2
    assert frechet_distance(one, turned) > 8


def test_frechet_distance_is_defined_for_few_images():
    assert np.isfinite(frechet_distance(normal(5, 20), normal(9, 20, seed=1)))


def kernel(x, y):
    return (x @ y / len(x) + 1) ** 3


def discrepancy(found, real):
    """The definition, a pair at a time."""
    n, m = len(found), len(real)
    own = sum(kernel(a, b) for i, a in enumerate(found) for j, b in enumerate(found) if i != j) / (n * (n - 1))
    beyond = sum(kernel(a, b) for i, a in enumerate(real) for j, b in enumerate(real) if i != j) / (m * (m - 1))
    return own + beyond - 2 * sum(kernel(a, b) for a in found for b in real) / (n * m)


@settings(max_examples=20)
@given(st.integers(3, 7), st.integers(2, 7), st.integers(1, 4), st.integers(0, 99))
def test_kernel_distance_is_its_definition(n, m, width, seed):
    found, real = normal(n, width, seed=seed), normal(m, width, 0.5, seed=seed + 1)
    value, error = kernel_distance(found, real)
    assert value == pytest.approx(discrepancy(found, real), rel=1e-9, abs=1e-9)
    left = [discrepancy(np.delete(found, i, 0), real) for i in range(n)]
    assert error == pytest.approx(np.sqrt((n - 1) / n * np.square(left - np.mean(left)).sum()), rel=1e-6, abs=1e-9)


def test_kernel_distance_is_right_on_average_for_few_images():
    """Of one distribution: around zero, where a Fréchet distance would be mostly bias."""
    real = normal(500, 8)
    values = [kernel_distance(normal(12, 8, seed=seed), real)[0] for seed in range(1, 60)]
    assert abs(np.mean(values)) < 3 * np.std(values) / len(values) ** 0.5
    assert kernel_distance(normal(12, 8, 1.0, seed=1), real)[0] > 1


def test_inception_score_goes_from_one_to_the_number_of_classes():
    assert inception_score(np.zeros((10, 4))) == pytest.approx(1)
    assert inception_score(np.tile(np.eye(4) * 60, (3, 1))) == pytest.approx(4)
    assert inception_score(np.repeat(np.eye(4)[:2] * 60, 5, axis=0)) == pytest.approx(2)
    assert inception_score(np.eye(3) * 2000 - 1000) == pytest.approx(3)  # no overflow


def covered(points, by, neighbours):
    """Share of points inside some ball around another set's."""
    inside = 0
    for point in points:
        for i, centre in enumerate(by):
            reach = sorted(np.linalg.norm(centre - other) for j, other in enumerate(by) if j != i)[neighbours - 1]
            if np.linalg.norm(point - centre) <= reach:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_precision_and_recall_are_their_definition(shift):
    found, real = normal(15, 3, shift, 0.6, seed=1), normal(15, 3, seed=2)
    assert precision_recall(found, real) == pytest.approx((covered(found, real, 3), covered(real, found, 3)))


def test_a_narrow_model_is_precise_and_forgets():
    real = normal(200, 2)
    precision, recall = precision_recall(normal(200, 2, scale=0.1, seed=1), real)
    assert precision > 0.95
    assert recall < 0.3


def test_precision_needs_equally_many():
    with pytest.raises(ValueError, match="both numbers must be equal"):
        precision_recall(normal(5, 2), normal(6, 2))


def test_duplicates_are_neighbours():
    assert radii(np.array([[0.0], [0.0], [0.0], [0.0], [5.0]]), 3).tolist() == [0, 0, 0, 0, 25]
