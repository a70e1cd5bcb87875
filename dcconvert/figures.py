"""The pictures of a report: samples side by side, and where the router spent its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dcconvert.evaluate import Fidelity
from dcconvert.export.bundle import write_whole
from dcconvert.images import captioned_rows, decode_latents, dim_dropped, grid_image, is_latent, png_bytes, to_images

COLUMNS = 8  # samples a row
MAPS = 4  # samples shown with their chunk maps
MOMENTS = 7  # steps shown of each
SMALL = 64  # images below this side are magnified
MAGNIFY = 3  # of chunk maps


def sample_figure(images: Mapping[str, Tensor]) -> bytes:
    """Rows of samples, one for each way of making them, same seeds in the same place."""
    return png_bytes(comparison(images, None))


def save_comparison(images: Mapping[str, Tensor], path: Path, vae: Path | None) -> None:
    """Write the rows as a PNG file, whole or not at all."""
    write_whole(path, png_bytes(comparison(images, vae)))


def comparison(images: Mapping[str, Tensor], vae: Path | None) -> Image.Image:
    rows = {}
    for name, samples in images.items():
        pixels = to_images(decode_latents(samples, vae) if vae else samples)
        scale = 2 if pixels.shape[1] < SMALL else 1
        note = ", latents: first three channels" if is_latent(samples) and vae is None else ""
        rows[f"{name}{note}"] = grid_image(pixels, COLUMNS, scale)
    return captioned_rows(rows)


def chunk_map_figure(result: Fidelity) -> bytes:
    """For a few samples: what the model saw at some steps, dropped tokens dimmed; then converted and original."""
    moments = np.unique(np.linspace(0, len(result.keep) - 1, MOMENTS).round().astype(int))
    original, converted = (to_images(result.images[name]) for name in (result.original, result.converted))
    tiles = []
    for sample in range(min(MAPS, len(result.keep[0]))):
        for moment in moments:
            seen = to_images(result.mid[moment][sample : sample + 1])[0]
            tiles.append(dim_dropped(seen, result.keep[moment][sample], MAGNIFY))
        tiles += [image[sample].repeat(MAGNIFY, 0).repeat(MAGNIFY, 1) for image in (converted, original)]
    steps = ", ".join(str(moment + 1) for moment in moments)
    caption = f"kept tokens at steps {steps} of {len(result.keep)} | {result.converted} | {result.original}"
    return png_bytes(captioned_rows({caption: grid_image(np.stack(tiles), len(moments) + 2)}))
