"""The training script: reading the data, resuming, exporting."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dcconvert
from dcconvert.sampling.samplers import Sampler
from training import fashion_dit
from training.trainer import WARMUP_STEPS, learning_rate, noised


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of the right format: ten images a split."""
    folder = tmp_path / "data"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        images = generator.integers(0, 256, (512, 28, 28), dtype=np.uint8)
        labels = np.arange(512, dtype=np.uint8) % 10
        with gzip.open(folder / f"{stem}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + images.tobytes())
        with gzip.open(folder / f"{stem}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + labels.tobytes())
    return folder


def train(out: Path, data: Path, steps: int, *more: str) -> None:
    """Run the script for so many steps of four samples."""
    small = dcconvert.DiTConfig(
        depth=2, width=32, heads=2, patch=8, image_size=32, in_channels=1, num_classes=10, learn_sigma=False
    )
    options = ["--out", out, "--data", data, "--samples", 4 * steps, "--batch", 4, "--log-every", 1, "--no-compile"]
    fashion_dit.main([*map(str, options), "--device", "cpu", *more], replace(fashion_dit.RECIPE, config=small))


@contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """The process ends before the optimiser's next step."""
    made = itertools.count()

    def look(optimiser: Any, args: Any, kwargs: Any) -> None:
        if next(made) == steps:
            raise KeyboardInterrupt

    hook = register_optimizer_step_pre_hook(look)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        hook.remove()


def test_images_are_padded_and_scaled(data: Path) -> None:
    x, y = fashion_dit.load_split(data, "train")
    assert x.shape == (512, 1, 32, 32)
    assert bool((x[:, :, :2] == -1).all())
    assert float(x.min()) >= -1
    assert float(x.max()) <= 1
    assert y.tolist()[:11] == [*range(10), 0]


def test_rate_warms_up_then_falls_to_zero() -> None:
    assert learning_rate(0, 0) == 1 / WARMUP_STEPS
    assert learning_rate(0.1, 10_000) == 1
    assert 0 < learning_rate(0.9, 10_000) < learning_rate(0.7, 10_000) < 1
    assert learning_rate(1, 10_000) == learning_rate(1.1, 10_000) == 0


def test_a_killed_run_ends_with_the_weights_of_one_that_ran_through(tmp_path: Path, data: Path) -> None:
    train(tmp_path / "whole", data, steps=4)
    with killed_after(2):
        train(tmp_path / "parts", data, steps=4)
    train(tmp_path / "parts", data, steps=4)
    whole, parts = (load_file(tmp_path / name / "fashion_dit.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=0)


def test_the_export_is_a_checkpoint(tmp_path: Path, data: Path) -> None:
    train(tmp_path / "run", data, steps=1)
    dit = dcconvert.load_checkpoint(tmp_path / "run" / "fashion_dit.safetensors")
    assert dit.checkpoint_info.prediction == "flow"
    assert dit.checkpoint_info.class_names == list(fashion_dit.CLASS_NAMES)


def test_a_model_that_predicts_noise_says_so(tmp_path: Path, data: Path) -> None:
    train(tmp_path / "run", data, 1, "--prediction", "eps")
    dit = dcconvert.load_checkpoint(tmp_path / "run" / "fashion_dit.safetensors")
    assert dit.checkpoint_info.prediction == "eps"


@pytest.mark.parametrize("prediction", ["flow", "eps"])
def test_training_adds_noise_as_sampling_expects_it(prediction: str) -> None:
    x0, noise = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    x, t, wanted = noised(prediction, x0, noise, torch.tensor([0.0, 0.25, 0.6, 0.999]))
    assert t.tolist() == [0, 250, 600, 999]
    torch.testing.assert_close(x, Sampler(prediction, 1000).add_noise(x0, noise, t), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wanted, noise - x0 if prediction == "flow" else noise)
