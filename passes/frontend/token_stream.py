"""Find the token stream: where the graph can be cut, and where its blocks begin and end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Node

from dcconvert.passes.frontend.patchify import find_patchify, image_input
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.ir.graph_tools import where
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.program import Program, TokenStream

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Cut:
    """A place where the graph can be cut: after `last`, only the tokens `node` [B, N, D] and `contexts` are live.

    Contexts [B, X, E] are tokens beside those of the grid, such as text in joint attention.
    """

    node: Node
    contexts: tuple[Node, ...]
    last: Node


class FindTokenStream(Pass):
    """Locate patchify, cut points, blocks and the trunk; changes no node.

    1. Patchify turns the image into tokens: see `find_patchify`.
    2. At a cut point, the only value depending on patchify that is still needed has the shape [B, N, D], apart from
       contexts and values that bypass all blocks.
    3. Blocks are runs of repeating op sequences between cut points that contain attention. (Position terms come before
       them, because they are not repeated.) Several runs may follow each other, as in models with double and single
       streams. The first and last block of a run may lack some ops, for example where text enters or ends.
    4. The trunk consists of the blocks between the head and the tail blocks.
    """

    def call(self, program: Program) -> PassResult:
        patchify, grid = find_patchify(program)
        tokens = math.prod(grid)
        cuts = find_cuts(program, patchify, tokens)
        boundaries = find_boundaries(program, cuts, patchify)
        width = int(boundaries[0].node.meta["val"].shape[2])
        contexts = {cut.node: cut.contexts for cut in cuts}
        stream = TokenStream(patchify, grid, width, [c.node for c in cuts], [b.node for b in boundaries], contexts)
        program.stream = stream
        program.image = image_input(patchify)
        program.trunk = choose_trunk(stream, program.method.head_blocks, program.method.tail_blocks)
        note = f"{grid[0]}x{grid[1]} tokens of width {width}, {len(cuts)} cut points, {stream.depth} blocks"
        beside = max(count_tokens(contexts[node]) for node in stream.boundaries)
        return PassResult(len(cuts), (f"{note}, {beside} tokens beside the grid" if beside else note,))


def dependents(program: Program, roots: Iterable[Node]) -> list[Node]:
    """All nodes that depend on `roots`, including these, in graph order; without the output node."""
    found = set(roots)
    for node in program.graph.nodes:
        if node.op != "output" and any(source in found for source in node.all_input_nodes):
            found.add(node)
    valued = (node for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor | list | tuple))
    return [node for node in valued if node in found]


def find_cuts(program: Program, patchify: Node, tokens: int) -> list[Cut]:
    """Cut points by liveness, in graph order; if several have the same `node`, the last with the fewest other
    tokens."""
    stream = dependents(program, [patchify])
    position = {node: i for i, node in enumerate(stream)}
    last_use = {n: max((position.get(user, len(stream)) for user in n.users), default=-1) for n in stream}
    beside = passing(stream, position)
    cuts: dict[Node, Cut] = {}
    live: set[Node] = set()
    for i, node in enumerate(stream):
        live = {value for value in live if last_use[value] > i} | ({node} if last_use[node] > i else set())
        grids = [value for value in live if beside.get(value, i) >= i and is_token_tensor(value, program.batch, tokens)]
        others = {value for value in live if beside.get(value, i) >= i} - set(grids)
        contexts = tuple(sorted(others, key=position.__getitem__))
        if len(grids) != 1 or not all(is_token_tensor(value, program.batch) for value in contexts):
            continue
        [tokens_node] = grids
        known = cuts.get(tokens_node)
        if known is None or count_tokens(known.contexts) >= count_tokens(contexts) > 0:
            cuts[tokens_node] = Cut(tokens_node, contexts, node)
    # A point with more contexts is in the middle of a block.
    fewest = min((count_tokens(cut.contexts) for cut in cuts.values() if cut.contexts), default=0)
    return [cut for cut in cuts.values() if count_tokens(cut.contexts) <= fewest]


def passing(stream: Sequence[Node], position: Mapping[Node, int]) -> dict[Node, int]:
    """Values made before the first attention and needed after the last, and the position from which they bypass the
    blocks.

    Between their last use before the blocks and their first use after them, they are not part of the stream.
    """
    places = [i for i, node in enumerate(stream) if node.target is ATTENTION]
    if len(places) < 2:
        return {}
    found = {}
    for node in stream[: places[0]]:
        uses = [position.get(user, len(stream)) for user in node.users]
        if max(uses, default=-1) > places[-1]:
            found[node] = max((use for use in uses if use < places[-1]), default=position[node])
    return found


def count_tokens(contexts: Sequence[Node]) -> int:
    return sum(int(node.meta["val"].shape[1]) for node in contexts)


def is_token_tensor(node: Node, batch: torch.SymInt, tokens: int | None = None) -> bool:
    """Whether a node returns [B, `tokens`, D]; None stands for any number of tokens."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != 3 or not same(value.shape[0], batch):
        return False
    return tokens is None or bool(value.shape[1] == tokens)


def same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are the same expression (no guard is added)."""
    return str(a) == str(b)


def find_boundaries(program: Program, cuts: list[Cut], patchify: Node) -> list[Cut]:
    """Residual-stream cuts before the first and after each repeating block."""
    stream = dependents(program, [patchify])
    position = {node: i for i, node in enumerate(stream)}
    places = [position[cut.last] + 1 for cut in cuts]
    parts = [stream[a:b] for a, b in pairwise(places)]
    segments = [tuple(str(node.target) for node in part) for part in parts]
    found = repeated(segments)
    if not found:
        raise no_blocks(stream, cuts, program)
    tokens = int(cuts[0].node.meta["val"].shape[1])
    own = [tuple(str(n.target) for n in part if n.target is ATTENTION or is_of_grid(n, tokens)) for part in parts]
    found = extended(found, own)
    while found[0] > 0 and (before := repeated(segments[: found[0]])):
        before = extended(before, own[: found[0]])
        if before[-1] != found[0]:
            break
        found = [*before[:-1], *found]
    while found[-1] < len(parts) and (after := repeated(segments[found[-1] :])):
        after = [i + found[-1] for i in extended(after, own[found[-1] :])]
        if after[0] != found[-1]:
            break
        found = [*found, *after[1:]]
    return [cuts[i] for i in found]


def no_blocks(stream: list[Node], cuts: list[Cut], program: Program) -> UnsupportedModelError:
    """Explains why there is no trunk: the number of cut points, and the value that stays live longest."""
    position = {node: i for i, node in enumerate(stream)}
    tensors = [node for node in stream if node.users and isinstance(node.meta["val"], Tensor)]
    kept = max(tensors, key=lambda n: max(position.get(user, -1) for user in n.users) - position[n])
    until = max(kept.users, key=lambda user: position.get(user, -1))
    attentions = sum(n.target is ATTENTION for n in stream)
    return UnsupportedModelError(
        f"no repeating transformer blocks found: {len(cuts)} cut points, {attentions} attention ops on the token "
        "stream (there must be two equal blocks with no live values between them other than [B, N, D] and other tokens "
        f"[B, X, D], with X different from N; the value that stays live longest is {where(kept)}, until {where(until)})"
    )


def is_of_grid(node: Node, tokens: int) -> bool:
    """Whether a node returns [B, N, ...]."""
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.ndim > 2 and bool(value.shape[1] == tokens)


def repeated(segments: Sequence[tuple[str, ...]]) -> list[int]:
    """The start of the longest run of repeating groups of segments with attention, and the end of each group."""
    best = (0, 0, 0)  # covered segments, start, period
    for period in range(1, len(segments) // 2 + 1):
        for start in range(len(segments) - 2 * period + 1):
            unit = segments[start : start + period]
            if not any(str(ATTENTION) in segment for segment in unit):
                continue
            repeats = 1
            while segments[start + repeats * period : start + (repeats + 1) * period] == unit:
                repeats += 1
            if repeats > 1 and repeats * period > best[0]:
                best = (repeats * period, start, period)
    covered, start, period = best
    return list(range(start, start + covered + 1, period)) if covered else []


def extended(found: list[int], own: Sequence[tuple[str, ...]]) -> list[int]:
    """A run, extended by blocks before and after it that treat the grid's tokens alike, even if not the other tokens.

    `own`: the ops of each segment that are attention or that work on grid tokens only.
    """

    def ops(first: int, last: int) -> list[str]:
        return [op for part in own[first:last] for op in part]

    unit = ops(found[0], found[1])
    before = next((i for i in range(found[0] - 1, -1, -1) if ops(i, found[0]) == unit), None)
    after = next((i for i in range(found[-1] + 1, len(own) + 1) if ops(found[-1], i) == unit), None)
    return [*([] if before is None else [before]), *found, *([] if after is None else [after])]


def choose_trunk(stream: TokenStream, head: int, tail: int) -> tuple[Node, Node]:
    if head < 0 or tail < 0:
        raise UsageError(f"head blocks ({head}) and tail blocks ({tail}) must not be negative")
    if head + tail >= stream.depth:
        raise UsageError(
            f"{head} head and {tail} tail blocks leave no trunk in a model of {stream.depth} blocks; "
            "lower --head-blocks or --tail-blocks"
        )
    return stream.boundaries[head], stream.boundaries[stream.depth - tail]
