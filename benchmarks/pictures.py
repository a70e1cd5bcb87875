"""Make the pictures of the README and the model card.

dcconvert demo --force && python -m benchmarks.pictures demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import dcconvert
from dcconvert.export.files import PNG, write_whole
from dcconvert.images.pixels import grid_image, png_bytes, to_images
from dcconvert.models.load import shipped_model
from dcconvert.sampling.samplers import Sampler, initial_noise, labels_for

ROOT = Path(__file__).parent.parent
ROWS = 4
STEPS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of the README and the model card.")
    parser.add_argument("demo", type=Path, help="the bundle that `dcconvert demo` wrote")
    args = parser.parse_args()
    write_whole(ROOT / "docs" / "samples.png", (args.demo / "samples.png").read_bytes(), PNG)
    dit = dcconvert.load_checkpoint(shipped_model())
    classes = dit.cfg.num_classes
    noise = initial_noise(0, ROWS * classes, dit.cfg.in_channels, dit.cfg.image_size)
    with torch.inference_mode():
        images = Sampler(dit.checkpoint_info.prediction, STEPS).run(dit, noise, labels_for(len(noise), classes))
    sheet = grid_image(to_images(images), classes, 2)
    write_whole(ROOT / "dcconvert" / "assets" / "fashion_dit_samples.png", png_bytes(sheet), PNG)


if __name__ == "__main__":
    main()
