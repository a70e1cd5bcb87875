"""Find the token stream: what turns the image into tokens, and where the blocks and the trunk begin and end."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Node

from dcconvert.passes.frontend.blocks import find_boundaries
from dcconvert.passes.frontend.cuts import ATTENTION, Cut, ancestors, dependents, find_cuts, main_stream
from dcconvert.passes.frontend.patchify import Candidate, find_candidates, no_candidate
from dcconvert.passes.frontend.reach import reach_of
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.ir.graph_tools import where
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.program import Program, TokenStream

aten = torch.ops.aten

# Ops that take the grid's tokens out of a value that holds others too.
PARTS = {aten.slice.Tensor, aten.split_with_sizes.default, aten.split.sizes, operator.getitem}


@dataclass(frozen=True)
class Found:
    """The blocks found for one candidate: its stream and cut points, and the attention ops that the blocks hold."""

    candidate: Candidate
    stream: list[Node]
    cuts: list[Cut]
    boundaries: list[Cut]
    attentions: int


class FindTokenStream(Pass):
    """Locate patchify, cut points, blocks and the trunk; changes no node.

    1. Patchify turns the image into tokens: of the nodes that may do so, the one whose blocks hold most attention ops
       (see `find_candidates`).
    2. At a cut point, the only value depending on patchify that is still needed has the shape [B, N, D], apart from
       contexts and values that bypass all blocks. In a single stream, it is [B, N+X, D], with other tokens in the same
       value.
    3. Blocks are runs of repeating op sequences between cut points that contain attention. (Position terms come before
       them, because they are not repeated.) Several runs may follow each other, as in models with double and single
       streams. The first and last block of a run may lack some ops, for example where text enters or ends.
    4. The trunk consists of the blocks between the head and the tail blocks. It holds no block from whose inside an
       output of the model is computed that leaves before the last block.
    """

    def call(self, program: Program) -> PassResult:
        found = find_blocks(program)
        tokens, boundaries = found.candidate.tokens, found.boundaries
        grid = found.candidate.placed(program)
        width = int(boundaries[0].node.meta["val"].shape[2])
        contexts = {cut.node: cut.contexts if cut.start is None else (cut.node,) for cut in found.cuts}
        nodes = [cut.node for cut in boundaries]
        stream = TokenStream(found.candidate.node, grid, width, [c.node for c in found.cuts], nodes, contexts)
        stream.starts = {cut.node: cut.start for cut in boundaries if cut.start is not None}
        program.stream = stream
        program.image = found.candidate.image.name
        head, tail = choose_trunk(program, found)
        program.trunk = (nodes[head], nodes[stream.depth - tail])
        program.reach = reach_of(program, head, tail)
        note = f"{grid[0]}x{grid[1]} tokens of width {width}, {len(found.cuts)} cut points, {stream.depth} blocks"
        beside = max(cut.beside(tokens) for cut in boundaries)
        note += f", {beside} tokens beside the grid" if beside else ""
        return PassResult(len(found.cuts), (note, *program.reach.notes))


def find_blocks(program: Program) -> Found:
    """The candidate whose blocks hold most attention ops, the first of several.

    Raises UnsupportedModelError if none has blocks, and UsageError for a grid that fits none.
    """
    best: Found | None = None
    tried: list[Found] = []
    misfit: UsageError | None = None
    for candidate in find_candidates(program):
        try:
            candidate.placed(program)
        except UsageError as error:
            misfit = misfit or error
            continue
        stream = main_stream(program, candidate.node)
        whole = count_attentions(stream)
        for single in (False, True):
            tried.append(blocks_at(program, candidate, stream, single))
            if tried[-1].boundaries and (best is None or tried[-1].attentions > best.attentions):
                best = tried[-1]
            if best is not None and best.attentions == whole:
                break
        if best is not None and best.attentions == whole:
            return best
    if best is not None:
        return best
    if misfit is not None and not tried:
        raise misfit
    if not tried:
        raise no_candidate(program)
    raise no_blocks(program, tried[0])


def blocks_at(program: Program, candidate: Candidate, stream: list[Node], single: bool) -> Found:
    cuts = find_cuts(program, stream, candidate.tokens, single)
    boundaries = find_boundaries(stream, cuts, candidate.tokens)
    if boundaries:
        boundaries = with_plain_ends(stream, cuts, boundaries)
    return Found(candidate, stream, cuts, boundaries, held(stream, boundaries))


def with_plain_ends(stream: Sequence[Node], cuts: Sequence[Cut], boundaries: list[Cut]) -> list[Cut]:
    """Boundaries whose first and last one, if in a single stream, are moved to where its tokens join or leave others.

    Only ops that join or take out tokens may lie in between.
    """
    position = {node: i for i, node in enumerate(stream)}
    first, last = cuts.index(boundaries[0]), cuts.index(boundaries[-1])

    def only(targets: set[object], earlier: Cut, later: Cut) -> bool:
        between = stream[position[earlier.last] + 1 : position[later.last] + 1]
        return all(node.target in targets for node in between)

    earlier, later = cuts[max(first - 1, 0)], cuts[min(last + 1, len(cuts) - 1)]
    if boundaries[0].start is not None and earlier.start is None and only({aten.cat.default}, earlier, cuts[first]):
        boundaries = [earlier, *boundaries[1:]]
    if boundaries[-1].start is not None and later.start is None and only(PARTS, cuts[last], later):
        boundaries = [*boundaries[:-1], later]
    return boundaries


def count_attentions(nodes: Sequence[Node]) -> int:
    return sum(node.target is ATTENTION for node in nodes)


def held(stream: Sequence[Node], boundaries: Sequence[Cut]) -> int:
    """The number of attention ops in all blocks together."""
    if not boundaries:
        return 0
    position = {node: i for i, node in enumerate(stream)}
    return count_attentions(stream[position[boundaries[0].last] + 1 : position[boundaries[-1].last] + 1])


def no_blocks(program: Program, tried: Found) -> UnsupportedModelError:
    """Explains why there is no trunk: the number of cut points, and the value that stays live longest."""
    stream, attentions = tried.stream, count_attentions(tried.stream)
    if not attentions:
        return UnsupportedModelError(
            "no attention found on the token stream: write it with torch's scaled_dot_product_attention, or as "
            "softmax(q @ k^T * scale) @ v with the softmax over the keys"
        )
    position = {node: i for i, node in enumerate(stream)}
    tensors = [node for node in stream if node.users and isinstance(node.meta["val"], Tensor)]
    kept = max(tensors, key=lambda n: max(position.get(user, -1) for user in n.users) - position[n])
    until = max(kept.users, key=lambda user: position.get(user, -1))
    return UnsupportedModelError(
        f"no repeating transformer blocks found: {len(tried.cuts)} cut points, {attentions} attention ops on the token "
        "stream (there must be two equal blocks with no live values between them other than [B, N, D] and other tokens "
        f"[B, X, D], with X different from N; the value that stays live longest is {where(kept)}, until {where(until)})"
    )


def choose_trunk(program: Program, found: Found) -> tuple[int, int]:
    """How many blocks come before and after the trunk. Raises UsageError if none are left for it."""
    head, tail = program.method.head_blocks, program.method.tail_blocks
    depth = len(found.boundaries) - 1
    if head < 0 or tail < 0:
        raise UsageError(f"head blocks ({head}) and tail blocks ({tail}) must not be negative")
    first, last = without_taps(program, found)
    if max(head, first) + max(tail, depth - last) >= depth:
        whole = count_attentions(found.stream)
        few = "" if found.attentions == whole else f" (of its {whole} attention ops, they hold {found.attentions})"
        left = f"{depth} blocks" if not few else f"{depth} repeating blocks{few}"
        raise UsageError(
            f"{head} head and {tail} tail blocks leave no trunk in a model of {left}; "
            "lower --head-blocks or --tail-blocks"
        )
    return max(head, first), max(tail, depth - last)


def without_taps(program: Program, found: Found) -> tuple[int, int]:
    """The longest run of blocks, as two indices of boundaries, of whose inside no other output is computed."""
    stream, boundaries = found.stream, found.boundaries
    position = {node: i for i, node in enumerate(stream)}
    places = [position[cut.last] for cut in boundaries]
    passed = [{cut.node, *cut.contexts} for cut in boundaries]
    inside = set(stream)
    path = ancestors([boundaries[-1].node]) & set(dependents(program, [boundaries[0].node]))
    ends: set[int] = {0, len(boundaries) - 1}
    blocked: set[int] = set()
    for node in stream[places[0] + 1 : places[-1] + 1]:
        if node not in path or all(user in inside or not used_as_value(user) for user in node.users):
            continue
        block = next(i for i, place in enumerate(places) if position[node] <= place) - 1
        at = next((i for i, values in enumerate(passed) if node in values), None)
        ends |= {block, block + 1} if at is None else {at}
        blocked |= {block} if at is None else set()
    limits = sorted(ends)
    runs = [(a, b) for a, b in pairwise(limits) if not (b == a + 1 and a in blocked)]
    return max(runs, key=lambda run: run[1] - run[0], default=(0, 0))


def used_as_value(user: Node) -> bool:
    return user.op == "output" or isinstance(user.meta.get("val"), Tensor | list | tuple)
