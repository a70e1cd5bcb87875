"""Figures of a stress test, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dcconvert.evaluate.stress_cases import Cases
from dcconvert.evaluate.stress_metrics import (
    WORST,
    Look,
    Outcome,
    correlation,
    detail_psnr,
    judged,
    look_at,
    summary,
    worst_of,
)
from dcconvert.images.pixels import psnr
from dcconvert.sampling.samplers import Sampler


def in_one_token(row: int, column: int) -> torch.Tensor:
    """All detail of a sample in one token of a 4x4 grid."""
    detail = torch.zeros(1, 4, 4)
    detail[0, row, column] = 3.0
    return detail


def test_detail_psnr_weighs_by_detail():
    """An error of 0.2 in the one token that holds all detail is 20 dB, and elsewhere nothing."""
    wanted = torch.zeros(2, 1, 8, 8)
    found = wanted.clone()
    found[0, :, :2, :2] = 0.2
    found[1, :, 4:, 4:] = 0.2
    first, second = detail_psnr(found, wanted, in_one_token(0, 0).expand(2, 4, 4)).tolist()
    assert first == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-3)
    assert second == pytest.approx(120)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_detail_psnr_is_psnr_where_detail_is_everywhere(channels):
    """Pixels beyond the range count in neither, latents in both."""
    wanted = torch.randn(2, channels, 8, 8)
    found = wanted + 0.1 * torch.randn_like(wanted)
    torch.testing.assert_close(detail_psnr(found, wanted, torch.ones(2, 4, 4)), psnr(found, wanted))


def look(keep: np.ndarray, error: torch.Tensor, age: np.ndarray | None = None) -> Look:
    return Look(0.6, 600.0, keep, error, age)


def test_a_look_by_hand():
    """Four of sixteen tokens kept, among them the one with all detail; errors are three times higher in the others."""
    keep = np.zeros((1, 4, 4), bool)
    keep[0, 1] = True
    error = torch.where(torch.from_numpy(keep), 1.0, 3.0)
    age = np.where(keep, 0, 2)
    facts = look_at(look(keep, error, age), 0, in_one_token(1, 2)[0])
    assert facts.kept == (4, 5, 6, 7)
    assert facts.detail_kept == 1
    assert facts.attention_to_detail == 4
    assert facts.one_step_error == 2.5
    assert facts.dropped_error == 3
    assert facts.error_with_dropped == pytest.approx(1)
    assert facts.error_with_detail is not None
    assert facts.error_with_detail < 0
    assert (facts.mean_age, facts.detail_age) == (1.5, 0)
    starved = look_at(look(keep, error), 0, in_one_token(3, 3)[0])
    assert starved.attention_to_detail == 0
    assert starved.mean_age is None


def test_a_look_at_a_step_that_keeps_everything():
    facts = look_at(look(np.ones((1, 4, 4), bool), torch.zeros(1, 4, 4)), 0, torch.ones(4, 4))
    assert facts.attention_to_detail == pytest.approx(1)
    assert facts.dropped_error is facts.error_with_dropped is facts.error_with_detail is None


def test_correlation_is_pearsons():
    first, second = torch.rand(4, 4), torch.rand(4, 4)
    expected = np.corrcoef(first.flatten().numpy(), second.flatten().numpy())[0, 1]
    assert correlation(first, second) == pytest.approx(expected, abs=1e-5)
    assert correlation(first, torch.ones(4, 4)) is None


def cases_of(count: int) -> Cases:
    images, numbers = torch.zeros(count, 1, 8, 8), list(range(count))
    labels = torch.arange(count)
    part = Sampler("flow", 4)
    kinds = ["hair", "texture"] * (count // 2)
    return Cases(part, images, labels, images, numbers, numbers, kinds, images, torch.ones(count, 4, 4))


def outcome_of(count: int, cost: float, controls: dict[int, float]) -> Outcome:
    """Converted images 0.2 off, the control's as much as is said."""
    looks = [look(np.ones((count, 4, 4), bool), torch.ones(count, 4, 4))] * 2
    images = torch.full((count, 1, 8, 8), 0.2)
    return Outcome(4.0, cost, images, {n: torch.full_like(images, off) for n, off in controls.items()}, looks)


def test_the_control_is_interpolated_at_the_cost():
    cases = cases_of(2)
    facts = judged(cases, outcome_of(2, 8.25, {8: 0.02, 9: 0.002}), ["boot"])
    assert facts[0].control_steps == (8, 9)
    assert facts[0].psnr == facts[0].detail_psnr == pytest.approx(20, abs=1e-4)
    assert facts[0].control_psnr == pytest.approx(0.75 * 40 + 0.25 * 60, abs=1e-3)
    assert [fact.class_name for fact in facts] == ["boot", None]
    exact = judged(cases, outcome_of(2, 8.0, {8: 0.02}), [])[0]
    assert exact.control_steps == (8,)
    assert exact.control_detail_psnr == pytest.approx(40, abs=1e-4)


def test_the_worst_of_each_ratio_come_first():
    [case, _] = judged(cases_of(2), outcome_of(2, 2.0, {2: 0.02}), [])
    values = [30.0, 10.0, math.nan, *np.arange(40.0, 40.0 + WORST)]
    found = worst_of([replace(case, ratio=ratio, detail_psnr=value) for ratio in (4.0, 16.0) for value in values])
    assert len(found) == 2 * WORST
    assert [facts.ratio for facts in found] == [4.0] * WORST + [16.0] * WORST
    assert math.isnan(found[0].detail_psnr)
    assert [facts.detail_psnr for facts in found[1:4]] == [10, 30, 40]


def test_rows_are_means_of_their_kind():
    cases = cases_of(4)
    cases.wanted[0] += 0.2  # the first, of kind hair, is met exactly
    rows = summary(judged(cases, outcome_of(4, 2.0, {2: 0.02}), []))
    assert [(row.kind, row.cases) for row in rows] == [("hair", 2), ("texture", 2)]
    assert rows[0].psnr == pytest.approx((120 + 20) / 2, abs=1e-3)
    assert rows[1].psnr == pytest.approx(20, abs=1e-3)
    assert rows[0].dropped_error_late is None
    assert (rows[0].cost, rows[0].control_steps) == (2.0, (2,))
