"""From scores and timesteps to the plan of a step, in either mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.ir.spec import ModelSpec
from dcconvert.passes.planning.carry_plan import CarryPlan, carry_plan
from dcconvert.passes.planning.chunk_plan import Plan
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.nearest_kept import Mask
from dcconvert.passes.planning.planners import scales_of
from dcconvert.passes.planning.pooled_planner import SizedPlanner
from dcconvert.passes.planning.schedule import DIFFERENCE, LEVELS, NATURAL, Timetable
from dcconvert.passes.planning.token_history import Doubles, History

if TYPE_CHECKING:
    from dcconvert.passes.methods.method import Method


class StepPlanner:
    """The schedule decides how many tokens a step keeps, the router and history which ones, and the plan where they
    go."""

    def __init__(self, spec: ModelSpec, method: Method, schedule: Timetable) -> None:
        self.spec = spec
        self.method = method
        schedule.policy.check(spec.tokens)
        self.schedule = schedule
        self.planner = method.planner(spec.grid)
        self.check()

    def check(self) -> None:
        """Raises UsageError for a schedule that does not work with this model."""
        kind, levels = self.schedule.kind, self.schedule.levels
        if self.schedule.data_dependent and kind not in self.method.schedules:
            raise UsageError(f"schedule '{kind}' does not work with method {self.method.name}: choose another")
        most = levels[-1] if levels else self.spec.tokens
        bounded = most == self.spec.tokens if kind == NATURAL else most <= self.spec.tokens  # else it would cut off
        if levels and (not bounded or (self.sizes and not {*levels} <= {*self.sizes})):
            known = f"{', '.join(map(str, sorted(self.sizes)))}" if self.sizes else f"at most {self.spec.tokens}"
            raise UsageError(f"levels {list(levels)}: a sample of this model can keep {known} tokens")
        fewest = min(self.sizes, default=1)
        if kind != DIFFERENCE and fewest > 1 and self.schedule.ratio > self.spec.tokens / fewest + 1e-6:
            raise UsageError(
                f"the coarsest grid of this model has {fewest} of {self.spec.tokens} tokens, which is "
                f"{self.spec.tokens / fewest:.3g}x: choose a ratio below {self.schedule.ratio:g}x, or convert again"
            )

    def at_ratio(self, ratio: float, taus: np.ndarray) -> StepPlanner:
        """The same planner with another ratio, as a mean over a run with these noise levels.

        Raises UsageError for a ratio that such a run cannot reach.
        """
        if ratio == self.schedule.ratio:
            return StepPlanner(self.spec, self.method, self.schedule.fitted(taus))
        if self.schedule.data_dependent:
            return StepPlanner(self.spec, self.method, self.schedule.dropping(ratio))
        other = StepPlanner(self.spec, self.method, replace(self.schedule.policy, ratio=ratio).timetable(taus))
        return StepPlanner(self.spec, self.method, other.levelled(taus, LEVELS))

    def levelled(self, taus: np.ndarray, most: int) -> Timetable:
        """The schedule with at most `most` different numbers of kept tokens, which the model can keep."""
        if self.skips:  # all or none
            return self.schedule
        return self.schedule.levelled(taus, self.spec.tokens, most, self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The only numbers of tokens that a sample can keep; empty if there is no restriction."""
        return tuple(self.planner.sizes) if isinstance(self.planner, SizedPlanner) else ()

    @property
    def patches(self) -> tuple[int, ...]:
        """Pixels per side of the patches that a step may use, for a trunk with patch sizes."""
        image = next(item for item in self.spec.input_specs if item.name == self.spec.image)
        patch = image.shape[-1] // self.spec.grid[1]
        return tuple(patch * scale for scale in scales_of(self.spec.grid))

    @property
    def watches(self) -> bool:
        """Whether a run must store its last latents."""
        return self.method.watches and self.schedule.data_dependent

    @property
    def carries(self) -> bool:
        return self.method.remembers == "tokens"

    @property
    def skips(self) -> bool:
        """Whether a step computes all tokens or none."""
        return self.method.remembers == "updates"

    def taus(self, inputs: dict[str, Any], batch: int) -> Doubles:
        """Noise levels [B] of a step's inputs; 0.5 if the schedule does not depend on them.

        Where the tokens or frames of a sample have timesteps of their own, the sample has the highest noise level.

        Raises UsageError if the schedule needs the timestep but the timestep input is unknown, or if a timestep is
        outside its range, and CheckFailedError with the number of a sample whose timestep is not finite.
        """
        if self.spec.timestep is not None:
            given = inputs[self.spec.timestep]
            array = given.detach().double().cpu().numpy() if isinstance(given, torch.Tensor) else given
            timesteps = np.asarray(array, np.float64)
            if timesteps.ndim > 1:
                timesteps = timesteps.reshape(len(timesteps), -1).max(1)
            levels = np.broadcast_to(timesteps.reshape(-1) / self.spec.timestep_scale, (batch,))
            check_finite(levels[:, None])
            if (outside := np.abs(levels - 0.5) > 0.51).any():
                raise UsageError(
                    f"timestep {levels[outside][0] * self.spec.timestep_scale:g} is outside 0 to "
                    f"{self.spec.timestep_scale:g}: convert with timestep_scale=..., its value at pure noise"
                )
            return np.clip(levels, 0, 1)
        if self.schedule.kind in ("constant", NATURAL) or self.schedule.ratio == 1:
            return np.full(batch, 0.5)
        raise UsageError(
            f"schedule '{self.schedule.kind}' needs the timestep, but which input of the model that is, is unknown; "
            "name it with timestep=..., or use the constant schedule"
        )

    def counts(self, taus: Doubles, steps: np.ndarray | None = None) -> np.ndarray:
        """Kept tokens of each sample at its noise level, `steps` [B] after its run began."""
        return self.schedule.counts(taus, self.spec.tokens, steps)

    def fraction(self, taus: Doubles, steps: np.ndarray) -> Doubles:
        """Mode steps: the fraction of the steps to compute at noise levels [B], `steps` [B] into the runs."""
        return self.schedule.step_fraction(taus, steps)

    def found_counts(self, scores: np.ndarray, spread: np.ndarray | None) -> np.ndarray:
        """Kept tokens of each sample, if steps decide them: from scores [B, N], or from `ThirdDifference.spread`."""
        return self.method.found_counts(self, scores, spread)

    def bucket_counts(self, taus: np.ndarray) -> np.ndarray:
        """The numbers of kept tokens that a run needs shapes for."""
        if self.skips:
            return np.array([self.spec.tokens])
        return np.array(self.schedule.levels) if self.schedule.data_dependent else self.run_counts(taus)

    def run_counts(self, taus: np.ndarray) -> np.ndarray:
        """Kept tokens per sample at every step of a run."""
        return self.method.run_counts(self, taus)

    def plan(self, scores: np.ndarray, counts: np.ndarray, bucket: Bucket | None = None) -> Plan:
        """Mode chunk: a plan for scores [B, N]; raises CheckFailedError, naming a sample whose scores are not
        finite."""
        check_finite(scores)
        return self.planner(scores, counts, bucket)

    def carry(
        self,
        history: History,
        scores: np.ndarray,
        counts: np.ndarray,
        taus: Doubles,
        bucket: Bucket | None = None,
        adjust: Callable[[Doubles], Doubles] | None = None,
    ) -> CarryPlan:
        """Mode carry: the plan of a step, which is also recorded in the history; errors as in `plan`.

        `adjust` may change the urgency [B, N] of the tokens before they are chosen.
        """
        half = any(dtype == "float16" for _, dtype in self.spec.state_shapes(1).values())
        check_finite(scores, OVERFLOW if half else "")
        urgency = self.method.urgency(history, scores, counts, taus)
        return carry_plan(history, most_urgent(adjust(urgency) if adjust else urgency, counts), taus, bucket)

    def of_mask(self, keep: Mask, bucket: Bucket | None = None) -> Plan | CarryPlan:
        """The plan of a keep mask [B, N] for the first step of a run, in either mode."""
        if self.carries:
            return carry_plan(History(*keep.shape), keep, np.ones(len(keep)), bucket)
        return self.planner.plan(keep, bucket)

    def full_plan(self, batch: int, bucket: Bucket | None = None) -> Plan | CarryPlan:
        """The plan that keeps everything, for the first step of a run."""
        return self.of_mask(np.ones((batch, self.spec.tokens), bool), bucket)


OVERFLOW = (
    "; if the input is finite, the model's values are too large for the state, which keeps them in fp16 (up to 65504): "
    "convert with --state fp32 (in Python: state_dtype='fp32')"
)


def most_urgent(urgency: np.ndarray, counts: np.ndarray) -> Mask:
    """Keep mask [B, N] of the counts[b] most urgent tokens of each sample, ties by lower index."""
    order = np.argsort(-urgency, axis=1, kind="stable")
    keep = np.zeros(urgency.shape, bool)
    np.put_along_axis(keep, order, np.arange(urgency.shape[1]) < np.asarray(counts)[:, None], 1)
    return keep


def check_finite(scores: np.ndarray, cause: str = "") -> None:
    """CheckFailedError, naming the sample, for scores that are not finite; `cause` is added to the message."""
    bad = ~np.isfinite(scores.reshape(len(scores), -1)).all(axis=1)
    if bad.any():
        raise CheckFailedError(
            f"sample {int(bad.argmax())} of the batch has non-finite values before the trunk: check its input "
            f"(NaN would spread to other samples through padded attention){cause}"
        )
