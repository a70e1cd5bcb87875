"""Models that torch.export captures for one batch size only, and what a capture leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dcconvert.passes.frontend.capture import capture
from dcconvert.passes.frontend.exported.aliases import TABLE
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from tests.passes.harness import Block, TinyModel, relative, tiny_inputs

CHUNK = method_of("chunk")


class Listed(TinyModel):
    """The batch size becomes a plain number: it makes a constant, sizes of views and a split."""

    def __init__(self) -> None:
        super().__init__(Block() for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        batch = int(x.shape[0])
        guidance = torch.tensor([0.5] * batch)
        doubled = torch.cat([x, x]).reshape(2 * batch, *x.shape[1:])[:batch]
        return super().forward(doubled.view(batch, *x.shape[1:]), t + guidance)


def test_the_batch_is_symbolic_afterwards():
    program = capture(Listed(), tiny_inputs(3), {}, CHUNK)
    for batch in (1, 2, 7):
        module, inputs = Listed(), tiny_inputs(batch)
        program.graph_module.load_state_dict(module.state_dict(), strict=False)
        torch.testing.assert_close(program.graph_module(*inputs)[0], module(*inputs))


@pytest.mark.parametrize("mode", ["chunk", "steps"])
def test_such_a_model_is_converted(mode):
    module, inputs = Listed(), tiny_inputs(2)
    model = rewrite(module, tiny_inputs(3), {}, method_of(mode), Policy("constant", 1).timetable(), timestep_scale=1.0)
    with torch.no_grad():
        assert relative(model(*inputs), module(*inputs)) < 1e-5


class OneByOne(nn.Module):
    """A loop over samples: the graph itself depends on their number."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.sin(x[i : i + 1]) * (i + 1) for i in range(int(x.shape[0]))])


class Numbered(nn.Module):
    """A constant that differs from sample to sample."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * torch.tensor([1.0 + i for i in range(int(x.shape[0]))])[:, None, None, None]


class Squared(nn.Module):
    """The number of samples, but not in proportion to it."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        batch = int(x.shape[0])
        return x + batch * batch


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Squared(), r"can only be captured for a batch of 3 \(another size changes its output by"),
        (OneByOne(), r"computes something else for another batch size, at aten\.\S+ in the model \(test_fixed_batch"),
        (Numbered(), r"has a constant for a batch of 3 only"),
    ],
    ids=["square", "loop", "constant"],
)
def test_what_depends_on_the_number_of_samples_is_refused(module, reason):
    with pytest.raises(UnsupportedModelError, match=reason) as refused:
        capture(module, tiny_inputs(3), {}, CHUNK)
    assert "\n" not in str(refused.value)


class Branches(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_branch_on_values_is_named_with_its_line():
    with pytest.raises(UnsupportedModelError, match=r"cannot capture Branches: .*\(test_fixed_batch\.py:\d+\)"):
        capture(Branches(), tiny_inputs(3), {}, CHUNK)


class Fails(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x @ t


def test_a_model_that_cannot_be_called_is_no_matter_of_capture():
    with pytest.raises(UsageError, match=r"Fails fails on the example inputs: .*\(test_fixed_batch\.py:\d+\)"):
        capture(Fails(), tiny_inputs(3), {}, CHUNK)


class Table:
    """Made at the first call, kept in a plain object."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def __call__(self) -> Tensor:
        if not self.rows:
            self.rows.append(torch.linspace(0, 1, 8))
        return self.rows[0]


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = Table()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.table() + int(x.shape[0]) * 0.0


def test_what_a_model_keeps_from_its_first_call_is_real():
    """torch would leave a tensor without data in the model, which could not be called any more."""
    module = Remembers()
    capture(module, tiny_inputs(3), {}, CHUNK)
    assert module(*tiny_inputs(2)).isfinite().all()


class Precise(nn.Module):
    """A part that asks for full precision whatever surrounds it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.linear(x.float())
            with torch.no_grad():
                z = torch.sin(y)
        return y + z


def test_regions_without_autocast_become_part_of_the_graph():
    module, inputs = Precise(), tiny_inputs(2)
    program = capture(module, tiny_inputs(3), {}, CHUNK)
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_module"] in ([], ["_guards_fn"])
    assert not any("wrap_with" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.graph_module(*inputs)[0], module(*inputs))


class Lower(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x.mT


def test_a_region_with_autocast_is_refused():
    with pytest.raises(UnsupportedModelError, match="a region with autocast is not supported"):
        capture(Lower(), tiny_inputs(3), {}, CHUNK)


ALIASES = {
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "mT": lambda x: x.mT,
    "movedim": lambda x: x.movedim(1, 2),
    "multiply": lambda x: torch.multiply(x, x),
    "divide": lambda x: torch.divide(x, 2.0),
    "subtract": lambda x: torch.subtract(x, 1.0),
    "concat": lambda x: torch.concat([x, x], -1),
    "hstack": lambda x: torch.hstack([x, x]),
    "narrow": lambda x: x.narrow(-1, 0, 3),
    "tensor_split": lambda x: x.tensor_split(2, -1)[0],
    "tile": lambda x: x.tile((2,)),
    "pad": lambda x: nn.functional.pad(x, (0, 3)),
    "std": lambda x: x.std(-1, keepdim=True),
    "var": lambda x: x.var(-1, unbiased=False, keepdim=True),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "special_softmax": lambda x: torch.special.softmax(x, -1),
    "linalg_norm": lambda x: torch.linalg.norm(x, dim=-1, keepdim=True),
    "expand_as": lambda x: x[..., :1].expand_as(x),
}


class Named(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> list[Tensor]:
        return [call(x) for call in ALIASES.values()]


def test_other_names_of_ops_are_written_as_the_ops():
    program = capture(Named(), tiny_inputs(3), {}, CHUNK)
    assert not {node.target for node in program.graph.nodes} & set(TABLE)
    inputs = tiny_inputs(2)
    torch.testing.assert_close(list(program.graph_module(*inputs)), Named()(*inputs))
