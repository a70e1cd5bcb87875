"""Which samples share a row of the attention grid: packing of variable lengths into rows of equal capacity.

`one_a_row`, `first_fit` and `shortest_pack_first` place samples, for the plan of each step. `spfhp` and `nnlshp`, both
from Krell et al. (arXiv 2107.02027), pack a histogram of lengths, once for a data set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.nearest_kept import Ints

Pack = tuple[int, ...]  # lengths, longest first
Packer = Callable[[ArrayLike, int], tuple[Ints, Ints]]

SHORT, SHORT_WEIGHT = 8, 0.09  # lengths below SHORT are cheap to leave empty: the fit uses this weight (paper, 3.2)


def one_a_row(lengths: ArrayLike, capacity: int) -> tuple[Ints, Ints]:
    """Row and first slot of every sample: sample b in row b. Raises UsageError if one is longer than ``capacity``."""
    kept = checked(lengths, capacity)
    return np.arange(len(kept)), np.zeros_like(kept)


def first_fit(lengths: ArrayLike, capacity: int) -> tuple[Ints, Ints]:
    """Row and first slot of every sample: longest first, each in the first row that has room, or else in a new one.

    First-fit decreasing; ties go to the lower sample. Raises UsageError if a sample is longer than ``capacity``.
    """

    def first(used: list[int], length: int) -> int | None:
        return next((row for row, there in enumerate(used) if there + length <= capacity), None)

    return greedy(lengths, capacity, first)


def shortest_pack_first(lengths: ArrayLike, capacity: int) -> tuple[Ints, Ints]:
    """Row and first slot of every sample: longest first, each in the row with the most room left, or else in a new one.

    SPFHP of Krell et al. (arXiv 2107.02027) without the histogram, which is useful only for far larger batches. Ties go
    to the lower sample and the lower row. Raises UsageError if a sample is longer than ``capacity``.
    """

    def roomiest(used: list[int], length: int) -> int | None:
        best = used.index(min(used)) if used else -1
        return best if used and used[best] + length <= capacity else None

    return greedy(lengths, capacity, roomiest)


def greedy(lengths: ArrayLike, capacity: int, choose: Callable[[list[int], int], int | None]) -> tuple[Ints, Ints]:
    """Place samples, longest first, each in the row that ``choose`` picks for it from how full the rows are."""
    kept = checked(lengths, capacity)
    row, start, used = np.zeros_like(kept), np.zeros_like(kept), list[int]()
    for sample in np.argsort(-kept, kind="stable").tolist():
        length = int(kept[sample])
        best = choose(used, length)
        if best is None:
            best = len(used)
            used.append(0)
        row[sample], start[sample] = best, used[best]
        used[best] += length
    return row, start


def checked(lengths: ArrayLike, capacity: int) -> Ints:
    kept = np.asarray(lengths, dtype=np.int64)
    if kept.max() > capacity:
        raise UsageError(f"a sample keeps {kept.max()} tokens and rows hold {capacity}: choose longer rows")
    return kept


def spfhp(histogram: Mapping[int, int], capacity: int, depth: int = 0) -> Counter[Pack]:
    """Shortest-pack-first histogram packing: how often each pack is used, for a ``histogram`` of length -> count.

    Lengths are packed longest first, all of one length at a time, into the open packs with the most room left; a pack
    closes when it is full or holds ``depth`` samples (0: any number). Raises UsageError for a length above
    ``capacity``.
    """
    open_packs: dict[int, Counter[Pack]] = {}  # by room left
    done: Counter[Pack] = Counter()

    def put(pack: Pack, count: int) -> None:
        room = capacity - sum(pack)
        if room == 0 or len(pack) == depth:
            done[pack] += count
        elif count:
            open_packs.setdefault(room, Counter())[pack] += count

    for length, count in by_length(histogram, capacity):
        left = count
        while left:
            room = max(open_packs, default=0)
            if room < length:
                put((length,), left)
                break
            pack, there = open_packs[room].popitem()
            if not open_packs[room]:
                del open_packs[room]
            used = min(left, there)
            put(pack, there - used)
            put((*pack, length), used)
            left -= used
    for packs in open_packs.values():
        done.update(packs)
    return +done


def by_length(histogram: Mapping[int, int], capacity: int) -> Iterator[tuple[int, int]]:
    """Lengths that occur, longest first, and how often."""
    found = sorted(((length, count) for length, count in histogram.items() if count), reverse=True)
    if found:
        checked(found[0][0], capacity)
    return iter(found)


def nnlshp(histogram: Mapping[int, int], capacity: int, depth: int = 3) -> Counter[Pack]:
    """Non-negative least squares histogram packing: how often each pack is used, for a ``histogram`` of length ->
    count.

    The packs are all of up to ``depth`` lengths that fill a row exactly; how often each is used comes from a weighted
    least squares fit of the histogram, rounded down. Samples that remain are packed by `spfhp`, to the same depth.
    Slots that the fit filled with samples that do not exist stay empty. Raises UsageError for a length above
    ``capacity``, or if scipy, which does the fit, is missing.
    """
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise UsageError("packing by least squares needs scipy: pip install scipy") from error
    lengths = [length for length, _ in by_length(histogram, capacity)]
    packs = list(exact_packs(capacity, depth, capacity))
    uses = np.zeros((capacity + 1, len(packs)))
    for column, pack in enumerate(packs):
        for length in pack:
            uses[length, column] += 1
    wanted = np.array([histogram.get(length, 0) for length in range(capacity + 1)], dtype=np.float64)
    weight = np.where(np.arange(capacity + 1) < SHORT, SHORT_WEIGHT, 1.0)
    found, _ = nnls(uses * weight[:, None], wanted * weight, maxiter=50 * capacity)
    counts = np.floor(found + 1e-9).astype(np.int64)
    left = {length: int(histogram[length]) for length in lengths}
    result: Counter[Pack] = Counter()
    for pack, count in sorted(zip(packs, counts.tolist(), strict=True), reverse=True):
        for times, kept in taken(pack, count, left):
            result[kept] += times
    result.update(spfhp(left, capacity, depth))
    return +result


def exact_packs(capacity: int, depth: int, longest: int) -> Iterator[Pack]:
    """All ways of writing ``capacity`` as at most ``depth`` lengths, none above ``longest``, longest first."""
    if 0 < capacity <= longest:
        yield (capacity,)
    if depth > 1:
        for first in range(min(longest, capacity - 1), 0, -1):
            for rest in exact_packs(capacity - first, depth - 1, first):
                yield (first, *rest)


def taken(pack: Pack, count: int, left: dict[int, int]) -> Iterator[tuple[int, Pack]]:
    """Use a pack ``count`` times with the remaining samples, leaving out lengths whose samples have run out."""
    while count:
        need = Counter(pack)
        kept = tuple(length for length in pack if left.get(length, 0) >= need[length])
        if not kept:
            return
        times = min(count, *(left[length] // need[length] for length in set(kept)))
        for length in kept:
            left[length] -= times
        yield times, kept
        count -= times


def efficiency(packs: Mapping[Pack, int], capacity: int) -> float:
    """Tokens in the packs divided by the slots of their rows."""
    return sum(sum(pack) * count for pack, count in packs.items()) / (capacity * sum(packs.values()))


def rows_of(packs: Mapping[Pack, int], lengths: Sequence[int] | Ints) -> tuple[Ints, Ints]:
    """Row and first slot of every sample, for packs that hold exactly these lengths."""
    waiting: dict[int, list[int]] = {}
    for sample, length in reversed(list(enumerate(lengths))):
        waiting.setdefault(int(length), []).append(sample)
    row, start = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    number = 0
    for pack, count in packs.items():
        for _ in range(count):
            place = 0
            for length in pack:
                sample = waiting[length].pop()
                row[sample], start[sample] = number, place
                place += length
            number += 1
    return row, start


def by_histogram(pack: Callable[[Mapping[int, int], int], Mapping[Pack, int]]) -> Packer:
    """A histogram algorithm adapted to return the row and first slot of every sample."""

    def rows(lengths: ArrayLike, capacity: int) -> tuple[Ints, Ints]:
        kept = checked(lengths, capacity)
        return rows_of(pack(Counter(kept.tolist()), capacity), kept)

    return rows


PACKERS: dict[str, Packer] = {
    "one a row": one_a_row,
    "first fit": first_fit,
    "SPFHP": shortest_pack_first,
    "NNLSHP": by_histogram(nnlshp),
}
