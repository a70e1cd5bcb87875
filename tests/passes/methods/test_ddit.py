"""DDiT's patch sizes: which number of tokens a spread of the latents gives, and what training takes in turns."""

from __future__ import annotations

import numpy as np

from dcconvert.passes.methods import method_of
from dcconvert.passes.methods.ddit import DDiT
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.planners import PatchPlanner
from dcconvert.passes.planning.schedule import DIFFERENCE, Policy
from dcconvert.passes.planning.step_planner import StepPlanner
from tests.passes.harness import dit_call


def test_the_largest_patches_whose_spread_is_below_the_threshold():
    model = rewrite(*dit_call(image_size=16), method_of("ddit"), Policy("constant", 2).timetable())
    made = StepPlanner(model.spec, model.method, Policy(DIFFERENCE, 4, threshold=0.5).timetable())
    assert isinstance(made.planner, PatchPlanner)
    assert made.sizes == (4, 16, 64)
    spread = np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.9], [0.1, 0.9, 0.9], [0.9, 0.9, 0.9]])
    assert made.found_counts(np.zeros((4, 64)), spread).tolist() == [4, 16, 64, 64]
    np.testing.assert_array_equal(model.method.training_counts(made, 4, 1), [16, 64, 4, 16])


def test_its_constants():
    assert DDiT.policy(4) == Policy(DIFFERENCE, 4, threshold=0.001)
    made = method_of("ddit").with_prediction("eps")
    assert made.predicts == "eps"
    assert method_of("chunk").with_prediction("eps") == method_of("chunk")
