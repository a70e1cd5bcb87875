"""Train the small DiT that ships with dcconvert, on Fashion-MNIST, on a CPU.

    python -m training.fashion_dit --out runs/fashion           # start, or resume after a kill
    python -m training.fashion_dit --out runs/fashion --samples 400000

How it is trained is in `training.trainer`; `--samples` may be changed between resumes. The script fetches Debian's
`dataset-fashion-mnist` package when `--data` holds no copy.
"""

from __future__ import annotations

import gzip
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dcconvert.models.dit import DiTConfig
from training.trainer import Recipe, Trainer, training_parser

PACKAGE = "dataset-fashion-mnist"
FILES = {"train": "train", "test": "t10k"}
CONFIG = DiTConfig(
    depth=8, width=128, heads=4, patch=2, image_size=32, in_channels=1, num_classes=10, learn_sigma=False
)
CLASS_NAMES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
RECIPE = Recipe("fashion_dit", CONFIG, CLASS_NAMES)


def fetch(folder: Path) -> None:
    """Unpack Debian's copy of the data set (MIT licence) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=tmp, check=True)
        deb = next(Path(tmp).glob("*.deb"))
        subprocess.run(["dpkg", "-x", str(deb), tmp], check=True)
        for gz in Path(tmp).rglob("*-ubyte.gz"):
            (folder / gz.name).write_bytes(gz.read_bytes())


def load_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 32, 32] in [-1, 1] (28x28 padded with black) and labels int64 [n]."""
    stem = FILES[split]
    images = gzip.decompress((folder / f"{stem}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
    x = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    x = np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)))
    y = np.frombuffer(labels, np.uint8, offset=8)
    return torch.from_numpy(x.astype(np.float32) / 127.5 - 1), torch.from_numpy(y.astype(np.int64))


def main(words: list[str] | None = None, recipe: Recipe = RECIPE) -> None:
    parser = training_parser("Train the small Fashion-MNIST DiT.", out="runs/fashion", samples=300_000, batch=32)
    parser.add_argument("--data", type=Path, default=Path("runs/fashion-mnist"), help="folder of the four .gz files")
    args = parser.parse_args(words)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.data / "train-images-idx3-ubyte.gz").exists():
        fetch(args.data)
    splits = (load_split(args.data, split) for split in ("train", "test"))
    train, test = ((images.to(args.device), labels.to(args.device)) for images, labels in splits)
    Trainer.start(args, recipe).run(train, test)


if __name__ == "__main__":
    main()
