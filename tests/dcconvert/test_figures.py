"""The pictures of a report."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcconvert import figures
from dcconvert.evaluate import Fidelity
from dcconvert.figures import COLUMNS, MAPS, MOMENTS, chunk_map_figure, sample_figure, save_comparison
from dcconvert.images import CAPTION, GAP
from dcconvert.passes.errors import UsageError


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def size(columns: int, rows: int, side: int) -> tuple[int, int, int]:
    """Height, width and channels of one captioned grid."""
    height = rows * (side + GAP) - GAP + CAPTION + GAP
    return height, columns * (side + GAP) - GAP, 3


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions that are drawn."""
    seen: list[str] = []
    draw = figures.captioned_rows

    def spy(rows: Mapping[str, Image.Image]) -> Image.Image:
        seen.extend(rows)
        return draw(rows)

    monkeypatch.setattr(figures, "captioned_rows", spy)
    return seen


def result(steps: int, samples: int) -> Fidelity:
    """A run on 8x8 pixels and 4x4 tokens that keeps the upper half, at step i at brightness i."""
    keep = np.zeros((samples, 4, 4), bool)
    keep[:, :2] = True
    mid = [torch.full((samples, 1, 8, 8), 2 * i / steps - 1) for i in range(steps)]
    images = {"reference": torch.zeros(samples, 1, 8, 8), "converted": torch.ones(samples, 1, 8, 8)}
    return Fidelity([], [], images, "reference", [keep] * steps, mid)


def test_samples_stand_in_rows_of_eight(captions):
    png = sample_figure({"one": torch.zeros(10, 1, 8, 8), "two": torch.ones(10, 1, 8, 8)})
    height, width, _ = size(COLUMNS, 2, 16)  # small ones are magnified twice
    assert opened(png).shape == (2 * height, width, 3)
    assert captions == ["one", "two"]


def test_large_images_are_not_magnified():
    assert opened(sample_figure({"one": torch.zeros(1, 3, 64, 64)})).shape == size(COLUMNS, 1, 64)


def test_latents_are_called_so(captions):
    sample_figure({"converted": torch.zeros(1, 4, 8, 8)})
    assert captions == ["converted, latents: first three channels"]


def test_decoded_latents_are_pictures(captions, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "decode_latents", lambda x, vae: torch.ones(len(x), 3, 64, 64))
    save_comparison({"converted": torch.zeros(1, 4, 8, 8)}, tmp_path / "s.png", tmp_path / "vae")
    assert captions == ["converted"]
    pixels = np.asarray(Image.open(tmp_path / "s.png"))
    assert pixels.shape == size(COLUMNS, 1, 64)
    assert (pixels[CAPTION : CAPTION + 64, :64] == 255).all()


def test_a_picture_is_written_whole(tmp_path):
    save_comparison({"one": torch.zeros(2, 1, 8, 8)}, tmp_path / "s.png", None)
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]
    assert (tmp_path / "s.png").read_bytes() == sample_figure({"one": torch.zeros(2, 1, 8, 8)})


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
    with pytest.raises(UsageError, match="cannot write .*: No space left on device"):
        save_comparison({"one": torch.zeros(1, 1, 8, 8)}, tmp_path / "s.png", None)
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]
    assert (tmp_path / "s.png").read_text() == "old"


@pytest.mark.parametrize(("steps", "samples"), [(50, 6), (3, 2), (1, 1)])
def test_chunk_maps_show_some_steps_of_some_samples(steps, samples, captions):
    pixels = opened(chunk_map_figure(result(steps, samples)))
    assert pixels.shape == size(min(steps, MOMENTS) + 1, min(samples, MAPS), 24)
    [caption] = captions
    assert caption.startswith("steps 1")
    assert f"{steps} of {steps} (kept tokens bright)" in caption


def test_chunk_maps_dim_what_was_dropped():
    pixels = opened(chunk_map_figure(result(steps=2, samples=1)))[CAPTION:, :, :]
    second = pixels[:24, 24 + GAP : 48 + GAP]
    assert (second[:12] == 128).all()
    assert (second[12:] == [47, 54, 99]).all()
    assert (pixels[:24, -24:] == 255).all()  # the final image, untouched
