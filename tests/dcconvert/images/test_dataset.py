"""Training data: pictures and arrays in, tensors as the model sees them out; one line for anything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcconvert.images.dataset import read_images
from dcconvert.models.dit import DiTConfig
from dcconvert.passes.ir.errors import UsageError
from tests.dcconvert.harness import CONFIG

COLOUR = replace(CONFIG, in_channels=3)
LATENT = replace(CONFIG, in_channels=4)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 1), np.uint8)
LABELS = np.array([0, 1, 2, 3, 0, 1])


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def pixels(images: torch.Tensor) -> np.ndarray:
    return ((images + 1) * 127.5).round().numpy()


@pytest.mark.parametrize("names", [("images", "labels"), ("arr_0", "arr_1"), ("x", "y")])
def test_arrays_with_labels(names, tmp_path):
    found = read_images(save(tmp_path / "a.npz", **dict(zip(names, (PIXELS, LABELS), strict=True))), CONFIG)
    assert found.images.dtype == torch.float32
    np.testing.assert_array_equal(pixels(found.images), np.moveaxis(PIXELS, 3, 1))
    assert found.labels.tolist() == LABELS.tolist()
    assert len(found) == 6


def test_floats_are_taken_as_they_are(tmp_path):
    latents = np.random.default_rng(0).normal(size=(3, 4, 16, 16))
    found = read_images(save(tmp_path / "a.npz", latents=latents, labels=LABELS[:3]), LATENT)
    np.testing.assert_array_equal(found.images.numpy(), latents.astype(np.float32))


def test_a_model_of_one_class_needs_no_labels(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS)
    found = read_images(tmp_path / "a.npy", replace(CONFIG, num_classes=1))
    assert found.labels.tolist() == [0] * 6


@pytest.mark.parametrize("config", [CONFIG, COLOUR])
def test_a_folder_with_a_folder_for_each_class(config: DiTConfig, tmp_path):
    for name, level in (("b", 200), ("a", 100)):
        (tmp_path / name).mkdir()
        for number in range(2):
            picture = np.full((40, 60, 3), level, np.uint8)
            picture[:, :10] = picture[:, 50:] = 0  # cut off: the middle square is taken
            Image.fromarray(picture).save(tmp_path / name / f"{number}.png")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    found = read_images(tmp_path, replace(config, num_classes=2))
    assert found.images.shape == (4, config.in_channels, 16, 16)
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert np.unique(pixels(found.images[:2])).tolist() == [100]
    assert np.unique(pixels(found.images[2:])).tolist() == [200]


@pytest.mark.parametrize(
    ("arrays", "config", "says"),
    [
        ({"images": PIXELS / 1.0, "labels": LABELS}, CONFIG, "floats must be from -1 to 1"),
        ({"images": PIXELS / 255, "labels": LABELS}, CONFIG, "floats must be from -1 to 1"),
        ({"images": np.zeros((6, 4, 16, 16), np.uint8), "labels": LABELS}, LATENT, "the model works on latents"),
        ({"images": PIXELS}, CONFIG, "has no labels, but the model has 4 classes"),
        ({"images": PIXELS, "labels": LABELS[:3]}, CONFIG, "use one integer per image"),
        ({"images": PIXELS, "labels": LABELS / 2}, CONFIG, "use one integer per image"),
        ({"images": PIXELS, "labels": LABELS + 1}, CONFIG, "labels 1 to 4: the model has labels 0 to 3"),
        ({"images": PIXELS, "labels": LABELS}, COLOUR, r"\[6, 16, 16, 1\]: the model needs \[n, 3, 16, 16\]"),
        ({"images": PIXELS[:, :8], "labels": LABELS}, CONFIG, r"the model needs \[n, 1, 16, 16\]"),
        ({"images": PIXELS[:0], "labels": LABELS[:0]}, CONFIG, r"the model needs \[n, 1, 16, 16\]"),
        ({"images": PIXELS.astype(np.int64), "labels": LABELS}, CONFIG, "uint8 pixels or finite floats"),
        ({"images": np.full((6, 16, 16, 1), np.nan), "labels": LABELS}, CONFIG, "uint8 pixels or finite floats"),
        ({"one": PIXELS, "two": PIXELS}, CONFIG, "one of images and one of labels"),
    ],
)
def test_arrays_that_do_not_fit(arrays, config, says, tmp_path):
    with pytest.raises(UsageError, match=says) as error:
        read_images(save(tmp_path / "a.npz", **arrays), config)
    assert "\n" not in str(error.value)


def test_places_that_hold_nothing(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_images(tmp_path / "missing", CONFIG)
    with pytest.raises(UsageError, match="holds no pictures"):
        read_images(tmp_path, CONFIG)
    with pytest.raises(UsageError, match="latents of 4 channels"):
        read_images(tmp_path, LATENT)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match="cannot read the picture"):
        read_images(tmp_path, CONFIG)
    for name in ("bad.npz", "bad.npy"):
        (tmp_path / name).write_bytes(b"no array")
        with pytest.raises(UsageError, match="cannot read"):
            read_images(tmp_path / name, CONFIG)


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="cannot read"):
        read_images(tmp_path / "a.npy", CONFIG)


def test_folders_that_are_not_the_classes(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "a" / "0.png")
    with pytest.raises(UsageError, match="holds 1 class folders, but the model has 4 classes"):
        read_images(tmp_path, CONFIG)
    Image.new("L", (16, 16)).save(tmp_path / "0.png")
    with pytest.raises(UsageError, match="holds pictures outside its class folders"):
        read_images(tmp_path, CONFIG)
