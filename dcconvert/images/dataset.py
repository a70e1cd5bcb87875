"""Training data from disk: a folder of pictures, or arrays of images or latents."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dcconvert.models.dit import DiTConfig
from dcconvert.passes.ir.errors import UsageError

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# What numpy and zipfile raise for files that are damaged or no arrays.
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
LABEL_NAMES = ("labels", "label", "y", "arr_1")


@dataclass(frozen=True)
class LabelledImages:
    """What a model is trained on: float32 [n, C, H, W], pixels in [-1, 1] or latents, and labels int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


def read_images(path: Path, config: DiTConfig, *, labelled: bool = True) -> LabelledImages:
    """Read `path` for a model: a folder (a sub-folder a class, in alphabetical order), `.npy` or `.npz`.

    An array holds [n, C, H, W] or [n, H, W, C]: uint8 pixels, or floats as the model sees them. An `.npz` may hold
    labels beside it (`labels`, or `arr_1` as in the ADM suite). Without labels the model must have one class; where
    they are not needed (`labelled` False) they are not read, and pictures may lie in any folders.
    UsageError for anything that cannot be read or does not fit the model.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist: pass a folder of pictures, an .npy or an .npz file")
    images, labels = from_folder(path, config, labelled) if path.is_dir() else from_array(path)
    wanted = (config.in_channels, config.image_size, config.image_size)
    if images.ndim == 4 and tuple(images.shape[1:]) != wanted and tuple(images.shape[1:]) == (*wanted[1:], wanted[0]):
        images = np.moveaxis(images, 3, 1)
    if images.ndim != 4 or tuple(images.shape[1:]) != wanted or not len(images):
        raise UsageError(
            f"{path} holds an array {list(images.shape)}: the model needs [n, {', '.join(map(str, wanted))}]"
        )
    if images.dtype == np.uint8 and config.in_channels not in (1, 3):
        raise UsageError(f"{path} holds uint8 pixels, but the model works on latents: encode them and pass floats")
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 127.5 - 1
    if images.dtype.kind != "f" or not np.isfinite(images).all():
        raise UsageError(f"{path} holds {images.dtype} values: use uint8 pixels or finite floats")
    if config.in_channels in (1, 3) and (images.min() < -1.5 or images.max() > 1.5 or images.min() >= 0):
        raise UsageError(
            f"{path} holds pixels from {images.min():g} to {images.max():g}: floats must be from -1 "
            "to 1; otherwise use uint8"
        )
    numbers = checked(labels, images, path, config) if labelled else torch.zeros(len(images), dtype=torch.int64)
    return LabelledImages(torch.from_numpy(np.ascontiguousarray(images, np.float32)), numbers)


def checked(labels: np.ndarray | None, images: np.ndarray, path: Path, config: DiTConfig) -> Tensor:
    """Labels int64 [n]; UsageError unless there is one in range for every image."""
    if labels is None and config.num_classes > 1:
        raise UsageError(f"{path} has no labels, but the model has {config.num_classes} classes: add an array 'labels'")
    labels = np.zeros(len(images), np.int64) if labels is None else np.asarray(labels)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UsageError(f"{path} has labels {list(labels.shape)} of {labels.dtype}: use one integer per image")
    if labels.min() < 0 or labels.max() >= config.num_classes:
        raise UsageError(
            f"{path} has labels {labels.min()} to {labels.max()}: the model has labels 0 to {config.num_classes - 1}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def from_array(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        found: Any = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found, None
        with found:
            names = [name for name in found.files if name not in LABEL_NAMES]
            if len(names) != 1:
                raise UsageError(f"{path} holds the arrays {found.files}: it needs one of images and one of labels")
            labels = next((found[name] for name in LABEL_NAMES if name in found.files), None)
            if not isinstance(found[names[0]], np.ndarray):
                raise UsageError(f"{path} holds {names[0]}, which is not an array")
            return found[names[0]], labels
    except UNREADABLE as error:
        raise UsageError(f"cannot read {path} as .npy or .npz: {str(error).splitlines()[0]}") from error


def from_folder(folder: Path, config: DiTConfig, labelled: bool) -> tuple[np.ndarray, np.ndarray | None]:
    if config.in_channels not in (1, 3):
        raise UsageError(f"the model works on latents of {config.in_channels} channels: pass them as an .npz file")
    if not labelled:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
        return stacked(files, folder, config), None
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    places = [(path, number) for number, entry in enumerate(classes) for path in pictures(entry)]
    labels = np.array([number for _, number in places], np.int64) if classes else None
    files = [path for path, _ in places] if classes else pictures(folder)
    if classes and pictures(folder):
        raise UsageError(f"{folder} holds pictures outside its class folders: move them into one of these folders")
    if classes and len(classes) != config.num_classes:
        raise UsageError(f"{folder} holds {len(classes)} class folders, but the model has {config.num_classes} classes")
    return stacked(files, folder, config), labels


def stacked(files: Sequence[Path], folder: Path, config: DiTConfig) -> np.ndarray:
    """Pictures as uint8 [n, C, S, S]."""
    if not files:
        raise UsageError(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))})")
    return np.stack([read_picture(path, config) for path in files])


def pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)


def read_picture(path: Path, config: DiTConfig) -> np.ndarray:
    """uint8 [C, S, S]: the middle square, scaled."""
    try:
        with Image.open(path) as picture:
            image = picture.convert("L" if config.in_channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UsageError(f"cannot read the picture {path}: {error}") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    size = (config.image_size, config.image_size)
    square = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(square.resize(size, Image.Resampling.BICUBIC))
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
