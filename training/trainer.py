"""Training of a small class-conditional DiT: what the training scripts share.

By default it becomes a rectified flow (Liu et al., arXiv 2209.03003; logit-normal times as in Esser et al., arXiv
2403.03206): x = (1 - sigma) x0 + sigma noise, the model sees t = 1000 sigma and predicts noise - x0. With
`--prediction eps` it predicts the noise at a timestep 0 to 999, drawn evenly, under DiT's linear schedule of betas
(arXiv 2212.09748), without DiT's learned variance.
Weight matrices of the blocks are trained by Muon, everything else by AdamW. The learning rate warms up, stays flat and
falls linearly to zero over the last part of the run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.models.files.tensor_files import PREDICTIONS
from dcconvert.sampling.default_tables import vp_coefficients
from dcconvert.sampling.solver_rows import TRAIN_STEPS

WARMUP_STEPS = 200
DECAY_FRACTION = 0.35
CLASS_DROPOUT = 0.1
VALIDATION_BATCH = 128


@dataclass(frozen=True)
class Recipe:
    """What one script trains: shapes, names of the classes, and what its data allow."""

    name: str
    config: DiTConfig
    class_names: tuple[str, ...]
    flips: bool = False  # mirrored images are as likely as the images
    ema_decay: float = 0.999


def noised(prediction: str, x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the model sees as x [B, C, H, W] and t [B] at noise levels [B] in [0, 1), and what it should answer."""
    if prediction == "flow":
        sigma = level.view(-1, 1, 1, 1)
        return (1 - sigma) * x0 + sigma * noise, TRAIN_STEPS * level, noise - x0
    times = (TRAIN_STEPS * level).long()
    alphas, sigmas = vp_coefficients(np.arange(TRAIN_STEPS))
    alpha, sigma = (torch.from_numpy(values).to(x0)[times].view(-1, 1, 1, 1) for values in (alphas, sigmas))
    return alpha * x0 + sigma * noise, times.to(x0), noise


def prediction_loss(
    model: Callable[..., Tensor], prediction: str, x0: Tensor, y: Tensor, noise: Tensor, level: Tensor
) -> Tensor:
    """Mean squared error of what is predicted, with the model run in bf16."""
    x, t, wanted = noised(prediction, x0, noise, level)
    with torch.autocast(x0.device.type, torch.bfloat16):
        found = model(x, t, y)
    return (found.float() - wanted).pow(2).mean()


def learning_rate(progress: float, step: int) -> float:
    """Factor on the base rate after a share `progress` of the run: warm-up, flat, linear to zero at the end."""
    decay = min(1.0, max(0.0, (1 - progress) / DECAY_FRACTION))
    return min(1.0, (step + 1) / WARMUP_STEPS) * decay


@dataclass
class Trainer:
    """All that a resume needs: weights, averaged weights, optimisers, counters, random state."""

    args: argparse.Namespace
    recipe: Recipe
    model: DiT
    ema: DiT
    optimisers: list[torch.optim.Optimizer]
    generator: torch.Generator
    step: int = 0
    seen: int = 0
    seconds: float = 0.0
    mark: float = 0.0

    @classmethod
    def start(cls, args: argparse.Namespace, recipe: Recipe) -> Trainer:
        torch.manual_seed(args.seed)
        model = DiT(recipe.config).initialise().to(args.device)
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
        generator = torch.Generator(args.device).manual_seed(args.seed)
        return cls(args, recipe, model, copy.deepcopy(model), optimisers, generator, mark=time.monotonic())

    @property
    def progress(self) -> float:
        """The share of the run that is done, by samples or by the clock, whichever is further."""
        by_samples = self.seen / self.args.samples
        if self.args.minutes is None:
            return by_samples
        return max(by_samples, (self.seconds + time.monotonic() - self.mark) / (60 * self.args.minutes))

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
        state = torch.load(path, weights_only=True, map_location=self.args.device)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.generator.set_state(state["generator"].cpu())
        self.step, self.seen, self.seconds = state["counters"]

    def train_step(self, data: Tensor, labels: Tensor) -> Tensor:
        """One step of every optimiser on a random batch; its loss, not waited for."""
        batch, device = self.args.batch, data.device
        draw: dict[str, Any] = {"generator": self.generator, "device": device}
        pick = torch.randint(len(data), (batch,), **draw)
        x0, y = data[pick], labels[pick].clone()
        if self.recipe.flips:
            x0 = torch.where(torch.rand(batch, 1, 1, 1, **draw) < 0.5, x0.flip(3), x0)
        y[torch.rand(batch, **draw) < CLASS_DROPOUT] = self.recipe.config.num_classes
        flow = self.args.prediction == "flow"
        level = torch.sigmoid(torch.randn(batch, **draw)) if flow else torch.rand(batch, **draw)
        noise = torch.randn(x0.shape, **draw)
        loss = prediction_loss(self.model, self.args.prediction, x0, y, noise, level)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = learning_rate(self.progress, self.step)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.average()
        self.step += 1
        self.seen += batch
        return loss.detach()

    @torch.no_grad()
    def average(self) -> None:
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        current: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        averaged: list[Tensor] = [p for p in self.ema.parameters() if p.requires_grad]
        torch._foreach_lerp_(averaged, current, 1 - decay)

    @torch.no_grad()
    def validation_loss(self, data: Tensor, labels: Tensor, count: int = 512) -> float:
        """Loss of the averaged weights on fixed images, noise and times."""
        generator = torch.Generator().manual_seed(0)
        x0, y = data[:count], labels[:count]
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        level = (torch.arange(count) + 0.5) / count
        level = level[torch.randperm(count, generator=generator)].to(x0.device)
        parts = zip(*(whole.split(VALIDATION_BATCH) for whole in (x0, y, noise, level)), strict=True)
        losses = [prediction_loss(self.ema, self.args.prediction, *part).item() for part in parts]
        return sum(losses) / (count // VALIDATION_BATCH)

    def export(self, path: Path) -> None:
        """Write the averaged weights with what cannot be read off their shapes as metadata."""
        facts: dict[str, Any] = {"config": self.recipe.config.as_dict(), "prediction": self.args.prediction}
        facts["class_names"] = list(self.recipe.class_names)
        tmp = path.with_suffix(".tmp")
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        tensors = {k: v.to("cpu", dtype).contiguous() for k, v in self.ema.state_dict().items()}
        save_file(tensors, str(tmp), metadata={"dcconvert": json.dumps(facts)})
        os.replace(tmp, path)

    def run(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Path:
        """Train until samples or minutes are used up, going on from what `--out` holds; the exported file."""
        out, losses = Path(self.args.out), []
        checkpoint, weights = out / "checkpoint.pt", out / f"{self.recipe.name}.safetensors"
        if checkpoint.exists():
            self.restore(checkpoint)
            print(f"resumed at {self.seen} samples", flush=True)
        if not self.args.no_compile:
            for block in self.model.blocks:  # one block is compiled, the others are its likes
                block.compile(dynamic=False)
        self.mark = time.monotonic()
        while (progress := self.progress) < 1:
            losses.append(self.train_step(*train))
            if self.step % self.args.log_every == 0:
                self.report(progress, losses, test)
                self.save(checkpoint)
                self.export(weights)
                losses = []
        self.report(1.0, losses, test)
        self.save(checkpoint)
        self.export(weights)
        print(f"done: {weights}")
        return weights

    def report(self, progress: float, losses: list[Tensor], test: tuple[Tensor, Tensor]) -> None:
        """Bring the clock up to date and add a line to the log."""
        now = time.monotonic()
        self.seconds, self.mark = self.seconds + now - self.mark, now
        row = {
            "step": self.step,
            "samples": self.seen,
            "progress": round(progress, 3),
            "train_loss": round(float(torch.stack(losses).mean()), 5) if losses else None,
            "validation_loss": round(self.validation_loss(*test), 5),
            "seconds": round(self.seconds),
        }
        with (Path(self.args.out) / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def training_parser(description: str, out: str, samples: int, batch: int) -> argparse.ArgumentParser:
    """The options that all training scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for checkpoint and log")
    parser.add_argument("--samples", type=int, default=samples, help="training samples in all")
    parser.add_argument("--minutes", type=float, help="end after this long, if --samples are not reached before")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--prediction", choices=PREDICTIONS, default="flow", help="a rectified flow, or noise")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW rate")
    parser.add_argument("--muon-lr", type=float, default=2e-3, help="Muon rate (RMS-matched to AdamW)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="export the averaged weights in half the bytes")
    parser.add_argument("--log-every", type=int, default=500, help="steps between checkpoints and log lines")
    parser.add_argument("--no-compile", action="store_true", help="run the model eagerly")
    return parser
