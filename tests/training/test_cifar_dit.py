"""The script for CIFAR-10: both forms of the data, the clock, and the reference model that it made."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dcconvert
from benchmarks.common import cifar_dit as reference_model
from training import cifar_dit


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Flat colours, which JPEG keeps."""
    colours = np.random.default_rng(0).integers(40, 216, (512, 3, 1, 1), dtype=np.uint8)
    return np.broadcast_to(colours, (512, 3, 32, 32))


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory, images: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("binary")
    labels = (np.arange(512) % 10).astype(np.uint8)[:, None]
    rows = np.concatenate([labels, images.reshape(512, -1)], axis=1)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)]:
        rows[:128].tofile(folder / name)
    rows.tofile(folder / "test_batch.bin")
    return folder


def jpeg(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=95)
    return np.frombuffer(file.getvalue(), np.uint8)


def test_both_forms_of_the_data_hold_the_same_images(tmp_path, binary, images):
    files = [jpeg(image) for image in images[:20]]
    offsets = np.cumsum([0, *map(len, files)])
    labels = (np.arange(20) % 10).astype(np.uint8)
    np.savez(tmp_path / "copies.npz", test_jpeg=np.concatenate(files), test_offsets=offsets, test_labels=labels)
    x, y = cifar_dit.load_split(tmp_path / "copies.npz", "test")
    wanted, classes = cifar_dit.load_split(binary, "test")
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, wanted[:20], rtol=0, atol=0.03)
    assert torch.equal(y, classes[:20])
    assert len(cifar_dit.load_split(binary, "train")[0]) == 5 * 128


def test_a_run_ends_by_the_clock_and_exports_half_the_bytes(tmp_path, binary):
    small = dcconvert.DiTConfig(
        depth=1, width=32, heads=2, patch=8, image_size=32, in_channels=3, num_classes=10, learn_sigma=False
    )
    words = ["--data", str(binary), "--out", str(tmp_path / "run"), "--minutes", "0.02", "--batch", "4"]
    recipe = replace(cifar_dit.RECIPE, config=small)
    cifar_dit.main([*words, "--device", "cpu", "--no-compile", "--bf16"], recipe)
    tensors = load_file(tmp_path / "run" / "cifar_dit.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_reference_model_is_the_one_that_was_trained(tmp_path):
    dit = dcconvert.load_checkpoint(reference_model(tmp_path))
    assert dit.cfg == cifar_dit.CONFIG
    assert dit.checkpoint_info.prediction == "flow"
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.no_grad():
        found = dit(x, torch.full((2,), 1.0), torch.tensor([0, 8]))
    # Near clean images a flow is noise less image, and what it expects of the noise is nothing.
    assert torch.nn.functional.cosine_similarity(found.flatten(1), -x.flatten(1)).min() > 0.5
