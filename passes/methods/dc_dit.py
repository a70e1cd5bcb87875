"""Method `dc-dit`: a learned router keeps the tokens that it scores above 0.5 (DC-DiT, arXiv 2603.06351)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.graph_tools import attributes
from dcconvert.passes.ir.pass_runner import Passes
from dcconvert.passes.ir.spec import ROUTER
from dcconvert.passes.methods.chunk import WHAT_CHUNK_NEEDS
from dcconvert.passes.methods.method import FRONTEND, Method, Model
from dcconvert.passes.methods.runs import Runs, expecting, kept
from dcconvert.passes.modules.routers import OWN, PLAIN_ROUTERS
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.levels import nearest_levels
from dcconvert.passes.planning.planners import SmoothedPlanner
from dcconvert.passes.planning.schedule import LEVELS, NATURAL, Policy, Timetable
from dcconvert.passes.planning.step_planner import StepPlanner, check_finite
from dcconvert.passes.rewrite.insert_router import InsertRouter
from dcconvert.passes.rewrite.pack_trunk import PackTrunk
from dcconvert.passes.rewrite.split_route import SplitRoute
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.trained.adapters import with_router_adapter
from dcconvert.passes.trained.weight_sets import original_name

SMOOTHED_NEIGHBOURS = 9  # those within a Gaussian of one cell if every second token is kept
VALUE_NEIGHBOURS = 25  # within 2.8 cells: each one left out has less than 2 % of the weight of a token itself
TAIL_DROPS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # the rates that DC-DiT trains for, one per step
EMBEDDERS = ("refined.t_embedder.", "refined.y_embedder.")
BIASES = (f"{ROUTER}.score.bias", "router.router.residual_scorer.3.bias")  # of an adapter; of DC-DiT's own router
SHIFTS = 3  # repeated because each shift changes the tokens of the model's own runs
MORE = 1.4


@dataclass(frozen=True)
class DcDit(Method):
    """Router `own` is for a model with DC-DiT's own architecture, and also selects its own dechunk: by values, after
    the norm that closes the trunk. `refined`: the architecture was made from another model (`--refine-grid`)."""

    refined: bool = False

    name: ClassVar[str] = "dc-dit"
    title: ClassVar[str] = "DC-DiT (arXiv 2603.06351): tokens scored above 0.5 by a learned router, smoothed dechunk"
    limits: ClassVar[tuple[str, ...]] = (
        WHAT_CHUNK_NEEDS,
        "DC-DiT's router is trained. Here it starts from the residual of a local predictor, shifted so that as many "
        "tokens as the ratio says are scored above 0.5; 'dcconvert upcycle' trains it.",
    )
    routers: ClassVar[tuple[str, ...]] = ("predictability", *(r for r in PLAIN_ROUTERS if r != "predictability"), OWN)
    schedules: ClassVar[tuple[str, ...]] = (NATURAL,)
    plain_plan: ClassVar[bool] = False
    trains: ClassVar[tuple[str, ...]] = ("all", "router")

    @property
    def by_values(self) -> bool:
        """Whether dechunk returns the trunk's values instead of adding its update."""
        return self.router == OWN

    @property
    def keeps_original(self) -> bool:
        return not self.refined

    @property
    def frozen(self) -> tuple[str, ...]:
        """DC-DiT's recipe for a refined grid leaves the embedders of time and class alone."""
        return EMBEDDERS if self.refined else ()

    def pipeline(self) -> Passes:
        return (
            *FRONTEND,
            InsertRouter(),  # h -> scores
            PackTrunk(),  #    h -> kept tokens -> packed trunk -> smoothed dechunk -> h'
            SplitRoute(),  #   route | plan on the host | denoise
        )

    def planner(self, grid: tuple[int, int]) -> Planner:
        neighbours = VALUE_NEIGHBOURS if self.by_values else SMOOTHED_NEIGHBOURS
        return SmoothedPlanner(grid, members=1, neighbours=neighbours, coverage=False)

    @classmethod
    def policy(cls, ratio: float) -> Policy:
        return super().policy(ratio) if ratio == 1 else Policy(NATURAL, ratio, base=ratio)

    def found_counts(self, planner: StepPlanner, scores: np.ndarray, spread: np.ndarray | None) -> np.ndarray:
        check_finite(scores)
        assert isinstance(planner.planner, SmoothedPlanner)
        natural = planner.planner.natural(scores, planner.schedule.policy.dropped)
        if not planner.schedule.levels:
            return natural
        levels = np.array(planner.schedule.levels)
        return levels[np.minimum(np.searchsorted(levels, natural), len(levels) - 1)]

    def finished(self, model: Model) -> Model:
        """The model with a trainable router adapter, whose bias is shifted, unless it has its own router."""
        return model if self.router == OWN else with_router_adapter(model, self.seed)  # type: ignore[return-value]

    def fitted(self, model: Model, runs: Runs) -> Model:
        """The model with the router's logits shifted to the ratio, and with the levels that token counts are rounded up
        to.

        The router of a DC-DiT checkpoint is not changed.
        """
        if not self.by_values or self.refined:
            shift(model, runs)
        tokens = model.spec.tokens
        natural = kept(model.with_schedule(self.unrounded(model.schedule)), runs)
        most = int(natural.max())
        chosen = nearest_levels(np.quantile(natural, np.linspace(0.5, 1, 64)).round().astype(int), LEVELS - 3)
        more = min(tokens, round(MORE * most))  # for samples that keep more than any of these
        levels = tuple(sorted({*chosen[chosen < most].tolist(), most, more, tokens}))
        return expecting(model, runs, replace(model.schedule, levels=levels))

    def training_ratios(self, schedule: Timetable) -> tuple[float, ...]:
        if schedule.kind != NATURAL:
            return super().training_ratios(schedule)
        return tuple(schedule.ratio / (1 - drop) for drop in TAIL_DROPS)

    def training_counts(self, planner: StepPlanner, size: int, number: int) -> np.ndarray | None:
        if planner.schedule.kind != NATURAL:
            return None
        return np.full(size, max(1, round(planner.spec.tokens / planner.schedule.policy.base)))

    def unrounded(self, schedule: Timetable) -> Timetable:
        return replace(schedule, levels=()) if schedule.kind == NATURAL else schedule


def shift(model: DynamicModel, runs: Runs) -> None:
    """Shift the router's logits until its threshold keeps one token in `base`, on runs of the model itself."""
    names, tokens = model.spec.inputs, model.spec.tokens
    unrounded = model.with_schedule(replace(model.schedule, levels=()))
    wanted = (tokens / model.schedule.policy.base - 2) / (tokens - 2)  # the first and the last token are always kept
    for _ in range(SHIFTS):
        scores: list[np.ndarray] = []
        converted = runs.step_of(unrounded)

        def step(x: Tensor, t: Tensor, y: Tensor, found: list[np.ndarray], own: object) -> Tensor:
            found.append(model.route(dict(zip(names, (x, t, y), strict=True)))[0].float().cpu().numpy())
            given: Tensor = own(x, t, y)  # type: ignore[operator]
            return given

        runs(partial(step, found=scores, own=converted))
        free = np.delete(np.stack(scores), [0, -1], axis=2)
        level = np.clip(np.quantile(free, np.clip(1 - wanted, 0, 1)), 1e-4, 1 - 1e-4)
        with torch.no_grad():
            bias_of(model).sub_(float(np.log(level / (1 - level))))


def bias_of(model: DynamicModel) -> Tensor:
    """The bias of a router's last layer."""
    return next(v for name, v in attributes(model.route_graph).items() if original_name(name) in BIASES)


def of_own_architecture(method: Method, refined: bool) -> DcDit:
    """The method for a model with DC-DiT's own architecture: its router, its dechunk, all blocks on the kept tokens.

    Raises UsageError for another method, or if head or tail blocks were requested.
    """
    if not isinstance(method, DcDit):
        raise UsageError("a DC-DiT checkpoint needs preset dc-dit: choose it")
    if any(blocks not in (0, method.blocks) for blocks in (method.head_blocks, method.tail_blocks)):
        raise UsageError("all blocks of a DC-DiT run on the kept tokens: leave out --head-blocks and --tail-blocks")
    return replace(method, router=OWN, head_blocks=0, tail_blocks=0, refined=refined)
