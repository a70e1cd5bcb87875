"""CarryTrunk: what a carry step computes, against the original and against its slow definition."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcconvert.passes.frontend.token_stream import FindTokenStream
from dcconvert.passes.ir.errors import CheckFailedError, UnsupportedModelError, UsageError
from dcconvert.passes.ir.pass_runner import run_passes
from dcconvert.passes.ir.program import Program
from dcconvert.passes.ir.spec import SLOTS
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.rewrite.carry_trunk import CarryTrunk
from tests.passes.carry_harness import CALLS, TAUS, MaskedRun, SlowRun, at, carried, plain, roomy, slow_step, tiny_call
from tests.passes.harness import (
    BATCH,
    TOKENS,
    WIDTH,
    Block,
    Call,
    TinyModel,
    count,
    pick,
    random_keep,
    relative,
    tiny_inputs,
    tiny_program,
)

aten, ops = torch.ops.aten, torch.ops.dcconvert
TOLERANCE = 1e-5
FULL = Policy("constant", 1).timetable()

every_model = pytest.mark.parametrize("name", CALLS)


def some(rng: np.random.Generator, tokens: int, even: bool = False) -> np.ndarray:
    """A random keep mask of the batch."""
    counts = rng.integers(1, tokens + 1, 1 if even else BATCH)
    return random_keep(np.broadcast_to(counts, BATCH).tolist(), tokens, int(rng.integers(1000)))


def all_of(tokens: int) -> np.ndarray:
    return np.ones((BATCH, tokens), bool)


# Everything kept


@every_model
@pytest.mark.parametrize("tile", [None, 4, 7])
def test_everything_kept_is_the_original_at_every_step(name, tile):
    model, call = carried(name)
    run, keep = MaskedRun(model), all_of(model.spec.tokens)
    for step, tau in enumerate(TAUS):
        now = at(model, call, tau, step)
        assert relative(run.step(now, keep, roomy(keep, tile) if tile else None), plain(now)) < TOLERANCE


@settings(max_examples=20)
@given(st.sampled_from(list(CALLS)), st.integers(0, 1000), st.booleans(), st.booleans())
def test_whatever_came_before_a_step_that_keeps_everything_is_the_original(name, seed, even, padded):
    """And in a batch of mixed counts each sample that keeps everything is the original."""
    model, call = carried(name)
    run, rng, tokens = MaskedRun(model), np.random.default_rng(seed), model.spec.tokens
    for step, tau in enumerate(TAUS):
        now = at(model, call, tau, step)
        keep = all_of(tokens) if step in (0, 4) else some(rng, tokens, even)
        if not even:
            keep[step % BATCH] = True
        found = run.step(now, keep, roomy(keep) if padded else None)
        for sample in np.flatnonzero(keep.all(1)):
            assert relative(found[sample], plain(now)[sample]) < TOLERANCE


def test_a_scale_of_attention_is_kept():
    class Scaled(Block):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            q, k, v = (y.unflatten(2, (2, 6)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=2))
            out = F.scaled_dot_product_attention(q, k, v, scale=1.5).transpose(1, 2).flatten(2)
            return x + self.proj(out) * c.unsqueeze(1)

    call: Call = TinyModel(Scaled() for _ in range(3)), tiny_inputs(), {}
    model = rewrite(*call, method_of("carry"), FULL, timestep_scale=1.0)
    assert relative(MaskedRun(model).step(call, all_of(TOKENS)), plain(call)) < TOLERANCE


# Some kept


@settings(max_examples=24)
@given(st.sampled_from(list(CALLS)), st.integers(0, 1000), st.booleans(), st.booleans())
def test_steps_against_the_definition(name, seed, even, padded):
    """Five steps, every sample at its own noise levels; the distances that steer the choice as well."""
    model, call = carried(name)
    run, slow = MaskedRun(model), [SlowRun() for _ in range(BATCH)]
    rng, tokens = np.random.default_rng(seed), model.spec.tokens
    for step, tau in enumerate(TAUS):
        taus = [round(tau * scale, 3) for scale in (1, 0.9, 0.6)]
        now = at(model, call, taus, step)
        keep = some(rng, tokens, even) if step else all_of(tokens)
        found = run.step(now, keep, roomy(keep) if padded else None)
        wanted = slow_step(slow, now, keep, taus)
        assert relative(found, wanted) < TOLERANCE, step
        assert run.state.distance is not None
        distance = [[one.memory.moved(("update", n)) for n in range(tokens)] for one in slow]
        np.testing.assert_allclose(run.state.distance, distance, rtol=1e-4, atol=1e-5)
        assert relative(found, plain(now)) > 1e-3 or keep.all()


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (2, 0), (0, 2)])
@pytest.mark.parametrize("name", ["tiny", "pixart"])
def test_with_head_and_tail_blocks(name, head, tail):
    model, call = carried(name, head_blocks=head, tail_blocks=tail)
    run, slow = MaskedRun(model), [SlowRun(head, tail) for _ in range(BATCH)]
    rng, tokens = np.random.default_rng(0), model.spec.tokens
    for step, tau in enumerate(TAUS):
        now, keep = at(model, call, tau, step), some(rng, tokens) if step else all_of(tokens)
        assert relative(run.step(now, keep), slow_step(slow, now, keep, [tau] * BATCH)) < TOLERANCE


@pytest.mark.parametrize("name", ["tiny", "diffusers"])
def test_two_looks_at_one_noise_level(name):
    """As Heun's sampler does: the second overwrites the first."""
    model, call = carried(name)
    run, slow = MaskedRun(model), [SlowRun() for _ in range(BATCH)]
    rng, tokens = np.random.default_rng(1), model.spec.tokens
    for step, tau in enumerate((1.0, 0.8, 0.8, 0.5, 0.5, 0.4)):
        now, keep = at(model, call, tau, step), some(rng, tokens) if step else all_of(tokens)
        assert relative(run.step(now, keep), slow_step(slow, now, keep, [tau] * BATCH)) < TOLERANCE


# The samples of a batch do not know of each other


def samples_of(run: MaskedRun, sample: int) -> dict[str, Tensor]:
    return {name: value[:, sample] for name, value in run.state.values.items()}


@settings(max_examples=16)
@given(st.sampled_from(list(CALLS)), st.integers(0, 1000), st.integers(0, BATCH - 1), st.booleans())
def test_isolation(name, seed, loud, padded):
    """One sample at 1e4 everywhere, its state too: outputs and states of the others stay."""
    model, call = carried(name)
    tokens = model.spec.tokens
    others = [i for i in range(BATCH) if i != loud]
    calm, wild = MaskedRun(model), MaskedRun(model)
    rng = np.random.default_rng(seed)
    for step, tau in enumerate(TAUS[:3]):
        keep = some(rng, tokens) if step else all_of(tokens)
        now, bucket = at(model, call, tau, step), roomy(keep) if padded else None
        before = calm.step(now, keep, bucket)
        image = now[1][0].clone()
        image[loud] = 1e4
        after = wild.step((now[0], (image, *now[1][1:]), now[2]), keep, bucket)
        assert relative(after[others], before[others]) <= 1e-6
        for other in others:
            for name, value in samples_of(calm, other).items():
                torch.testing.assert_close(samples_of(wild, other)[name], value, atol=1e-6, rtol=1e-6)
        for value in wild.state.values.values():
            value[:, loud] = 1e4


@settings(max_examples=16)
@given(st.sampled_from(list(CALLS)), st.integers(0, 1000), st.integers(0, BATCH - 1), st.booleans())
def test_batch_invariance(name, seed, alone, padded):
    """A sample gives the same alone as in a batch, with the same tokens kept."""
    model, call = carried(name)
    tokens = model.spec.tokens
    together, single = MaskedRun(model), MaskedRun(model, 1)
    rng = np.random.default_rng(seed)
    for step, tau in enumerate(TAUS):
        now, keep = at(model, call, tau, step), some(rng, tokens) if step else all_of(tokens)
        found = together.step(now, keep, roomy(keep) if padded else None)
        assert relative(single.step(pick(now, [alone]), keep[[alone]])[0], found[alone]) < TOLERANCE


def test_samples_in_another_order():
    model, call = carried("dit")
    forward, turned, order = MaskedRun(model), MaskedRun(model), [2, 0, 1]
    rng = np.random.default_rng(2)
    for step, tau in enumerate(TAUS):
        now, keep = at(model, call, tau, step), some(rng, 16) if step else all_of(16)
        assert relative(turned.step(pick(now, order), keep[order]), forward.step(now, keep)[order]) < TOLERANCE


# The state


def test_every_state_is_an_output_and_its_kept_tokens_alone_are_new():
    model, call = carried("tiny")
    run = MaskedRun(model)
    run.step(at(model, call, 1.0, 0), all_of(TOKENS))
    before = {name: value.clone() for name, value in run.state.values.items()}
    newest = run.history.newest.copy()
    keep = random_keep((3, 5, 1), TOKENS)
    run.step(at(model, call, 0.5, 1), keep)
    assert list(before) == [state.name for state in model.spec.states]
    for name, value in run.state.values.items():
        changed = (value != before[name]).any(2).any(-1).numpy()  # [P, B, N]
        wanted = np.zeros_like(changed)
        for b, n in np.argwhere(keep).tolist():
            wanted[1 - newest[b, n], b, n] = True
        np.testing.assert_array_equal(changed, wanted, name)


def test_a_half_precision_state_is_close_and_half_the_size():
    """Widths above and distances whose squares half precision cannot hold."""
    half, call = carried("dit", state_dtype="fp16")
    full, _ = carried("dit")
    assert half.spec.state_bytes * 2 == full.spec.state_bytes
    runs, rng = (MaskedRun(half), MaskedRun(full)), np.random.default_rng(3)
    for step, tau in enumerate(TAUS):
        now, keep = at(full, call, tau, step), some(rng, 16) if step else all_of(16)
        found, wanted = (run.step(now, keep) for run in runs)
        assert found.dtype == torch.float32
        assert relative(found, wanted) < 5e-3
        assert not torch.equal(found, wanted) or not step
    assert {value.dtype for value in runs[0].state.values.values()} == {torch.float16}
    assert {value.dtype for value in runs[1].state.values.values()} == {torch.float32}
    runs[0].state.values["update"][:, :, :, 0] = torch.tensor([300.0, -300.0]).view(2, 1, 1, 1)
    keep = all_of(16)
    keep[:, 0] = False
    runs[0].step(at(half, call, 0.1), keep)
    assert runs[0].state.distance is not None
    np.testing.assert_allclose(runs[0].state.distance[:, 0], 600 * np.sqrt(half.spec.width), rtol=1e-3)


def test_a_state_in_another_precision_than_the_model():
    module = TinyModel(Block() for _ in range(3)).double()

    class Double(TinyModel):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return module(x.double(), t.double())

        def parameters(self, recurse: bool = True) -> Any:
            return iter(())

    outer = Double([])
    outer.inner = module
    x, t = tiny_inputs()
    for dtype, wanted in (("model", torch.float64), ("fp32", torch.float32), ("fp16", torch.float16)):
        model = rewrite(outer, (x, t), {}, method_of("carry", state_dtype=dtype), FULL, timestep_scale=1.0)
        assert {state.torch_dtype for state in model.spec.states} == {wanted}
        assert model(x, t).dtype == torch.float64


# The graph


def rewritten(**options: Any) -> Program:
    program = tiny_program(mode="carry", **options)
    run_passes(program, (FindTokenStream(), CarryTrunk()))
    return program


@pytest.mark.parametrize(("head", "tail"), [(0, 0), (1, 1), (0, 2)])
def test_op_counts(head, tail):
    before = Counter(node.target for node in tiny_program().graph.nodes)
    program = rewritten(head_blocks=head, tail_blocks=tail)
    after = Counter(node.target for node in program.graph.nodes)
    trunk = 3 - head - tail
    for target in (aten.scaled_dot_product_attention.default, aten.linear.default, aten.layer_norm.default):
        assert after[target] == before[target], target
    assert after[ops.cache_write.default] == after[ops.cache_read.default] == 2 * trunk + 1
    assert after[ops.chunk.default] == after[ops.dechunk.default] == 0
    assert after[ops.cache_index.default] == 2  # one for the heads, one for the update
    assert count(program.graph_module, ops.gather_tokens.default, "packed_index") == trunk
    entering = [n for n in program.graph.nodes if n.target is ops.gather_tokens.default and "grid" in str(n.args[1])]
    assert len(entering) == trunk
    assert all(math.prod(n.meta["val"].shape[2:]) == WIDTH for n in entering)  # of q, k and v only the queries


def test_inputs_and_outputs():
    program = rewritten()
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    states = [f"{part}_{i}" for i in range(3) for part in ("key", "value")] + ["update"]
    plan = ["token_index", "sample_ids", "packed_index", "grid_index", "write_index", "recall_weight"]
    assert list(program.state) == states
    assert sorted(program.plan_inputs) == sorted(plan)
    assert sorted(names) == sorted(["x", "t", *plan, *states])
    batch = program.batch
    for name, node in program.state.items():
        channels, width = (1, WIDTH) if name == "update" else (2, WIDTH // 2)
        assert [str(size) for size in node.meta["val"].shape] == list(map(str, (SLOTS, batch, channels, TOKENS, width)))
    output = next(iter(reversed(program.graph.nodes))).args[0]
    assert len(output) == 1 + 1 + len(states)
    assert [node.args[0].name for node in output[2:]] == states
    assert [str(size) for size in output[1].meta["val"].shape] == [str(batch), str(TOKENS)]


def test_states_that_are_no_outputs_are_caught():
    program = rewritten()
    output = next(iter(reversed(program.graph.nodes)))
    output.args = (output.args[0][:-1],)
    with pytest.raises(CheckFailedError, match="not the graph's last outputs"):
        CarryTrunk().ensures(program)


def test_the_result_says_how_often_it_fired():
    program = tiny_program(mode="carry", head_blocks=1)
    FindTokenStream().call(program)
    result = CarryTrunk().call(program)
    assert result.matches == 2
    assert "2 attentions" in result.notes[0]


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "bins"}, "method carry has no option 'packing'"),
        ({"state_dtype": "int8"}, "unknown state dtype 'int8': choose one of model, fp16, fp32"),
        ({"mode": "both"}, "unknown method 'both': choose one of steps, carry, chunk"),
        ({"router": "norm"}, "method carry has no router 'norm': choose one of drift, age, pool, predictability"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        rewrite(*tiny_call(), method_of(**{"mode": "carry", **options}), FULL)


class Nameless(TinyModel):
    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return super().forward(x, sigma)


def test_a_model_whose_timestep_is_unknown_is_refused():
    call: Call = Nameless(Block() for _ in range(3)), tiny_inputs(), {}
    with pytest.raises(UsageError, match=r"needs to know which input is the timestep: name it with timestep=\.\.\."):
        rewrite(*call, method_of("carry"), FULL)
    assert rewrite(*call, method_of("carry"), FULL, timestep="sigma").spec.timestep == "sigma"
    with pytest.raises(UsageError, match="no input 'time' to take the timestep from; it has x, sigma"):
        rewrite(*call, method_of("carry"), FULL, timestep="time")


class KeysElsewhere(Block):
    """Keys laid out [B, N, H, d] where queries are [B, H, N, d]; there are as many heads as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = torch.nn.Linear(WIDTH, 3 * TOKENS * 2), torch.nn.Linear(TOKENS * 2, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], TOKENS, 3, TOKENS, 2).unbind(2)
        mixed = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v)
        return x + self.proj(mixed.transpose(1, 2).reshape(x.shape[0], TOKENS, TOKENS * 2))


def test_keys_laid_out_otherwise_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"keys and values must be laid out \[B, H, N, d\]"):
        rewrite(TinyModel(KeysElsewhere() for _ in range(3)), tiny_inputs(), {}, method_of("carry"), FULL)
