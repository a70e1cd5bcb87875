"""Train the small DiT that ships with dcconvert, on Fashion-MNIST, on a CPU.

    python -m training.fashion_dit --out runs/fashion           # start, or resume after a kill
    python -m training.fashion_dit --out runs/fashion --samples 400000

Rectified flow (Liu et al., arXiv 2209.03003; logit-normal times as in Esser et al., arXiv 2403.03206):
x_sigma = (1 - sigma) x0 + sigma noise, the model sees t = 1000 sigma and predicts noise - x0.
Weight matrices of the blocks are trained by Muon, everything else by AdamW. The learning rate is
flat and falls linearly to zero over the last part of the run, so `--samples` may be changed between
resumes. The script fetches Debian's `dataset-fashion-mnist` package when `--data` holds no copy.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dcconvert.dit import DiT, DiTConfig

PACKAGE = "dataset-fashion-mnist"
FILES = {"train": "train", "test": "t10k"}
CONFIG = DiTConfig(
    depth=8, width=128, heads=4, patch=2, image_size=32, in_channels=1, num_classes=10, learn_sigma=False
)
CLASS_NAMES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
WARMUP_STEPS = 200
DECAY_FRACTION = 0.35
EMA_DECAY = 0.999
CLASS_DROPOUT = 0.1


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


def flow_loss(model: Callable[..., Tensor], x0: Tensor, y: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    s = sigma.view(-1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        v = model((1 - s) * x0 + s * noise, 1000 * sigma, y)
    return (v.float() - (noise - x0)).pow(2).mean()


def learning_rate(seen: int, step: int, total: int) -> float:
    """Factor on the base rate: warm-up, flat, linear to zero over the last DECAY_FRACTION."""
    decay = min(1.0, max(0.0, (total - seen) / (DECAY_FRACTION * total)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * decay


@dataclass
class Trainer:
    """All that a resume needs: weights, averaged weights, optimisers, counters, random state."""

    args: argparse.Namespace
    model: DiT
    ema: DiT
    optimisers: list[torch.optim.Optimizer]
    generator: torch.Generator
    step: int = 0
    seen: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, args: argparse.Namespace) -> Trainer:
        torch.manual_seed(args.seed)
        model = DiT(CONFIG).initialise()
        matrices = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.99)),
        ]
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["base_lr"] = group["lr"]
        generator = torch.Generator().manual_seed(args.seed)
        return cls(args, model, copy.deepcopy(model), optimisers, generator)

    def state(self) -> dict[str, object]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "generator": self.generator.get_state(),
            "counters": [self.step, self.seen, self.seconds],
        }

    def save(self, path: Path) -> None:
        tmp = path.with_suffix(".tmp")
        torch.save(self.state(), tmp)
        os.replace(tmp, path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.step, self.seen, self.seconds = state["counters"]

    def train_step(self, forward: Callable[..., Tensor], data: Tensor, labels: Tensor) -> float:
        batch = self.args.batch
        pick = torch.randint(len(data), (batch,), generator=self.generator)
        x0, y = data[pick], labels[pick].clone()
        y[torch.rand(batch, generator=self.generator) < CLASS_DROPOUT] = CONFIG.num_classes
        sigma = torch.sigmoid(torch.randn(batch, generator=self.generator))
        noise = torch.randn(x0.shape, generator=self.generator)
        loss = flow_loss(forward, x0, y, noise, sigma)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = learning_rate(self.seen, self.step, self.args.samples)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for averaged, current in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                averaged.lerp_(current, 1 - decay)
        self.step += 1
        self.seen += batch
        return loss.item()

    @torch.no_grad()
    def validation_loss(self, data: Tensor, labels: Tensor, count: int = 512) -> float:
        """Loss of the averaged weights on fixed images, noise and times."""
        generator = torch.Generator().manual_seed(0)
        x0, y = data[:count], labels[:count]
        noise = torch.randn(x0.shape, generator=generator)
        sigma = (torch.arange(count) + 0.5) / count
        sigma = sigma[torch.randperm(count, generator=generator)]
        parts = zip(x0.split(128), y.split(128), noise.split(128), sigma.split(128), strict=True)
        return sum(flow_loss(self.ema, *part).item() for part in parts) / (count // 128)

    def export(self, path: Path) -> None:
        """Write the averaged weights, fp32, with what cannot be read off their shapes as metadata."""
        facts = {"config": CONFIG.as_dict(), "prediction": "flow", "class_names": CLASS_NAMES}
        tmp = path.with_suffix(".tmp")
        tensors = {k: v.contiguous() for k, v in self.ema.state_dict().items()}
        save_file(tensors, str(tmp), metadata={"dcconvert": json.dumps(facts)})
        os.replace(tmp, path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the small Fashion-MNIST DiT.")
    parser.add_argument("--out", type=Path, default=Path("runs/fashion"), help="folder for checkpoint and log")
    parser.add_argument("--data", type=Path, default=Path("runs/fashion-mnist"), help="folder of the four .gz files")
    parser.add_argument("--samples", type=int, default=300_000, help="training samples in all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW rate")
    parser.add_argument("--muon-lr", type=float, default=2e-3, help="Muon rate (RMS-matched to AdamW)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=500, help="steps between checkpoints and log lines")
    parser.add_argument("--no-compile", action="store_true", help="run the model eagerly")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.data / "train-images-idx3-ubyte.gz").exists():
        fetch(args.data)
    train, test = load_split(args.data, "train"), load_split(args.data, "test")
    trainer = Trainer.start(args)
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.restore(checkpoint)
        print(f"resumed at {trainer.seen} samples", flush=True)
    forward = trainer.model if args.no_compile else torch.compile(trainer.model)
    mark, losses = time.time(), []
    while trainer.seen < args.samples:
        losses.append(trainer.train_step(forward, *train))
        if trainer.step % args.log_every == 0 or trainer.seen >= args.samples:
            trainer.seconds += time.time() - mark
            mark = time.time()
            row = {
                "step": trainer.step,
                "samples": trainer.seen,
                "train_loss": round(sum(losses) / len(losses), 5),
                "validation_loss": round(trainer.validation_loss(*test), 5),
                "seconds": round(trainer.seconds),
            }
            losses = []
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            trainer.save(checkpoint)
            trainer.export(args.out / "fashion_dit.safetensors")
    print(f"done: {args.out / 'fashion_dit.safetensors'}")


if __name__ == "__main__":
    main()
