"""How a stress test is shown."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dcconvert.evaluate.stress_cases import Cases
from dcconvert.evaluate.stress_metrics import CaseFigures, Look, Outcome, judged, summary, worst_of
from dcconvert.images.pixels import CAPTION, GAP, TILE
from dcconvert.report.conversion import page
from dcconvert.report.stress import GALLERY, Stress, failure_figure, heat
from dcconvert.sampling.samplers import Sampler

COUNT = 5


def cases_of(channels: int = 1) -> Cases:
    images, numbers = torch.zeros(COUNT, channels, 8, 8), list(range(COUNT))
    part, detail = Sampler("flow", 4), torch.ones(COUNT, 4, 4)
    images[:, :, 0] = 1
    return Cases(part, images, torch.arange(COUNT), images, numbers, numbers, ["hair"] * COUNT, images, detail)


def outcome_of(cases: Cases, ratio: float, age: np.ndarray | None = None) -> Outcome:
    """Case i is off by 0.1 (i + 1) throughout."""
    keep = np.zeros((COUNT, 4, 4), bool)
    keep[:, :1] = True
    looks = [Look(tau, 1000 * tau, keep, torch.rand(COUNT, 4, 4), age) for tau in (0.6, 0.2)]
    images = cases.wanted - 0.1 * torch.arange(1, COUNT + 1).view(-1, 1, 1, 1)
    return Outcome(ratio, 1.5, images, {1: images, 2: cases.wanted}, looks)


def stress_of(figures: list[CaseFigures]) -> Stress:
    return Stress(
        source="a<b.npz",
        start=0.7,
        early=0.6,
        late=0.2,
        steps=3,
        run_steps=4,
        solver="euler",
        cases=COUNT,
        left_out=("one & two",),
        rows=tuple(summary(figures)),
    )


def found_of(outcome: Outcome) -> Stress:
    return stress_of(judged(cases_of(), outcome, ["<boot>"]))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_gallery_shows_the_worst_of_each_ratio(channels):
    cases = cases_of(channels)
    outcomes = [outcome_of(cases, ratio) for ratio in (4.0, 16.0)]
    worst = worst_of([facts for outcome in outcomes for facts in judged(cases, outcome, [])])
    assert [facts.source_index for facts in worst[:COUNT]] == [4, 3, 2, 1, 0]
    pixels = np.asarray(Image.open(io.BytesIO(failure_figure(worst, cases, outcomes))))
    assert pixels.shape == (CAPTION + 2 * GALLERY * (CAPTION + TILE + GAP), 7 * (TILE + GAP) - GAP, 3)
    row = pixels[2 * CAPTION : 2 * CAPTION + TILE]
    given, original, converted, fewer, error, early, late = (row[:, i * (TILE + GAP) :][:, :TILE] for i in range(7))
    assert (given == original).all()
    assert (fewer == original).all()
    assert converted.mean() < original.mean()
    assert (error == error[0, 0]).all()
    assert (error > 0).any()
    assert (early == late).all()
    assert (early[: TILE // 4] == original[: TILE // 4]).all()
    assert (early[TILE // 4 :] != original[TILE // 4 :]).any(2).all()


def test_no_error_is_black_and_half_the_range_as_bright_as_all_of_it():
    none, half, whole = heat(np.array([[0, 0.5, 1.0]]))[0]
    assert none.max() < 10
    assert half.min() > 100
    assert (half == whole).all()


def test_ages_are_shown_where_there_are_any():
    cases = cases_of()
    ages = np.tile(np.arange(4), (COUNT, 4, 1))
    carry, chunk = (found_of(outcome_of(cases, 4.0, age)) for age in (ages, None))
    for stress, last in ((carry, "1.5 (1.5)"), (chunk, None)):
        [row] = stress.table.rows
        assert len(row) == len(stress.table.headings) == (11 if last else 10)
        assert row[:3] == ("4x", "hair", "1.5")
        assert last is None or row[-1] == last
        assert ("“Age”" in page({"stress": stress.to_json()}, {})) == bool(last)


def test_the_section_is_safe_html_and_says_what_was_left_out():
    found = {"stress": found_of(outcome_of(cases_of(), 4.0)).to_json()}
    text = page(found, {"failures": b"png"})
    assert "a&lt;b.npz" in text
    assert "one &amp; two." in text
    assert "1 and 2 at 4x" in text
    assert "data:image/png" in text
    assert "data:image/png" not in page(found, {})
    assert "Stress" not in page({}, {"failures": b"png"})


def test_the_terminal_prints_both_tables_in_one():
    stress = found_of(outcome_of(cases_of(), 4.0))
    names = stress.table.headings[:2]
    assert stress.table.headings == (*stress.image_table.headings, *stress.router_table.headings[2:])
    assert names == stress.image_table.headings[:2] == stress.router_table.headings[:2] == ("ratio", "detail")
    assert [column.header for column in stress.for_terminal().columns] == list(stress.table.headings)


def test_a_model_that_diverged():
    cases = cases_of()
    outcome = outcome_of(cases, 4.0)
    broken = replace(outcome, images=outcome.images.clone().index_fill(0, torch.tensor([2]), torch.nan))
    figures = judged(cases, broken, [])
    worst = worst_of(figures)
    assert worst[0].source_index == 2
    assert stress_of(figures).table.rows[0][3] == "not finite"
    assert failure_figure(worst, cases, [broken]).startswith(b"\x89PNG")
