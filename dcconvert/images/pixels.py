"""From samples to pictures, and the distance between them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dcconvert.passes.ir.errors import UsageError

LATENT_SCALE = 0.18215  # Stable Diffusion's autoencoder, which the published DiTs use
GAP = 2
CAPTION = 16
TILE = 96  # pixels that small pictures are magnified to, at least, where words stand above them


def to_images(x: Tensor) -> np.ndarray:
    """Samples [B, C, H, W] in [-1, 1] -> uint8 [B, H, W, 3]. Of more than three channels (latents), the first three."""
    pixels = ((x[:, :3].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if pixels.shape[1] < 3:
        pixels = pixels[:, :1].expand(-1, 3, -1, -1)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def decode_latents(x: Tensor, vae: Path) -> Tensor:
    """Latents [B, 4, h, w] -> pixels [B, 3, 8h, 8w] in [-1, 1] by a diffusers AutoencoderKL folder on disk."""
    from diffusers import AutoencoderKL

    try:
        model = AutoencoderKL.from_pretrained(str(vae), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"{vae} is not a diffusers AutoencoderKL folder: {str(error).splitlines()[0]}") from error
    with torch.inference_mode():
        return torch.cat([model.decode(part / LATENT_SCALE).sample for part in x.split(4)])


def is_latent(x: Tensor) -> bool:
    """Whether samples [B, C, H, W] are latents rather than grey or colour pixels."""
    return x.shape[1] > 3


def squared_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error over the squared peak at every pixel, mean over the channels: [B, H, W] for samples [B, C, H, W].

    Pixels are clamped to [-1, 1], so peak to peak is 2; for latents it is the range of `wanted`.
    """
    peak = 2.0
    if is_latent(wanted):
        peak = float(wanted.max() - wanted.min())
    else:
        found, wanted = found.clamp(-1, 1), wanted.clamp(-1, 1)
    return (found - wanted).square().mean(1) / peak**2


def decibels(error: Tensor) -> Tensor:
    """Squared errors over the squared peak as a peak signal-to-noise ratio in dB; 120 for none at all."""
    return -10 * torch.log10(error.clamp_min(1e-12))


def psnr(found: Tensor, wanted: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each sample, [B]; peaks as in `squared_error`."""
    return decibels(squared_error(found, wanted).flatten(1).mean(1))


def psnr_mean(found: Tensor, wanted: Tensor) -> float:
    """Mean over the samples of their PSNR, in dB."""
    return float(psnr(found, wanted).mean())


def grid_image(images: np.ndarray, columns: int, scale: int = 1) -> Image.Image:
    """Images uint8 [B, H, W, 3] in rows of `columns`, each magnified `scale` times."""
    if scale > 1:
        images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)


def captioned_rows(rows: Mapping[str, Image.Image], headings: Sequence[str] = ()) -> Image.Image:
    """Pictures below each other, each under its caption; `headings` name their columns, all of one width, on top."""
    width = max(image.width for image in rows.values())
    top = CAPTION if headings else 0
    sheet = Image.new("RGB", (width, top + sum(image.height + CAPTION + GAP for image in rows.values())), "white")
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(headings):
        draw.text((2 + column * (width + GAP) // len(headings), 2), text, fill="black")
    for caption, image in rows.items():
        draw.text((2, top + 2), caption, fill="black")
        sheet.paste(image, (0, top + CAPTION))
        top += image.height + CAPTION + GAP
    return sheet


def tile_scale(side: int) -> int:
    """By how much pictures of this side are magnified to fill a tile."""
    return max(1, -(-TILE // side))


def dim_dropped(image: np.ndarray, keep: np.ndarray, scale: int) -> np.ndarray:
    """A sample uint8 [H, W, 3], magnified, with dropped tokens (keep [h, w] False) tinted blue."""
    large = image.repeat(scale, axis=0).repeat(scale, axis=1).astype(np.float32)
    cell = (large.shape[0] // keep.shape[0], large.shape[1] // keep.shape[1])
    mask = keep.repeat(cell[0], axis=0).repeat(cell[1], axis=1)[:, :, None]
    # Neither dark nor light: kept tokens stand out on black ground as on white.
    tint = np.array([0, 114, 178], np.float32)
    return np.where(mask, large, 0.3 * large + 0.7 * tint).astype(np.uint8)


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
