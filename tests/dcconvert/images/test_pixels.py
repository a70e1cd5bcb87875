"""Pixels, grids and distances, against values worked out by hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcconvert.images.pixels import (
    CAPTION,
    GAP,
    LATENT_SCALE,
    captioned_rows,
    decode_latents,
    dim_dropped,
    grid_image,
    is_latent,
    png_bytes,
    psnr,
    psnr_mean,
    tile_scale,
    to_images,
)
from dcconvert.passes.ir.errors import UsageError


def filled(value: float, channels: int = 1, batch: int = 1) -> torch.Tensor:
    return torch.full((batch, channels, 2, 2), value)


@pytest.mark.parametrize(("value", "pixel"), [(-1, 0), (1, 255), (0, 128), (0.5, 191), (-7, 0), (7, 255)])
def test_pixels_of_a_value(value, pixel):
    assert (to_images(filled(value)) == pixel).all()


def test_channels_of_pictures():
    colours = torch.tensor([-1.0, 0.0, 1.0, 9.0]).reshape(1, 4, 1, 1).expand(2, 4, 3, 5)
    for channels in (3, 4):
        image = to_images(colours[:, :channels])
        assert image.shape == (2, 3, 5, 3)
        assert image.dtype == np.uint8
        assert (image == [0, 128, 255]).all()
    assert (to_images(colours[:, 1:2]) == 128).all()
    assert to_images(colours[:, :2]).tolist() == to_images(colours[:, :1]).tolist()


def test_rows_stay_rows():
    x = torch.full((1, 1, 2, 3), -1.0)
    x[0, 0, 1, 2] = 1
    assert to_images(x)[0, :, :, 0].tolist() == [[0, 0, 0], [0, 0, 255]]


def test_psnr_of_pixels():
    """Peak to peak 2: an error of 0.2 everywhere is 20 dB, of 0.02 40 dB."""
    wanted = filled(0.5, batch=2)
    found = wanted + torch.tensor([0.2, -0.02]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(psnr(found, wanted), torch.tensor([20.0, 40.0]), rtol=0, atol=1e-3)
    assert psnr_mean(found, wanted) == pytest.approx(30, abs=1e-3)


def test_psnr_averages_over_pixels():
    found = filled(0.0)
    found[0, 0, 0, 0] = 0.4  # one of four: mean square 0.04
    assert psnr_mean(found, filled(0.0)) == pytest.approx(20, abs=1e-3)


def test_psnr_of_pixels_sees_what_is_shown():
    assert psnr_mean(filled(3.0), filled(1.2)) == psnr_mean(filled(1.0), filled(1.0)) > 100


def test_psnr_of_latents_has_their_own_peak():
    wanted = torch.zeros(1, 4, 2, 2)
    wanted[0, 0, 0, 0], wanted[0, 1, 1, 1] = -6, 4
    assert psnr_mean(wanted + 1, wanted) == pytest.approx(20, abs=1e-3)


def test_latents_have_more_than_three_channels():
    assert [is_latent(filled(0, channels)) for channels in (1, 3, 4, 16)] == [False, False, True, True]


def test_grid():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((5, 4, 3, 3), np.uint8) * 10
    sheet = grid_image(images, columns=3)
    assert sheet.size == (3 * 3 + 2 * GAP, 2 * 4 + GAP)
    pixels = np.asarray(sheet)
    assert (pixels[4 + GAP :, 3 + GAP : 6 + GAP] == 40).all()  # the fifth: second row, second column
    assert (pixels[4 : 4 + GAP] == 255).all()
    assert (pixels[:, 3 : 3 + GAP] == 255).all()
    assert (pixels[4 + GAP :, -3:] == 255).all()  # nothing there
    assert grid_image(images, columns=5, scale=2).size == (5 * 6 + 4 * GAP, 8)


def test_a_grid_magnifies_without_smoothing():
    images = np.array([0, 200], np.uint8).reshape(1, 1, 2, 1) * np.ones((1, 2, 2, 3), np.uint8)
    pixels = np.asarray(grid_image(images, columns=1, scale=3))
    assert (pixels[:, :3] == 0).all()
    assert (pixels[:, 3:] == 200).all()


def test_captions_stand_above_their_pictures():
    rows = {"one": Image.new("RGB", (30, 10), "red"), "two": Image.new("RGB", (50, 20), "blue")}
    sheet = captioned_rows(rows)
    assert sheet.size == (50, 10 + 20 + 2 * (CAPTION + GAP))
    pixels = np.asarray(sheet)
    assert (pixels[CAPTION : CAPTION + 10, :30] == [255, 0, 0]).all()
    assert (pixels[-GAP - 20 : -GAP] == [0, 0, 255]).all()
    assert (pixels[:CAPTION] < 128).any()  # some ink


def test_headings_stand_above_their_columns():
    grid = Image.new("RGB", (2 * 96 + GAP, 10), "red")
    pixels = np.asarray(captioned_rows({"": grid}, ("one", "two")))
    assert pixels.shape[:2] == (CAPTION + CAPTION + 10 + GAP, 2 * 96 + GAP)
    for left in (0, 96 + GAP):
        ink = np.asarray(pixels[:CAPTION, left : left + 96].min((0, 2)) < 128)
        assert ink[:20].any()
        assert not ink[60:].any()


@pytest.mark.parametrize(("side", "scale"), [(8, 12), (32, 3), (64, 2), (96, 1), (256, 1)])
def test_small_pictures_fill_a_tile(side, scale):
    assert tile_scale(side) == scale


def test_dropped_tokens_are_blue():
    keep = np.array([[True, False], [False, True]])
    picture = dim_dropped(np.full((4, 4, 3), 200, np.uint8), keep, scale=2)
    assert picture.shape == (8, 8, 3)
    assert (picture[:4, :4] == 200).all()
    assert (picture[4:, 4:] == 200).all()
    assert (picture[:4, 4:] == [60, 139, 184]).all()  # 0.3 of 200, 0.7 of (0, 114, 178)


def test_png():
    image = Image.new("RGB", (3, 2), "green")
    data = png_bytes(image)
    assert data.startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))


def test_latents_decode_to_pixels(tmp_path: Path):
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
    )
    vae.save_pretrained(tmp_path)
    x = torch.randn(5, 4, 4, 4)
    with torch.no_grad():
        wanted = vae.eval().decode(x / LATENT_SCALE).sample
    found = decode_latents(x, tmp_path)
    assert found.shape == (5, 3, 8, 8)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_folder_without_an_autoencoder(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UsageError, match="is not a diffusers AutoencoderKL folder") as error:
            decode_latents(torch.zeros(1, 4, 2, 2), folder)
        assert "\n" not in str(error.value)
