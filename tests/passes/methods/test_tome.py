"""Token merging: the options that a ratio decides."""

from __future__ import annotations

import pytest

from dcconvert.passes.methods import method_of
from dcconvert.passes.methods.tome import ToMe
from dcconvert.passes.modules.routers import MergeRouter
from dcconvert.passes.planning.planners import MergePlanner


def test_tokens_that_are_always_kept_are_no_more_than_the_ratio_leaves():
    made = method_of("tome", 5, head_blocks=2)
    assert isinstance(made, ToMe)
    assert made.fewest == pytest.approx(0.2)
    assert (made.head_blocks, made.tail_blocks) == (2, 1)
    router = made.router_module((6, 6))
    assert isinstance(router, MergeRouter)
    assert len(router.destinations) <= 36 * made.fewest
    assert isinstance(made.planner((6, 6)), MergePlanner)
    assert not made.plain_plan
