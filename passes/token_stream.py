"""Find the token stream: where the graph can be cut, and where its blocks begin and end."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Node

from dcconvert.passes.errors import UnsupportedModelError, UsageError
from dcconvert.passes.infra import Pass, PassResult, Program, TokenStream

aten = torch.ops.aten

PATCHIFY = {aten.conv2d.default, aten.convolution.default, aten.conv2d.padding}
ATTENTION = aten.scaled_dot_product_attention.default


class FindTokenStream(Pass):
    """Locate patchify, cut points, blocks and the trunk; changes no node.

    1. Patchify is the first convolution on the way from an input whose output is [B, D, H, W].
    2. A cut point is a node that depends on patchify, is the only live such value, and has shape [B, N, D].
    3. Blocks are the longest run of repeating op sequences between cut points that holds attention. (Position
       terms come before it, being no part of the repetition.)
    4. The trunk is what is left of the blocks between the head and the tail blocks.
    """

    def call(self, program: Program) -> PassResult:
        patchify = find_patchify(program)
        value = patchify.meta["val"]
        grid = (int(value.shape[2]), int(value.shape[3]))
        cuts = find_cuts(program, patchify, grid[0] * grid[1])
        boundaries = find_boundaries(program, cuts, patchify)
        width = int(boundaries[0].meta["val"].shape[2])
        stream = TokenStream(patchify, grid, width, cuts, boundaries)
        program.stream = stream
        program.image = image_input(program, patchify)
        program.trunk = choose_trunk(stream, program.options.head_blocks, program.options.tail_blocks)
        note = f"{grid[0]}x{grid[1]} tokens of width {width}, {len(cuts)} cut points, {stream.depth} blocks"
        return PassResult(len(cuts), (note,))


def find_patchify(program: Program) -> Node:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.target in PATCHIFY and isinstance(value, Tensor) and value.ndim == 4:
            return node
    seen = sorted({str(n.target) for n in program.graph.nodes if "conv" in str(n.target)})
    raise UnsupportedModelError(
        "no patchify convolution (conv2d giving [B, D, H, W]) found; "
        f"nearest miss: {', '.join(seen) or 'no convolution'}"
    )


def image_input(program: Program, patchify: Node) -> str:
    """The model input that patchify reads first."""
    stack = [patchify]
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            return node.name
        stack.extend(reversed(node.all_input_nodes))
    raise UnsupportedModelError("patchify depends on no input of the model: there is no image to take apart")


def dependents(program: Program, root: Node) -> list[Node]:
    """All nodes that depend on `root`, itself first, in graph order; the output node is left out."""
    found = {root}
    for node in program.graph.nodes:
        if node.op != "output" and any(source in found for source in node.all_input_nodes):
            found.add(node)
    valued = (node for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor | list | tuple))
    return [node for node in valued if node in found]


def find_cuts(program: Program, patchify: Node, tokens: int) -> list[Node]:
    """Cut points by liveness, in graph order."""
    stream = dependents(program, patchify)
    position = {node: i for i, node in enumerate(stream)}
    last_use = {n: max((position.get(user, len(stream)) for user in n.users), default=-1) for n in stream}
    cuts, reach = [], -1  # reach: the last position at which anything seen so far is still needed
    for i, node in enumerate(stream):
        if reach <= i and is_token_tensor(node, program.batch, tokens):
            cuts.append(node)
        reach = max(reach, last_use[node])
    return cuts


def is_token_tensor(node: Node, batch: torch.SymInt, tokens: int) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 3 and same(value.shape[0], batch) and value.shape[1] == tokens


def same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are the same expression (no guard is added)."""
    return str(a) == str(b)


def find_boundaries(program: Program, cuts: list[Node], patchify: Node) -> list[Node]:
    """Residual-stream nodes before the first and after each repeating block."""
    stream = dependents(program, patchify)
    position = {node: i for i, node in enumerate(stream)}
    segments = [tuple(str(n.target) for n in stream[position[a] + 1 : position[b] + 1]) for a, b in pairwise(cuts)]
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
    if not covered:
        attentions = sum(n.target is ATTENTION for n in stream)
        raise UnsupportedModelError(
            f"no repeating transformer blocks found: {len(cuts)} cut points, {attentions} attention ops on the token "
            f"stream (two equal blocks whose only live value between them is [B, N, D] are needed)"
        )
    return cuts[start : start + covered + 1 : period]


def choose_trunk(stream: TokenStream, head: int, tail: int) -> tuple[Node, Node]:
    if head < 0 or tail < 0:
        raise UsageError(f"head blocks ({head}) and tail blocks ({tail}) must not be negative")
    if head + tail >= stream.depth:
        raise UsageError(
            f"{head} head and {tail} tail blocks leave no trunk in a model of {stream.depth} blocks; "
            "lower --head-blocks or --tail-blocks"
        )
    return stream.boundaries[head], stream.boundaries[stream.depth - tail]
