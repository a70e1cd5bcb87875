"""DDiT's trunk: each sample and step uses one of several patch sizes (arXiv 2602.16968)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dcconvert.passes.frontend.cuts import ancestors, dependents, is_token_tensor
from dcconvert.passes.frontend.reach import trunk_nodes
from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.graph_tools import remove_dead_code, run_nodes, where
from dcconvert.passes.ir.node_args import integers, operand
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.plan_inputs import CHUNK_INPUTS
from dcconvert.passes.ir.program import Program
from dcconvert.passes.modules.patch_resize import PatchEmbedding, PatchOutput, PatchSkip, resized
from dcconvert.passes.packing.packer import Packer
from dcconvert.passes.packing.rules import find_rule
from dcconvert.passes.planning.planners import scales_of
from dcconvert.passes.rewrite.inline import inline
from dcconvert.passes.rewrite.pack_trunk import add_plan_inputs, drop_unused_inputs

aten = torch.ops.aten

NAME = "patch_sizes"


@dataclass(frozen=True)
class Pixels:
    """The pixels of a token's features: feature f of token (y, x) is pixel (y p + dy, x p + dx) of channel c.

    order [F]: c p^2 + dy p + dx of each feature; `patch`: p.
    """

    order: Tensor
    patch: int
    channels: int


class PatchSizes(Pass):
    """Rewrite image -> tokens -> blocks -> pixels so that it runs in patches of p, 2p or 4p; the plan says which.

    1. Patches of 2p and 4p have their own embedding: the pseudo-inverse of a bilinear resize, with interpolated
       positions.
    2. `chunk` takes the tokens of the plan's size; everything up to the last linear layer is packed.
    3. That layer also has a version for each size (a bilinear resize of its output for p). Every token of the grid
       takes its part of its patch's output, plus the detail of the input that a patch of that size cannot represent
       (`PatchSkip`).

    If every patch has size p, the result is the original.
    """

    exact = True

    def requires(self, program: Program) -> None:
        stream = program.found_stream()
        if any(stream.contexts.get(node) for node in stream.boundaries):
            raise UnsupportedModelError("patch sizes do not support tokens beside the grid (joint attention with text)")
        if len(scales_of(stream.grid)) == 1:
            raise UnsupportedModelError(
                f"a grid of {stream.grid[0]}x{stream.grid[1]} tokens has no patches of twice the size"
            )

    def call(self, program: Program) -> PassResult:
        stream = program.found_stream()
        start, scales = stream.boundaries[0], scales_of(stream.grid)
        end = last_linear(program)
        pixels = pixels_of(program, end)
        body = trunk_nodes(program, start, (end,))
        outside = [user for user in end.users if user not in body]
        add_plan_inputs(program, CHUNK_INPUTS)
        packer = PatchPacker(program, find_rule, stream.tokens, program.method.row_packing)
        with program.graph.inserting_before(end.next):
            members = (packer.plan_input("chunk_index"), packer.plan_input("chunk_weight"))
            embedded = embeddings(program, start, pixels.patch, scales)
            packer.start(start, packer.emit(torch.ops.dcconvert.chunk.default, embedded, *members))
            for node in body:
                packer.visit(node)
            result = self.pixels(packer, end, pixels, scales)
        for user in outside:
            user.replace_input_with(end, result)
        remove_dead_code(program.graph)
        drop_unused_inputs(program)
        program.trunk = (start, result)
        sizes = ", ".join(str(pixels.patch * scale) for scale in scales)
        return PassResult(packer.attentions, (f"patches of {sizes}, {packer.attentions} attentions",))

    def pixels(self, packer: Packer, end: Node, pixels: Pixels, scales: Sequence[int]) -> Node:
        """The output of the packed tokens, as features of every token of the grid [B, N, F]."""
        program, features = packer.program, int(end.meta["val"].shape[2])
        own, source = (packer.get(node, "packed").node for node in (end, operand(end)))
        tensors = [tensor_of(program, node) for node in end.args[1:] if isinstance(node, Node)]
        module = PatchOutput(tensors[0], tensors[1] if len(tensors) > 1 else None, pixels.order, pixels.patch, scales)
        coarse = inline(program.graph_module, module, (source,), f"{NAME}.output")
        both = packer.emit(aten.cat.default, [own, coarse], -1)
        rows = packer.emit(aten.reshape.default, both, [packer.groups("packed"), -1, features])
        fill = packer.plan_input("fill_index")
        taken = packer.emit(torch.ops.dcconvert.gather_tokens.default, rows, packer.emit(aten.select.int, fill, 2, 0))
        image, time = (input_of(program, name) for name in (program.image, program.timestep))
        predicts = program.method.predicts
        if not predicts or time is None or image is None:
            return taken
        stream, known = program.found_stream(), (predicts, image.meta["val"].shape[1])
        skip = PatchSkip(stream.grid, pixels.order, pixels.patch, scales, *known, program.timestep_scale)
        details = inline(program.graph_module, skip, (image, time), f"{NAME}.skip")
        which = packer.emit(aten.select.int, fill, 2, 1)
        return packer.emit(
            aten.add.Tensor, taken, packer.emit(torch.ops.dcconvert.gather_tokens.default, details, which)
        )


class PatchPacker(Packer):
    def token_index(self) -> Node:
        raise UnsupportedModelError(
            "the blocks use token positions (rotary embeddings): patch sizes support only positions that "
            "are added before the first block"
        )


def last_linear(program: Program) -> Node:
    """The last linear layer over tokens, which computes the pixels of each."""
    after = dependents(program, [program.found_stream().boundaries[-1]])
    found = [
        n
        for n in after
        if n.target is aten.linear.default and is_token_tensor(n, program.batch, program.found_stream().tokens)
    ]
    if not found:
        raise UnsupportedModelError("no linear layer after the last block gives the pixels of each token")
    return found[-1]


def pixels_of(program: Program, end: Node) -> Pixels:
    """Where unpatchify puts the features of a token, found by running it on the features' indices."""
    tokens, features = int(end.meta["val"].shape[1]), int(end.meta["val"].shape[2])
    height, width = program.found_stream().grid
    output: Any = next(iter(reversed(program.graph.nodes)))
    wanted = next(value for value in output.args[0] if isinstance(value, Node) and value is not program.scores)
    given = {end: torch.arange(tokens * features, dtype=torch.float64).view(1, tokens, features)}
    values = run_nodes(program.graph_module, dependents(program, [end]), given, missing=1)
    image = values.get(wanted)
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[2] % height or image.shape[3] % width:
        raise UnsupportedModelError("the model's output is not an image [B, C, H, W] in patches of the token grid")
    patch, channels = int(image.shape[2]) // height, int(image.shape[1])
    cells = image[0].reshape(channels, height, patch, width, patch).permute(1, 3, 0, 2, 4).reshape(tokens, -1)
    order = cells[0].argsort()
    if not torch.equal(cells[:, order], values[end][0]):
        raise UnsupportedModelError("the ops after the last linear layer do more than rearrange pixels")
    return Pixels(order, patch, channels)


def embeddings(program: Program, start: Node, patch: int, scales: Sequence[int]) -> Node:
    """Tokens of all sizes one after the other [B, sum of N / scale^2, D]."""
    stream = program.found_stream()
    convolution = stream.patchify
    weight = tensor_of(program, operand(convolution, 1)) if convolution.target is aten.conv2d.default else None
    stride = integers(convolution, 3) if len(convolution.args) > 3 else [1, 1]
    if weight is None or tuple(weight.shape[2:]) != (patch, patch) or stride != [patch, patch]:
        raise UnsupportedModelError(
            f"{where(convolution)}: patch sizes need a convolution with patches of {patch} as stride"
        )
    first = prefix(program, start)
    base = first(torch.zeros(1, *image_shape(program)))[0]
    probe = torch.randn(2, *image_shape(program), generator=torch.Generator().manual_seed(0))
    plain = torch.nn.functional.conv2d(probe.to(weight), weight, stride=patch).flatten(2).transpose(1, 2)
    if not torch.allclose(first(probe), plain + base, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
        raise UnsupportedModelError("the model does more than add positions between patchify and the first block")
    module = PatchEmbedding(weight, resized(base, stream.grid, scales), scales)
    image = input_of(program, program.image)
    assert image is not None
    coarse = inline(program.graph_module, module, (image,), f"{NAME}.embedding")
    return program.emit(aten.cat.default, ([start, coarse], 1))


def image_shape(program: Program) -> tuple[int, ...]:
    image = input_of(program, program.image)
    assert image is not None
    return tuple(map(int, image.meta["val"].shape[1:]))


def prefix(program: Program, start: Node) -> Any:
    """A function from the image to the first block's input [B, N, D], which must depend only on the image."""
    needed = ancestors([start])
    others = [n.name for n in needed if n.op == "placeholder" and n.name != program.image]
    if others:
        raise UnsupportedModelError(
            f"tokens depend on {', '.join(sorted(others))} before the first block: patch sizes do not support this"
        )

    def run(image: Tensor) -> Tensor:
        ordered = [node for node in program.graph.nodes if node in needed]
        given = {node: image.to(node.meta["val"].dtype) for node in ordered if node.op == "placeholder"}
        found: Tensor = run_nodes(program.graph_module, ordered, given)[start]
        return found

    return run


def tensor_of(program: Program, node: Node) -> Tensor:
    """The value of a weight."""
    if node.op != "get_attr":
        raise UnsupportedModelError(f"{where(node)}: this is computed, but a weight is needed")
    value: Tensor = run_nodes(program.graph_module, [node])[node]
    return value.detach()


def input_of(program: Program, name: str | None) -> Node | None:
    return next((n for n in program.graph.nodes if n.op == "placeholder" and n.name == name), None)
