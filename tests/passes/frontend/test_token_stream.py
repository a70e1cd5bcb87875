"""FindTokenStream on models small enough to list their cut points by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.families import FAMILIES, made
from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.capture import capture
from dcconvert.passes.frontend.cuts import find_cuts, main_stream
from dcconvert.passes.frontend.token_stream import FindTokenStream
from dcconvert.passes.ir.errors import CheckFailedError, UnsupportedModelError, UsageError
from dcconvert.passes.ir.graph_tools import module_path
from dcconvert.passes.ir.pass_runner import run_passes
from dcconvert.passes.ir.program import Program
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from tests.passes.harness import GRID, TOKENS, WIDTH, Block, TinyModel, diffusers_call, pixart_call, tiny_inputs
from tests.passes.harness import tiny_program as program_of

aten = torch.ops.aten


def found(module: nn.Module | None = None, **options: int) -> Program:
    program = program_of(module, **options)
    run_passes(program, (FindTokenStream(),))
    return program


class Mlp(nn.Module):
    """A block without attention."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + F.relu(self.linear(x))


class SigmoidBlock(Block):
    """A block that is not like the others."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(torch.sigmoid(x), c)


def test_grid_width_and_patchify():
    stream = found().found_stream()
    assert stream.patchify.target is aten.conv2d.default
    assert (stream.grid, stream.tokens, stream.width, stream.depth) == (GRID, TOKENS, WIDTH, 3)


def test_cut_points_are_the_residual_stream():
    """The flattened patches, the position add, and in every block the two residual adds; the last linear too."""
    cuts = found().found_stream().cuts
    named = [(str(node.target), module_path(node)) for node in cuts]
    block = [("aten.add.Tensor", "blocks.{}"), ("aten.add.Tensor", "blocks.{}")]
    blocks = [(op, path.format(i)) for i in range(3) for op, path in block]
    patches = [("aten.transpose.int", ""), ("aten.add.Tensor", "")]
    assert named == [*patches, *blocks, ("aten.linear.default", "final")]


def test_boundaries_start_after_the_positions_and_end_with_the_last_block():
    stream = found().found_stream()
    positions = next(node for node in stream.cuts if node.target is aten.add.Tensor)
    assert stream.boundaries == [positions, *stream.cuts[3:-1:2]]
    assert [module_path(node) for node in stream.boundaries] == ["", "blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize(("head", "tail", "start", "end"), [(1, 1, 1, 2), (0, 0, 0, 3), (2, 0, 2, 3), (0, 2, 0, 1)])
def test_the_trunk_is_what_head_and_tail_leave(head, tail, start, end):
    program = found(head_blocks=head, tail_blocks=tail)
    boundaries = program.found_stream().boundaries
    assert program.found_trunk() == (boundaries[start], boundaries[end])


def test_alternating_blocks_repeat_as_pairs():
    stream = found(TinyModel([Block(), Mlp()] * 3)).found_stream()
    assert stream.depth == 3
    assert [module_path(node) for node in stream.boundaries[1:]] == ["blocks.1", "blocks.3", "blocks.5"]


def test_odd_blocks_at_the_ends_are_no_part_of_the_repetition():
    stream = found(TinyModel([Mlp(), Block(), Block(), SigmoidBlock()]), tail_blocks=0).found_stream()
    assert [module_path(node) for node in stream.boundaries] == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize("make", [diffusers_call, pixart_call])
def test_diffusers_models(make):
    program = capture(*make(), method_of("carry"))  # type: ignore[call-arg]
    run_passes(program, (Normalise(), FindTokenStream()))
    stream = program.found_stream()
    assert (stream.grid, stream.width, stream.depth) == ((4, 4), 32, 3)


@pytest.mark.parametrize(
    ("name", "depth", "beside"), [("sd3", 4, 7), ("sd35", 3, 7), ("flux", 6, 7), ("auraflow", 6, 15), ("wan", 4, 0)]
)
def test_blocks_of_models_with_other_tokens(name, depth, beside):
    """First blocks, where text enters, and last ones, which it leaves, count; so do double and single streams."""
    program = capture(*made(FAMILIES[name]), method_of("carry"))
    run_passes(program, (Normalise(), FindTokenStream()))
    stream = program.found_stream()
    assert (stream.depth, stream.width) == (depth, 32)
    assert stream.contexts[stream.boundaries[0]] == ()
    for boundary in stream.boundaries[1:-1]:
        assert stream.beside(boundary) == beside


def test_video_lies_frame_below_frame():
    program = capture(*made(FAMILIES["wan"]), method_of("carry"))
    run_passes(program, (Normalise(), FindTokenStream()))
    assert program.found_stream().grid == (3 * 4, 4)


def test_the_grid_of_a_linear_patchify_may_be_given():
    program = capture(*made(FAMILIES["flux"]), method_of("carry"))
    program.grid = (2, 8)
    run_passes(program, (Normalise(), FindTokenStream()))
    assert program.found_stream().grid == (2, 8)
    program.grid = (3, 5)
    with pytest.raises(UsageError, match="the grid 3x5 does not match the 16 tokens"):
        run_passes(program, (FindTokenStream(),))


def test_long_skips_are_named():
    program = capture(*made(FAMILIES["hunyuan-dit"]), method_of("carry"))
    with pytest.raises(UnsupportedModelError, match=r"stays live longest is .* in blocks\.0 .*, until .* in blocks\.3"):
        run_passes(program, (Normalise(), FindTokenStream()))


class LongSkip(TinyModel):
    """The first tokens are added again before the block with this number (3: behind the last)."""

    def __init__(self, where: int) -> None:
        super().__init__(Block() for _ in range(3))
        self.where = where

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = torch.sin(t.unsqueeze(1) * torch.arange(WIDTH))
        first = x = self.patchify(x).flatten(2).transpose(1, 2) + self.positions
        for number, block in enumerate(self.blocks):
            x = block(x + first if number == self.where else x, c)
        return self.final(x + first if self.where == 3 else x)


def test_a_value_that_stays_alive_leaves_no_cut():
    program = program_of(LongSkip(2))
    patchify = next(node for node in program.graph.nodes if node.target is aten.conv2d.default)
    cuts = find_cuts(program, main_stream(program, patchify), TOKENS)
    # Patches, positions, where the skip ends.
    kinds = [str(cut.node.target) for cut in cuts]
    assert kinds[:3] == [
        "aten.transpose.int",
        "aten.add.Tensor",
        "aten.add.Tensor",
    ]
    with pytest.raises(UnsupportedModelError, match="3 attention ops on the token stream"):
        run_passes(program, (FindTokenStream(),))


@pytest.mark.parametrize("mode", ["carry", "chunk"])
def test_a_value_that_passes_by_all_blocks_is_no_part_of_the_stream(mode):
    module, inputs = LongSkip(3), tiny_inputs()
    model = rewrite(module, inputs, {}, method_of(mode), Policy("constant", 2).timetable())
    assert model.spec.depth == 3
    with torch.no_grad():
        scores, live = model.route(dict(zip(model.spec.inputs, inputs, strict=True)))
        plan = model.planner.full_plan(len(scores))
        found = model.denoise(dict(zip(model.spec.inputs, inputs, strict=True)), live, plan)[0]
        torch.testing.assert_close(found, module(*inputs), rtol=1e-4, atol=1e-5)


class LinearPatchify(TinyModel):
    def __init__(self) -> None:
        super().__init__([Block(), Block()])
        self.patchify = nn.Linear(8, WIDTH)  # type: ignore[assignment]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.patchify(x.reshape(x.shape[0], TOKENS, 8)) + self.positions
        for block in self.blocks:
            x = block(x, t.unsqueeze(1) * torch.ones(WIDTH))
        return self.final(x)


class Frames(TinyModel):
    """Every frame of a video [B, T, C, H, W] is an image of the batch when the convolution sees it."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        frames = self.patchify(x.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = frames.reshape(x.shape[0], -1, WIDTH)
        for block in self.blocks:
            x = block(x, t.unsqueeze(1).expand(-1, WIDTH))
        return self.final(x)


class Sound(TinyModel):
    """A convolution that keeps the channels comes before the linear layer that makes tokens."""

    def __init__(self) -> None:
        super().__init__([Block(), Block()])
        self.before, self.widen = nn.Conv1d(4, 4, 1), nn.Linear(4, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.widen((self.before(x) + x).transpose(1, 2))
        for block in self.blocks:
            x = block(x, t.unsqueeze(1).expand(-1, WIDTH))
        return self.final(x).transpose(1, 2)


class LastAxis(LinearPatchify):
    """Patches of a video as features [B, T, H, W, C], which a linear layer makes wider."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.patchify(x).flatten(1, 3)
        for block in self.blocks:
            x = block(x, t.unsqueeze(1).expand(-1, WIDTH))
        return self.final(x)


T = torch.rand(3)


@pytest.mark.parametrize(
    ("module", "image", "grid"),
    [
        (LinearPatchify(), torch.randn(3, 2, 4, 8), (2, 4)),
        (Frames([Block(), Block()]), torch.randn(3, 5, 2, 4, 8), (5 * 2, 4)),
        (Sound(), torch.randn(3, 4, 10), (10, 1)),
        (LastAxis(), torch.randn(3, 5, 2, 4, 8), (5 * 2, 4)),
    ],
    ids=["linear", "frames in the batch", "sound", "features last"],
)
def test_what_may_make_tokens_of_an_image(module, image, grid):
    program = capture(module, (image, T), {}, method_of("carry"))
    run_passes(program, (Normalise(), FindTokenStream()))
    stream = program.found_stream()
    assert (stream.grid, stream.depth, program.image) == (grid, 2, "x")


class NoImage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


@pytest.mark.parametrize(
    ("given", "found"),
    [(torch.randn(3, 5), "no floating-point input"), (torch.randn(3, 4, 5), "no convolution and no")],
)
def test_without_anything_that_makes_tokens_the_message_says_what_is_missing(given, found):
    program = capture(NoImage(), (given,), {}, method_of("carry"))
    with pytest.raises(UnsupportedModelError, match=f"no patchify found: .*; it has {found}"):
        run_passes(program, (FindTokenStream(),))


class Tapped(TinyModel):
    """Features of an earlier block are an output too, as they are or through a layer of their own (REPA)."""

    def __init__(self, at: int, inside: bool = False) -> None:
        super().__init__(Block() for _ in range(5))
        self.at, self.inside = at, inside
        self.projector = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 5))

    def forward(self, x: Tensor, t: Tensor) -> Any:
        c, features = t.unsqueeze(1).expand(-1, WIDTH), x
        x = self.patchify(x).flatten(2).transpose(1, 2) + self.positions
        for number, block in enumerate(self.blocks):
            x = block(x, c)
            if number == self.at:
                features = x[..., :3] if self.inside else self.projector(x)
        return self.final(x), features


@pytest.mark.parametrize(("at", "head", "tail"), [(0, 1, 0), (1, 2, 0), (3, 0, 1)])
def test_the_trunk_ends_where_another_output_is_computed(at, head, tail):
    program = found(Tapped(at), head_blocks=0, tail_blocks=0)
    stream = program.found_stream()
    assert stream.depth == 5
    assert program.found_trunk() == (stream.boundaries[head], stream.boundaries[5 - tail])
    assert program.reach is not None
    assert (program.reach.held, program.reach.attentions) == (5 - head - tail, 5)


def test_the_other_output_is_the_original_s():
    module, inputs = Tapped(1), tiny_inputs()
    model = rewrite(module, inputs, {}, method_of("carry"), Policy("constant", 2).timetable(), timestep_scale=1.0)
    with torch.no_grad():
        for got, want in zip(model(*inputs), module(*inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_no_attention_at_all_says_how_to_write_it():
    with pytest.raises(UnsupportedModelError, match=r"no attention found .* scaled_dot_product_attention"):
        found(TinyModel([Mlp(), Mlp(), Mlp()]))


def test_few_repeating_blocks_are_counted_as_such():
    """Two of three blocks repeat: it is not a model of two blocks."""
    with pytest.raises(UsageError, match=r"no trunk in a model of 2 repeating blocks \(of its 3 attention ops"):
        found(TinyModel([Block(), Block(), SigmoidBlock()]), head_blocks=1, tail_blocks=1)


@pytest.mark.parametrize(
    ("blocks", "attentions"),
    [([Block()], 1), ([Block(), SigmoidBlock()], 2)],
    ids=["one block", "two different blocks"],
)
def test_blocks_that_do_not_repeat_are_refused(blocks, attentions):
    with pytest.raises(UnsupportedModelError, match=f"no repeating transformer blocks .* {attentions} attention ops"):
        found(TinyModel(blocks))


@pytest.mark.parametrize(("head", "tail"), [(2, 1), (0, 3), (5, 5)])
def test_too_many_head_and_tail_blocks_are_a_usage_error(head, tail):
    with pytest.raises(UsageError, match=rf"{head} head and {tail} tail blocks leave no trunk in a model of 3 blocks"):
        found(head_blocks=head, tail_blocks=tail)


def test_negative_head_blocks_are_a_usage_error():
    with pytest.raises(UsageError, match="cannot be negative"):
        found(head_blocks=-2)  # -1 stands for the default


def test_asking_before_the_pass_ran_is_an_error():
    program = capture(TinyModel([Block()]), tiny_inputs(), {}, method_of("carry"))
    for ask in (program.found_stream, program.found_trunk):
        with pytest.raises(CheckFailedError, match="before FindTokenStream"):
            ask()
