"""Calls that know nothing of runs: which go on from the one before, and which are another image's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.infer_runs import LIMIT, TURNS, WARN_AFTER, Loop, last_loop, moved, spent
from dcconvert.passes.runtime.model import DynamicModel
from tests.passes.carry_harness import carried, flat, tiny_call
from tests.passes.harness import BATCH, Call, first_tensor, relative, tiny_inputs

HALF = Policy("constant", 2).timetable()
EVERY = [0, 1, 2]


def fresh(name: str = "dit") -> tuple[DynamicModel, Call]:
    """A converted model that was not called yet."""
    model, call = carried(name)
    return model.with_schedule(HALF), call


def image(seed: int) -> Tensor:
    return torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def called(model: DynamicModel, x: Tensor, tau: float | Sequence[float], y: Sequence[int] = (0, 1, 2)) -> Tensor:
    t = torch.as_tensor(tau, dtype=torch.float32).expand(len(x)) * 1000
    return model(x, t, torch.tensor(y[: len(x)]))


def steps(model: DynamicModel) -> list[int]:
    """How many steps each sample made since it was started."""
    assert model.followed.run is not None
    assert model.followed.run.history is not None
    return model.followed.run.history.steps.tolist()


def restarted(model: DynamicModel) -> list[int]:
    """The samples whose last call was the first of a run."""
    return [sample for sample, made in enumerate(steps(model)) if made == 1]


def drifted(x: Tensor, amount: float, seed: int = 9) -> Tensor:
    """Images further on by `amount`, relative to their norm."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    size = x.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
    return x + amount * noise * size.view(-1, 1, 1, 1)


@pytest.mark.parametrize("name", ["tiny", "dit", "diffusers", "pixart"])
@pytest.mark.parametrize("count", [4, 10, 25])
def test_a_sampling_loop_is_one_run(name, count):
    """Each call gives bit for bit what the step of a run does; the model's output drives the image as Euler would."""
    model, (_, args, kwargs) = fresh(name)
    run, x = model.start(BATCH), args[0]
    for number in range(count):
        tau = 1 - number / count
        level = torch.full((BATCH,), tau * model.spec.timestep_scale)
        if "timestep" in kwargs:
            kwargs = {**kwargs, "timestep": level.long()}
            args = (x,)
        else:
            args = (x, level, *args[2:])
        found = first_tensor(model(*args, **kwargs))
        with torch.no_grad():
            wanted = first_tensor(run.step(model.flat_inputs(args, kwargs)))
        assert torch.equal(found, wanted)
        assert steps(model) == [number + 1] * BATCH
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(number))
        x = x + direction * 1.2 / count


def test_two_looks_at_one_noise_level_are_one_run():
    """Heun's second look: the image it was about to reach, at the noise level where it would be."""
    model, _ = fresh()
    x = image(0)
    for tau in (1.0, 0.9, 0.9, 0.8, 0.8):
        called(model, x, tau)
        x = drifted(x, 0.015)
    assert steps(model) == [5] * BATCH


def test_a_third_look_at_one_noise_level_is_another_image():
    model, _ = fresh()
    for tau, wanted in ((1.0, 1), (0.9, 2), (0.9, 3), (0.9, 1)):
        called(model, image(0), tau)
        assert steps(model) == [wanted] * BATCH


def test_images_of_one_step_are_computed_in_full():
    """One-step models, and the frames of a stream, which are close to each other."""
    model, _ = fresh()
    for number in range(TURNS + 2):
        x = drifted(image(0), 0.01 * number)
        assert torch.equal(called(model, x, 0.9), called(fresh()[0], x, 0.9))
    assert model.followed.tracks == []  # more than take turns: nothing is kept


@pytest.mark.parametrize("count", [2, TURNS, TURNS + 2])
def test_images_that_take_turns(count):
    """Each is what it is alone, or is computed in full where there are too many."""
    model, _ = fresh()
    images, alone = [image(seed) for seed in range(count)], []
    for x in images:
        beside, _ = fresh()
        alone.append([called(beside, drifted(x, 0.05 * n), 1 - 0.1 * n) for n in range(4)])
    for number in range(4):
        for x, wanted in zip(images, alone, strict=True):
            now = drifted(x, 0.05 * number)
            found = called(model, now, 1 - 0.1 * number)
            assert torch.equal(found, wanted[number] if count <= TURNS else called(fresh()[0], now, 1 - 0.1 * number))


def test_calls_with_two_labels_that_take_turns_are_two_runs(caplog):
    model, _ = fresh()
    for number in range(4):
        for label in (1, 2):
            called(model, drifted(image(0), 0.02 * number), 0.9 - 0.1 * number, (label,) * 3)
            assert steps(model) == [number + 1] * BATCH
    assert not caplog.records


def test_a_call_that_fits_two_runs_starts_a_third():
    model, _ = fresh()
    near = [image(0), drifted(image(0), 0.1)]
    for x in near:
        called(model, x, 0.9)
    called(model, (near[0] + near[1]) / 2, 0.8)
    assert steps(model) == [1] * BATCH


def test_equal_labels_in_another_tensor_are_of_another_loop():
    """As after a loop that was given up: the next one makes its own labels."""
    model, _ = fresh()
    labels, t = torch.tensor([0, 1, 2]), torch.full((BATCH,), 500.0)
    for number in range(3):
        model(image(0), t - 10 * number, labels)
    assert steps(model) == [3] * BATCH
    model(image(0), t - 40, labels.clone())
    assert steps(model) == [1] * BATCH


def test_runs_of_an_earlier_image_are_dropped():
    model, _ = fresh()
    for seed in range(5):
        for tau in (0.9, 0.5):
            called(model, image(seed), tau)
        assert len(model.followed.tracks) == 1


@pytest.mark.parametrize("tau", [0.9, 0.8, 0.7, 0.6])
@pytest.mark.parametrize("after", [1, 3])
def test_another_image_starts_a_run_at_any_noise_level(tau, after):
    """With the same labels, no matter how many steps the one before made."""
    model, _ = fresh()
    for number in range(after):
        called(model, drifted(image(0), 0.01 * number), 0.9 + 0.02 * (after - number - 1))
    found = called(model, image(1), tau)
    assert steps(model) == [1] * BATCH
    assert torch.equal(found, called(fresh()[0], image(1), tau))


@pytest.mark.parametrize("tau", [0.5, 0.3, 0.1])
def test_another_image_starts_a_run_at_far_lower_noise(tau):
    """As image to image does after a run that was given up early."""
    model, _ = fresh()
    called(model, image(0), 0.95)
    called(model, image(1), tau)
    assert steps(model) == [1] * BATCH
    called(model, drifted(image(1), LIMIT + 0.1), tau - 0.1)
    assert steps(model) == [1] * BATCH


def test_a_risen_timestep_starts_a_run():
    model, _ = fresh()
    called(model, image(0), 0.5)
    called(model, image(0), [0.45, 0.6, 0.4])
    assert restarted(model) == [1]


def test_another_label_starts_a_run():
    model, _ = fresh()
    called(model, image(0), 0.5)
    called(model, image(0), 0.45, (0, 7, 2))
    assert restarted(model) == [1]
    called(model, image(0), 0.4, (0, 7, 2))
    assert steps(model) == [3, 2, 3]


def test_a_moved_image_starts_a_run():
    """Further than samplers go: more than a few times the noise levels passed."""
    model, _ = fresh()
    called(model, image(0), 0.5)
    x = drifted(image(0), 0.15)
    x[1] = drifted(image(0), 0.5)[1]
    called(model, x, 0.45)
    assert restarted(model) == [1]


def test_the_same_image_elsewhere_in_the_batch_is_another():
    model, _ = fresh()
    called(model, image(0), 0.5, (1, 1, 1))
    called(model, image(0)[[0, 2, 1]], 0.45, (1, 1, 1))
    assert restarted(model) == [1, 2]


@pytest.mark.parametrize("batch", [1, 2])
def test_another_batch_size_starts_a_run(batch):
    model, _ = fresh()
    called(model, image(0), 0.5)
    found = called(model, image(0)[:batch], 0.45)
    assert steps(model) == [1] * batch
    assert torch.equal(found, called(fresh()[0], image(0)[:batch], 0.45))


def test_other_text_starts_a_run():
    model, (_, args, kwargs) = fresh("pixart")

    def call(tau: int, **changed: Any) -> None:
        model(*args, **{**kwargs, "timestep": torch.full((BATCH,), tau), **changed})

    call(500)
    call(490)
    assert restarted(model) == []
    text, mask = kwargs["encoder_hidden_states"].clone(), kwargs["encoder_attention_mask"].clone()
    text[2, 6, 0] += 1
    call(480, encoder_hidden_states=text)
    assert restarted(model) == [2]
    mask[0, 3:] = 0
    call(470, encoder_hidden_states=text, encoder_attention_mask=mask)
    assert restarted(model) == [0]


def test_a_value_for_the_whole_batch_that_changed_starts_all():
    model, (_, (x, _t), _) = fresh("tiny")

    def shared(timestep: float) -> None:
        model(x, torch.full((BATCH,), timestep))

    shared(0.9)
    shared(0.8)
    assert steps(model) == [2] * BATCH
    module, inputs, _ = tiny_call()

    class Gained(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor, t: Tensor, gain: Tensor) -> Tensor:
            return self.inner(x, t) * gain

    gained = rewrite(Gained(), (*inputs, torch.ones(4, 8).mean(0)), {}, method_of("carry"), HALF, timestep_scale=1.0)
    for tau, gain, wanted in ((0.9, 1.0, 1), (0.8, 1.0, 2), (0.7, 2.0, 1), (0.6, 2.0, 2)):
        gained(x, torch.full((BATCH,), tau), torch.full((8,), gain))
        assert steps(gained) == [wanted] * BATCH


def test_what_was_restarted_gives_what_a_fresh_model_gives():
    """Sample by sample, the stale state being wild; the others are not disturbed."""
    model, _ = fresh()
    called(model, image(0), 0.5)
    called(model, drifted(image(0), 0.05), 0.45)
    run: Any = model.followed.run
    for value in run.state.values.values():
        value[:, 1] = 1e4
    x = drifted(image(0), 0.1)
    x[1] = image(5)[1]
    found = called(model, x, 0.4)
    assert restarted(model) == [1]
    assert relative(found[1], called(fresh()[0], x, 0.4)[1]) < 1e-6
    beside, _ = fresh()
    called(beside, image(0), 0.5)
    called(beside, drifted(image(0), 0.05), 0.45)
    assert relative(found[[0, 2]], called(beside, drifted(image(0), 0.1), 0.4)[[0, 2]]) < 1e-6


def test_an_image_changed_in_place_is_seen():
    model, _ = fresh()
    x = image(0)
    called(model, x, 0.5)
    x[0] = image(3)[0]
    called(model, x, 0.45)
    assert restarted(model) == [0]


def test_a_call_after_one_that_failed_starts_a_run():
    model, _ = fresh()
    called(model, image(0), 0.5)

    def fail(*_: Any) -> None:
        raise MemoryError

    hook = model.denoise_graph.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        called(model, image(0), 0.45)
    hook.remove()
    found = called(model, image(0), 0.4)
    assert steps(model) == [1] * BATCH
    assert torch.equal(found, called(fresh()[0], image(0), 0.4))


def test_an_image_of_another_type_starts_a_run_with_another_state():
    """As after the model was moved: the state is where the image was."""
    model, _ = fresh()
    called(model, image(0), 0.5)
    before = model.followed.run
    model.followed.tracks[-1].last["x"] = image(0).half()
    called(model, image(0), 0.45)
    assert model.followed.run is not before
    assert steps(model) == [1] * BATCH


def test_forget():
    model, _ = fresh()
    called(model, image(0), 0.5)
    model.forget()
    assert model.followed.run is None
    called(model, image(0), 0.4)
    assert steps(model) == [1] * BATCH


def test_every_model_follows_its_own_calls():
    model, _ = fresh()
    other = model.with_schedule(HALF)
    called(model, image(0), 0.5)
    called(other, image(0), 0.4)
    assert steps(model) == steps(other) == [1] * BATCH


def test_runs_beside_the_calls_do_not_disturb_them():
    model, call = fresh()
    called(model, image(0), 0.5)
    run = model.start(BATCH)
    run.step(flat(model, call))
    called(model, image(0), 0.4)
    assert steps(model) == [2] * BATCH


def test_calls_in_mode_chunk_are_never_followed():
    torch.manual_seed(0)
    model = rewrite(*tiny_call(), method_of("chunk"), HALF, timestep_scale=1.0)
    x, _ = tiny_inputs()
    first = model(x, torch.full((BATCH,), 0.5))
    model(x, torch.full((BATCH,), 0.7))
    assert torch.equal(model(x, torch.full((BATCH,), 0.5)), first)
    assert model.followed.run is None
    assert first.requires_grad


def test_calls_in_mode_carry_need_no_gradient():
    model, _ = fresh()
    assert not called(model, image(0), 0.5).requires_grad
    assert not called(model, image(0), 0.4).requires_grad


# The warning


def test_it_warns_once_when_calls_never_go_on(caplog):
    """As when the halves of guidance are two calls: each has another label than the one before."""
    model, _ = fresh()
    for number in range(WARN_AFTER + 5):
        called(model, image(0), 0.9 - 0.01 * number, (number % 2,) * 3)
        assert len(caplog.records) == (number >= WARN_AFTER)
    assert f"{WARN_AFTER} calls in a row did not continue the previous one" in caplog.text
    assert "because input y is not the same at every step" in caplog.text
    assert "model.start(batch)" in caplog.text


def test_it_warns_when_one_sample_of_the_batch_never_goes_on(caplog):
    model, _ = fresh()
    for number in range(WARN_AFTER + 1):
        called(model, image(0), 0.9 - 0.01 * number, (0, number % 2, 2))
    assert len(caplog.records) == 1


def test_it_does_not_warn_while_runs_go_on_now_and_then(caplog):
    model, _ = fresh()
    for number in range(20):
        called(model, image(number // 4 * 4), 0.9 - 0.01 * number, (0 if number % 4 else 1,) * 3)
    assert not caplog.records


def test_it_does_not_warn_of_new_images_from_noise(caplog):
    """One step each: the noise rises every time."""
    model, _ = fresh()
    for number in range(10):
        called(model, image(number), 0.5 + 0.01 * number)
    assert not caplog.records


def test_what_the_last_loop_computed(caplog):
    model, _ = fresh()
    assert last_loop(model.runs) is None
    for number in range(4):
        called(model, image(0), 0.9 - 0.1 * number)
    called(model, image(1), 0.95)  # a loop that has just begun does not count
    asked = "(asked for: 2x over 9 steps)"
    assert spent(cast(Loop, last_loop(model.runs)), HALF, 9) == f"last run: 4 steps, 1.6x fewer tokens computed {asked}"
    for number in range(6):
        called(model, image(0), 0.96 - 0.1 * number, (number,) * 3)
    why = "no calls continued the ones before, because input y is not the same at every step"
    assert (
        spent(cast(Loop, last_loop(model.runs)), HALF)
        == f"last run: 6 steps, 1x fewer tokens computed (asked for: 2x); {why}"
    )


def test_moved_is_relative_to_the_smaller_image():
    a = torch.full((2, 1, 1, 2), 3.0)
    b = torch.stack([a[0] * 2, a[1] / 3])
    assert moved(b, a).tolist() == pytest.approx([1.0, 2.0])
    assert moved(a, b).tolist() == pytest.approx([1.0, 2.0])
    assert moved(a, a).tolist() == [0, 0]
    assert moved(torch.zeros(1, 4), torch.zeros(1, 4)).tolist() == [0]
