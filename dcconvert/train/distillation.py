"""Distillation: the converted model learns to reproduce its original's output from fewer tokens.

What the two kinds of training share: what is trained, at which rate, how it is averaged, and what a resume needs.
`StepDistillation` (mode chunk) is below; `dcconvert.train.run_distillation` has the one for mode carry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dcconvert.export.checks.parity import check_identity, require
from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.ir.spec import DECHUNK, ROUTER
from dcconvert.passes.modules.routers import OWN
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.trained.adapters import (
    GATE,
    with_dechunk_adapter,
    with_features,
    with_gate,
    with_router_adapter,
)
from dcconvert.passes.trained.weight_sets import all_tensors, linear_weights, original_name, plainly_named, teacher_of
from dcconvert.train.distributed import Distributed

TRAINABLE = ("all", "lora", "router", "adapters")
RATIO_GROUP = 16  # samples whose tokens are counted together, as in DC-DiT


@dataclass(frozen=True)
class Recipe:
    """How to train. `ratios`: one is drawn for every step, so that one set of weights serves all of them.

    `train`: `all` or `lora` (the weights there are), and with either or alone `router` and `adapters`, new paths;
    empty in the settings of a command: what the bundle's preset trains.
    `unroll`: steps of a run whose errors are added up, mode carry only.
    """

    train: tuple[str, ...] = ("all",)
    samples: int = 10_000
    batch: int = 32
    lr: float = 3e-4  # 0 in the settings of a command: that of the bundle's method
    warm_up: float = 0.05  # fraction of the steps
    rank: int = 32
    feature_weight: float = 0.5
    ratio_weight: float = 0.03
    unroll: int = 8
    class_dropout: float = 0.1
    ema: float = 0.995
    clip: float = 1.0
    seed: int = 0
    ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in self.train:
            if name not in TRAINABLE:
                raise UsageError(f"cannot train '{name}': choose one of {', '.join(TRAINABLE)}")
        if {"all", "lora"} <= {*self.train}:
            raise UsageError("train either all weights or low-rank updates of them (lora), not both")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine to zero (Loshchilov and Hutter, arXiv 1608.03983)."""
        first = max(1, round(self.warm_up * steps))
        left = max(0, step - first) / max(1, steps - first)
        return self.lr * min(1.0, (step + 1) / first) * 0.5 * (1 + math.cos(math.pi * left))


def with_new_paths(model: DynamicModel, recipe: Recipe) -> DynamicModel:
    """The model with the new paths that the recipe trains; UsageError if the mode does not support them."""
    added = [name for name in ("router", "adapters") if name in recipe.train]
    if added and model.method.stateful:
        raise UsageError(
            f"cannot train '{added[0]}' in mode carry, where the router uses the run's history; train all or lora"
        )
    if "router" in added:
        if model.method.router == OWN:
            return model  # it is one of the model's own weights, and learns with all of them
        if not model.method.learns_router:
            raise UsageError(
                f"cannot train 'router': method {model.method.name} has no trainable router; train all, lora or "
                "adapters"
            )
        model = with_router_adapter(model, recipe.seed)
    if "adapters" in added and model.method.new_weights == DECHUNK:
        model = with_dechunk_adapter(model, recipe.seed)
    return model


class Weights(nn.Module):
    """The trained weights: whole tensors, and low-rank updates of the linear layers (`lora`, arXiv 2106.09685).

    `tensors` gives the weights to run with, by their names in the model. All start at the weights the model has.
    UsageError where the model has nothing of what is to be trained.
    """

    def __init__(self, model: DynamicModel, train: Sequence[str], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        present = {n: v for n, v in all_tensors(model).items() if isinstance(v, nn.Parameter)}
        router = "router" if model.method.router == OWN else ROUTER
        paths = {"router": router, "adapters": model.method.new_weights}
        new = tuple(f"{path}." for name, path in paths.items() if name in train)
        whole = set(present) if "all" in train else {name for name in present if original_name(name).startswith(new)}
        frozen = model.method.frozen
        self.whole = sorted(n for n in whole if present[n].is_floating_point() and not n.startswith(frozen))
        self.low = sorted(n for n in linear_weights(model) if not n.startswith(frozen)) if "lora" in train else []
        if not self.names:
            raise UsageError(f"this model has nothing of {', '.join(train)} to train: train all or lora")
        self.base = {name: present[name].detach() for name in self.low}
        self.parts = nn.ParameterList(present[name].detach().clone() for name in self.whole)
        for name in self.low:
            rows, columns = present[name].shape
            size = min(rank, rows, columns)
            down = torch.randn(size, columns, generator=generator) / math.sqrt(columns)
            self.parts += [down.to(present[name]), present[name].new_zeros(rows, size)]

    @property
    def names(self) -> list[str]:
        return [*self.whole, *self.low]

    def tensors(self, parts: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """Made of `parts` that were trained: these, or averages of them."""
        parts = list(self.parts) if parts is None else parts
        whole, pairs = parts[: len(self.whole)], parts[len(self.whole) :]
        changes = zip(self.low, pairs[::2], pairs[1::2], strict=True)
        low = {name: self.base[name] + up @ down for name, down, up in changes}
        return {**dict(zip(self.whole, whole, strict=True)), **low}


class Distillation:
    """A run of training, in rounds: everything that a resume needs.

    All that is random in a round comes from a generator seeded with the recipe's seed and the round's number, so that
    a run that was stopped goes on as if it had not been. `student` is a module that runs the model; its parameters
    that are trained are given to it in every call. With several processes each trains on its part of every batch and
    the gradients are averaged.
    """

    updates_a_round = 1

    def __init__(
        self, model: DynamicModel, student: nn.Module, recipe: Recipe, taus: np.ndarray, distributed: Distributed
    ) -> None:
        self.model, self.recipe, self.distributed = model, recipe, distributed
        self.student = student.requires_grad_(False)
        generator = torch.Generator().manual_seed(recipe.seed)
        self.weights = Weights(model, recipe.train, recipe.rank, generator)
        self.average = [part.detach().clone() for part in self.weights.parts]
        self.optimiser = torch.optim.AdamW(self.weights.parameters(), lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.99))
        ratios = recipe.ratios or model.method.training_ratios(model.schedule)
        self.planners = [unrounded(model.planner.at_ratio(ratio, taus)) for ratio in ratios]
        known = {name for name, _ in self.student.named_parameters(remove_duplicate=False)}
        self.paths = {
            path: name for name in self.weights.names for path in known if read_as(path) == original_name(name)
        }
        self.round = self.step = 0

    @property
    def samples_a_round(self) -> int:
        return self.recipe.batch

    @property
    def rounds(self) -> int:
        return math.ceil(self.recipe.samples / self.samples_a_round)

    def trained(self) -> dict[str, Tensor]:
        """The weights that are being trained, by their places in the student."""
        tensors = self.weights.tensors()
        return {path: tensors[name] for path, name in self.paths.items()}

    def generator(self) -> torch.Generator:
        """Of all that is random in the next round."""
        return torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.round)

    def update(self, loss: Tensor) -> float:
        """One step of the optimiser; the norm of the gradient. CheckFailedError if loss or gradient are not finite."""
        if not self.distributed.all_agree(bool(torch.isfinite(loss))):
            raise CheckFailedError(f"the loss of step {self.step} is not finite: lower the learning rate")
        loss.backward()
        self.distributed.average_gradients(self.weights.parts)
        norm = nn.utils.clip_grad_norm_(self.weights.parameters(), self.recipe.clip)
        if not torch.isfinite(norm):
            raise CheckFailedError(f"the gradient of step {self.step} is not finite: lower the learning rate")
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate(self.step, self.rounds * self.updates_a_round)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for averaged, current in zip(self.average, self.weights.parts, strict=True):
                averaged.lerp_(current, 1 - decay)
        return float(norm)

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights, by the original's names; whole tensors are averaged further by the next step."""
        return {original_name(name): value for name, value in self.weights.tensors(self.average).items()}

    def state(self) -> dict[str, Any]:
        """Everything a resume needs, in types that load without pickle."""
        return {
            "round": self.round,
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
        self.round, self.step = int(state["round"]), int(state["step"])


def unrounded(planner: StepPlanner) -> StepPlanner:
    """A planner that keeps as many tokens as its router finds, without rounding up to the shapes of a bundle."""
    return StepPlanner(planner.spec, planner.method, planner.method.unrounded(planner.schedule))


def read_as(path: str) -> str:
    """The name in its graph of a parameter at `path` in a student."""
    for graph in ("route_graph.", "denoise_graph.", "prepare_graph."):
        if graph in path:
            return path.split(graph, 1)[1]
    return ""


class Passes(nn.Module):
    """Route, plan and denoise in one call: output, features and scores, for so many kept tokens a sample.

    `planner`: finds their number where it is found at every step.
    """

    def __init__(self, model: DynamicModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: dict[str, Tensor], counts: np.ndarray | None, planner: StepPlanner | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores, live = self.model.route(inputs)
        host = scores.detach().float().cpu().numpy()
        if counts is None:
            plan: Any = self.model.planner.full_plan(len(scores))
        else:
            if planner is not None and planner.schedule.data_dependent and not planner.watches:
                counts = planner.found_counts(host, None)
            plan = self.model.planner.plan(host, counts)
        if GATE in self.model.spec.denoise_inputs:
            chosen = scores.flatten()[torch.from_numpy(plan.chunk_index[..., 0]).to(scores.device)].unsqueeze(-1)
            inputs = {**inputs, GATE: 1 + chosen - chosen.detach()}
        outputs = self.model.denoise(inputs, live, plan)
        return outputs[0], outputs[-1], scores


class StepDistillation(Distillation):
    """Mode chunk: a round is a batch of noised data with its own times.

    The teacher is the original in the form of the rewritten graph, keeping everything; the student the same graph,
    keeping what the schedule says. Losses: the model's output (noise or velocity), and the hidden state where the
    trunk ends, each relative to the teacher's mean square. A router that is trained learns through a gate on the
    trunk's update (1, with a gradient) and from DC-DiT's ratio loss. Trunks that are not the original's, however much
    they keep, learn from its output alone; patch sizes are taken in turns.
    """

    def __init__(
        self, model: DynamicModel, recipe: Recipe, taus: np.ndarray, distributed: Distributed | None = None
    ) -> None:
        self.inside = model.method.original_trunk and not model.method.by_values
        student = model
        if self.inside:
            teacher = teacher_of(model)
            require([check_identity(teacher, teacher.spec.example(2))])
            student = with_features(student)
            self.teacher = Passes(with_features(teacher)).requires_grad_(False)
        if "router" in recipe.train:
            student = with_gate(student)  # last: it adds an input, which other passes have no example of
        student = plainly_named(student)
        super().__init__(model, Passes(student), recipe, taus, distributed or Distributed())

    def run_student(
        self, inputs: dict[str, Tensor], counts: np.ndarray, planner: StepPlanner | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, features and scores of the weights that are being trained."""
        found: tuple[Tensor, Tensor, Tensor] = torch.func.functional_call(
            self.student, self.trained(), (inputs, counts, planner)
        )
        return found

    def run_teacher(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Output of the original, and what leaves its trunk where the student has the same place."""
        if self.inside:
            return self.teacher(inputs, None)[:2]
        return self.model.original_graph(*(inputs[name] for name in self.model.spec.inputs))[0], None

    def counts(self, batch: dict[str, Tensor], planner: StepPlanner) -> np.ndarray:
        """What each sample of a batch is to keep; of a natural threshold what is expected."""
        size = len(next(iter(batch.values())))
        given = planner.method.training_counts(planner, size, self.round)
        return given if given is not None else planner.counts(planner.taus(batch, size))

    def train(self, batch: dict[str, Tensor], planner: StepPlanner) -> dict[str, float]:
        """One round on the model's inputs by name; losses, gradient norm. CheckFailedError if it is not finite."""
        counts = self.counts(batch, planner)
        with torch.no_grad():
            wanted, features = self.run_teacher(batch)
        found, own, scores = self.run_student(batch, counts, planner)
        channels = batch[self.model.spec.image].shape[1]  # learned variances, which samplers ignore, come after them
        output = relative_error(found[:, :channels], wanted[:, :channels])
        parts, loss = {"output": output}, output
        if features is not None:
            parts["feature"] = relative_error(own, features)
            loss = loss + self.recipe.feature_weight * parts["feature"]
        if "router" in self.recipe.train:
            parts["ratio"] = ratio_loss(scores, counts / self.model.spec.tokens)
            loss = loss + self.recipe.ratio_weight * parts["ratio"]
        norm = self.update(loss)
        self.round += 1
        return {**{name: float(value.detach()) for name, value in parts.items()}, "norm": norm}


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error divided by the mean square of the target."""
    return (found - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)


def ratio_loss(scores: Tensor, fractions: np.ndarray) -> Tensor:
    """DC-DiT's ratio loss (arXiv 2603.06351), mean over groups of samples: 1 where p > 0.5 as often as it should be.

    scores p [B, N]; `fractions` [B]: what each sample keeps. With 1/n the mean of them in a group, r the share of
    tokens with p > 0.5 and p' the mean of p: n/(n-1) ((1-r)(1-p') + (n-1) r p'). Groups that keep everything give 0.
    """
    found = []
    for part, kept in zip(
        scores.split(RATIO_GROUP), np.split(fractions, range(RATIO_GROUP, len(scores), RATIO_GROUP)), strict=True
    ):
        n = 1 / float(kept.mean())
        chosen, mean = (part > 0.5).to(part.dtype).mean(), part.mean()
        loss = (1 - chosen) * (1 - mean) + (n - 1) * chosen * mean
        found.append(loss * (n / (n - 1)) if n > 1 + 1e-6 else 0 * mean)
    return torch.stack(found).mean()


def spread_times(count: int, generator: torch.Generator) -> Tensor:
    """Random numbers [count] in (0, 1], evenly spread over it in random order."""
    start = torch.rand(1, generator=generator)
    levels = (torch.arange(count) + start) / count
    return (1 - levels)[torch.randperm(count, generator=generator)]


def pick_ratio(planners: Sequence[StepPlanner], generator: torch.Generator) -> int:
    """The place of the planner that a round trains for."""
    return int(torch.randint(len(planners), (1,), generator=generator))
