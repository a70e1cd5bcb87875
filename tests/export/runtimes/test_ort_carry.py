"""Mode carry on ONNX Runtime: runs of several steps, state in place, samples that come and go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dcconvert.export.buckets import choose_buckets
from dcconvert.export.checks.parity import (
    check_batch_invariance,
    check_identity,
    check_isolation,
    check_runtime,
    require,
)
from dcconvert.export.runtimes.ort import OrtModel, OrtState
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.spec import DISTANCE_NAME, state_output
from tests.export.harness import TOKENS, arrays, convert, export, inputs, tensors

BUCKET_SET = choose_buckets([1, 4], [5, 9], TOKENS)
COUNTS = (16, 5, 9, 3, 5, 16, 4)


@pytest.fixture(scope="module")
def runtime(carry_model, carry_onnx) -> OrtModel:
    return OrtModel(carry_onnx, carry_model.planner, threads=1)


def at(step: int, batch: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a step: other images at lower timesteps than the step before."""
    given = arrays(batch, seed + 17 * step)
    return given | {"t": np.full(batch, 990.0 - 110 * step, np.float32)}


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-4, atol=1e-4)


def test_a_run_is_torch_s_step_for_step(runtime, carry_model):
    run, same = runtime.start(3), carry_model.start(3)
    for step, count in enumerate(COUNTS):
        given, counts = at(step), np.array([count, max(1, count - 2), count])
        with torch.no_grad():
            (wanted,) = same.step(tensors(given), counts)
        (found,) = run.step(given, counts)
        np.testing.assert_array_equal(run.last_plan.keep, same.last_plan.keep)
        close(found, wanted)
        for name, value in run.state.values.items():
            close(value.numpy(), same.state.values[name])
        close(run.state.distance, same.state.distance)


def test_the_state_is_written_where_it_was_read(runtime):
    """The buffers stay the same, and give what separate ones give."""
    run = runtime.start(2)
    places = {name: value.data_ptr() for name, value in run.state.values.items()}
    session = runtime.sessions["denoise"]
    for step in range(3):
        given = at(step, 2)
        before = {name: value.numpy().copy() for name, value in run.state.values.items()}
        run.step(given, np.array([7, 7]))
        _, live = runtime.route(given)
        feed = {**given, **{n: v.numpy() for n, v in live.items()}, **run.last_plan.arrays(), **before}
        names = [node.name for node in session.get_outputs()]
        results = session.run(None, {node.name: feed[node.name] for node in session.get_inputs()})
        apart = dict(zip(names, results, strict=True))
        assert {name: value.data_ptr() for name, value in run.state.values.items()} == places
        for name, value in run.state.values.items():
            close(value.numpy(), apart[state_output(name)])
        close(run.state.distance, apart[DISTANCE_NAME])


def test_a_batch_between_the_buckets(carry_model, carry_onnx):
    on_buckets = OrtModel(carry_onnx, carry_model.planner, BUCKET_SET, threads=1).start(3)
    plain = OrtModel(carry_onnx, carry_model.planner, threads=1).start(3)
    for step, count in enumerate(COUNTS):
        results = [run.step(at(step), np.full(3, count))[0] for run in (on_buckets, plain)]
        assert len(results[0]) == 3
        close(*results)
    assert on_buckets.size == 4


def test_a_stale_state_cannot_leak(runtime):
    """Sample 1 is replaced by another image after its state was set to loud values."""
    run, fresh = runtime.start(2), runtime.start(2)
    for step in range(3):
        run.step(at(step, 2), np.array([6, 6]))
    for value in run.state.values.values():
        array = value.numpy()
        array[:, 1] = 1e4
        value.update_inplace(array)
    run.restart([1])
    run.restart([0])
    for step in range(4):
        close(run.step(at(step, 2, 5), np.array([6, 6]))[0], fresh.step(at(step, 2, 5), np.array([6, 6]))[0])


def test_samples_that_start_at_different_times_give_what_they_give_alone(runtime):
    """Continuous batching: sample 1 starts two steps later and goes on with its own timesteps."""
    together, first, second = runtime.start(2), runtime.start(1), runtime.start(1)
    for step in range(6):
        early, late = at(step, 1, 1), at(max(0, step - 2), 1, 2)
        if step == 2:
            together.restart([1])
        both = {name: np.concatenate([early[name], late[name]]) for name in early}
        (found,) = together.step(both, np.array([6, 6]))
        close(found[:1], first.step(early, np.array([6]))[0])
        if step >= 2:
            close(found[1:], second.step(late, np.array([6]))[0])
            assert together.last_plan.counts[1] == (TOKENS if step == 2 else 6)


def test_another_batch_size_is_another_run(runtime):
    run = runtime.start(2)
    with pytest.raises(UsageError, match="this run has 2 samples"):
        run.step(at(0, 3) | {"t": np.full(1, 990.0, np.float32)})


def test_noise_that_rises(runtime):
    run = runtime.start(2)
    run.step(at(3, 2))
    with pytest.raises(UsageError, match="noise level of sample 0 rose"):
        run.step(at(2, 2))


def test_every_check_passes(carry_model, carry_onnx):
    given = inputs(2)
    checks = [check(carry_model, given) for check in (check_identity, check_isolation, check_batch_invariance)]
    checks += check_runtime(carry_model, carry_onnx, inputs, BUCKET_SET.buckets)
    require(checks)
    assert len(checks) == 3 + 2 + len(BUCKET_SET.buckets)


def test_checks_see_samples_that_share_a_state():
    mixed = convert("carry")
    states = {state.name for state in mixed.spec.states}

    def share(graph: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        names = mixed.spec.inputs_of("denoise")
        return tuple(
            0.5 * value + 0.5 * value.mean(1, keepdim=True) if name in states else value
            for name, value in zip(names, given, strict=True)
        )

    mixed.denoise_graph.register_forward_pre_hook(share)
    assert not check_isolation(mixed, inputs(3)).passed


def test_half_precision_halves_the_state(tmp_path, carry_model):
    half = convert("carry", state_dtype="fp16")
    assert half.spec.state_bytes * 2 == carry_model.spec.state_bytes
    runtime = OrtModel(export(half, tmp_path), half.planner, threads=1)
    run, whole = runtime.start(3), carry_model.start(3)
    assert isinstance(run.state, OrtState)
    for step, count in enumerate(COUNTS):
        (found,) = run.step(at(step), np.full(3, count))
        with torch.no_grad():
            (wanted,) = whole.step(tensors(at(step)), np.full(3, count))
        np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-2, atol=2e-2)
    assert all(value.numpy().dtype == np.float16 for value in run.state.values.values())


def test_clearing_a_state_touches_the_named_samples_only(carry_model, carry_onnx):
    state = OrtModel(carry_onnx, carry_model.planner, threads=1).empty_state(3)
    for value in state.values.values():
        value.update_inplace(np.ones(value.shape(), np.float32))
    state.clear([0, 2])
    for value in state.values.values():
        assert value.numpy()[:, 1].all()
        assert not value.numpy()[:, [0, 2]].any()
