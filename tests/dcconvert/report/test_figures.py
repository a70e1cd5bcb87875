"""The pictures of a report."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcconvert.evaluate.image_fidelity import Fidelity
from dcconvert.images import pixels as images
from dcconvert.images.pixels import CAPTION, GAP, TILE
from dcconvert.passes.ir.errors import UsageError
from dcconvert.report import figures
from dcconvert.report.figures import MAPS, MOMENTS, sample_figure, save_comparison, token_map_figure


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def size(columns: int, rows: int, side: int) -> tuple[int, int, int]:
    """Height, width and channels of one captioned grid."""
    height = rows * (side + GAP) - GAP + CAPTION + GAP
    return height, columns * (side + GAP) - GAP, 3


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The headings and captions that are drawn."""
    seen: list[str] = []
    draw = images.captioned_rows

    def spy(rows: Mapping[str, Image.Image], headings: Sequence[str] = ()) -> Image.Image:
        seen.extend((*headings, *rows))
        return draw(rows, headings)

    monkeypatch.setattr(figures, "captioned_rows", spy)
    return seen


def result(steps: int, samples: int) -> Fidelity:
    """A run on 8x8 pixels and 4x4 tokens that keeps the upper half, at step i at brightness i."""
    keep = np.zeros((samples, 4, 4), bool)
    keep[:, :2] = True
    mid = [torch.full((samples, 1, 8, 8), 2 * i / steps - 1) for i in range(steps)]
    images = {name: torch.full((samples, 1, 8, 8), value) for name, value in (("long", 0), ("same", -1), ("less", 1))}
    return Fidelity("long", "same", "less", images, keep=[keep] * steps, mid=mid)


@pytest.mark.parametrize("place", ["", "nothing/s.png"])
def test_a_place_that_cannot_be_written(place, tmp_path):
    with pytest.raises(UsageError, match="cannot write"):
        save_comparison({"one": torch.zeros(1, 1, 8, 8)}, tmp_path / place, None)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    (tmp_path / "s.png").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match=r"cannot write .*: No space left on device"):
        save_comparison({"one": torch.zeros(1, 1, 8, 8)}, tmp_path / "s.png", None)
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]
    assert (tmp_path / "s.png").read_text() == "old"


@pytest.mark.parametrize(("steps", "samples"), [(50, 6), (3, 2), (1, 1)])
def test_token_maps_show_some_steps_of_some_samples(steps, samples, captions):
    pixels = opened(token_map_figure(result(steps, samples)))
    height, *rest = size(min(steps, MOMENTS) + 2, min(samples, MAPS), TILE)
    assert pixels.shape == (CAPTION + height, *rest)
    *headings, converted, original, caption = captions
    assert len(headings) == min(steps, MOMENTS)
    assert headings[0] == "step 1: 8 kept"
    assert headings[-1] == f"step {steps}: 8 kept"
    assert (converted, original) == ("converted", "original")
    assert f"at steps of {steps}; of 16 tokens" in caption
    assert caption.endswith("less; same")


def test_token_maps_tint_what_was_dropped():
    pixels = opened(token_map_figure(result(steps=2, samples=1)))[2 * CAPTION : 2 * CAPTION + TILE]
    first, second, converted, original = (pixels[:, i * (TILE + GAP) :][:, :TILE] for i in range(4))
    assert (first[: TILE // 2] == 0).all()
    assert (second[: TILE // 2] == 128).all()
    assert (second[TILE // 2 :] == [38, 118, 163]).all()
    assert (converted == 255).all()
    assert (original == 0).all()


def test_samples_are_captioned_with_what_they_cost(captions):
    shown = result(1, 2)
    costs = [("long", 40.0, None, None), ("same", 4.0, 800.4, 30.25), ("less", 1.26, 300.0, 24.0)]
    shown.rows = [dict(zip(("name", "gmacs", "latency_ms", "psnr"), row, strict=True)) for row in costs]
    pixels = opened(sample_figure(shown))
    assert pixels.shape[0] == 3 * (2 * 8 + CAPTION + GAP)
    assert captions == [
        "long: 40.0 GMACs",
        "same: 4.0 GMACs, 800 ms, 30.2 dB",
        "less: 1.3 GMACs, 300 ms, 24.0 dB",
    ]
