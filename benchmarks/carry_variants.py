"""Ideas for mode carry, each tried separately on the shipped model, and their effect on the final images.

    python -m benchmarks.carry_variants              # 32 images, half an hour on one core

The mode is written out by hand here, on the DiT itself in plain torch, so that an idea can be tried without passes, ops
or exported graphs; the default variant is what the product does (a test compares the two). The variants that paid off
are the defaults of the product; the others exist only here. The controls are runs of the original with about the same
compute.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import dcconvert
from benchmarks.common import write_result
from dcconvert.images.pixels import psnr
from dcconvert.models.dit import Block, DiT, modulate
from dcconvert.models.load import shipped_model
from dcconvert.passes.modules.routers import even_priorities
from dcconvert.passes.planning.schedule import AUTO, Policy, Timetable
from dcconvert.sampling.samplers import Sampler, initial_noise, labels_for


@dataclass(frozen=True)
class Variant:
    """One way to carry. Orders: 0 holds the last value, 1 follows the line through the last two, 2 the parabola."""

    steps: int = 25
    kept: float = 0.5  # mean over the run
    solver: str = "euler"
    warm_up: int = AUTO
    refresh: int = 0
    curve: tuple[tuple[float, float], ...] = ()
    order_keys: int = 1
    order_values: int = 1
    order_update: int = 1
    reach: float = 2.0
    clock: str = "tau"  # the variable in which lines are straight
    router: str = "drift"
    head: int = 0
    tail: int = 0
    groups: tuple[float, ...] = (1.0,)  # kept tokens in equal parts of the trunk, relative to the mean

    def schedule(self, taus: np.ndarray) -> Timetable:
        kind = "curve" if self.curve else "constant"
        policy = Policy(kind, 1 / self.kept, warm_up=self.warm_up, refresh=self.refresh, knots=self.curve)
        return policy.timetable(taus)


TRIED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("base: constant schedule", {}),
    ("router age", {"router": "age"}),
    ("router drift, not its square root", {"router": "drift1"}),
    ("router by the error of the prediction", {"router": "error"}),
    ("router random", {"router": "random"}),
    ("hold keys, values and update", {"order_keys": 0, "order_values": 0, "order_update": 0}),
    ("hold keys and values", {"order_keys": 0, "order_values": 0}),
    ("hold keys", {"order_keys": 0}),
    ("hold values", {"order_values": 0}),
    ("hold the update", {"order_update": 0}),
    ("parabola for the update", {"order_update": 2}),
    ("parabola for everything", {"order_keys": 2, "order_values": 2, "order_update": 2}),
    ("reach 1", {"reach": 1.0}),
    ("reach unlimited", {"reach": math.inf}),
    ("lines in log signal to noise", {"clock": "logsnr"}),
    ("one head block", {"head": 1}),
    ("one tail block", {"tail": 1}),
    ("more tokens in early blocks", {"groups": (1.3, 0.7)}),
    ("more tokens in late blocks", {"groups": (0.7, 1.3)}),
    ("falling", {"curve": ((0.0, 0.5), (1.0, 1.5))}),
    ("rising", {"curve": ((0.0, 1.5), (1.0, 0.5))}),
    ("dense every 8th step", {"refresh": 8}),
    ("one warm-up step", {"warm_up": 1}),
    ("5 warm-up steps", {"warm_up": 5}),
)
BASES = ({"steps": 25, "kept": 0.34}, {"steps": 25, "kept": 0.34, "solver": "unipc"})


class Part:
    """A sequence of trunk blocks with its own choice of tokens: what was computed when, and how it is read now."""

    def __init__(self, blocks: list[Block], share: float, variant: Variant, grid: tuple[int, int], batch: int) -> None:
        self.blocks, self.share, self.variant = blocks, share, variant
        self.slots = 1 + max(variant.order_keys, variant.order_values, variant.order_update, 1)
        tokens = grid[0] * grid[1]
        self.ties = even_priorities(grid).expand(batch, -1)
        self.times = torch.zeros(self.slots, batch, tokens, dtype=torch.float64)  # newest first
        self.taus = torch.zeros(batch, tokens, dtype=torch.float64)
        self.written = torch.zeros(batch, tokens, dtype=torch.int64)
        self.drift = torch.ones(batch, tokens, dtype=torch.float64)
        self.error = torch.ones(batch, tokens, dtype=torch.float64)
        self.states: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(0)

    def choose(self, count: int, tau: float) -> Tensor:
        """Mask [B, N] of the tokens to compute."""
        elapsed = self.taus - tau
        factor = {
            "drift": lambda: self.drift.sqrt(),
            "drift1": lambda: self.drift,
            "error": lambda: self.error.sqrt(),
            "age": lambda: torch.ones_like(elapsed),
            "random": lambda: torch.rand(elapsed.shape, generator=self.random) / elapsed.clamp_min(1e-9),
        }[self.variant.router]()
        order = (elapsed * (factor + 1e-6) + 1e-6 * self.ties).argsort(dim=1, descending=True, stable=True)
        mask = torch.zeros(elapsed.shape, dtype=torch.bool)
        return mask.scatter_(1, order[:, :count], value=True)

    def note(self, mask: Tensor, tau: float) -> None:
        """Shift the times of the tokens that are computed now."""
        shifted = torch.cat([torch.full_like(self.times[:1], clock(tau, self.variant)), self.times[:-1]])
        self.times = torch.where(mask, shifted, self.times)
        self.gap = (self.taus - tau).clamp_min(1e-12)
        self.taus = torch.where(mask, tau, self.taus)
        self.written += mask

    def weights(self, order: int, tau: float) -> Tensor:
        """Lagrange weights [P, B, N] of the values in the slots, newest first."""
        now, ahead = clock(tau, self.variant), self.times[0] - clock(tau, self.variant)
        weights = torch.zeros_like(self.times)
        weights[0] = 1
        known = (self.written > 1) & (ahead != 0)
        if order >= 1:
            steps = torch.where(known, ahead / (self.times[1] - self.times[0]), 0).clamp(0, self.variant.reach)
            weights[0], weights[1] = 1 + steps, -steps
        if order >= 2:
            a, b, c = self.times[:3]
            curve = torch.stack(
                [
                    (now - b) * (now - c) / ((a - b) * (a - c)),
                    (now - a) * (now - c) / ((b - a) * (b - c)),
                    (now - a) * (now - b) / ((c - a) * (c - b)),
                ]
            )
            bent = known & (self.written > 2) & (ahead / (b - a) < self.variant.reach)
            weights[:3] = torch.where(bent, curve, weights[:3])
        return weights.float()

    def carry(self, name: str, fresh: Tensor, kept: Tensor, order: int, tau: float) -> Tensor:
        """Write the values [B, k, E] of the kept tokens, and read those of all tokens [B, N, E]."""
        batch, tokens = self.taus.shape
        state = self.states.setdefault(name, fresh.new_zeros(self.slots, batch, tokens, fresh.shape[2]))
        index = kept.unsqueeze(-1).expand(-1, -1, fresh.shape[2])
        for slot in range(self.slots - 1, 0, -1):
            state[slot].scatter_(1, index, state[slot - 1].gather(1, index))
        state[0].scatter_(1, index, fresh)
        return (state * self.weights(order, tau).unsqueeze(-1)).sum(0)

    def __call__(self, h: Tensor, c: Tensor, count: int, tau: float) -> Tensor:
        """The tokens after these blocks [B, N, D]."""
        variant, (batch, tokens, width) = self.variant, h.shape
        count = min(tokens, max(1, round(count * self.share))) if count < tokens else tokens
        mask = self.choose(count, tau)
        before = self.states["update"][0].clone() if "update" in self.states else None
        predicted = self.weights(variant.order_update, tau) if before is not None else None
        guess = (self.states["update"] * predicted.unsqueeze(-1)).sum(0) if predicted is not None else None
        self.note(mask, tau)
        kept = mask.nonzero()[:, 1].view(batch, count)
        index = kept.unsqueeze(-1).expand(-1, -1, width)
        u = start = h.gather(1, index)
        for number, block in enumerate(self.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
            x = modulate(block.norm1(u), shift1.squeeze(1), scale1.squeeze(1))
            q, k, v = block.attn.qkv(x).chunk(3, dim=2)
            keys = self.carry(f"k{number}", k, kept, variant.order_keys, tau)
            values = self.carry(f"v{number}", v, kept, variant.order_values, tau)
            q, keys, values = (z.unflatten(2, (block.attn.heads, -1)).transpose(1, 2) for z in (q, keys, values))
            u = u + gate1 * block.attn.proj(F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2))
            u = u + gate2 * block.mlp(modulate(block.norm2(u), shift2.squeeze(1), scale2.squeeze(1)))
        update = self.carry("update", u - start, kept, variant.order_update, tau)
        if before is not None and guess is not None:
            moved, missed = ((update - old).double().norm(dim=2) / self.gap for old in (before, guess))
            self.drift = torch.where(mask, moved, self.drift)
            self.error = torch.where(mask, missed, self.error)
        return h + update


def clock(tau: float, variant: Variant) -> float:
    if variant.clock == "tau":
        return tau
    clipped = min(max(tau, 1e-3), 1 - 1e-3)
    return math.log(clipped / (1 - clipped))


def carried(dit: DiT, variant: Variant, batch: int, counts: np.ndarray) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A step function for one run of `batch` samples that computes counts[i] tokens at step i."""
    blocks = list(dit.blocks)
    head, trunk = blocks[: variant.head], blocks[variant.head : len(blocks) - variant.tail]
    tail, size = blocks[len(blocks) - variant.tail :], len(trunk) // len(variant.groups)
    grid = (dit.cfg.grid, dit.cfg.grid)
    parts = [
        Part(trunk[i * size : (i + 1) * size], share, variant, grid, batch)  # type: ignore[arg-type]
        for i, share in enumerate(variant.groups)
    ]
    left = iter(counts.tolist())

    def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        count, tau = next(left), float(t[0]) / 1000
        h, c = dit.x_embedder(x) + dit.pos_embed, dit.t_embedder(t) + dit.y_embedder(y)
        for block in head:
            h = block(h, c)
        for part in parts:
            h = part(h, c, count, tau)
        for block in tail:
            h = block(h, c)
        return dit.unpatchify(dit.final_layer(h, c))

    return step


def sample(dit: DiT, variant: Variant, prediction: str, noise: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Final images, and the compute in full steps (trunk and the other blocks, without embedding and output)."""
    sampler = Sampler(prediction, variant.steps, variant.solver)
    tokens = dit.cfg.grid**2
    counts = variant.schedule(sampler.taus).run_counts(sampler.taus, tokens)
    counts[0] = tokens
    images = sampler.run(carried(dit, variant, len(noise), counts), noise, labels)
    fixed = (variant.head + variant.tail) / len(dit.blocks)
    return images, float(fixed * variant.steps + (1 - fixed) * counts.sum() / tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ideas for mode carry, one at a time, on the shipped model.")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--reference-steps", type=int, default=400)
    parser.add_argument("--reference", type=Path, help="file with the reference images, from benchmarks.frontier")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dit = dcconvert.load_checkpoint(shipped_model())
    prediction = dit.checkpoint_info.prediction
    noise = initial_noise(0, args.images, dit.cfg.in_channels, dit.cfg.image_size)
    labels = labels_for(args.images, dit.cfg.num_classes)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        if args.reference:
            reference = torch.load(args.reference, weights_only=True)[: args.images]
        else:
            reference = Sampler(prediction, args.reference_steps).run(dit, noise, labels)
        for base in BASES:
            plain = Variant(**base)
            for name, change in TRIED:
                variant = replace(plain, **change)
                images, cost = sample(dit, variant, prediction, noise, labels)
                values = psnr(images, reference)
                row = {"name": name, "solver": plain.solver, "steps": plain.steps, "full_steps": round(cost, 2)}
                rows.append({**row, "psnr": round(float(values.mean()), 2)})
                print(rows[-1], flush=True)
            for steps in (8, 9, 10, 11, 12):
                images = Sampler(prediction, steps, plain.solver).run(dit, noise, labels)
                value = round(float(psnr(images, reference).mean()), 2)
                rows.append(
                    {"name": "original", "solver": plain.solver, "steps": steps, "full_steps": steps, "psnr": value}
                )
                print(rows[-1], flush=True)
    settings = {name: value for name, value in vars(args).items() if name != "reference"}
    print(f"Results: {write_result('carry_variants', {'model': shipped_model().name, **settings}, rows)}")


if __name__ == "__main__":
    main()
