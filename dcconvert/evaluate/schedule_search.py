"""Search for the number of steps, the warm-up and the kept-fraction curve that score best at a given compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.schedule import CURVE, WARM_UP, Policy, Timetable

KNOTS = (0.0, 0.5, 1.0)  # noise levels
CONSTANT = (1.0, 1.0, 1.0)
# Relative kept fractions at the knots, clean first: mildly and steeply falling toward clean images, rising, a hump.
SHAPES = ((0.5, 0.75, 1.0), (0.15, 0.5, 1.0), (1.0, 0.75, 0.5), (0.4, 1.0, 0.4))

MIN_BUDGET = 2.0  # full steps: one for the dense first step, one to distribute
SPACING = 1.2  # ratio between numbers of steps, and of the fewest to the budget, where nearly all are dense
WARM_UPS = range(1, 7)
FACTORS = (2.0, 1.4, 1.2)  # by which a level is moved, coarse to fine
LEAST_LEVEL = 0.01  # of the highest: a lower one changes nothing, because a step keeps at least one token
FINALISTS = 3  # numbers of steps that are tried again after their first trial


@dataclass(frozen=True)
class Candidate:
    """A way to spend the budget; `shape`: relative kept fractions at the noise levels `KNOTS`, the highest is 1."""

    steps: int
    warm_up: int
    shape: tuple[float, float, float] = CONSTANT

    def schedule(self, budget: float, taus: NDArray[np.float64]) -> Timetable:
        """The schedule whose run over `taus` [steps] costs `budget` full steps; raises UsageError if there is none."""
        knots = tuple(zip(KNOTS, self.shape, strict=True))
        return Policy(CURVE, self.steps / budget, warm_up=self.warm_up, knots=knots).timetable(taus)


@dataclass(frozen=True)
class Trial:
    """A candidate, its fitted schedule and what it scored; `counts`: tokens that a sample keeps at each step."""

    candidate: Candidate
    schedule: Timetable
    counts: tuple[int, ...]
    score: float


def step_counts(budget: float, most: int) -> list[int]:
    """Numbers of steps worth trying, ascending: a little more than `budget` to `most`, evenly spaced on a log scale.

    Raises UsageError if the budget is below two steps or leaves nothing to choose.
    """
    fewest = math.ceil(SPACING * budget)
    if budget < MIN_BUDGET:
        raise UsageError(
            f"{budget:.3g} full steps are too few to distribute: choose a lower --ratio, or convert with more --steps "
            f"(at least {MIN_BUDGET:g} are needed)"
        )
    if fewest > most:
        raise UsageError(
            f"a run of {most} steps with a budget of {budget:.3g} full steps leaves nothing to choose: give a higher "
            f"--ratio (at least {SPACING:g}x)"
        )
    places = 1 + round(math.log(most / fewest) / math.log(SPACING))
    return sorted({round(count) for count in np.geomspace(fewest, most, places)} | {most})


class Search:
    """Coordinate descent from a grid; every candidate costs the same and is scored once. A higher score is better.

    `taus(steps)` returns a run's noise levels, and `score` the quality of a schedule's images with them. A score that
    is not finite counts as the worst.
    """

    def __init__(
        self,
        budget: float,
        most: int,
        tokens: int,
        taus: Callable[[int], NDArray[np.float64]],
        score: Callable[[int, Timetable], float],
    ) -> None:
        self.budget = budget
        self.tokens = tokens
        self.grid = step_counts(budget, most)
        self.taus = taus
        self.score = score
        self.trials: dict[tuple[int, ...], Trial] = {}

    def run(self) -> list[Trial]:
        """All trials, best first; raises UsageError if no candidate can be fitted to the budget."""
        for steps in self.grid:  # a constant curve, and the warm-up that a conversion would choose
            self.consider(Candidate(steps, min(WARM_UP, max(1, int(self.budget / 2)))))
        starts = [trial.candidate for trial in self.ranked()[:FINALISTS]]
        for start in starts:
            for warm_up in WARM_UPS:
                self.consider(replace(start, warm_up=warm_up))
        best_of: dict[int, Candidate] = {}
        for trial in self.ranked():
            best_of.setdefault(trial.candidate.steps, trial.candidate)
        for start in list(best_of.values())[:FINALISTS]:
            for shape in SHAPES:
                self.consider(replace(start, shape=shape))
        if not self.trials:
            raise UsageError(f"no schedule costs {self.budget:.3g} full steps: choose a lower --ratio")
        for factor in FACTORS:
            self.descend(factor)
        return self.ranked()

    def ranked(self) -> list[Trial]:
        """Trials so far, best first."""
        return sorted(self.trials.values(), key=lambda trial: trial.score, reverse=True)

    def descend(self, factor: float) -> None:
        """Move from the best candidate to a better neighbour until there is none."""
        best = self.ranked()[0]
        improved = True
        while improved:
            improved = False
            for candidate in self.neighbours(best.candidate, factor):
                trial = self.consider(candidate)
                if trial is not None and trial.score > best.score:
                    best, improved = trial, True
                    break

    def neighbours(self, centre: Candidate, factor: float) -> Iterator[Candidate]:
        """Candidates one step away in one coordinate: a level, the warm-up, the number of steps."""
        for place in range(len(KNOTS)):
            for scale in (factor, 1 / factor):
                levels = list(centre.shape)
                levels[place] *= scale
                yield replace(centre, shape=normal(levels))
        for warm_up in (centre.warm_up - 1, centre.warm_up + 1):
            if warm_up in WARM_UPS:
                yield replace(centre, warm_up=warm_up)
        index = self.grid.index(centre.steps)
        for steps in self.grid[max(0, index - 1) : index + 2]:
            if steps != centre.steps:
                yield replace(centre, steps=steps)

    def consider(self, candidate: Candidate) -> Trial | None:
        """Score a candidate unless its counts have been scored already; None if it does not cost the budget."""
        try:
            taus = self.taus(candidate.steps)
            schedule = candidate.schedule(self.budget, taus)
        except UsageError:
            return None
        counts = tuple(schedule.run_counts(taus, self.tokens).tolist())
        # Rounding changes a step by half a token at most. If the difference is larger, some steps need their one token.
        if abs(sum(counts) - self.budget * self.tokens) > candidate.steps / 2:
            return None
        if counts not in self.trials:
            score = self.score(candidate.steps, schedule)
            self.trials[counts] = Trial(candidate, schedule, counts, score if math.isfinite(score) else -math.inf)
        return self.trials[counts]


def normal(levels: list[float]) -> tuple[float, float, float]:
    """Relative levels with a highest value of 1, and none so low that it has no effect."""
    clean, middle, noise = (max(level / max(levels), LEAST_LEVEL) for level in levels)
    return clean, middle, noise
