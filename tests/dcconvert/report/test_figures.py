"""The pictures of a report."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcconvert.evaluate.image_fidelity import Fidelity
from dcconvert.images.pixels import CAPTION, GAP, TILE, captioned_rows
from dcconvert.passes.ir.errors import UsageError
from dcconvert.report.figures import MAPS, MOMENTS, sample_figure, save_comparison, token_map_figure


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def size(columns: int, rows: int, side: int) -> tuple[int, int, int]:
    """Height, width and channels of one captioned grid."""
    height = rows * (side + GAP) - GAP + CAPTION + GAP
    return height, columns * (side + GAP) - GAP, 3


def drawn(captions: Sequence[str], width: int, headings: Sequence[str] = ()) -> np.ndarray:
    """Texts as they stand above each other over grids of some width, without the grids."""
    blank = Image.new("RGB", (width, 1), "white")
    return np.asarray(captioned_rows(dict.fromkeys(captions, blank), headings))


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

    (tmp_path / "s.png").write_bytes(b"\x89PNG, old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match=r"cannot write .*: No space left on device"):
        save_comparison({"one": torch.zeros(1, 1, 8, 8)}, tmp_path / "s.png", None)
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]
    assert (tmp_path / "s.png").read_bytes() == b"\x89PNG, old"


@pytest.mark.parametrize(("steps", "samples"), [(50, 6), (3, 2), (1, 1)])
def test_token_maps_show_some_steps_of_some_samples(steps, samples):
    pixels = opened(token_map_figure(result(steps, samples)))
    height, *rest = size(min(steps, MOMENTS) + 2, min(samples, MAPS), TILE)
    assert pixels.shape == (CAPTION + height, *rest)
    shown = {50: (1, 9, 17, 25, 34, 42, 50), 3: (1, 2, 3), 1: (1,)}[steps]
    headings = [*(f"step {step}: 8 kept" for step in shown), "converted", "original"]
    caption = (
        f"what the model saw at steps of {steps}; of 16 tokens, those not computed are tinted blue. Then final images: "
        "less; same"
    )
    np.testing.assert_array_equal(pixels[: 2 * CAPTION], drawn([caption], rest[0], headings)[: 2 * CAPTION])


def test_token_maps_tint_what_was_dropped():
    pixels = opened(token_map_figure(result(steps=2, samples=1)))[2 * CAPTION : 2 * CAPTION + TILE]
    first, second, converted, original = (pixels[:, i * (TILE + GAP) :][:, :TILE] for i in range(4))
    assert (first[: TILE // 2] == 0).all()
    assert (second[: TILE // 2] == 128).all()
    assert (second[TILE // 2 :] == [38, 118, 163]).all()
    assert (converted == 255).all()
    assert (original == 0).all()


def test_samples_are_captioned_with_what_they_cost():
    shown = result(1, 2)
    costs = [("long", 40.0, None, None), ("same", 4.0, 800.4, 30.25), ("less", 1.26, 300.0, 24.0)]
    shown.rows = [dict(zip(("name", "gmacs", "latency_ms", "psnr"), row, strict=True)) for row in costs]
    pixels = opened(sample_figure(shown))
    assert pixels.shape[0] == 3 * (2 * 8 + CAPTION + GAP)
    captions = ["long: 40.0 GMACs", "same: 4.0 GMACs, 800 ms, 30.2 dB", "less: 1.3 GMACs, 300 ms, 24.0 dB"]
    for row, caption in zip(np.split(pixels, 3), captions, strict=True):
        np.testing.assert_array_equal(row[:CAPTION], drawn([caption], pixels.shape[1])[:CAPTION])
