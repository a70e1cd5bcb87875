"""Distillation: the converted model learns to give what its original gives, from fewer tokens.

The teacher is the original in the form of the rewritten graph, keeping everything; the student the same graph, keeping
what the schedule says. Both see the same noised data at the same times. Two losses: the model's output (noise or
velocity), and the hidden state where the trunk ends, each relative to the teacher's mean square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dcconvert.export.parity import check_identity, require
from dcconvert.passes.errors import CheckFailedError, UsageError
from dcconvert.passes.model import DynamicModel
from dcconvert.passes.step_planner import StepPlanner
from dcconvert.passes.trained import (
    all_tensors,
    linear_weights,
    original_name,
    plainly_named,
    show_features,
    teacher_of,
)

TRAINABLE = ("all", "lora")


@dataclass(frozen=True)
class Recipe:
    """How to train. `ratios`: one is drawn for every step, so that one set of weights serves all of them."""

    train: str = "all"
    samples: int = 10_000
    batch: int = 32
    lr: float = 3e-4
    warm_up: float = 0.05  # fraction of the steps
    rank: int = 32
    feature_weight: float = 0.5
    class_dropout: float = 0.1
    ema: float = 0.995
    clip: float = 1.0
    seed: int = 0
    ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.train not in TRAINABLE:
            raise UsageError(f"cannot train '{self.train}': choose one of {', '.join(TRAINABLE)}")

    @property
    def steps(self) -> int:
        return math.ceil(self.samples / self.batch)

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine to zero (Loshchilov and Hutter, arXiv 1608.03983)."""
        first = max(1, round(self.warm_up * self.steps))
        left = max(0, step - first) / max(1, self.steps - first)
        return self.lr * min(1.0, (step + 1) / first) * 0.5 * (1 + math.cos(math.pi * left))


class Weights(nn.Module):
    """What is trained: whole tensors (`all`), or low-rank changes of the linear layers (`lora`, arXiv 2106.09685).

    `tensors` gives the weights to run with, by their names in the model. Both start at the weights the model has.
    """

    def __init__(self, model: DynamicModel, train: str, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        present = {n: v for n, v in all_tensors(model).items() if isinstance(v, nn.Parameter)}
        names = set(present) if train == "all" else linear_weights(model)
        self.names = sorted(name for name in names if present[name].is_floating_point())
        self.base = {name: present[name].detach() for name in self.names}
        self.low_rank = train == "lora"
        self.parts = nn.ParameterList()
        for name in self.names:
            start = self.base[name]
            if self.low_rank:
                size = min(rank, *start.shape)
                self.parts.append(torch.randn(size, start.shape[1], generator=generator) / math.sqrt(start.shape[1]))
                self.parts.append(torch.zeros(start.shape[0], size))
            else:
                self.parts.append(start.clone())

    def tensors(self, parts: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """Made of `parts` that were trained: these, or averages of them."""
        parts = list(self.parts) if parts is None else parts
        if not self.low_rank:
            return dict(zip(self.names, parts, strict=True))
        pairs = zip(self.names, parts[::2], parts[1::2], strict=True)
        return {name: self.base[name] + up @ down for name, down, up in pairs}


class Passes(nn.Module):
    """Route, plan and denoise in one call: the model's outputs and its features, for so many kept tokens a sample."""

    def __init__(self, model: DynamicModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor], counts: np.ndarray | None) -> tuple[Tensor, Tensor]:
        scores, live = self.model.route(inputs)
        planner = self.model.step_planner
        if counts is None:
            plan: Any = planner.full_plan(len(scores))
        else:
            plan = planner.plan(scores.detach().float().cpu().numpy(), counts)
        outputs = self.model.denoise(inputs, live, plan)
        return outputs[0], outputs[-1]


class Distillation:
    """A run of training: everything that a resume needs, and one step of it.

    All that is random in a step comes from a generator seeded with the recipe's seed and the step's number, so that a
    run that was stopped goes on as if it had not been.
    """

    def __init__(self, model: DynamicModel, recipe: Recipe, taus: np.ndarray) -> None:
        self.model, self.recipe = model, recipe
        teacher = teacher_of(model)
        require([check_identity(teacher, teacher.spec.example(2))])
        show_features(teacher)
        self.teacher = Passes(teacher).requires_grad_(False)
        student = plainly_named(model)  # the weights that are trained are given to it in every call
        show_features(student)
        self.student = Passes(student).requires_grad_(False)
        generator = torch.Generator().manual_seed(recipe.seed)
        self.weights = Weights(model, recipe.train, recipe.rank, generator)
        self.average = [part.detach().clone() for part in self.weights.parts]
        self.optimiser = torch.optim.AdamW(self.weights.parameters(), lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.99))
        ratios = recipe.ratios or (model.schedule.ratio,)
        self.planners = [planner_for(model, ratio, taus) for ratio in ratios]
        known = {name for name, _ in self.student.named_parameters(remove_duplicate=False)}
        self.paths = {  # where the student reads what is trained
            path: name
            for name in self.weights.names
            for graph in ("route_graph", "denoise_graph")
            if (path := f"model.{graph}.{original_name(name)}") in known
        }
        self.step = 0

    def run_student(self, inputs: dict[str, Tensor], counts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Output and features of the weights that are being trained."""
        tensors = self.weights.tensors()
        weights = {path: tensors[name] for path, name in self.paths.items()}
        return torch.func.functional_call(self.student, weights, (inputs, counts))

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)

    def train_step(self, batch: dict[str, Tensor], planner: StepPlanner) -> dict[str, float]:
        """One step on the model's inputs by name; losses, gradient norm. CheckFailedError if it is not finite."""
        counts = planner.counts(planner.taus(batch, len(next(iter(batch.values())))))
        with torch.no_grad():
            wanted, features = self.teacher(batch, None)
        found, own = self.run_student(batch, counts)
        output = relative_error(found, wanted)
        feature = relative_error(own, features)
        loss = output + self.recipe.feature_weight * feature
        if not torch.isfinite(loss):
            raise CheckFailedError(f"the loss of step {self.step} is not finite: lower the learning rate")
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.weights.parameters(), self.recipe.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for averaged, current in zip(self.average, self.weights.parts, strict=True):
                averaged.lerp_(current, 1 - decay)
        return {
            name: float(value.detach()) for name, value in (("output", output), ("feature", feature), ("norm", norm))
        }

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights, by the original's names; those of `all` are averaged further by the next step."""
        return {original_name(name): value for name, value in self.weights.tensors(self.average).items()}

    def state(self) -> dict[str, Any]:
        """Everything a resume needs, in types that load without pickle."""
        return {
            "step": self.step,
            "weights": list(self.weights.parts),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for part, value in zip(self.weights.parts, state["weights"], strict=True):
                part.copy_(value)
            for part, value in zip(self.average, state["average"], strict=True):
                part.copy_(value)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = int(state["step"])


def planner_for(model: DynamicModel, ratio: float, taus: np.ndarray) -> StepPlanner:
    """A planner at another ratio, its mean over a run at these noise levels."""
    schedule = replace(model.schedule, ratio=ratio, mean=0.0).fitted(taus)
    return StepPlanner(model.spec, model.options, schedule)


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error over the mean square of what was wanted."""
    return (found - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)


def spread_times(count: int, generator: torch.Generator) -> Tensor:
    """Random numbers [count] in (0, 1], evenly spread over it in random order."""
    start = torch.rand(1, generator=generator)
    levels = (torch.arange(count) + start) / count
    return (1 - levels)[torch.randperm(count, generator=generator)]


def pick_ratio(planners: Sequence[StepPlanner], generator: torch.Generator) -> StepPlanner:
    return planners[int(torch.randint(len(planners), (1,), generator=generator))]
