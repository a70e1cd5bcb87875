"""SplitRoute: what passes from route to denoise, and that the halves make the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.families import FAMILIES, made
from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.capture import capture
from dcconvert.passes.frontend.token_stream import FindTokenStream
from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.graph_tools import placeholders
from dcconvert.passes.ir.pass_runner import run_passes
from dcconvert.passes.ir.program import Program
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.rewrite.insert_router import InsertRouter
from dcconvert.passes.rewrite.pack_trunk import PackTrunk
from dcconvert.passes.rewrite.split_route import SplitRoute
from tests.passes.harness import (
    GRID,
    WIDTH,
    Block,
    TinyModel,
    plan_tensors,
    random_keep,
    tiny_inputs,
    tiny_program,
)

aten = torch.ops.aten


def split(module: nn.Module | None = None, **options: int | str) -> Program:
    program = tiny_program(module, **options)
    run_passes(program, (FindTokenStream(), InsertRouter(), PackTrunk(), SplitRoute()))
    return program


def inputs_of(half: torch.fx.GraphModule | None) -> list[str]:
    assert half is not None
    return [node.name for node in placeholders(half.graph)]


def run_halves(
    program: Program, batch: int, counts: tuple[int, ...], timestep: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the unsplit graph, and of route followed by denoise; scores first."""
    x, t = tiny_inputs(batch)
    plan = plan_tensors(Planner(GRID, 4, 4).plan(random_keep(counts, 8)))
    given = {"x": x, "t": t if timestep is None else timestep, **plan}
    program.graph_module.recompile()
    with torch.no_grad():
        whole = program.graph_module(*(given[name] for name in inputs_of(program.graph_module)))
        scores, *live = program.parts["route"](*(given[name] for name in inputs_of(program.parts["route"])))
        names = [name for name in inputs_of(program.parts["denoise"]) if name not in given]
        given.update(zip(names, live, strict=True))
        late = program.parts["denoise"](*(given[name] for name in inputs_of(program.parts["denoise"])))
    return list(whole), [scores, *late]


@pytest.mark.parametrize("head", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_halves_make_the_whole(head, batch):
    program = split(head_blocks=head, tail_blocks=0)
    whole, halves = run_halves(program, batch, tuple(range(3, 3 + batch)))
    torch.testing.assert_close(halves, whole, rtol=0, atol=0)


def test_h_comes_first_then_the_other_live_values():
    program = split()
    live = [name for name in inputs_of(program.parts["denoise"]) if name not in program.plan_inputs]
    assert live == ["h", "live_0"]  # the hidden state, and c for the modulation of the later blocks
    shapes = [tuple(node.meta["val"].shape[1:]) for node in placeholders(program.parts["denoise"].graph)[:2]]
    assert shapes == [(8, WIDTH), (WIDTH,)]


def test_placeholders_are_only_where_they_are_used():
    program = split()
    assert inputs_of(program.parts["route"]) == ["x", "t"]
    assert sorted(inputs_of(program.parts["denoise"])) == sorted(["h", "live_0", *program.plan_inputs])
    for half in (program.parts["route"], program.parts["denoise"]):
        assert half is not None
        assert all(node.users for node in placeholders(half.graph))


def test_an_input_needed_late_is_taken_late():
    class Gained(TinyModel):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, t) + x.mean((1, 2, 3)).reshape(-1, 1, 1)

    program = split(Gained(Block() for _ in range(3)))
    assert inputs_of(program.parts["denoise"])[2] == "x"
    whole, halves = run_halves(program, 2, (3, 4))
    torch.testing.assert_close(halves, whole, rtol=0, atol=0)


def test_sizes_are_read_again_from_h():
    """The batch size used in the tail comes from h, not from an input that denoise has not got."""

    class Reshaped(TinyModel):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            b = x.shape[0]
            return super().forward(x, t).reshape(b * 8, 8).reshape(b, 2, 4, 8)

    program = split(Reshaped(Block() for _ in range(3)))
    assert "x" not in inputs_of(program.parts["denoise"])
    sizes = [n for n in program.parts["denoise"].graph.nodes if n.target is aten.sym_size.int and n.args[0].name == "h"]
    assert len(sizes) == 1
    for batch in (1, 4):
        whole, halves = run_halves(program, batch, (3,) * batch)
        torch.testing.assert_close(halves, whole, rtol=0, atol=0)


def test_weights_used_on_both_sides_are_in_both():
    class Shared(TinyModel):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, t) * self.positions.mean()

    whole, halves = run_halves(split(Shared(Block() for _ in range(3))), 2, (3, 4))
    torch.testing.assert_close(halves, whole, rtol=0, atol=0)


def test_one_modulation_shared_by_all_blocks():
    """The list that chunk returns is made early, and most of its parts are used late."""

    class PlainBlock(Block):
        def __init__(self) -> None:
            super().__init__()
            self.modulation = nn.Identity()  # type: ignore[assignment]

    class SharedModulation(TinyModel):
        def __init__(self) -> None:
            super().__init__(PlainBlock() for _ in range(3))
            self.all_modulations = nn.Linear(WIDTH, 3 * 3 * WIDTH)
            nn.init.normal_(self.all_modulations.weight, std=0.2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            c = torch.sin(t.unsqueeze(1) * torch.arange(WIDTH))
            x = self.patchify(x).flatten(2).transpose(1, 2) + self.positions
            for block, part in zip(self.blocks, self.all_modulations(c).chunk(3, dim=1), strict=True):
                x = block(x, part)
            return self.final(x)

    whole, halves = run_halves(split(SharedModulation()), 2, (3, 4))
    torch.testing.assert_close(halves, whole, rtol=0, atol=0)


def test_a_second_output_that_is_known_early():
    class WithCondition(TinyModel):
        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x, t), t * 2

    whole, halves = run_halves(split(WithCondition(Block() for _ in range(3))), 2, (3, 4))
    torch.testing.assert_close(halves, whole, rtol=0, atol=0)


def test_an_early_value_that_is_an_output_and_nothing_else():
    class WithEmbedding(TinyModel):
        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            c = torch.sin(t.unsqueeze(1) * torch.arange(WIDTH))
            first = torch.cos(c)
            x = self.patchify(x).flatten(2).transpose(1, 2) + self.positions
            for i, block in enumerate(self.blocks):
                x = block(x, c if i else first)
            return self.final(x), first

    whole, halves = run_halves(split(WithEmbedding(Block() for _ in range(3))), 2, (3, 4))
    torch.testing.assert_close(halves, whole, rtol=0, atol=0)


def test_values_without_a_batch_axis_are_computed_again():
    """One timestep for the whole batch: its embedding is made in both halves, and only h passes."""
    program = capture(TinyModel(Block() for _ in range(3)), (tiny_inputs()[0], torch.rand(1)), {}, method_of("chunk"))
    run_passes(program, (Normalise(), FindTokenStream(), InsertRouter(), PackTrunk(), SplitRoute()))
    live = [name for name in inputs_of(program.parts["denoise"]) if name not in program.plan_inputs]
    assert live == ["h", "t"]
    whole, halves = run_halves(program, 2, (3, 4), torch.rand(1))
    torch.testing.assert_close(halves, whole, rtol=0, atol=0)


def test_it_needs_router_and_trunk_before_it():
    program = tiny_program()
    run_passes(program, (FindTokenStream(), PackTrunk()))
    with pytest.raises(CheckFailedError, match="SplitRoute needs InsertRouter and PackTrunk"):
        run_passes(program, (SplitRoute(),))


def test_no_input_stays_for_its_size_alone():
    """The batch size is read off one input: TensorRT leaves out an input of which nothing else is needed."""
    module, args, kwargs = made(FAMILIES["sd3"])
    model = rewrite(module, args, kwargs, method_of("carry"), Policy("constant", 2).timetable())
    assert "pooled_projections" in model.spec.prepare_inputs
    assert "pooled_projections" not in model.spec.denoise_inputs
    module, args, kwargs = made(FAMILIES["cogview3"])
    model = rewrite(module, args, kwargs, method_of("carry"), Policy("constant", 2).timetable())
    assert "original_size" not in model.spec.route_inputs
