"""Find the nodes that may turn the image into tokens, and the grid of the tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from dcconvert.passes.frontend.cuts import ATTENTION, dependents, is_token_tensor, size_of
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.ir.graph_tools import output_node, placeholders
from dcconvert.passes.ir.program import Program

aten = torch.ops.aten

CONVOLUTIONS = {aten.conv2d.default, aten.convolution.default, aten.conv2d.padding, aten.conv3d.default}
CONVOLUTIONS |= {aten.conv1d.default, aten.conv1d.padding, aten.conv3d.padding}
MOST_COUNTS = 4  # numbers of tokens that are tried for one node


@dataclass(frozen=True)
class Candidate:
    """A node that may turn the image into N tokens; `grid`: how they lie, as far as the node shows it."""

    node: Node
    image: Node
    tokens: int
    grid: tuple[int, int] | None

    def placed(self, program: Program) -> tuple[int, int]:
        """The tokens' grid: the program's if one was given, or else the one that was seen, or one column.

        Raises UsageError if the given grid does not have N tokens.
        """
        if program.grid is None:
            return self.grid or (self.tokens, 1)
        if math.prod(program.grid) != self.tokens:
            height, width = program.grid
            raise UsageError(f"the grid {height}x{width} does not match the {self.tokens} tokens of the model")
        return program.grid


def find_candidates(program: Program) -> Iterator[Candidate]:
    """Convolutions and linear layers ahead of the first attention op that depend on the image, likely ones first.

    The image is an input with the output's shape, except for the channels, or else any other floating-point input with
    at least three axes. The number of tokens is that of a node's own places, or any other number of tokens [B, N, D]
    that the image has ahead of the first attention op: frames may be folded into the batch. Tokens of a video lie frame
    below frame.
    """
    for image in sorted(images(program), key=lambda node: not is_image(program, node)):
        after = dependents(program, [image])
        ahead = after[: next((i for i, node in enumerate(after) if node.target is ATTENTION), len(after))]
        counts = token_counts(program, ahead)
        convolutions = [node for node in ahead if node.target in CONVOLUTIONS]
        linears = [node for node in ahead if node.target is aten.linear.default]
        for node in (*convolutions, *linears):
            yield from candidates_at(program, node, image, counts)


def candidates_at(program: Program, node: Node, image: Node, counts: list[int]) -> Iterator[Candidate]:
    shape = node.meta["val"].shape
    places = shape[2:] if node.target in CONVOLUTIONS else shape[1:-1]
    if not places or any(isinstance(size, torch.SymInt) for size in places):
        return
    *rows, columns = map(int, places)
    own = math.prod(rows) * columns
    flat = len(places) == 1
    if not same_batch(program, node):
        counts = [count for count in counts if count != own]  # frames in the batch: these places are those of one frame
    else:
        yield Candidate(node, image, own, seen_grid(image, own) if flat else (math.prod(rows), columns))
    for count in counts:
        if count != own:
            whole = not flat and count % own == 0
            yield Candidate(node, image, count, (count // columns, columns) if whole else seen_grid(image, count))


def same_batch(program: Program, node: Node) -> bool:
    return str(node.meta["val"].shape[0]) == str(program.batch)


def images(program: Program) -> list[Node]:
    """Floating-point inputs with a batch axis and at least two others."""
    values = {node: node.meta.get("val") for node in placeholders(program.graph)}
    return [
        node
        for node, value in values.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3 and same_batch(program, node)
    ]


def is_image(program: Program, source: Node) -> bool:
    """Whether an input has the first output's shape, except for the channels, which are on one axis of a sample."""
    output = output_node(program.graph).args[0]
    first = next(iter(output)) if isinstance(output, list | tuple) else output
    value, wanted = source.meta["val"], first.meta["val"] if isinstance(first, Node) else None
    if not isinstance(wanted, Tensor) or value.ndim != wanted.ndim:
        return False
    return sum(str(a) != str(b) for a, b in zip(value.shape, wanted.shape, strict=True)) <= 1


def token_counts(program: Program, ahead: list[Node]) -> list[int]:
    """The numbers N of the values [B, N, D], most frequent first, without values that other tokens were joined to."""
    inside, joined = set(ahead), set()
    counts: Counter[int] = Counter()
    for node in ahead:
        tokens = is_token_tensor(node, program.batch)
        sources = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
        outside = node.target is aten.cat.default and any(source not in inside for source in sources)
        if outside or any(source in joined for source in sources):
            joined.add(node)
        elif tokens:
            counts[size_of(node)] += 1
    return [count for count, _ in counts.most_common(MOST_COUNTS) if count > 1]


def seen_grid(image: Node, tokens: int) -> tuple[int, int] | None:
    """The grid of `tokens` patches of an image [B, C, H, W]; for tokens [B, N, C], a square grid if N is a square."""
    shape = image.meta["val"].shape
    if len(shape) == 4:
        height, width = int(shape[2]), int(shape[3])
        side = math.isqrt(height * width // tokens)
        grid = (height // side, width // side) if side else (0, 0)
        return grid if math.prod(grid) == tokens else None
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None


def no_candidate(program: Program) -> UnsupportedModelError:
    """Explains that nothing turns an image into tokens."""
    layers = [n for n in program.graph.nodes if n.target in CONVOLUTIONS or n.target is aten.linear.default]
    if not images(program):
        found = "it has no floating-point input [B, ...] with at least three axes"
    elif not layers:
        found = "it has no convolution and no linear layer"
    else:
        found = "none of its convolutions and linear layers depends on such an input ahead of the first attention op"
    return UnsupportedModelError(
        "no patchify found: a convolution that gives [B, D, H, W] or a linear layer over patches that gives [B, N, D], "
        f"of an input [B, C, H, W] or [B, N, C]; {found}"
    )
