"""What is recorded of a rewritten model, and that it survives JSON."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from dcconvert.passes.frontend.token_stream import FindTokenStream
from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.pass_runner import run_passes
from dcconvert.passes.ir.spec import SLOTS, InputSpec, ModelSpec, StateSpec
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from tests.passes.carry_harness import carried
from tests.passes.harness import BATCH, GRID, TOKENS, WIDTH, Block, TinyModel, tiny_inputs, tiny_program


class Mixed(TinyModel):
    """Inputs of every sort: a batch of floats, of integers, a shared vector, a number."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, table: Tensor, gain: float) -> Tensor:  # type: ignore[override]
        return super().forward(x, t + table[y]) * gain


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    torch.manual_seed(0)
    inputs = (*tiny_inputs(), torch.tensor([1, 2, 3]), torch.randn(5), 2.0)
    return rewrite(
        Mixed(Block() for _ in range(3)), inputs, {}, method_of("chunk"), Policy("constant", 2).timetable()
    ).spec


def test_inputs_with_shape_type_and_value(spec):
    assert spec.input_specs == (
        InputSpec("x", True, (2, 4, 8), "float32"),
        InputSpec("t", True, (), "float32"),
        InputSpec("y", True, (), "int64"),
        InputSpec("table", False, (5,), "float32"),
        InputSpec("gain", value=2.0),
    )


def test_seams(spec):
    assert (spec.grid, spec.tokens, spec.width, spec.depth, spec.timestep) == (GRID, TOKENS, WIDTH, 3, "t")
    assert spec.route_inputs == ("x", "t", "y", "table")
    assert spec.live == ("h", "live_0")
    assert spec.live_shapes == ((TOKENS, WIDTH), (WIDTH,))
    assert spec.denoise_inputs[:2] == spec.live


def test_through_json_and_back(spec):
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


def test_example_inputs(spec):
    example = spec.example(4, seed=1)
    assert list(example) == ["x", "t", "y", "table", "gain"]
    assert example["x"].shape == (4, 2, 4, 8)
    assert (example["t"] >= 0).all()
    assert 1 < example["t"].max() <= 1000
    assert example["y"].tolist() == [0] * 4
    assert example["table"].shape == (5,)
    assert example["gain"] == 2.0
    torch.testing.assert_close(spec.example(4, seed=1), example, rtol=0, atol=0)
    assert not torch.equal(spec.example(4, seed=2)["x"], example["x"])


def test_all_that_passes_from_route_to_denoise_has_a_batch_axis():
    """The spec leaves that axis out of the shapes, and callers slice along it."""

    class Scaled(TinyModel):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            scale = torch.sigmoid(self.positions.mean((0, 1)))  # [D], needed on both sides
            x = (self.patchify(x).flatten(2).transpose(1, 2) + self.positions) * scale
            for block in self.blocks:
                x = block(x, t.unsqueeze(1) * scale)
            return self.final(x * scale)

    model = rewrite(
        Scaled(Block() for _ in range(3)), tiny_inputs(), {}, method_of("chunk"), Policy("constant", 2).timetable()
    )
    with torch.no_grad():
        _, live = model.route(model.flat_inputs(tiny_inputs(BATCH + 1), {}))
    assert [tuple(value.shape) for value in live.values()] == [(BATCH + 1, *s) for s in model.spec.live_shapes]


def test_states_of_mode_carry():
    spec = carried("tiny")[0].spec
    names = [f"{part}_{block}" for block in range(3) for part in ("key", "value")]
    heads = [StateSpec(name, 2, WIDTH // 2, "float32") for name in names]
    assert spec.states == (*heads, StateSpec("update", 1, WIDTH, "float32"))
    assert spec.denoise_inputs[-len(spec.states) :] == tuple(state.name for state in spec.states)
    assert spec.states[0].shape(5, TOKENS) == (SLOTS, 5, 2, TOKENS, WIDTH // 2)
    assert spec.states[0].torch_dtype == torch.float32
    # Two slots of keys and values of three blocks, and of the update, in four bytes each.
    assert spec.state_bytes == 2 * (3 * 2 + 1) * TOKENS * WIDTH * 4
    assert carried("tiny", state_dtype="fp16")[0].spec.state_bytes == spec.state_bytes / 2
    model = carried("tiny")[0]
    state = model.empty_state(4)
    assert {n: tuple(t.shape) for n, t in state.values.items()} == {s.name: s.shape(4, TOKENS) for s in spec.states}
    assert sum(t.nbytes for t in state.values.values()) == 4 * spec.state_bytes


def test_mode_chunk_has_no_states(spec):
    assert (spec.states, spec.state_bytes, spec.constants, spec.prepare_inputs) == ((), 0, (), ())


@pytest.mark.parametrize(
    ("name", "image", "timestep"),
    [("tiny", "x", "t"), ("dit", "x", "t"), ("diffusers", "hidden_states", "timestep"),
     ("pixart", "hidden_states", "timestep")],
)  # fmt: skip
def test_image_and_timestep_are_known(name, image, timestep):
    spec = carried(name)[0].spec
    assert (spec.image, spec.timestep) == (image, timestep)


def test_what_is_the_same_over_a_run():
    for name in ("tiny", "dit", "diffusers"):
        assert (carried(name)[0].spec.constants, carried(name)[0].spec.prepare_inputs) == ((), ())
    spec = carried("pixart")[0].spec
    assert spec.constants == tuple(f"constant_{number}" for number in range(len(spec.constants)))
    assert len(spec.constants) >= 6  # text keys and values of three blocks
    assert set(spec.constants) <= set(spec.denoise_inputs)
    assert "encoder_hidden_states" in spec.prepare_inputs
    assert not {"hidden_states", "timestep"} & {*spec.prepare_inputs}


@pytest.mark.parametrize("name", ["tiny", "pixart"])
def test_carry_through_json_and_back(name):
    spec = carried(name)[0].spec
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


def test_a_program_that_was_not_split_has_no_spec():
    program = tiny_program()
    run_passes(program, (FindTokenStream(),))
    with pytest.raises(CheckFailedError, match="was not split"):
        ModelSpec.of(program)
