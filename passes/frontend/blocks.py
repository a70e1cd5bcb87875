"""Find the blocks of a token stream: runs of repeating op sequences between its cut points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Node

from dcconvert.passes.frontend.cuts import ATTENTION, Cut

Ops = Sequence[tuple[str, ...]]  # the ops between one cut point and the next


def find_boundaries(stream: Sequence[Node], cuts: Sequence[Cut], tokens: int) -> list[Cut]:
    """Cuts before the first and after each repeating block; empty if nothing repeats.

    Blocks may be counted from different places of the same repetition, for example from after each attention instead of
    from before it. The run that covers most attention ops wins, the first of several.
    """
    position = {node: i for i, node in enumerate(stream)}
    places = [position[cut.last] + 1 for cut in cuts]
    parts = [stream[a:b] for a, b in pairwise(places)]
    segments = [tuple(str(node.target) for node in part) for part in parts]
    own = [tuple(str(n.target) for n in part if n.target is ATTENTION or is_of_grid(n, tokens)) for part in parts]
    held = [sum(node.target is ATTENTION for node in part) for part in parts]

    def attentions(found: list[int]) -> int:
        return sum(held[found[0] : found[-1]])

    first = next(longest_runs(segments), [])
    if not first:
        return []
    best = joined(first, segments, own, held)
    if attentions(best) < sum(held):
        others = (joined(found, segments, own, held) for found in longest_runs(segments))
        best = max((best, *others), key=attentions)
    return [cuts[i] for i in best]


def is_of_grid(node: Node, tokens: int) -> bool:
    """Whether a node returns [B, N, ...]."""
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.ndim > 2 and same_size(value.shape[1], tokens)


def same_size(size: int | torch.SymInt, wanted: int) -> bool:
    return not isinstance(size, torch.SymInt) and bool(size == wanted)


def longest_runs(segments: Ops) -> Iterator[list[int]]:
    """The longest run of repeating groups of segments with attention: where it starts, and where each group ends.

    Then runs that start elsewhere in the same repetition and are at most one group shorter.
    """
    runs = []  # covered segments, start, period
    for period in range(1, len(segments) // 2 + 1):
        for start in range(len(segments) - 2 * period + 1):
            unit = segments[start : start + period]
            if not any(str(ATTENTION) in segment for segment in unit):
                continue
            repeats = 1
            while segments[start + repeats * period : start + (repeats + 1) * period] == unit:
                repeats += 1
            if repeats > 1:
                runs.append((repeats * period, start, period))
    longest = max((covered for covered, _, _ in runs), default=0)
    period = next((period for covered, _, period in runs if covered == longest), 0)
    alike = [run for run in runs if run[2] == period and run[0] >= longest - period]
    for covered, start, _ in sorted(alike, key=lambda run: -run[0]):
        yield list(range(start, start + covered + 1, period))


def joined(found: list[int], segments: Ops, own: Ops, held: Sequence[int]) -> list[int]:
    """A run with other runs that end where it starts or start where it ends.

    Segments without attention may lie in between, for example where two streams become one; they belong to the block
    after them. `held`: the number of attention ops of each segment.
    """
    found = extended(found, own)
    while found[0] > 0:
        before = (extended(run, own[: found[0]]) for run in longest_runs(segments[: found[0]]))
        fits = [run for run in before if not any(held[run[-1] : found[0]])]
        if not fits:
            break
        longest = max(fits, key=lambda run: sum(held[run[0] : run[-1]]))
        found = [*longest, *found[1:]]
    while found[-1] < len(segments):
        after = (extended(run, own[found[-1] :]) for run in longest_runs(segments[found[-1] :]))
        fits = [run for run in after if not any(held[found[-1] : found[-1] + run[0]])]
        if not fits:
            break
        longest = max(fits, key=lambda run: sum(held[found[-1] + run[0] : found[-1] + run[-1]]))
        found = [*found, *(place + found[-1] for place in longest[1:])]
    return found


def extended(found: list[int], own: Ops) -> list[int]:
    """A run, extended by blocks before and after it that treat the grid's tokens alike, even if not the other tokens.

    `own`: the ops of each segment that are attention or that work on grid tokens only.
    """

    def ops(first: int, last: int) -> list[str]:
        return [op for part in own[first:last] for op in part]

    unit = ops(found[0], found[1])
    before = next((i for i in range(found[0] - 1, -1, -1) if ops(i, found[0]) == unit), None)
    after = next((i for i in range(found[-1] + 1, len(own) + 1) if ops(found[-1], i) == unit), None)
    return [*([] if before is None else [before]), *found, *([] if after is None else [after])]
