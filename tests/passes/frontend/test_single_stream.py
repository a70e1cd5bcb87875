"""Models whose residual stream holds other tokens beside the image's, alone or after blocks with two streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel
from tests.passes.harness import TOKENS, WIDTH, Block, TinyModel, first_tensor, random_keep, relative, tiny_inputs

OTHERS = 3
HALF = Policy("constant", 2).timetable()


class Single(TinyModel):
    """Learned tokens join the image's, before or behind them, ahead of the block with the number `at`."""

    def __init__(self, at: int = 0, before: bool = True) -> None:
        super().__init__(Block() for _ in range(5))
        self.at, self.before = at, before
        self.registers = nn.Parameter(torch.randn(1, OTHERS, WIDTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = torch.sin(t.unsqueeze(1) * torch.arange(WIDTH))
        x = self.patchify(x).flatten(2).transpose(1, 2) + self.positions
        for number, block in enumerate(self.blocks):
            if number == self.at:
                others = self.registers.expand(x.shape[0], -1, -1)
                x = torch.cat([others, x] if self.before else [x, others], 1)
            x = block(x, c)
        return self.final(x[:, OTHERS:] if self.before else x[:, :TOKENS])


CASES: dict[str, dict[str, int]] = {"before": {}, "behind": {"before": False}, "in the middle": {"at": 2}}


def converted(mode: str, **options: Any) -> tuple[DynamicModel, Single]:
    module = Single(**options)
    return rewrite(module, tiny_inputs(), {}, method_of(mode), HALF, timestep_scale=1.0), module


def kept_all(model: DynamicModel, inputs: tuple[Tensor, ...]) -> Tensor:
    given = dict(zip(model.spec.inputs, inputs, strict=True))
    with torch.no_grad():
        scores, live = model.route(given)
        state = model.empty_state(len(scores)) if model.spec.states else None
        return first_tensor(model.denoise(given, live, model.planner.full_plan(len(scores)), state))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["chunk", "carry"])
def test_all_blocks_are_trunk_and_keeping_everything_is_the_original(case, mode):
    model, module = converted(mode, **CASES[case])
    blocks = {"chunk": 3, "carry": 5}[mode]  # chunk has a head and a tail block
    assert model.spec.reach is not None
    assert (model.spec.depth, model.spec.reach.held, model.spec.reach.attentions) == (5, blocks, 5)
    inputs = tiny_inputs(2)
    with torch.no_grad():
        assert relative(kept_all(model, inputs), module(*inputs)) < 1e-5


def test_dropped_tokens_are_absent_and_others_are_not():
    """A sample's kept tokens give what the blocks give for them and the other tokens alone."""
    module, inputs = Single(), tiny_inputs(2)
    method = method_of("chunk", head_blocks=0, tail_blocks=0, members=1, neighbours=1)
    model = rewrite(module, tiny_inputs(), {}, method, HALF, timestep_scale=1.0)
    given = dict(zip(model.spec.inputs, inputs, strict=True))
    keep = random_keep((4, 3), TOKENS)
    with torch.no_grad():
        _, live = model.route(given)
        found = first_tensor(model.denoise(given, live, model.planner.planner.plan(keep)))
        for sample, mask in enumerate(torch.from_numpy(keep)):
            image, t = (value[sample : sample + 1] for value in inputs)
            tokens = module.patchify(image).flatten(2).transpose(1, 2) + module.positions
            x = torch.cat([module.registers, tokens[:, mask]], 1)
            for block in module.blocks:
                x = block(x, torch.sin(t.unsqueeze(1) * torch.arange(WIDTH)))
            assert relative(found[sample, mask], module.final(x[0, OTHERS:])) < 1e-5


def test_steps_skip_all_blocks():
    model, module = converted("steps")
    assert model.records[-1].notes == ("5 of 5 attention ops are skipped",)
    inputs = tiny_inputs(2)
    with torch.no_grad():
        assert relative(model(*inputs), module(*inputs)) < 1e-5


class Shuffled(Single):
    """The tokens change places within the stream: what they are is not known behind that."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.patchify(x).flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([self.registers.expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x.flip(1), F.silu(t).unsqueeze(1).expand(-1, WIDTH))
        return self.final(x[:, OTHERS:])


def test_other_orders_of_the_tokens_are_refused():
    with pytest.raises(UnsupportedModelError, match="it changes the order along the batch or token axis"):
        rewrite(Shuffled(), tiny_inputs(), {}, method_of("carry"), HALF, timestep_scale=1.0)
