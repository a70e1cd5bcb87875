"""The numeric gate lets exact passes through and stops one that changes the output."""

from __future__ import annotations

import pytest
import torch

from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.capture import capture
from dcconvert.passes.frontend.token_stream import FindTokenStream
from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.output_gate import HALF_PRECISION
from dcconvert.passes.ir.pass_runner import Pass, PassResult, run_passes
from dcconvert.passes.ir.program import Program
from dcconvert.passes.methods import method_of
from dcconvert.passes.numeric_gate import NumericGate, outputs
from dcconvert.passes.rewrite.carry_trunk import CarryTrunk
from dcconvert.passes.rewrite.insert_router import InsertRouter
from dcconvert.passes.rewrite.pack_trunk import PackTrunk


def captured(**options: str) -> Program:
    model = DiT(DiTConfig(depth=3, width=32, heads=2, patch=2, image_size=8, in_channels=1, num_classes=4))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = (torch.randn(3, 1, 8, 8), torch.rand(3) * 1000, torch.tensor([0, 1, 2]))
    return capture(model, inputs, {}, method_of(**{"mode": "chunk", **options}))  # type: ignore[arg-type]


class Double(Pass):
    """Claims to be exact and doubles the last linear layer's output."""

    exact = True

    def call(self, program: Program) -> PassResult:
        node = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default][-1]
        users = list(node.users)
        with program.graph.inserting_after(node):
            doubled = program.emit(torch.ops.aten.add.Tensor, (node, node))
        for user in users:
            user.replace_input_with(node, doubled)
        return PassResult(1)


BEFORE = {
    "chunk": (Normalise(), FindTokenStream(), InsertRouter(), PackTrunk()),
    "carry": (Normalise(), FindTokenStream(), InsertRouter(), CarryTrunk()),
}


@pytest.mark.parametrize("mode", BEFORE)
def test_exact_passes_come_through(mode: str) -> None:
    program = captured(mode=mode)
    seen: list[str] = []
    gate = NumericGate(program)

    def noting(subject: Program, current: Pass) -> None:
        seen.append(current.name)
        gate(subject, current)

    run_passes(program, BEFORE[mode], gate=noting)
    assert seen == ["Normalise", "InsertRouter", BEFORE[mode][-1].name]


@pytest.mark.parametrize(("mode", "passes"), [("chunk", 0), ("chunk", 4), ("carry", 4)])
def test_a_pass_that_changes_the_output_is_stopped_by_name(mode: str, passes: int) -> None:
    program, before = captured(mode=mode), BEFORE[mode][:passes]
    gate = NumericGate(program)
    with pytest.raises(CheckFailedError, match="Double changed the model's output"):
        run_passes(program, (*before, Double()), gate=gate)


def test_a_state_in_half_precision_may_round() -> None:
    """By what halves round, and no more."""
    program = captured(mode="carry", state_dtype="fp16")
    gate = NumericGate(program)
    run_passes(program, BEFORE["carry"], gate=gate)
    found, wanted = outputs(program)[1], gate.wanted[0]
    assert 1e-5 < float((found - wanted).norm() / wanted.norm()) < HALF_PRECISION
    with pytest.raises(CheckFailedError, match="Double changed the model's output"):
        run_passes(program, (Double(),), gate=gate)


def test_values_that_are_not_finite_do_not_pass() -> None:
    program = captured()
    gate = NumericGate(program)
    program.example = (torch.full((3, 1, 8, 8), torch.nan), *program.example[1:])
    with pytest.raises(CheckFailedError, match="Normalise"):
        run_passes(program, (Normalise(),), gate=gate)
