"""Levels: the few numbers of kept tokens that a run uses, each of them a static shape of the exported model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray


def nearest(levels: Sequence[int], counts: ArrayLike) -> NDArray[np.int64]:
    """The level nearest to each count, in the same shape; the first if two are equally near."""
    known = np.asarray(levels)
    found: NDArray[np.int64] = known[np.abs(np.asarray(counts)[..., None] - known).argmin(-1)]
    return found


def diffused(counts: NDArray[np.int64], levels: Sequence[int]) -> NDArray[np.int64]:
    """Numbers among ``levels`` whose running sum stays as near as possible to that of ``counts``."""
    found, owed = [], 0.0
    for count in counts.tolist():
        owed += count
        found.append(int(nearest(levels, owed)))
        owed -= found[-1]
    return np.array(found, np.int64)


def levels_of(counts: NDArray[np.int64], tokens: int, most: int, sizes: Sequence[int] = ()) -> tuple[int, ...]:
    """At most ``most`` levels near the counts [steps] of a run, including ``tokens``; chosen from ``sizes``, if
    given."""
    known = sorted(sizes)
    sparse = counts[counts < tokens]
    if known:
        sparse = nearest(known, sparse)
        sparse = sparse[sparse < tokens]
    chosen = nearest_levels(sparse, most - 1) if sparse.size else sparse
    if known:
        chosen = np.unique(nearest(known, chosen))
    return (*chosen.tolist(), tokens)


def nearest_levels(counts: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most ``most`` numbers, ascending, with the least squared distance of ``counts`` to the nearest of them.

    Exact k-means on a line, by dynamic programming over the sorted distinct counts: least[j] is the least cost of the
    counts up to j in the groups so far. Each number is the rounded mean of its group, which keeps the mean of all.
    """
    values, weights = np.unique(counts, return_counts=True)
    heads, sums, squares = (
        np.concatenate([[0.0], np.cumsum(weights * np.power(values, power, dtype=np.float64))]) for power in (0, 1, 2)
    )
    # cost[i, j]: squared distances of counts i..j to their mean.
    size, total, square = (part[None, 1:] - part[:-1, None] for part in (heads, sums, squares))
    cost = square - np.divide(total**2, size, out=np.zeros_like(total), where=size > 0)
    cost[np.tril_indices(len(values), -1)] = np.inf
    least, cuts = cost[0], []
    for _ in range(min(most, len(values)) - 1):
        before = np.concatenate([[np.inf], least[:-1]])[:, None] + cost  # one more group, which begins at i
        cuts.append(before.argmin(axis=0))
        least = before.min(axis=0)
    ends, last = [len(values)], len(values) - 1
    for cut in reversed(cuts):
        ends.append(int(cut[last]))
        last = ends[-1] - 1
    parts = [slice(start, end) for start, end in pairwise([0, *reversed(ends)])]
    return np.unique([round(np.average(values[part], weights=weights[part])) for part in parts])
