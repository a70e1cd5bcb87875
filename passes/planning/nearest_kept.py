"""Nearest kept tokens on a token grid, found in numpy on the host for a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

# Nearest grid positions tried before falling back to a search over all kept tokens: one per bit of a machine word.
_WINDOW = 64


@dataclass(frozen=True)
class Nearest:
    """Nearest kept tokens of every dropped one, in order of sample and index.

    sample, target [X]: sample and grid index of the dropped token. token, distance [X, K]: grid indices of the kept
    tokens of the sample and squared distances, nearest first, ties by lower index; where the sample keeps fewer than
    K, the slots past its count repeat some of them.
    """

    sample: Ints
    target: Ints
    token: Ints
    distance: Ints


class Neighbourhood:
    """Finds nearest kept tokens on one grid: in a window of near positions, or by search if the window has too few.

    ``token_bits`` and ``distance_bits`` hold any index and any squared distance of the grid.
    """

    def __init__(self, height: int, width: int) -> None:
        self.tokens = height * width
        self.token_bits = max(1, (self.tokens - 1).bit_length())
        self.distance_bits = max(1, ((height - 1) ** 2 + (width - 1) ** 2).bit_length())
        # The sign bit stays free.
        self._key: np.dtype[Any] = np.dtype(np.int32 if self.token_bits + self.distance_bits < 32 else np.int64)
        self._y: NDArray[Any]
        self._x: NDArray[Any]
        self._y, self._x = (axis.ravel().astype(self._key) for axis in np.indices((height, width)))
        inside = min(_WINDOW, self.tokens)
        self._inside = np.uint64((1 << inside) - 1)
        keys = np.zeros((self.tokens, _WINDOW), dtype=np.int64)
        for top in range(0, self.tokens, width):  # a grid row at a time, so that N x N is never in memory at once
            rows = np.arange(top, top + width)
            every = np.arange(self.tokens)
            nearest = np.partition(self._keys(rows, every).T, inside - 1, axis=1)[:, :inside]
            keys[rows, :inside] = np.sort(nearest, axis=1)
        self._token, self._distance = keys & ((1 << self.token_bits) - 1), keys >> self.token_bits

    def _keys(self, centre: Ints, other: Ints) -> NDArray[Any]:
        """Squared distance and index of ``other`` in one integer [other, centre]: unique, ordered by both."""
        down: NDArray[Any] = self._y[other][:, None] - self._y[centre]
        right = self._x[other][:, None] - self._x[centre]
        down *= down
        right *= right
        down += right
        down <<= self.token_bits
        down |= other.astype(self._key)[:, None]
        return down

    def nearest(self, keep: Mask, counts: Ints, neighbours: int, everywhere: bool = False) -> Nearest:
        """The ``neighbours`` nearest kept tokens of every dropped token of a mask [B, N], or of every token."""
        sample, target = np.nonzero(np.ones_like(keep) if everywhere else ~keep)
        window = np.packbits(keep.take(self._token, axis=1, mode="wrap"), axis=2, bitorder="little").view("<u8")[..., 0]
        word = window[sample, target] & self._inside
        wanted = np.minimum(counts, neighbours)[sample]
        missing = np.flatnonzero(np.bitwise_count(word) < wanted)
        place = np.empty((len(sample), neighbours), dtype=np.int64)
        for slot in range(neighbours):
            lowest = word & (~word + np.uint64(1))
            place[:, slot] = np.bitwise_count(lowest - np.uint64(1))
            word ^= lowest
        # An empty word gives 64; such slots are repeats of the first or found by search.
        np.copyto(place, place[:, :1], where=place == _WINDOW)
        place += (target * _WINDOW)[:, None]
        place[missing] = 0
        token, distance = self._token.ravel()[place], self._distance.ravel()[place]
        for index in np.unique(sample[missing]).tolist():
            rows = missing[sample[missing] == index]
            token[rows], distance[rows] = self._search(np.flatnonzero(keep[index]), target[rows], neighbours)
        return Nearest(sample, target, token, distance)

    def _search(self, kept: Ints, target: Ints, neighbours: int) -> tuple[Ints, Ints]:
        """Tokens and squared distances [targets, neighbours] among all the ``kept`` tokens of one sample."""
        keys = self._keys(target, kept).view(f"u{self._key.itemsize}")
        best = np.empty((neighbours, len(target)), dtype=keys.dtype)
        best[0] = keys.min(axis=0)
        for slot in range(1, neighbours):
            # Unsigned wrap-around sends everything up to the last find to the far end; with nothing left, the minimum
            # is the nearest again.
            floor = best[slot - 1] + 1
            best[slot] = (keys - floor).min(axis=0) + floor
        found = best.T.astype(np.int64)
        return found & ((1 << self.token_bits) - 1), found >> self.token_bits
