"""SplitSteps: a full step is the original, and a skip step the original with the trunk's update read, not computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from benchmarks.families import FAMILIES, made
from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.complex_to_real import RealNumbers
from dcconvert.passes.frontend.cuts import ATTENTION
from dcconvert.passes.frontend.token_stream import FindTokenStream
from dcconvert.passes.ir.errors import CheckFailedError, UnsupportedModelError
from dcconvert.passes.ir.graph_tools import placeholders
from dcconvert.passes.ir.pass_runner import run_passes
from dcconvert.passes.ir.program import Program
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import captured
from dcconvert.passes.rewrite.split_steps import SplitSteps
from tests.passes.harness import TOKENS, WIDTH, Block, TinyModel, dit_call, tiny_inputs, tiny_program


@dataclass
class Split:
    """The original's graph and the two that are made of it."""

    original: GraphModule
    full: GraphModule
    skip: GraphModule
    example: tuple[Any, ...]


def split(program: Program, updates: int = 3) -> Split:
    run_passes(program, (Normalise(), RealNumbers(), FindTokenStream(), SplitSteps(updates)))
    return Split(program.graph_module, program.parts["full"], program.parts["skip"], program.example)


def split_dit(**options: int) -> tuple[Split, tuple[torch.Tensor, ...]]:
    dit, args, kwargs = dit_call()
    return split(captured(dit, args, kwargs, method_of("carry", **options))), args


@pytest.mark.parametrize("batch", [1, 3])
def test_full_is_the_original_and_skip_gives_it_again(batch):
    program, args = split_dit()
    inputs = [value[:batch] for value in args]
    with torch.no_grad():
        [wanted] = program.original(*inputs)
        found, update = program.full(*inputs)
        weights = torch.tensor([1.0, 0, 0])[:, None].expand(3, batch)
        [skipped] = program.skip(*inputs, weights, update, torch.randn_like(update), torch.randn_like(update))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(skipped, wanted, rtol=1e-5, atol=1e-5)


def test_every_sample_has_weights_of_its_own():
    program, inputs = split_dit()
    updates = [torch.randn_like(program.full(*inputs)[1]) for _ in range(3)]
    weights = torch.randn(3, 3)
    with torch.no_grad():
        [together] = program.skip(*inputs, weights, *updates)
        for i in range(3):
            mixed = torch.stack([weights[k, i] * updates[k][i : i + 1] for k in range(3)]).sum(0)
            one = torch.tensor([[1.0], [0], [0]])
            zero = torch.zeros_like(mixed)
            [alone] = program.skip(*(value[i : i + 1] for value in inputs), one, mixed, zero, zero)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_skip_step_holds_no_attention_and_no_weights_of_the_trunk():
    program, _ = split_dit()
    assert not [node for node in program.skip.graph.nodes if node.target is ATTENTION]
    used = {str(node.target) for node in program.skip.graph.nodes if node.op == "get_attr"}
    assert not [name for name in used if "blocks" in name]
    added = [node.name for node in placeholders(program.skip.graph)][3:]
    assert added == ["weights", "update_0", "update_1", "update_2"]


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (1, 0), (0, 2)])
def test_head_and_tail_blocks_are_computed_at_every_step(head, tail):
    program, inputs = split_dit(head_blocks=head, tail_blocks=tail)
    assert len([node for node in program.skip.graph.nodes if node.target is ATTENTION]) == head + tail
    with torch.no_grad():
        [wanted] = program.original(*inputs)
        _, update = program.full(*inputs)
        weights = torch.tensor([[1.0], [0], [0]]).expand(3, 3)
        zero = torch.zeros_like(update)
        torch.testing.assert_close(program.skip(*inputs, weights, update, zero, zero)[0], wanted, rtol=1e-5, atol=1e-5)


def test_tokens_that_are_an_output_too_are_those_of_a_skip_step():
    class WithTokens(TinyModel):
        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            c = torch.sin(t.unsqueeze(1) * torch.arange(WIDTH))
            x = self.patchify(x).flatten(2).transpose(1, 2) + self.positions
            for block in self.blocks:
                x = block(x, c)
            return self.final(x), x

    module = WithTokens(Block() for _ in range(3))
    program, inputs = split(tiny_program(module, mode="carry"), updates=1), tiny_inputs()
    with torch.no_grad():
        pixels, tokens, update = program.full(*inputs)
        torch.testing.assert_close((pixels, tokens), module(*inputs))
        pixels, moved = program.skip(*inputs, torch.full((1, len(update)), 3.0), update)
        torch.testing.assert_close(moved, tokens + 2 * update, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pixels, module.final(moved))


def test_attention_beside_the_trunk_is_refused_unless_some_was_asked_for():
    class Pooled(TinyModel):
        """What gives the pixels is modulated by an attention of its own."""

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            own = torch.sin(t.view(-1, 1, 1, 1) * torch.arange(TOKENS * 8).view(1, TOKENS, 8))
            return super().forward(x, t) * F.scaled_dot_product_attention(own, own, own).squeeze(1)

    def parts(**options: int) -> Split:
        return split(tiny_program(Pooled(Block() for _ in range(3)), mode="carry", **options))

    with pytest.raises(UnsupportedModelError, match="1 of 4 attention ops do not go through the tokens' update"):
        parts()
    for blocks in ({"head_blocks": 1}, {"tail_blocks": 1}):
        left = [node for node in parts(**blocks).skip.graph.nodes if node.target is ATTENTION]
        assert len(left) == 2


def test_it_needs_the_token_stream():
    with pytest.raises(CheckFailedError, match="FindTokenStream"):
        run_passes(tiny_program(), (SplitSteps(),))


@pytest.mark.parametrize("family", ["diffusers-dit", "pixart", "flux"])
def test_other_families_split_too(family):
    module, args, kwargs = made(FAMILIES[family])
    program = split(captured(module, args, kwargs, method_of("carry")))
    with torch.no_grad():
        [wanted] = program.original(*program.example)
        found, update = program.full(*program.example)
        weights = torch.tensor([1.0, 0, 0])[:, None].expand(3, len(update))
        [skipped] = program.skip(*program.example, weights, *[update] * 3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(skipped, wanted, rtol=1e-4, atol=1e-4)
