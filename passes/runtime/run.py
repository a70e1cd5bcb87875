"""A sampling run, and the interface of a runtime: the same steps in torch and in every exported runtime.

A step consists of route, the plan on the host, and denoise. In mode chunk, steps are independent. In mode carry, a run
has a state on the runtime's device and the bookkeeping on the host.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.ir.spec import DISTANCE_NAME, SCORES_NAME, InputSpec, ModelSpec
from dcconvert.passes.planning.carry_plan import CarryPlan
from dcconvert.passes.planning.chunk_plan import Plan
from dcconvert.passes.planning.latent_difference import ThirdDifference
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.planning.token_history import History
from dcconvert.passes.runtime.state import State
from dcconvert.passes.runtime.threads import Guarded, OneThread, by_one_thread
from dcconvert.passes.runtime.update_history import UpdateHistory


class Buckets(Protocol):
    """The shapes that a runtime is limited to."""

    def choose(self, batch: int, counts: Any) -> Bucket:
        """The smallest bucket that holds `batch` samples of `counts` (one number, or [batch]) tokens."""


class Runtime(ABC):
    """A converted model in some runtime. Values in the runtime's own memory are passed on without a copy.

    A new runtime implements `call`, `empty_state` and `array`; docs/adding_a_runtime.md shows an example. `planner`
    decides what a step computes; `bucket_set` holds the shapes that the runtime is limited to (None: dynamic shapes).
    """

    planner: StepPlanner
    bucket_set: Buckets | None
    turn: AbstractContextManager[Any] = nullcontext()  # held during a step: a lock, if the steps of runs share buffers

    @abstractmethod
    def call(
        self, graph: str, feed: Mapping[str, Any], bucket: Bucket | None, into: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Outputs by name, in the graph's order (`ModelSpec.outputs_of`).

        `graph`: one of `ModelSpec.graphs`. `feed`: its inputs by name, as the caller or an earlier call gave them; plan
        inputs are numpy arrays. `bucket`: the shape that holds the batch. `into`: buffers that some outputs must be
        written to, as the state requires.
        """

    @abstractmethod
    def empty_state(self, batch: int) -> State:
        """The state of `batch` samples before their first step: zeros in the shapes of `ModelSpec.state_shapes`."""

    @abstractmethod
    def array(self, value: Any) -> np.ndarray:
        """An output on the host, in memory that later calls do not change."""

    def result(self, value: Any) -> Any:
        """An output of the model in the form that the caller of a run gets."""
        return self.array(value)

    def start(self, batch: int, groups: int = 1) -> Run:
        """A new sampling run of `batch` samples; call its `step` for every timestep. `groups` as in `Run`."""
        return self.planner.method.run(self, batch, groups)

    def beside(self, array: np.ndarray, value: Any) -> Any:
        """A host array moved to the place of another value of the runtime, for graphs that take both."""
        return array

    @property
    def spec(self) -> ModelSpec:
        return self.planner.spec

    def padded(self, batch: int) -> int:
        """The batch size that `batch` samples run in; raises UsageError if no bucket is large enough."""
        return batch if self.bucket_set is None else self.bucket_set.choose(batch, self.spec.tokens).batch

    def bucket(self, counts: np.ndarray) -> Bucket | None:
        """The bucket for a batch that keeps `counts` [B] tokens; None for dynamic shapes."""
        return None if self.bucket_set is None else self.bucket_set.choose(len(counts), counts)

    def plan_shape(self, counts: np.ndarray) -> Bucket | None:
        """The shape of a plan: the bucket, unless the runtime accepts shapes between buckets."""
        return self.bucket(counts)

    def feed(
        self,
        graph: str,
        inputs: Mapping[str, Any],
        live: Mapping[str, Any] | None = None,
        plan: Plan | CarryPlan | None = None,
        state: State | None = None,
    ) -> dict[str, Any]:
        """The inputs of a graph, by name and in order.

        `inputs`: the model's inputs, and the results of `prepare` (computed here for `denoise` if they are missing).
        `live`: the results of `route`. `plan` and `state` as in `denoise`.
        """
        given = {**inputs, **(live or {}), **(state.values if state else {})}
        names, constants = self.spec.inputs_of(graph), self.spec.constants
        if graph == "denoise" and constants and constants[0] not in given:
            given |= self.prepare(inputs)
        if plan is not None and live:
            hidden = live[self.spec.live[0]]
            given |= {name: self.beside(array, hidden) for name, array in plan.arrays().items() if name in names}
        return {name: given[name] for name in names}

    def prepare(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Values that stay the same during a run, by name; none for most models."""
        if not self.spec.constants:
            return {}
        return self.call("prepare", self.feed("prepare", inputs), self.full_bucket(inputs), {})

    def route(self, inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Scores [B, N], and the values that `denoise` needs, by name."""
        live = self.call("route", self.feed("route", inputs), self.full_bucket(inputs), {})
        return live.pop(SCORES_NAME), live

    def denoise(
        self, inputs: Mapping[str, Any], live: Mapping[str, Any], plan: Plan | CarryPlan, state: State | None = None
    ) -> list[Any]:
        """Flat outputs of the model for a plan. In mode carry, also updates the state (None: an empty one).

        `inputs`: the model's inputs, and the results of `prepare` (computed here if they are missing).
        """
        if state is None:
            state = self.empty_state(len(plan.counts))
        feed = self.feed("denoise", inputs, live, plan, state)
        made = self.call("denoise", feed, self.bucket(plan.counts), state.into)
        if self.spec.states:
            state.advance(made, self.array(made[DISTANCE_NAME]).astype(np.float64))
        return [self.result(value) for name, value in made.items() if name not in self.spec.carried]

    def full_bucket(self, inputs: Mapping[str, Any]) -> Bucket | None:
        """The bucket of a batch that keeps every token."""
        return self.bucket(np.full(len(inputs[self.spec.image]), self.spec.tokens))


@dataclass
class StageTimes:
    """Seconds spent in the stages of one step."""

    route: float
    plan: float
    denoise: float

    @property
    def total(self) -> float:
        return self.route + self.plan + self.denoise


class Run(Guarded):
    """One batch of samples on their way from noise to image.

    Call `step` with the original's inputs by name, in the sampler's order. `restart` replaces some of the samples by
    new ones, which have no state at their next step. Samples may be at different timesteps and start at different
    times. With `groups`, the batch consists of that many equal parts, such as the conditional and unconditional halves
    of guidance, and sample i of every part computes the same tokens (mode carry). Inputs other than image and timestep,
    and values that are added to the tokens (`ModelSpec.varies`), must stay the same as at a sample's first step; what
    depends only on them is computed then.

    One thread makes all steps, until `restart` clears the whole run: UsageError for another thread's step. UsageError
    also for a batch or groups below 1, and for groups that the batch cannot be split into.
    """

    def __init__(self, runtime: Runtime, batch: int, groups: int = 1, *, gradients: bool = False) -> None:
        if min(batch, groups) < 1 or batch % groups:
            raise UsageError(
                f"a batch of {batch} cannot be split into {groups} groups that share their choice of tokens"
            )
        self.runtime = runtime
        self.batch = batch
        self.groups = groups
        self.gradients = gradients
        self.size = runtime.padded(batch)
        self.last_plan: Plan | CarryPlan | None = None
        self.last_times: StageTimes | None = None
        planner = runtime.planner
        self.history = History(self.size, planner.spec.tokens) if planner.carries else None
        self.watch = ThirdDifference(self.size) if planner.watches else None
        self.computed: list[float] = []  # the fraction of the tokens that each step computed
        self.guard = OneThread()
        self._constants: dict[str, Any] | None = None

    @cached_property
    def state(self) -> State:
        """What the samples carry from step to step; memory for it is taken at the first step."""
        return self.runtime.empty_state(self.size)

    @property
    def ratio(self) -> float:
        """All tokens divided by the computed ones, over the steps made so far; 1 before the first."""
        return len(self.computed) / sum(self.computed) if sum(self.computed) else 1.0

    @property
    def kept(self) -> np.ndarray:
        """Tokens that each sample [B] kept at the last step."""
        assert self.last_plan is not None
        return self.last_plan.counts[: self.batch]

    @property
    def keep(self) -> np.ndarray:
        """Which tokens each sample computed at the last step, bool [B, N]."""
        assert self.last_plan is not None
        return self.last_plan.keep[: self.batch]

    @property
    def remembered(self) -> History | ThirdDifference | UpdateHistory | None:
        """The host's record of a run's earlier steps."""
        return self.history or self.watch

    def restart(self, samples: Sequence[int] | None = None) -> None:
        """Clear the state of these samples (None: all), and of those that share tokens with them."""
        named = list(range(self.batch) if samples is None else samples)
        if not all(0 <= sample < self.batch for sample in named):
            raise UsageError(f"samples {named}: this run has samples 0 to {self.batch - 1}")
        part = self.batch // self.groups
        chosen = sorted({sample % part + group * part for sample in named for group in range(self.groups)})
        if self.batch - 1 in chosen:
            chosen += range(self.batch, self.size)  # the copies that fill up the batch
        if len(chosen) == self.size:
            self.computed = []
            self.guard.release()
        self.forget(chosen)

    def forget(self, samples: Sequence[int]) -> None:
        """Clear the state of these samples of the filled-up batch."""
        if self.history is not None:
            self._constants = None
            self.history.restart(samples)
            if "state" in vars(self):
                self.state.clear(samples)
        if self.watch is not None:
            self.watch.restart(samples)

    @by_one_thread
    def step(
        self, inputs: dict[str, Any], counts: np.ndarray | None = None, planners: Sequence[StepPlanner] = ()
    ) -> list[Any]:
        """Flat outputs of one step; sample b keeps counts[b] tokens, 1 to N (None: as the schedule says).

        `planners`: one for each group, if the groups decide differently how many tokens to keep.

        In mode carry, only a run that was made with `gradients` has gradients: they go back through the states of its
        steps until the state is detached. If a step fails, the state is cleared and the run starts again.
        """
        inputs = self._filled(inputs)
        counts = self._checked(counts, 1)
        if self.history is None:
            return self._step(inputs, counts, planners)
        self.history.check(self.runtime.planner.taus(inputs, self.size))
        try:
            with self._gradients():
                return self._step(inputs, counts, planners)
        except BaseException as error:
            lost = self._overflow() if isinstance(error, CheckFailedError) else ""
            self.restart()
            if lost:
                raise CheckFailedError(lost) from error
            raise

    def _overflow(self) -> str:
        """What to say if the state holds values that are too large for its type; else nothing."""
        for spec in self.runtime.spec.states:
            if spec.dtype == "float16" and not np.isfinite(self.runtime.array(self.state.values[spec.name])).all():
                return (
                    f"the remembered values {spec.name} are too large for float16, which ends at 65504: convert with "
                    "the state in float32 (--state fp32, or state_dtype='fp32')"
                )
        return ""

    def _gradients(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.gradients else torch.no_grad()

    def _step(self, inputs: dict[str, Any], counts: np.ndarray | None, planners: Sequence[StepPlanner]) -> list[Any]:
        planner, history = self.runtime.planner, self.history
        start = time.perf_counter()
        taus = planner.taus(inputs, self.size)
        scores, live = self.runtime.route(inputs)
        host = self.runtime.array(scores)
        routed = time.perf_counter()
        if self.watch is not None:
            self.watch.note(inputs[planner.spec.image], taus)
        if counts is not None:
            counts = np.concatenate([counts, np.repeat(counts[-1:], self.size - len(counts))])
        elif planner.schedule.data_dependent:
            counts = self._found(host, planners or [planner])
        else:
            counts = planner.counts(taus, None if history is None else history.steps)
        if history is not None:
            counts = np.where(history.steps == 0, planner.spec.tokens, counts)  # nothing to carry over yet
        bucket = self.runtime.plan_shape(counts)
        plan: Plan | CarryPlan
        if history is None:
            plan = planner.plan(host, counts, bucket)
        else:
            plan = planner.carry(history, host, counts, taus, bucket, self._shared if self.groups > 1 else None)
        planned = time.perf_counter()
        if self._constants is None:
            self._constants = self.runtime.prepare(inputs)
        outputs = self.runtime.denoise({**inputs, **self._constants}, live, plan, self.state)
        if history is not None and self.state.distance is not None:
            history.distance = self.state.distance
        self.last_plan = plan
        self.computed.append(float(self.kept.mean() / planner.spec.tokens))
        self.last_times = StageTimes(routed - start, planned - routed, time.perf_counter() - planned)
        return [output[: self.batch] for output in outputs] if self.size > self.batch else list(outputs)

    def _found(self, scores: np.ndarray, planners: Sequence[StepPlanner]) -> np.ndarray:
        """Kept tokens of the samples [B], if steps decide them; copies that fill up the batch keep as many."""
        spread = None if self.watch is None else self.watch.spread(self.runtime.planner.patches)
        groups = np.minimum(np.arange(self.size) * len(planners) // self.batch, len(planners) - 1)
        found = [planner.found_counts(scores, spread) for planner in planners]
        return np.stack(found)[groups, np.arange(self.size)]

    def _shared(self, urgency: np.ndarray) -> np.ndarray:
        """Urgency [B, N] averaged over the groups; the copies that fill up the batch are not averaged."""
        mean = urgency[: self.batch].reshape(self.groups, -1, urgency.shape[1]).mean(0)
        return np.concatenate([np.tile(mean, (self.groups, 1)), urgency[self.batch :]])

    def _filled(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a batch as large as the run's, its last sample repeated."""
        inputs = checked_inputs(self.runtime.spec, inputs)
        specs = {spec.name: spec for spec in self.runtime.planner.spec.input_specs}
        found = {len(value) for name, value in inputs.items() if specs[name].batched}
        if found != {self.batch}:
            raise UsageError(f"this run has {self.batch} samples, but the step got {sorted(found)}: start another run")
        if self.size == self.batch:
            return inputs
        return {n: fill_batch(value, self.size) if specs[n].batched else value for n, value in inputs.items()}

    def _checked(self, counts: Any, least: int) -> np.ndarray | None:
        """Tokens that samples [B] keep, as integers from `least` to N; UsageError for anything else."""
        if counts is None:
            return None
        tokens, given = self.runtime.spec.tokens, np.asarray(counts)
        whole = given.shape == (self.batch,) and np.issubdtype(given.dtype, np.number) and np.all(given % 1 == 0)
        if not whole or given.min() < least or given.max() > tokens:
            raise UsageError(
                f"counts {np.array2string(given, threshold=8)}: give {self.batch} whole numbers from {least} to "
                f"{tokens}, the tokens that each sample keeps"
            )
        return given.astype(np.int64)


def checked_inputs(spec: ModelSpec, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a step, with the constants that the model was captured with.

    UsageError for one that is missing, unknown, or not what the model was captured for.
    """
    constants = {item.name: item.value for item in spec.input_specs if not item.dtype}
    needed = [name for name in spec.inputs if name not in constants]
    for said, names in (("no", {*needed} - {*inputs}), ("an unknown", {*inputs} - {*spec.inputs})):
        if names:
            raise UsageError(f"the step got {said} input {min(names)}: the model takes {', '.join(needed)}")
    for item in spec.input_specs:
        if item.dtype:
            check_input(item, inputs[item.name])
    return {**constants, **inputs}


def check_input(spec: InputSpec, value: Any) -> None:
    """Raises UsageError for a tensor or array of another shape or type than the model was captured for, or for a label
    that is no row of its table."""
    check_shape(spec, value)
    if isinstance(value, np.ndarray) and value.dtype != spec.dtype:
        raise UsageError(f"input {spec.name} is {value.dtype}, but the model needs {spec.dtype}: convert it")
    if spec.rows and value.shape[0] and not 0 <= int(value.min()) <= int(value.max()) < spec.rows:
        raise UsageError(
            f"input {spec.name} has a value of {int(value.min())} to {int(value.max())}, but the model knows 0 to "
            f"{spec.rows - 1}"
        )


def check_shape(spec: InputSpec, value: Any) -> None:
    """Raises UsageError for anything but a tensor or array of the shape that the model was captured for."""
    if not isinstance(value, np.ndarray | torch.Tensor):
        raise UsageError(f"input {spec.name} is a {type(value).__name__}: give a tensor or an array")
    if tuple(value.shape[spec.batched :]) != spec.shape or value.ndim != len(spec.shape) + spec.batched:
        wanted = ", ".join(["batch"] * spec.batched + [str(size) for size in spec.shape])
        raise UsageError(
            f"input {spec.name} has shape {list(value.shape)}, but the model was captured for [{wanted}]: "
            "convert again for another size"
        )


def fill_batch(value: Any, batch: int) -> Any:
    """Repeat the last sample of an array or tensor until there are `batch`."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value, value[-1:].expand(batch - len(value), *value.shape[1:])])
    return np.concatenate([value, np.repeat(value[-1:], batch - len(value), axis=0)])


def rows_of(value: Any, samples: np.ndarray) -> Any:
    """Some samples of an array or tensor, in the order given."""
    return value[torch.as_tensor(samples, device=value.device)] if isinstance(value, torch.Tensor) else value[samples]


def joined(parts: Sequence[Any]) -> Any:
    """Arrays or tensors one after the other, along the batch."""
    return torch.cat(list(parts)) if isinstance(parts[0], torch.Tensor) else np.concatenate(parts)
