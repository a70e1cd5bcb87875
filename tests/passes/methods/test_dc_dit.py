"""DC-DiT's natural threshold: numbers of tokens that are found, rounded up to levels, and dropped in training."""

from __future__ import annotations

import numpy as np
import pytest

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.methods.dc_dit import TAIL_DROPS, DcDit, of_own_architecture
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.planners import SmoothedPlanner
from dcconvert.passes.planning.schedule import NATURAL, Policy, Timetable
from dcconvert.passes.planning.step_planner import StepPlanner
from tests.passes.harness import dit_call

NATURALLY = Policy(NATURAL, 4, base=4)
SCORES = np.where(np.arange(16) % 3 == 0, 0.9, 0.1)[None]  # 6 of 16, the first and the last included


@pytest.fixture(scope="module")
def model():
    return rewrite(*dit_call(), method_of("dc-dit"), NATURALLY.timetable())


def test_it_keeps_what_is_scored_above_a_half(model):
    assert model.spec.tokens == 16
    made = StepPlanner(model.spec, model.method, NATURALLY.timetable())
    assert isinstance(made.planner, SmoothedPlanner)
    assert made.found_counts(SCORES, None).tolist() == [6]
    rounded = StepPlanner(model.spec, model.method, Timetable(NATURALLY, 0.25, levels=(5, 9, 16)))
    assert rounded.found_counts(SCORES, None).tolist() == [9]


def test_a_natural_schedule_cannot_keep_more_than_its_router():
    with pytest.raises(UsageError, match="would need more of them"):
        Policy(NATURAL, 2, base=4)
    assert DcDit.policy(4) == NATURALLY


def test_what_is_trained_for(model):
    natural = Timetable(NATURALLY, 0.25, levels=(5, 16))
    assert [round(1 - 4 / ratio, 6) for ratio in model.method.training_ratios(natural)] == list(TAIL_DROPS)
    assert model.method.training_ratios(Policy("constant", 4).timetable()) == (4,)
    assert model.method.unrounded(natural).levels == ()
    made = StepPlanner(model.spec, model.method, NATURALLY.timetable())
    assert model.method.training_counts(made, 3, 0).tolist() == [4, 4, 4]


def test_the_architecture_of_its_own():
    own = of_own_architecture(method_of("dc-dit"), refined=True)
    assert (own.router, own.head_blocks, own.tail_blocks, own.by_values, own.keeps_original) == (
        "own",
        0,
        0,
        True,
        False,
    )
    assert own.frozen
    assert not method_of("dc-dit").frozen
    with pytest.raises(UsageError, match="needs preset dc-dit"):
        of_own_architecture(method_of("chunk"), refined=False)
    with pytest.raises(UsageError, match="leave out --head-blocks and --tail-blocks"):
        of_own_architecture(method_of("dc-dit", head_blocks=2), refined=False)
