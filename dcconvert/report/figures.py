"""The pictures of a report: samples side by side, and where the router spent its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dcconvert.evaluate.image_fidelity import Fidelity
from dcconvert.export.files import PNG, write_whole
from dcconvert.images.pixels import (
    captioned_rows,
    decode_latents,
    dim_dropped,
    grid_image,
    is_latent,
    png_bytes,
    tile_scale,
    to_images,
)

COLUMNS = 8  # samples per row
MAPS = 4  # samples shown with their chunk maps
MOMENTS = 7  # steps shown of each
SMALL = 64  # images below this side are magnified


def sample_figure(result: Fidelity) -> bytes:
    """Rows of samples, one for each way of making them and with its cost; the same seeds are in the same place."""
    captions = {row["name"]: f"{row['name']}{costs(row)}" for row in result.rows}
    return png_bytes(comparison({captions[name]: images for name, images in result.images.items()}, None))


def costs(row: Mapping[str, Any]) -> str:
    parts = [f"{row['gmacs']:.1f} GMACs"]
    parts += [] if row["latency_ms"] is None else [f"{row['latency_ms']:.0f} ms"]
    parts += [] if row["psnr"] is None else [f"{row['psnr']:.1f} dB"]
    return ": " + ", ".join(parts)


def save_comparison(images: Mapping[str, Tensor], path: Path, vae: Path | None) -> None:
    """Write the rows as a PNG file, whole or not at all."""
    write_whole(path, png_bytes(comparison(images, vae)), PNG)


def comparison(images: Mapping[str, Tensor], vae: Path | None) -> Image.Image:
    rows = {}
    for name, samples in images.items():
        pixels = to_images(decode_latents(samples, vae) if vae else samples)
        scale = 2 if pixels.shape[1] < SMALL else 1
        note = ", latents: first three channels" if is_latent(samples) and vae is None else ""
        rows[f"{name}{note}"] = grid_image(pixels, COLUMNS, scale)
    return captioned_rows(rows)


def token_map_figure(result: Fidelity) -> bytes:
    """For a few samples: what the model saw at some steps, dropped tokens tinted; then converted and original."""
    moments = np.unique(np.linspace(0, len(result.keep) - 1, MOMENTS).round().astype(int))
    original, converted = (to_images(result.images[name]) for name in (result.original, result.converted))
    scale = tile_scale(original.shape[1])
    tiles = []
    for sample in range(min(MAPS, len(result.keep[0]))):
        for moment in moments:
            seen = to_images(result.mid[moment][sample : sample + 1])[0]
            tiles.append(dim_dropped(seen, result.keep[moment][sample], scale))
        tiles += [image[sample].repeat(scale, 0).repeat(scale, 1) for image in (converted, original)]
    kept = [result.keep[moment].sum((1, 2)).mean() for moment in moments]
    headings = [f"step {moment + 1}: {mean:.0f} kept" for moment, mean in zip(moments, kept, strict=True)]
    tokens = result.keep[0][0].size
    caption = (
        f"what the model saw at steps of {len(result.keep)}; of {tokens} tokens, those not computed are tinted blue. "
        f"Then final images: {result.converted}; {result.original}"
    )
    grid = grid_image(np.stack(tiles), len(moments) + 2)
    return png_bytes(captioned_rows({caption: grid}, [*headings, "converted", "original"]))
