"""The invariants that carry all others: everything kept is the original; a sample is alone whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel
from tests.passes.harness import (
    BATCH,
    Call,
    diffusers_call,
    dit_call,
    first_tensor,
    larger,
    pick,
    pixart_call,
    relative,
    run_with_plan,
)

TOLERANCE = 1e-5
ALL = Policy("constant", 1).timetable()

MODELS: dict[str, Callable[[], Call]] = {
    "dit 4x4": lambda: dit_call(8),
    "dit 6x6": lambda: dit_call(12),
    "diffusers dit 4x4": lambda: diffusers_call(8),
    "diffusers dit 6x6": lambda: diffusers_call(12),
    "pixart 4x4": lambda: pixart_call(8),
    "pixart 6x6": lambda: pixart_call(12),
}
PACKINGS = {name: ("rows",) if name.startswith("pixart") else ("rows", "bins") for name in MODELS}
CASES = [(name, packing) for name in MODELS for packing in PACKINGS[name]]
every_case = pytest.mark.parametrize(("name", "packing"), CASES)


@cache
def converted(name: str, packing: str) -> tuple[DynamicModel, Call]:
    """One conversion for all tests and examples; weights and inputs are random but fixed."""
    torch.manual_seed(0)
    call = MODELS[name]()
    return rewrite(*call, method_of("chunk", packing=packing), ALL), call


def plain(call: Call) -> torch.Tensor:
    with torch.no_grad():
        return first_tensor(call[0](*call[1], **call[2]))


@every_case
def test_called_like_the_original(name, packing):
    model, call = converted(name, packing)
    with torch.no_grad():
        assert relative(first_tensor(model(*call[1], **call[2])), plain(call)) < TOLERANCE
        assert relative(first_tensor(model.original(*call[1], **call[2])), plain(call)) < TOLERANCE


@every_case
@pytest.mark.parametrize("tile", [1, 4, 7])
def test_in_larger_buckets(name, packing, tile):
    model, call = converted(name, packing)
    planner = Planner(model.spec.grid, 4, 4, packing)
    keep = np.ones((BATCH, model.spec.tokens), dtype=bool)
    plan = planner.plan(keep, larger(planner, keep, tile))
    assert plan.packed_index.size > plan.kept
    assert relative(run_with_plan(model, call, plan), plain(call)) < TOLERANCE


def test_with_several_samples_in_a_row():
    """Bins only meet when rows are longer than a sample."""
    model, call = converted("dit 4x4", "bins")
    planner = Planner(model.spec.grid, 4, 4, "bins")
    for row_tokens, rows in ((32, 2), (48, 1), (50, 3)):
        plan = planner.full_plan(BATCH, Bucket(BATCH, 48, rows, row_tokens, 16))
        assert (plan.segment_ids[0] >= 0).sum() > 16
        assert relative(run_with_plan(model, call, plan), plain(call)) < TOLERANCE


@every_case
def test_in_another_sample_order_and_batch(name, packing):
    model, call = converted(name, packing)
    wanted = plain(call)
    for order in ([2, 0, 1], [1], [0, 2]):
        found = run_with_plan(model, pick(call, order), model.planner.planner.full_plan(len(order)))
        assert relative(found, wanted[order]) < TOLERANCE


@pytest.mark.parametrize(("head", "tail"), [(0, 0), (2, 0), (0, 2)])
def test_with_other_head_and_tail_blocks(head, tail):
    call = dit_call()
    model = rewrite(*call, method_of("chunk", head_blocks=head, tail_blocks=tail), ALL)
    assert relative(first_tensor(model(*call[1])), plain(call)) < TOLERANCE


def test_pixart_in_bins_is_refused():
    with pytest.raises(UsageError, match="one sample per row: use packing='rows'"):
        rewrite(*pixart_call(), method_of("chunk", packing="bins"), ALL)


@pytest.mark.slow
@pytest.mark.parametrize(("pixels", "depth"), [(256, 12), (512, 4)])
def test_the_real_size(pixels, depth):
    """DiT-S/2 on the latents of 256 pixel images, and some blocks of it on those of 512 pixels."""
    call = dit_call(pixels // 8, depth=depth, width=384, heads=6, batch=2)
    torch.nn.init.normal_(call[0].pos_embed)  # type: ignore[arg-type]
    for parameter in call[0].parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model = rewrite(*call, method_of("chunk"), ALL)
    planner = model.planner.planner
    wanted = plain(call)
    keep = np.ones((2, model.spec.tokens), dtype=bool)
    for plan in (planner.full_plan(2), planner.plan(keep, larger(planner, keep, 8))):
        assert relative(run_with_plan(model, call, plan), wanted) < TOLERANCE


# Properties over any keep mask: the samples of a batch do not know of each other.


@st.composite
def keeps(draw: st.DrawFn, tokens: int = 16) -> np.ndarray:
    counts = draw(st.lists(st.integers(1, tokens), min_size=BATCH, max_size=BATCH))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return np.stack([rng.permutation(tokens) < count for count in counts])


small_models = st.sampled_from([case for case in CASES if case[0].endswith("4x4")])


@settings(max_examples=25)
@given(small_models, keeps(), st.integers(0, BATCH - 1), st.booleans())
def test_isolation(case, keep, loud, padded):
    """One sample at 1e4 everywhere: the outputs of the others stay."""
    model, call = converted(*case)
    planner = model.planner.planner
    plan = planner.plan(keep, larger(planner, keep) if padded else None)
    x = call[1][0].clone()
    x[loud] = 1e4
    others = [i for i in range(BATCH) if i != loud]
    before = run_with_plan(model, call, plan)[others]
    after = run_with_plan(model, (call[0], (x, *call[1][1:]), call[2]), plan)[others]
    assert relative(after, before) <= 1e-6


@settings(max_examples=25)
@given(small_models, keeps(), st.integers(0, BATCH - 1), st.booleans())
def test_batch_invariance(case, keep, alone, padded):
    """A sample gives the same alone as in a batch, with the same tokens kept."""
    model, call = converted(*case)
    planner = model.planner.planner
    together = run_with_plan(model, call, planner.plan(keep, larger(planner, keep) if padded else None))
    single = run_with_plan(model, pick(call, [alone]), planner.plan(keep[[alone]]))
    assert relative(single[0], together[alone]) < TOLERANCE


@settings(max_examples=15)
@given(small_models, keeps(), st.permutations(range(BATCH)))
def test_sample_order_does_not_matter(case, keep, order):
    model, call = converted(*case)
    planner = model.planner.planner
    found = run_with_plan(model, pick(call, order), planner.plan(keep[order]))
    assert relative(found, run_with_plan(model, call, planner.plan(keep))[order]) < TOLERANCE
