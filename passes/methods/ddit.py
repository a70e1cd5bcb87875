"""Method `ddit`: one patch size per step, chosen by how the latents change (DDiT, arXiv 2602.16968)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.graph_tools import attributes
from dcconvert.passes.ir.pass_runner import Passes
from dcconvert.passes.methods.chunk import WHAT_CHUNK_NEEDS
from dcconvert.passes.methods.method import FRONTEND, Method, Model
from dcconvert.passes.methods.runs import Runs, expecting, kept
from dcconvert.passes.modules.patch_resize import enlarging, reducing
from dcconvert.passes.planning.chunk_plan import Planner
from dcconvert.passes.planning.latent_difference import ORDER, THRESHOLD, largest_below, patch_spread, third_difference
from dcconvert.passes.planning.planners import PatchPlanner, scales_of
from dcconvert.passes.planning.schedule import DIFFERENCE, Policy, Timetable
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.rewrite.insert_router import InsertRouter
from dcconvert.passes.rewrite.patch_sizes import NAME, PatchSizes
from dcconvert.passes.rewrite.split_route import SplitRoute
from dcconvert.passes.runtime.model import DynamicModel

PREDICTIONS = ("", "eps", "flow")
EVERYTHING = 1e12  # a threshold above all patches
SEARCH = 8  # runs in search of the threshold
WIDER = 3.0  # how far the threshold may be above the original's spread, in logarithms


@dataclass(frozen=True)
class DDiT(Method):
    """`prediction`: what the model predicts (`eps`, `flow`, or "" if it is not known), which the skip around larger
    patches needs."""

    prediction: str = ""

    name: ClassVar[str] = "ddit"
    title: ClassVar[str] = (
        "DDiT (arXiv 2602.16968): one patch size per step, chosen by the third difference of the latents"
    )
    limits: ClassVar[tuple[str, ...]] = (
        WHAT_CHUNK_NEEDS,
        "DDiT trains embeddings and low-rank updates for its larger patches. Here they start from a bilinear resize; "
        "'dcconvert upcycle' trains them.",
    )
    blocks: ClassVar[int] = 0
    routers: ClassVar[tuple[str, ...]] = ("pool",)
    new_weights: ClassVar[str] = NAME
    schedules: ClassVar[tuple[str, ...]] = (DIFFERENCE,)
    watches: ClassVar[bool] = True
    fixed_steps: ClassVar[bool] = True
    drops_tokens: ClassVar[bool] = False
    plain_plan: ClassVar[bool] = False
    original_trunk: ClassVar[bool] = False
    trains: ClassVar[tuple[str, ...]] = ("lora", "adapters")
    learns_router: ClassVar[bool] = False

    def check(self) -> None:
        super().check()
        if self.head_blocks + self.tail_blocks:
            raise UsageError("all blocks run in the patch size of the step: leave out --head-blocks and --tail-blocks")
        if self.prediction not in PREDICTIONS:
            raise UsageError(f"unknown prediction '{self.prediction}': a model predicts eps or flow")

    def with_prediction(self, prediction: str) -> Self:
        return replace(self, prediction=prediction)

    @property
    def predicts(self) -> str:
        return self.prediction

    def pipeline(self) -> Passes:
        return (
            *FRONTEND,
            InsertRouter(),  # h -> scores
            PatchSizes(),  #   embeddings of every size -> one of them, packed -> pixels of that size
            SplitRoute(),  #   route | plan on the host | denoise
        )

    def planner(self, grid: tuple[int, int]) -> Planner:
        return PatchPlanner(grid)

    @classmethod
    def policy(cls, ratio: float) -> Policy:
        return super().policy(ratio) if ratio == 1 else Policy(DIFFERENCE, ratio, threshold=THRESHOLD)

    def found_counts(self, planner: StepPlanner, scores: np.ndarray, spread: np.ndarray | None) -> np.ndarray:
        assert spread is not None
        sizes = np.array(sorted(planner.sizes, reverse=True))  # the smallest patches first
        return sizes[largest_below(spread, planner.schedule.policy.threshold)]

    def training_counts(self, planner: StepPlanner, size: int, number: int) -> np.ndarray | None:
        """Alternates between the patch sizes."""
        if planner.schedule.kind != DIFFERENCE:
            return None
        sizes = np.array(planner.sizes)
        return sizes[(number + np.arange(size)) % len(sizes)]

    def fitted(self, model: Model, runs: Runs) -> Model:
        """The model with the threshold for which its own runs keep one token in `ratio`, and with the detail of images.

        Larger patches change how the latents change, and so the criterion. Therefore the threshold is searched for on
        runs of the model itself. Raises UsageError for a ratio that cannot be reached.
        """
        latents: list[Tensor] = []

        def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            latents.append(x)
            found: Tensor = model.original_graph(x, t, y)[0]
            return found

        images = runs(step)
        if len(latents) <= ORDER:
            raise UsageError(
                f"patch sizes are chosen from the fourth step on: more than {ORDER} sampling steps are needed"
            )
        set_detail(model, images)
        patches, tokens, ratio = model.planner.patches, model.spec.tokens, model.schedule.ratio

        def fraction(threshold: float) -> float:
            return float(kept(model.with_schedule(with_threshold(model.schedule, threshold)), runs).mean()) / tokens

        least = fraction(EVERYTHING)
        if least > 1 / ratio + 1e-9:
            raise UsageError(
                f"patches of {patches[-1]} pixels from the fourth of {len(latents)} steps on give {1 / least:.1f}x at "
                f"most: choose a ratio below {ratio:g}x, or more steps"
            )
        windows = [latents[i : i + ORDER + 1] for i in range(len(latents) - ORDER)]
        spread = np.stack([patch_spread(third_difference(window), patches) for window in windows])
        low, high = np.log(max(float(spread.min()), 1e-12)), np.log(max(float(spread.max()), 1e-12)) + WIDER
        best = (np.inf, 0.0)
        for _ in range(SEARCH):
            middle = (low + high) / 2
            found = fraction(float(np.exp(middle)))
            best = min(best, (abs(found - 1 / ratio), float(np.exp(middle))))
            low, high = (middle, high) if found > 1 / ratio else (low, middle)
        return expecting(model, runs, with_threshold(model.schedule, best[1]))


def with_threshold(schedule: Timetable, threshold: float) -> Timetable:
    return replace(schedule, policy=replace(schedule.policy, threshold=threshold))


def set_detail(model: DynamicModel, images: Tensor) -> None:
    """Set, in the skip, the variance of the image detail that patches of each size lose."""
    found: dict[str, Any] = attributes(model.denoise_graph)
    name = f"{NAME}.skip.detail"
    if name not in found:
        return
    first = model.planner.patches[0]
    for place, scale in enumerate(scales_of(model.spec.grid)[1:], 1):
        side = scale * first
        batch, channels, height, width = images.shape
        cells = images.double().reshape(batch, channels, height // side, side, width // side, side)
        flat = cells.permute(0, 1, 2, 4, 3, 5).flatten(-2)
        lost = flat - flat @ (enlarging(first, scale) @ reducing(first, scale)).T
        found[name][place] = float(lost.square().mean()) * scale**2 / (scale**2 - 1)
