"""DDiT's criterion: third differences, the spread within patches, and runs that watch their latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.methods.ddit import with_threshold
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.latent_difference import ThirdDifference, largest_below, patch_spread, third_difference
from dcconvert.passes.planning.schedule import DIFFERENCE, Policy
from dcconvert.passes.runtime.run import Run
from tests.passes.harness import dit_call
from tests.passes.runtime.test_run import Counting


def test_third_difference_of_polynomials():
    steps = torch.arange(4.0)
    shape = torch.randn(2, 1, 4, 4)
    square = [shape * step**2 - step for step in steps]
    cubic = [shape * step**3 for step in steps]
    torch.testing.assert_close(third_difference(square), torch.zeros(2, 1, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(third_difference(cubic), 6 * shape)


def test_spread_is_the_percentile_over_patches_of_the_deviation_within():
    difference = torch.zeros(2, 1, 4, 4)
    difference[1, 0, :2, :2] = torch.tensor([[0.0, 2.0], [2.0, 0.0]])  # deviation 1 in one patch of four
    difference[1, 0, :2, 2:] = torch.tensor([[0.0, 4.0], [4.0, 0.0]])  # 2 in another
    found = patch_spread(difference, (2, 4))
    np.testing.assert_array_equal(found[0], 0)
    # Sorted 0, 0, 1, 2: at 0.4 of the way, 1.2 steps from the first.
    assert found[1, 0] == pytest.approx(0.2)
    assert found[1, 1] == pytest.approx(float(difference[1].std(correction=0)))


def test_the_largest_patch_below_the_threshold():
    spread = np.array([[1, 2, 3], [0.1, 0.2, 3], [0.1, 3, 0.2], [0.1, 0.2, 0.3], [np.inf] * 3])
    assert largest_below(spread, 0.5).tolist() == [0, 1, 2, 2, 0]
    assert largest_below(spread, 0.0).tolist() == [0] * 5
    assert largest_below(spread, 0.2).tolist() == [0] * 5  # below it, not at it: only 0.1 is, the smallest


def test_the_first_three_steps_of_a_sample_tell_nothing():
    watch = ThirdDifference(2)
    for step in range(6):
        if step == 3:
            watch.restart([1])
        watch.note(np.full((2, 1, 2, 2), step**3.0), np.full(2, 1 - step / 10))
        known = np.isfinite(watch.spread((1, 2))).all(1)
        assert known.tolist() == [step >= 3, False]
    watch.note(np.zeros((2, 1, 2, 2)), np.full(2, 0.3))
    assert np.isfinite(watch.spread((1, 2))).all()
    with pytest.raises(UsageError, match="the noise of sample 0 rose"):
        watch.note(np.zeros((2, 1, 2, 2)), np.array([0.9, 0.1]))


@pytest.fixture(scope="module")
def model():
    options = method_of("ddit")
    made = rewrite(*dit_call(image_size=16), options, Policy(DIFFERENCE, 4, threshold=0.01).timetable())
    assert isinstance(made.planner.sizes, tuple)
    return made


def values(model, tau: float, image: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x": image, "t": torch.full((len(image),), 1000 * tau), "y": torch.zeros(len(image), dtype=torch.long)}


def test_a_run_takes_large_patches_where_latents_move_evenly(model):
    run = Run(model, 2)
    smooth, rough = torch.randn(4, 16, 16), torch.randn(8, 4, 16, 16)
    kept = []
    for step in range(8):
        image = torch.stack([smooth * (1 - step / 20), rough[step]])
        run.step(values(model, 1 - step / 10, image))
        kept.append(run.kept.tolist())
    assert kept[:3] == [[64, 64]] * 3
    assert kept[3:] == [[4, 64]] * 5


def test_guidance_halves_choose_alike_and_a_restart_forgets(model):
    run = Run(model, 2, groups=2)
    for step in range(5):
        run.step(values(model, 1 - step / 10, torch.ones(2, 4, 16, 16) * step))
    assert run.kept.tolist() == [4, 4]
    run.restart([0])
    run.step(values(model, 1.0, torch.ones(2, 4, 16, 16)))
    assert run.kept.tolist() == [64, 64]


def test_each_group_finds_its_numbers_by_its_own_planner(model):
    """In a batch that is filled up as well: the copies are of the last group."""
    fine, coarse = (model.with_schedule(with_threshold(model.schedule, threshold)).planner for threshold in (0.0, 1e9))
    run = Run(Counting(model, 6), 4)
    for step in range(5):
        run.step(values(model, 1 - step / 10, torch.randn(4, 4, 16, 16)), planners=(fine, coarse))
    assert run.kept.tolist() == [64, 64, 4, 4]


def test_calls_of_the_model_follow_each_other(model):
    model.forget()
    for step in range(5):
        found = model(*values(model, 1 - step / 100, torch.ones(2, 4, 16, 16) * (1 + step / 100)).values())
    assert model.followed.run.kept.tolist() == [4, 4]
    assert found.shape == (2, 8, 16, 16)
    model(*values(model, 0.96, torch.randn(2, 4, 16, 16)).values())  # another image
    assert model.followed.run.kept.tolist() == [64, 64]


def test_a_threshold_of_zero_is_the_original(model):
    fine = model.with_schedule(with_threshold(model.schedule, 0.0))
    run, image = Run(fine, 2), torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        for step in range(5):
            inputs = values(fine, 1 - step / 10, image)
            torch.testing.assert_close(run.step(inputs)[0], fine.original(*inputs.values()), rtol=1e-4, atol=1e-4)
