"""The mode written out by hand for the trial of ideas is the product's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dcconvert
from benchmarks.carry_variants import TRIED, Variant, sample
from dcconvert.passes.methods import method_of
from dcconvert.passes.planning.schedule import AUTO, Policy
from dcconvert.sampling.samplers import Sampler, initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep
from tests.dcconvert.harness import CONFIG, tiny_dit

COUNT = 3


@pytest.mark.parametrize("change", [{}, {"router": "age"}, {"head": 1}, {"refresh": 4}, {"warm_up": 1}], ids=str)
def test_by_hand_equals_the_product(change):
    dit, noise = tiny_dit(), initial_noise(0, COUNT, CONFIG.in_channels, CONFIG.image_size)
    labels = labels_for(COUNT, CONFIG.num_classes)
    variant = Variant(steps=12, kept=0.5, **change)
    options = method_of("carry", router=variant.router, head_blocks=variant.head)
    model = dcconvert.convert(dit, 2, options=options, steps=12)
    sampler = Sampler("flow", variant.steps)
    spending = Policy("constant", 2, warm_up=variant.warm_up, refresh=variant.refresh)
    model = model.with_schedule(spending.timetable(sampler.taus))
    with torch.inference_mode():
        by_hand, _ = sample(dit, variant, "flow", noise, labels)
        product = sampler.run(ConvertedStep(model, model), noise, labels)
        torch.testing.assert_close(product, by_hand, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "change"), [pair for pair in TRIED if pair[1]], ids=lambda value: str(value))
def test_every_idea_runs_and_changes_something(name, change):
    dit, noise = tiny_dit(), initial_noise(0, COUNT, CONFIG.in_channels, CONFIG.image_size)
    labels = labels_for(COUNT, CONFIG.num_classes)
    base: dict[str, Any] = {"steps": 12, "kept": 0.5, "warm_up": AUTO}
    with torch.inference_mode():
        plain, _ = sample(dit, Variant(**base), "flow", noise, labels)
        found, cost = sample(dit, Variant(**{**base, **change}), "flow", noise, labels)
    assert found.isfinite().all()
    assert 0 < cost <= 12
    assert not torch.equal(found, plain), name
