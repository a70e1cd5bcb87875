"""Find the node that turns the image into tokens, and the grid of the tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node

from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.ir.program import Program

aten = torch.ops.aten

CONVOLUTIONS = {aten.conv2d.default, aten.convolution.default, aten.conv2d.padding, aten.conv3d.default}
# Ops that may come between an image and the linear layer that turns its patches into tokens.
MOVES = {aten.reshape.default, aten.view.default, aten.permute.default, aten.flatten.using_ints, aten.transpose.int}


def find_patchify(program: Program) -> tuple[Node, tuple[int, int]]:
    """The node that turns the image into tokens, and the tokens' grid (H, W).

    This is the first convolution that returns [B, D, H, W], or [B, D, F, H, W] for video, whose frames are stacked
    vertically (F*H, W). Otherwise it is the linear layer over patches of the input that has the output's shape, except
    for the channels. The grid of a linear layer is the program's, or is inferred if the input is an image, or is
    assumed to be square. Raises UnsupportedModelError if there is no such node, and UsageError for a grid that does not
    fit.
    """
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.target in CONVOLUTIONS and isinstance(value, Tensor) and value.ndim in (4, 5):
            *rows, columns = map(int, value.shape[2:])
            grid = (math.prod(rows), columns)
            return node, checked(program, grid, math.prod(grid))
    for node in program.graph.nodes:
        if node.target is aten.linear.default and (image := patched_input(node)) and is_image(program, image):
            tokens = int(node.meta["val"].shape[1])
            return node, checked(program, seen_grid(image, tokens), tokens)
    seen = sorted({str(n.target) for n in program.graph.nodes if "conv" in str(n.target)})
    raise UnsupportedModelError(
        "no patchify convolution (conv2d giving [B, D, H, W]) and no linear layer over patches found; "
        f"nearest miss: {', '.join(seen) or 'no convolution'}"
    )


def checked(program: Program, seen: tuple[int, int] | None, tokens: int) -> tuple[int, int]:
    """The program's grid, or else the inferred one; raises UsageError if there is none or it has the wrong size."""
    grid = program.grid or seen
    if grid is None:
        raise UsageError(f"cannot infer the grid of the {tokens} tokens from the model: pass grid=(height, width)")
    if math.prod(grid) != tokens:
        raise UsageError(f"the grid {grid[0]}x{grid[1]} does not match the {tokens} tokens of the model")
    return grid


def patched_input(node: Node) -> Node | None:
    """The model input whose patches a linear layer [B, N, D] takes."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != 3:
        return None
    source = node.all_input_nodes[0]
    while source.target in MOVES:
        source = source.all_input_nodes[0]
    return source if source.op == "placeholder" else None


def is_image(program: Program, source: Node) -> bool:
    """Whether an input has the first output's shape, except for the channels (the first or last axis of a sample)."""
    output = next(iter(reversed(program.graph.nodes))).args[0]
    first = next(iter(output)).meta["val"] if isinstance(output, list | tuple) else output.meta["val"]
    axes = slice(2, None) if first.ndim == 4 else slice(1, -1)
    value = source.meta["val"]
    return bool(value.ndim == first.ndim and tuple(value.shape[axes]) == tuple(first.shape[axes]))


def seen_grid(image: Node, tokens: int) -> tuple[int, int] | None:
    """The grid of `tokens` patches of an image [B, C, H, W]; for tokens [B, N, C], a square grid if N is a square."""
    shape = image.meta["val"].shape
    if len(shape) == 4:
        height, width = int(shape[2]), int(shape[3])
        side = math.isqrt(height * width // tokens)
        return (height // side, width // side) if side else None
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None


def image_input(patchify: Node) -> str:
    """The model input that patchify reads first."""
    stack = [patchify]
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            return node.name
        stack.extend(reversed(node.all_input_nodes))
    raise UnsupportedModelError("patchify does not depend on any input of the model, so there is no image to split")
