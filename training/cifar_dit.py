"""Train a DiT on CIFAR-10, on a GPU: the reference model for colour photographs.

    python -m training.cifar_dit --data cifar-10-batches-bin --minutes 6 --bf16

`--data` is the folder of CIFAR-10's binary version (Krizhevsky 2009: `data_batch_1.bin` ... `test_batch.bin`; each
record has one byte of label and 3072 of image), or an `.npz` of JPEG copies with arrays `train_jpeg` (all files
joined), `train_offsets`, `train_labels` and the same for `test`.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dcconvert.models.dit import DiTConfig
from training.trainer import Recipe, Trainer, training_parser

RECORD = 1 + 3 * 32 * 32
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CONFIG = DiTConfig(
    depth=10, width=256, heads=4, patch=2, image_size=32, in_channels=3, num_classes=10, learn_sigma=False
)
RECIPE = Recipe("cifar_dit", CONFIG, CLASS_NAMES, flips=True, ema_decay=0.9995)


def load_binary(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 3, 32, 32] and labels [n] of the official binary files."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    rows = np.concatenate([np.fromfile(folder / name, np.uint8).reshape(-1, RECORD) for name in names])
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def load_jpeg(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The same from an `.npz` of JPEG files."""
    with np.load(path) as arrays:
        data, offsets, labels = (arrays[f"{split}_{name}"] for name in ("jpeg", "offsets", "labels"))

    def decoded(i: int) -> np.ndarray:
        with Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(decoded, range(len(labels)), chunksize=512))), labels


def load_split(path: Path, split: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Images [n, 3, 32, 32] in [-1, 1] and labels int64 [n] on a device."""
    images, labels = load_binary(path, split) if path.is_dir() else load_jpeg(path, split)
    return torch.from_numpy(images).to(device).float() / 127.5 - 1, torch.from_numpy(labels).to(device).long()


def main(words: list[str] | None = None, recipe: Recipe = RECIPE) -> None:
    parser = training_parser("Train a DiT on CIFAR-10.", out="runs/cifar", samples=10_000_000, batch=512)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10's binary files, or an .npz")
    args = parser.parse_args(words)
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = (load_split(args.data, split, args.device) for split in ("train", "test"))
    Trainer.start(args, recipe).run(train, test)


if __name__ == "__main__":
    main()
