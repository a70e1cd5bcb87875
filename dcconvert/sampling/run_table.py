"""A sampling run as a table of numbers: what each step computes, and how its output moves the sample.

Every deterministic sampler that evaluates a model once a step and is linear in what the model returned is such a table:
Euler, DDIM, Adams-Bashforth, DPM-Solver++, UniPC. So is every forecast of a skipped trunk by a weighted sum of earlier
updates: holding the last one, a straight line, TaylorSeer. One loop runs them all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.step_planner import StepPlanner

VERSION = 1
PREDICTIONS = ("eps", "flow")
MOST_STEPS = 10_000


# A model inside one run of a batch: x [B, C, H, W], t [B], y [B] -> [B, C', H, W]. A table with steps that skip the
# trunk gives it the weights of each step as well, which are empty where the step is computed.
Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Row:
    """One step: evaluate the model at `t`, then move on.

    The model sees timestep `t` at noise level `tau`. `weights`, newest first, are those of the trunk's last updates in
    a step that skips the trunk; without them the step is computed in full. With x_i the sample, z the starting noise
    and m_i what the model returned: v_i = scale m_i + shift x_i, and x_{i+1} = state x_i + noise z + sum_j outputs[j]
    v_{i-j}. So v_i may be the velocity of a flow although the model predicts noise.
    """

    t: float
    tau: float
    outputs: tuple[float, ...]
    state: float = 1.0
    noise: float = 0.0
    weights: tuple[float, ...] = ()
    scale: float = 1.0
    shift: float = 0.0

    @property
    def full(self) -> bool:
        return not self.weights


class Batched:
    """A sampler whose `run` can be made on a few samples at a time."""

    run: Callable[..., Tensor]

    def run_batches(
        self, new_model: Callable[[], Model], noise: Tensor, labels: Tensor, batch: int, **options: Any
    ) -> Tensor:
        """`run` on `batch` samples at a time, each batch with a model of its own; options as `run` has them."""
        pairs = zip(noise.split(batch), labels.split(batch), strict=True)
        return torch.cat([self.run(new_model(), x, y, **options) for x, y in pairs])


@dataclass(frozen=True)
class RunTable(Batched):
    """The steps of a run, from noise to image. `prediction` "flow" or "eps"; `guidance`: the scale it was made for.

    `fitted`: whether its numbers were fitted to a model, at that guidance.

    UsageError for a table that cannot be run: numbers that are not finite, a step that needs outputs or updates from
    before the run began, noise levels that rise.
    """

    rows: tuple[Row, ...]
    prediction: str = "flow"
    guidance: float = 1.0
    name: str = ""
    fitted: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.rows) <= MOST_STEPS:
            raise UsageError(f"a run table of {len(self.rows)} steps: it needs 1 to {MOST_STEPS}")
        if self.prediction not in PREDICTIONS:
            raise UsageError(f"unknown prediction '{self.prediction}' in a run table: use eps or flow")
        computed = 0
        for number, row in enumerate(self.rows):
            values = (row.t, row.tau, row.state, row.noise, row.scale, row.shift, *row.outputs, *row.weights)
            if not all(map(math.isfinite, values)):
                raise UsageError(f"step {number} of the run table holds a number that is not finite: make it again")
            if not row.outputs or len(row.outputs) > number + 1 or (row.weights and not computed):
                raise UsageError(f"step {number} of the run table reads what no earlier step computed: make it again")
            computed += row.full
        if any(later.tau > earlier.tau + 1e-6 for earlier, later in zip(self.rows, self.rows[1:], strict=False)):
            raise UsageError("the noise levels of the run table rise: make it again")

    @property
    def steps(self) -> int:
        return len(self.rows)

    @property
    def evaluations(self) -> int:
        """Steps that are computed in full."""
        return sum(row.full for row in self.rows)

    def cost(self, skipped: float) -> float:
        """What a run costs in computed steps, if a skipped one costs so much of one."""
        return self.evaluations + skipped * (self.steps - self.evaluations)

    @property
    def updates(self) -> int:
        """How many of the trunk's last updates its steps read; 0 for a table that the original graph can run."""
        return max(len(row.weights) for row in self.rows)

    @property
    def memory(self) -> int:
        """How many of the model's last outputs its steps read."""
        return max(len(row.outputs) for row in self.rows)

    @property
    def taus(self) -> np.ndarray:
        """Noise level in [0, 1] at each step."""
        return np.array([row.tau for row in self.rows])

    @property
    def timesteps(self) -> np.ndarray:
        """What the model sees as t at each step, float [steps], falling."""
        return np.array([row.t for row in self.rows])

    @property
    def solver(self) -> str:
        return self.name or "run table"

    def guidance_note(self, guidance: float, folder: object) -> str:
        """What to tell a user who samples with another guidance scale than the table was made for; else nothing."""
        if guidance == self.guidance:
            return ""
        made = "fitted" if self.fitted else "made"
        return (
            f"The run table was {made} for guidance {self.guidance:g} and is used with {guidance:g}, where it may be "
            f"worse: 'dcconvert tune {folder} --guidance {guidance:g}' fits one for that."
        )

    def run_counts(self, planner: StepPlanner) -> np.ndarray:
        """Tokens that each step computes [steps]: all or none."""
        return np.array([planner.spec.tokens if row.full else 0 for row in self.rows])

    def run(
        self,
        model: Model,
        noise: Tensor,
        labels: Tensor,
        *,
        guidance: float | None = None,
        null_class: int | None = None,
        on_step: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """Take noise [B, C, H, W] to samples of the same shape; `labels` int64 [B].

        `guidance` (None: what the table was made for) other than 1 evaluates the conditional and unconditional halves
        in one batch of 2B, y = `null_class` for the second (classifier-free guidance, arXiv 2207.12598).
        """
        last = noise
        for number, sample in enumerate(self.samples(model, noise, labels, guidance, null_class)):
            last = sample
            on_step(number)
        return last

    def samples(
        self,
        model: Model,
        noise: Tensor,
        labels: Tensor,
        guidance: float | None = None,
        null_class: int | None = None,
    ) -> Iterator[Tensor]:
        """What a run has after each of its steps; arguments as in `run`."""
        return self.continued(model, 0, noise, deque(maxlen=self.memory), noise, labels, guidance, null_class)

    def continued(
        self,
        model: Model,
        first: int,
        x: Tensor,
        outputs: deque[Tensor],
        noise: Tensor,
        labels: Tensor,
        guidance: float | None = None,
        null_class: int | None = None,
    ) -> Iterator[Tensor]:
        """What a run has after each of its steps from number `first` on, other arguments as in `run`.

        `x` [B, C, H, W]: its sample before that step. `outputs`: of earlier steps, newest first; each step adds one.
        """
        scale, skips = self.guidance if guidance is None else guidance, self.updates > 0
        check_guidance(scale, null_class)
        for row in self.rows[first:]:
            outputs.appendleft(evaluated(model, x, row, labels, scale, null_class, skips))
            x = moved(row, x, noise, outputs)
            yield x

    def to_dict(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Any) -> RunTable:
        """The table of a `run.json`; UsageError for anything else."""
        try:
            if data["version"] != VERSION:
                raise UsageError(f"a run table of version {data['version']}, this dcconvert reads {VERSION}")
            rows = tuple(row_of(entry) for entry in data["rows"])
            name = str(data.get("name", ""))
            return cls(rows, str(data["prediction"]), float(data["guidance"]), name, bool(data.get("fitted", False)))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UsageError("this is not a run table: make one with 'dcconvert tune'") from error


def row_of(entry: Mapping[str, Any]) -> Row:
    known = {item.name: item for item in fields(Row)}
    if {*entry} - {*known}:
        raise TypeError(f"a run table has no {sorted({*entry} - {*known})[0]}")
    values = {k: tuple(map(float, v)) if isinstance(v, list | tuple) else float(v) for k, v in entry.items()}
    return Row(**values)  # type: ignore[arg-type]


def evaluated(
    model: Model, x: Tensor, row: Row, y: Tensor, scale: float, null_class: int | None, skips: bool
) -> Tensor:
    """v_i [B, C, H, W] of a step, of both halves where there is guidance; learned variances are cut off.

    `skips`: whether the table has steps that skip the trunk.
    """
    made = guided(model, x, row.t, y, scale, null_class, *((row.weights,) if skips else ()))
    return made if (row.scale, row.shift) == (1, 0) else row.scale * made + row.shift * x


def guided(
    model: Model, x: Tensor, t: float, y: Tensor, scale: float, null_class: int | None, *weights: tuple[float, ...]
) -> Tensor:
    """What a model returns at timestep `t`, in the channels of x; both halves in one batch where there is guidance."""
    channels = x.shape[1]
    if scale == 1 or null_class is None:
        return model(x, torch.full((len(x),), t, device=x.device), y, *weights)[:, :channels]
    both, labels = both_halves(x, y, null_class)
    made = model(both, torch.full((len(both),), t, device=x.device), labels, *weights)
    conditional, unconditional = made[:, :channels].chunk(2)
    return unconditional + scale * (conditional - unconditional)


def both_halves(x: Tensor, y: Tensor, null_class: int) -> tuple[Tensor, Tensor]:
    """Samples and labels of the conditional and then of the unconditional half of guidance."""
    return torch.cat([x, x]), torch.cat([y, torch.full_like(y, null_class)])


def check_guidance(scale: float, null_class: int | None) -> None:
    """UsageError for guidance of a model that has no unconditional class."""
    if scale != 1 and null_class is None:
        raise UsageError("guidance needs a model with an unconditional class")


def moved(row: Row, x: Tensor, noise: Tensor, outputs: Iterable[Tensor]) -> Tensor:
    """The sample after a step; `outputs` newest first."""
    result = row.state * x
    if row.noise:
        result = result + row.noise * noise
    for coefficient, output in zip(row.outputs, outputs, strict=False):
        result = result + coefficient * output
    return result
