"""Run tables of equal cost, fitted to a model and judged on images that they were not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.export.checks.flops import converted_gmacs, original_gmacs
from dcconvert.export.checks.latency import interleaved, spread
from dcconvert.export.checks.parity import as_array
from dcconvert.export.runtimes.ort import pick
from dcconvert.images.pixels import psnr
from dcconvert.models.dit import DiTConfig
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.spec import UPDATE, update_name
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.run import Runtime
from dcconvert.passes.runtime.step_run import StepRun
from dcconvert.sampling.default_tables import (
    ADAMS,
    GRADED,
    LEAST,
    default_levels,
    default_table,
    on_levels,
    original_run,
    pattern,
)
from dcconvert.sampling.fit_table import Trajectory, fitted, trajectory
from dcconvert.sampling.polish_table import polished
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Sampler, initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep, OrtPair, arrays_of

SKIPS = (1, 2)  # skipped steps for each computed one
CONTROLS = ("euler", "unipc")  # solvers for the original, with nothing fitted
GIVEN, DEFAULT = "the given table", "the unfitted default"  # names of trials
StepTimes = dict[str, dict[str, float]]  # milliseconds (`spread`) of a step of the original, computed, skipped
CLOSE = 1.01  # of a budget: what a run may cost, so that cheap skipped steps do not take the place of a computed one
PRESENT = "the bundle's present table"
CONVERGED = 50.0  # dB between the reference and a run of half its steps, below which a warning is due


class FittedStep(ConvertedStep):
    """One run of a bundle in mode steps that exposes its trunk's updates; without weights, a step is computed."""

    def __init__(self, model: DynamicModel, runtime: Runtime, groups: int = 1) -> None:
        super().__init__(model, runtime, groups, by_table=True)

    @property
    def updates(self) -> list[Tensor]:
        """The trunk's last updates [B, N, D], newest first."""
        run = self.run
        assert isinstance(run, StepRun)
        newest, slots = int(run.updates.newest[0]), run.updates.slots
        known = min(int(run.updates.computed[0]), slots)
        return [self._tensor(run.state.values[update_name((newest - age) % slots)]) for age in range(known)]

    def update(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The trunk's update at a step that is not part of the run."""
        inputs = arrays_of(self.model, x, t, y)
        with self.runtime.turn:
            made = self.runtime.call("full", self.runtime.feed("full", inputs), self.runtime.full_bucket(inputs), {})
            return self._tensor(made[UPDATE])

    def copies(self, times: int) -> FittedStep:
        """The step function of a separate run that continues from here with every sample repeated so many times.

        The halves of guidance stay apart: copies of one half come before those of the other.
        """
        other = FittedStep(self.model, self.runtime, self.groups)
        assert isinstance(self.run, StepRun)
        halves = np.arange(self.run.batch).reshape(self.groups, -1)
        other.run = self.run.copied(np.concatenate([np.tile(half, times) for half in halves]))
        return other

    def _tensor(self, value: object) -> Tensor:
        return torch.from_numpy(np.array(self.runtime.array(value)))


@dataclass(frozen=True)
class Images:
    """Noise and labels of some images, and the converged run from there."""

    noise: Tensor
    labels: Tensor
    reference: Trajectory


@dataclass(frozen=True)
class Trial:
    """A run of about the budget. `cost` in steps of the original; `psnr` of the images it was not fitted to, [n]."""

    name: str
    table: RunTable | Sampler
    cost: float
    psnr: Tensor

    @property
    def fitted(self) -> bool:
        return isinstance(self.table, RunTable) and self.table.fitted

    @property
    def mean(self) -> float:
        return float(self.psnr.mean())

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return float(self.psnr.std() / len(self.psnr) ** 0.5)


@dataclass(frozen=True)
class Gain:
    """How much better a run is than another, in dB, image by image: the mean and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, trial: Trial, other: Trial) -> Gain:
        found = trial.psnr - other.psnr
        return cls(float(found.mean()), float(found.std() / len(found) ** 0.5))

    @property
    def enough(self) -> bool:
        """Whether it is at least as good, as far as these images can tell; also if the other's are not finite."""
        return not self.mean < -self.error


def best_first(trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: -trial.mean)


def skip_cost(model: DynamicModel) -> float:
    """Operations of a skipped step, in steps of the original."""
    inputs = model.spec.example(2)
    return converted_gmacs(model, inputs, 0) / original_gmacs(model, inputs)


def step_times(pair: OrtPair, batch: int, runs: int, tick: Callable[[], None] = lambda: None) -> StepTimes:
    """Times of each kind of step for `batch` samples on ONNX Runtime, measured in turn."""
    tokens = pair.model.spec.tokens
    feed = {name: as_array(value) for name, value in pair.model.spec.example(batch).items()}
    timestep = pair.model.spec.timestep
    assert timestep is not None
    feed[timestep] = np.full_like(feed[timestep], 500)  # the noise must not rise from call to call
    run, given = pair.converted.start(batch), pick(pair.original, feed)
    calls: dict[str, Callable[[], Any]] = {
        "original": lambda: pair.original.run(None, given),
        "computed": lambda: run.step(feed, np.full(batch, tokens)),
        "skipped": lambda: run.step(feed, np.zeros(batch, np.int64)),
    }
    return {name: spread(values) for name, values in interleaved(calls, runs, 3, tick).items()}


def run_time(steps: int, computed: int, times: StepTimes, original: bool = False) -> float:
    """Milliseconds of a whole run of so many steps, of the converted model or of the original."""
    kind = "original" if original else "computed"
    return times[kind]["median"] * computed + times["skipped"]["median"] * (steps - computed)


@dataclass(frozen=True)
class Tuner:
    """Fits the tables of one bundle and judges them.

    `new_step` starts a fresh run. `skip_cost`: the cost of a skipped step in computed steps, by operations or by time,
    like the budget.
    `polish`: rounds of Gauss-Newton on the final images, for the fitted table without skipped steps and the best with
    them.
    `tolerance`: how many times the budget a run may cost.
    """

    new_step: Callable[[], FittedStep]
    prediction: str
    skip_cost: float
    guidance: float = 1.0
    null_class: int | None = None
    polish: int = 0
    tolerance: float = CLOSE

    def images(self, config: DiTConfig, seed: int, count: int, steps: int, tick: Callable[[], None]) -> Images:
        """Images of so many seeds from `seed` on, with their reference, an Adams run of so many steps."""
        noise = initial_noise(seed, count, config.in_channels, config.image_size)
        labels = labels_for(count, config.num_classes)
        found = trajectory(
            self.structure(ADAMS, steps), self.new_step(), noise, labels, self.null_class, lambda _: tick()
        )
        return Images(noise, labels, found)

    def convergence(self, images: Images, steps: int, tick: Callable[[], None]) -> float:
        """PSNR in dB of a run of so many steps to the reference: how far that is from converged."""
        return float(self.judged(self.structure(ADAMS, steps), images, tick).mean())

    def structure(self, kind: str, steps: int) -> RunTable:
        table = original_run(self.prediction, steps, kind)
        assert isinstance(table, RunTable)
        return replace(table, guidance=self.guidance)

    def structures(self, budget: float) -> Iterator[tuple[str, RunTable]]:
        """Tables that cost no more than `budget` steps of the original, with every number of skipped steps."""
        whole = int(budget + 1e-9)
        yield "all steps computed", self.structure(GRADED, whole)
        for skips in SKIPS:
            full = self.affordable(budget, skips)
            if full is not None:
                table = on_levels(self.prediction, default_levels(full), full)
                yield f"{skips} skipped after each", replace(table, guidance=self.guidance)

    def affordable(self, budget: float, skips: int) -> list[bool] | None:
        """The longest pattern that costs about the budget; None if there is none with a skipped step."""
        for evaluations in range(int(budget), 1, -1):
            full = pattern(evaluations, skips)
            if not all(full) and self.cost(full) <= budget * self.tolerance:
                return full
        return None

    def cost(self, full: Sequence[bool]) -> float:
        return sum(full) + self.skip_cost * (len(full) - sum(full))

    def trials(self, budget: float, seen: Images, fresh: Images, tick: Callable[[str], None]) -> list[Trial]:
        """Every structure, as it is and fitted to the images `seen`, and the original with known solvers.

        Raises UsageError if the budget is below two steps.
        """
        if budget < 2:
            raise UsageError(f"a budget of {budget:.3g} steps of the original: at least 2 are needed to fit anything")
        found = []
        fits: dict[str, RunTable] = {}
        for name, plain in self.structures(budget):
            found.append(self.trial(name, plain, fresh, tick))
            fits[name] = self.fit(f"{name}, fitted", plain, seen, tick)
            found.append(self.trial(f"{name}, fitted", fits[name], fresh, tick))
        for name in self.worth_polishing(fits, seen, tick) if self.polish else ():
            table = self.polished(f"{name}, polished", fits[name], seen, tick)
            found.append(self.trial(f"{name}, polished", table, fresh, tick))
        whole = int(budget + 1e-9)
        controls = {f"original, {solver}": Sampler(self.prediction, whole, solver) for solver in CONTROLS}
        found += [self.trial(name, sampler, fresh, tick) for name, sampler in controls.items()]
        return best_first(found)

    def comparable(self, table: RunTable, cost: float) -> bool:
        """Whether a table is for this kind of model and this guidance, and costs about that much or less."""
        if (table.prediction, table.guidance) != (self.prediction, self.guidance):
            return False
        return table.cost(self.skip_cost) <= cost * self.tolerance

    def beside(self, table: RunTable, fresh: Images, tick: Callable[[str], None]) -> tuple[Trial, Trial, list[Trial]]:
        """A table that was not fitted here, the default with as many computed steps, and all trials, best first.

        Those are these two and the original at the table's cost, on its graded grid and with UniPC. Raises UsageError
        for a table of one computed step, which has no default beside it.
        """
        plain = default_table(self.prediction, table.evaluations, 1, self.guidance)
        given, default = self.trial(GIVEN, table, fresh, tick), self.trial(DEFAULT, plain, fresh, tick)
        whole = max(LEAST, int(given.cost + 1e-9))
        controls: dict[str, RunTable | Sampler] = {
            "original, graded grid": self.structure(GRADED, whole),
            "original, unipc": Sampler(self.prediction, whole, "unipc"),
        }
        found = [given, default, *(self.trial(name, run, fresh, tick) for name, run in controls.items())]
        return given, default, best_first(found)

    def least_budget(
        self, psnr: float, most: int, seen: Images, fresh: Images, tick: Callable[[str], None]
    ) -> tuple[int, list[Trial]]:
        """The smallest whole budget up to `most` whose best table reaches this mean PSNR in dB, and its trials.

        It is found by bisection, which assumes that quality rises with the budget. Raises UsageError if even `most`
        does not reach it.
        """
        tried: dict[int, list[Trial]] = {}

        def best(budget: int) -> float:
            tried[budget] = self.trials(budget, seen, fresh, lambda what: tick(f"budget {budget}: {what}"))
            return max(trial.mean for trial in tried[budget] if isinstance(trial.table, RunTable))

        low, high = 1, most
        if (found := best(most)) < psnr:
            raise UsageError(
                f"no run of up to {most} computed steps reaches {psnr:g} dB: the best has {found:.1f} dB; ask for less"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if best(middle) >= psnr else (middle, high)
        return high, tried[high]

    def fit(self, name: str, structure: RunTable, seen: Images, tick: Callable[[str], None]) -> RunTable:
        """The structure with its numbers fitted to images, step by step."""
        found = fitted(
            structure,
            self.new_step(),
            seen.noise,
            seen.labels,
            seen.reference,
            null_class=self.null_class,
            on_step=lambda _: tick(name),
        )
        return replace(found, name=name)

    def worth_polishing(self, fits: dict[str, RunTable], seen: Images, tick: Callable[[str], None]) -> list[str]:
        """Names of the table without skipped steps, which is the control, and of the best on `seen` with them."""
        control, *others = fits
        quality = {name: float(self.judged(fits[name], seen, lambda: tick("choose")).mean()) for name in others}
        return [control, *sorted(quality, key=lambda name: -quality[name])[:1]]

    def polished(self, name: str, table: RunTable, seen: Images, tick: Callable[[str], None]) -> RunTable:
        """A fitted table with all its numbers improved together, by the final images."""
        found = polished(
            table,
            self.new_step,
            seen.noise,
            seen.labels,
            seen.reference.samples[-1],
            rounds=self.polish,
            null_class=self.null_class,
            on_step=lambda number: tick(f"{name}, row {number + 1} of {table.steps}"),
        )
        return replace(found, name=name)

    def trial(self, name: str, table: RunTable | Sampler, fresh: Images, tick: Callable[[str], None]) -> Trial:
        cost = table.cost(self.skip_cost) if isinstance(table, RunTable) else float(table.steps)
        return Trial(name, table, cost, self.judged(table, fresh, lambda: tick(name)))

    def judged(self, table: RunTable | Sampler, images: Images, tick: Callable[[], None]) -> Tensor:
        """PSNR in dB of each image [n] to where the converged run takes it."""
        options: dict[str, Any] = {"guidance": self.guidance, "null_class": self.null_class}
        made = table.run(self.new_step(), images.noise, images.labels, on_step=lambda _: tick(), **options)
        return psnr(made, images.reference.samples[-1])
