"""Distances between sets of images, on the features and class probabilities of some network.

The network is part of a figure's name: figures cannot be compared across networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

NEIGHBOURS = 3  # of precision and recall


@dataclass(frozen=True)
class Real:
    """Features [n, d] of real images; values that depend only on them are computed once, for all comparisons."""

    features: Doubles

    @cached_property
    def mean(self) -> Doubles:
        return np.asarray(self.features.mean(0))

    @cached_property
    def covariance(self) -> Doubles:
        return np.asarray(np.cov(self.features, rowvar=False))

    @cached_property
    def own_kernel(self) -> float:
        """Mean of the kernel over all pairs of different features."""
        values, count = cubic_kernel(self.features, self.features), len(self.features)
        return float((values.sum() - np.trace(values)) / (count * (count - 1)))


def real_of(real: Doubles | Real) -> Real:
    return real if isinstance(real, Real) else Real(real)


def cubic_kernel(one: Doubles, other: Doubles) -> Doubles:
    """(x.y / d + 1)^3 for all pairs of rows, [n, m]."""
    return np.asarray((one @ other.T / one.shape[1] + 1) ** 3)


def frechet_distance(found: Doubles, real: Doubles | Real) -> float:
    """||mean difference||^2 + tr(A + B - 2 (A B)^(1/2)) of two sets of features [n, d] (arXiv 1706.08500).

    It decreases with n, so compare only values with the same n. With n <= d the covariance does not have full rank, and
    the figure is still defined but mostly bias.
    """
    real = real_of(real)
    moved = found.mean(0) - real.mean
    one, other = np.cov(found, rowvar=False), real.covariance
    values, vectors = np.linalg.eigh(one)
    root = vectors * np.sqrt(values.clip(0))
    product = root.T @ other @ root
    roots = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0))
    return float(moved @ moved + np.trace(one) + np.trace(other) - 2 * roots.sum())


def kernel_distance(found: Doubles, real: Doubles | Real) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, and its standard error.

    The unbiased estimate of arXiv 1801.01401 (KID) on all features [n, d], n > 2: right on average for any n, and
    below zero by chance where the sets are alike. The error is the jackknife's over `found`; `real` counts as given.
    """
    real = real_of(real)
    n, m, fixed = len(found), len(real.features), real.own_kernel
    within, across = cubic_kernel(found, found), cubic_kernel(found, real.features)
    own = within.sum(1) - within.diagonal()
    value = own.sum() / (n * (n - 1)) + fixed - 2 * across.mean()
    # Leaving out sample i takes its row and its column away.
    left = (own.sum() - 2 * own) / ((n - 1) * (n - 2)) + fixed - 2 * (across.sum() - across.sum(1)) / ((n - 1) * m)
    return float(value), float(np.sqrt((n - 1) / n * np.square(left - left.mean()).sum()))


def inception_score(logits: Doubles) -> float:
    """exp of the mean KL(p(y|x) || p(y)) of class logits [n, classes] (arXiv 1606.03498), all samples at once.

    From 1 to the number of classes; few samples lower it.
    """
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    p = np.exp(log_p)
    return float(np.exp((p * (log_p - np.log(p.mean(0).clip(1e-300)))).sum(1).mean()))


def precision_recall(found: Doubles, real: Doubles, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of features [n, d] against as many real ones.

    Precision: the share of `found` inside the manifold of `real`, the union of balls around its points that reach
    their k-th nearest neighbours. Recall: the same the other way round. ValueError for sets of other sizes, which
    would bias one against the other, or of no more than k points.
    """
    if len(found) != len(real) or len(found) <= neighbours:
        raise ValueError(f"{len(found)} and {len(real)} features: both numbers must be equal and above {neighbours}")
    across = squared_distances(found, real)
    inside_real = across <= radii(real, neighbours)[None]
    inside_found = across <= radii(found, neighbours)[:, None]
    return float(inside_real.any(1).mean()), float(inside_found.any(0).mean())


def radii(features: Doubles, neighbours: int) -> Doubles:
    """Squared distance [n] of each point to its k-th nearest other point."""
    distances = squared_distances(features, features)
    np.fill_diagonal(distances, -1)  # itself comes first, whatever rounding says
    return np.asarray(np.partition(distances, neighbours, axis=1)[:, neighbours])


def squared_distances(one: Doubles, other: Doubles) -> Doubles:
    """Squared Euclidean distances [n, m] between rows."""
    sizes = np.square(one).sum(1)[:, None] + np.square(other).sum(1)[None]
    return np.asarray((sizes - 2 * one @ other.T).clip(0))
