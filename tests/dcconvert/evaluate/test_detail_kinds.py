"""Measures of detail: drawn pictures win their own kind."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcconvert.evaluate.detail_kinds import KINDS, box, choose, hair, on_tokens, ridge, small_object, strokes, texture

SIDE = 32


def blank(level=-1.0):
    return torch.full((SIDE, SIDE), level)


def checkerboard():
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return ((rows + columns) % 2).float() * 1.6 - 0.8


def writing():
    """Short strokes of one pixel, close together, in a corner."""
    picture = blank()
    for top in (4, 11):
        for left in range(4, 20, 4):
            picture[top : top + 5, left] = 1
            picture[top + 2, left : left + 3] = 1
    return picture


def hairs():
    picture = blank()
    picture[6, 2:30] = 1
    for i in range(24):
        picture[4 + i, 3 + i] = 1
    return picture


def dot():
    picture = blank()
    picture[15:18, 20:23] = 1
    return picture


def shirt():
    """A large plain shape: edges and no detail."""
    picture = blank()
    picture[4:28, 6:26] = 0.7
    return picture


PICTURES = {"texture": checkerboard(), "strokes": writing(), "hair": hairs(), "small object": dot(), "": shirt()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_wins_its_own_kind(kind):
    scores = KINDS[kind](torch.stack(list(PICTURES.values())))[0]
    assert list(PICTURES)[int(scores.argmax())] == kind


def test_edges_are_no_strokes():
    """The sides of a shape are none; its corners are, across the diagonal."""
    for measure in (strokes, hair):
        _, response = measure(shirt()[None])
        assert float(response[0, 12:20, :].max()) == pytest.approx(0, abs=1e-6)
        assert float(response.mean()) < 0.2 * float(measure(writing()[None])[1].mean())


def test_strokes_are_light_or_dark():
    assert float(strokes(-writing()[None])[0]) == pytest.approx(float(strokes(writing()[None])[0]))


def test_a_response_is_where_the_detail_is():
    line = hairs()
    for measure in (strokes, hair):
        response = measure(line[None])[1][0]
        assert response[line > 0].mean() > 5 * response[line < 0].mean()
    _, response = small_object(dot()[None])
    assert torch.equal(response[0] > 0, dot() > 0)
    _, response = texture(shirt()[None])
    assert float(response[0, 10:20, 10:20].max()) == pytest.approx(0, abs=1e-9)


def test_an_object_must_be_small():
    pictures = torch.stack([blank(), dot(), shirt(), -shirt()])
    assert [score > 0 for score in small_object(pictures)[0].tolist()] == [False, True, False, False]


def test_a_ridge_by_hand():
    """Three pixels wide at most: the middle of five has itself on both sides."""
    for width, height in ((1, 2.0), (3, 2.0), (5, 0.0)):
        picture = blank()
        picture[:, 10 : 10 + width] = 1
        assert float(ridge(picture[None], (0, 1))[0, 16, 10 + width // 2]) == height
        assert float(ridge(picture[None], (1, 0))[0, 16, 10 + width // 2]) == 0


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 9))
def test_no_image_is_chosen_twice(count, channels, seed):
    images = torch.rand(10, channels, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    chosen = choose(images, count)
    flat = [place for places in chosen.values() for place in places]
    assert len(flat) == len(set(flat))
    assert len(chosen["texture"]) >= min(count, 2)
    assert all(len(places) <= count for places in chosen.values())


def test_the_most_of_each_kind_comes_first():
    images = torch.stack([0.3 * PICTURES["strokes"], *PICTURES.values()])[:, None]
    chosen = choose(images, 1)
    assert {kind: places[0] for kind, places in chosen.items()} == {
        kind: 1 + number for number, kind in enumerate(KINDS)
    }


def test_images_without_detail_are_not_chosen():
    assert not any(choose(torch.full((3, 1, 16, 16), -1.0), 2).values())


def test_cells_of_tokens_add_up():
    values = torch.rand(2, 8, 12)
    cells = on_tokens(values, (4, 3))
    assert cells.shape == (2, 4, 3)
    torch.testing.assert_close(cells[1, 2, 1], values[1, 4:6, 4:8].sum())
    torch.testing.assert_close(cells.sum(), values.sum())


def test_a_box_is_a_mean():
    values = torch.rand(1, 5, 5)
    assert math.isclose(float(box(values, 3)[0, 2, 2]), float(values[0, 1:4, 1:4].mean()), rel_tol=1e-5)
    torch.testing.assert_close(box(torch.ones(1, 4, 4), 3), torch.ones(1, 4, 4))
