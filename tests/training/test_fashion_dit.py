"""The training script: reading the data, resuming, exporting."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dcconvert
from training import fashion_dit
from training.trainer import WARMUP_STEPS, Trainer, learning_rate


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


def train(monkeypatch: pytest.MonkeyPatch, out: Path, data: Path, steps: int, stop: int | None = None) -> None:
    """Run the script for `stop` of `steps` steps of four samples (a kill after a checkpoint), or all of them."""
    small = dcconvert.DiTConfig(
        depth=2, width=32, heads=2, patch=8, image_size=32, in_channels=1, num_classes=10, learn_sigma=False
    )
    monkeypatch.setattr(fashion_dit, "RECIPE", replace(fashion_dit.RECIPE, config=small))
    options = ["--out", out, "--data", data, "--samples", 4 * steps, "--batch", 4, "--log-every", 1, "--no-compile"]
    words = [*map(str, options), "--device", "cpu"]
    if stop is not None:
        counted = Trainer.train_step

        def until_killed(self: Trainer, *batch: torch.Tensor) -> torch.Tensor:
            if self.step == stop:
                raise KeyboardInterrupt
            return counted(self, *batch)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", until_killed)
            with pytest.raises(KeyboardInterrupt):
                fashion_dit.main(words)
    else:
        fashion_dit.main(words)


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


def test_a_killed_run_ends_with_the_weights_of_one_that_ran_through(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path
) -> None:
    train(monkeypatch, tmp_path / "whole", data, steps=4)
    train(monkeypatch, tmp_path / "parts", data, steps=4, stop=2)
    train(monkeypatch, tmp_path / "parts", data, steps=4)
    whole, parts = (load_file(tmp_path / name / "fashion_dit.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=0)


def test_the_export_is_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path) -> None:
    train(monkeypatch, tmp_path / "run", data, steps=1)
    dit = dcconvert.load_checkpoint(tmp_path / "run" / "fashion_dit.safetensors")
    assert dit.checkpoint_info.prediction == "flow"
    assert dit.checkpoint_info.class_names == list(fashion_dit.CLASS_NAMES)
