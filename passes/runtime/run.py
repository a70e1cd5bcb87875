"""A sampling run, and what a runtime offers to it: the same steps in torch and in every exported runtime.

A step is route, plan on the host, denoise. In mode chunk steps know nothing of each other. In mode carry a run holds
what its samples remember: a state on the runtime's device, and the bookkeeping on the host.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.spec import DISTANCE_NAME, SCORES_NAME, ModelSpec
from dcconvert.passes.planning.carry_plan import CarryPlan
from dcconvert.passes.planning.chunk_plan import Plan
from dcconvert.passes.planning.latent_difference import ThirdDifference
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.planning.token_history import History
from dcconvert.passes.runtime.state import State
from dcconvert.passes.runtime.update_history import UpdateHistory


class Buckets(Protocol):
    """The shapes that a runtime is limited to."""

    def choose(self, batch: int, counts: Any) -> Bucket:
        """The smallest bucket that holds `batch` samples of `counts` (one number, or [batch]) tokens."""


class Runtime(ABC):
    """A converted model in some runtime. Values in the runtime's own memory are passed on as they are.

    A new runtime writes `call`, `empty_state` and `array`; docs/adding_a_runtime.md shows one. `planner` decides what a
    step computes; `bucket_set` holds the shapes that the runtime is limited to, None for shapes as they come.
    """

    planner: StepPlanner
    bucket_set: Buckets | None

    @abstractmethod
    def call(
        self, graph: str, feed: Mapping[str, Any], bucket: Bucket | None, into: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Outputs by name, in the graph's order (`ModelSpec.outputs_of`).

        `graph`: one of `ModelSpec.graphs`. `feed`: its inputs by name, as the caller or an earlier call gave
        them; plan inputs are numpy arrays. `bucket`: the shape that holds the batch. `into`: buffers that some outputs
        must be written to, as the state asks.
        """

    @abstractmethod
    def empty_state(self, batch: int) -> State:
        """What `batch` samples remember before their first step: zeros in the shapes of `ModelSpec.state_shapes`."""

    @abstractmethod
    def array(self, value: Any) -> np.ndarray:
        """An output on the host, in memory that later calls leave alone."""

    def result(self, value: Any) -> Any:
        """An output of the model as the caller of a run gets it."""
        return self.array(value)

    def start(self, batch: int, groups: int = 1) -> Run:
        """A new sampling run of `batch` samples; call its `step` for every timestep. `groups` as in `Run`."""
        return self.planner.method.run(self, batch, groups)

    def beside(self, array: np.ndarray, value: Any) -> Any:
        """An array of the host where another value of the runtime is, for graphs that take both."""
        return array

    @property
    def spec(self) -> ModelSpec:
        return self.planner.spec

    def padded(self, batch: int) -> int:
        """The batch size that `batch` samples run in; UsageError if there is none so large."""
        return batch if self.bucket_set is None else self.bucket_set.choose(batch, self.spec.tokens).batch

    def bucket(self, counts: np.ndarray) -> Bucket | None:
        """The bucket that a batch keeping `counts` [B] tokens runs in; None for shapes as they come."""
        return None if self.bucket_set is None else self.bucket_set.choose(len(counts), counts)

    def plan_shape(self, counts: np.ndarray) -> Bucket | None:
        """The shape that a plan is laid out for: the bucket, unless the runtime takes shapes between buckets."""
        return self.bucket(counts)

    def feed(
        self,
        graph: str,
        inputs: Mapping[str, Any],
        live: Mapping[str, Any] | None = None,
        plan: Plan | CarryPlan | None = None,
        state: State | None = None,
    ) -> dict[str, Any]:
        """What a graph takes, by name and in its order.

        `inputs`: the model's, and what `prepare` made of them (made here for `denoise` if it is missing). `live`: what
        `route` made. `plan` and `state` as in `denoise`.
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
        """What stays the same over a run, by name; nothing for most models."""
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
        """Flat outputs of the model under one plan; in mode carry the state (None: an empty one) is brought forward.

        `inputs`: the model's, and what `prepare` made of them (made here if it is missing).
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


class Run:
    """One batch of samples on their way from noise to image.

    Call `step` with the original's inputs by name, in the sampler's order. `restart` makes some of the samples new
    ones: their next step remembers nothing. Samples may be at different timesteps and start at different times.
    With `groups` the batch is that many equal parts, such as the conditional and unconditional half of guidance, and
    sample i of every part computes the same tokens (mode carry).
    Inputs other than image and timestep are those of a sample's first step; what they alone decide is computed then.
    """

    def __init__(self, runtime: Runtime, batch: int, groups: int = 1, *, gradients: bool = False) -> None:
        if batch % groups:
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
        self.state = runtime.empty_state(self.size)
        self.watch = ThirdDifference(self.size) if planner.watches else None
        self._constants: dict[str, Any] | None = None

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
        """What a run keeps of its earlier steps on the host."""
        return self.history or self.watch

    def restart(self, samples: Sequence[int] | None = None) -> None:
        """Forget what these samples (all of them, if None) remember, and with them those they share tokens with."""
        named = list(range(self.batch) if samples is None else samples)
        if not all(0 <= sample < self.batch for sample in named):
            raise UsageError(f"samples {named}: this run has samples 0 to {self.batch - 1}")
        part = self.batch // self.groups
        chosen = sorted({sample % part + group * part for sample in named for group in range(self.groups)})
        if self.batch - 1 in chosen:
            chosen += range(self.batch, self.size)  # the copies that fill up the batch
        self.forget(chosen)

    def forget(self, samples: Sequence[int]) -> None:
        """Drop what these samples remember, of the filled-up batch."""
        if self.history is not None:
            self._constants = None
            self.history.restart(samples)
            self.state.clear(samples)
        if self.watch is not None:
            self.watch.restart(samples)

    def step(
        self, inputs: dict[str, Any], counts: np.ndarray | None = None, planners: Sequence[StepPlanner] = ()
    ) -> list[Any]:
        """Flat outputs of one step; sample b keeps counts[b] tokens, or what the schedule says.

        `planners`: of each of the groups, where they differ in how many tokens they find worth keeping.

        Mode carry gives gradients only to a run that was made with `gradients`: they reach back through what its steps
        remember, until the state is detached. A step that fails leaves nothing half remembered: the run starts anew.
        """
        inputs = self._filled(inputs)
        if self.history is None:
            return self._step(inputs, counts, planners)
        self.history.check(self.runtime.planner.taus(inputs, self.size))
        try:
            with self._gradients():
                return self._step(inputs, counts, planners)
        except BaseException:
            self.restart()
            raise

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
        self.last_times = StageTimes(routed - start, planned - routed, time.perf_counter() - planned)
        return [output[: self.batch] for output in outputs] if self.size > self.batch else list(outputs)

    def _found(self, scores: np.ndarray, planners: Sequence[StepPlanner]) -> np.ndarray:
        """What the samples keep [B] where every step finds it; the copies that fill up the batch as the last one."""
        spread = None if self.watch is None else self.watch.spread(self.runtime.planner.patches)
        groups = np.minimum(np.arange(self.size) * len(planners) // self.batch, len(planners) - 1)
        found = [planner.found_counts(scores, spread) for planner in planners]
        return np.stack(found)[groups, np.arange(self.size)]

    def _shared(self, urgency: np.ndarray) -> np.ndarray:
        """Urgency [B, N] averaged over the groups; the copies that fill up the batch keep their own."""
        mean = urgency[: self.batch].reshape(self.groups, -1, urgency.shape[1]).mean(0)
        return np.concatenate([np.tile(mean, (self.groups, 1)), urgency[self.batch :]])

    def _filled(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a batch as large as the run's, its last sample repeated."""
        specs = {spec.name: spec for spec in self.runtime.planner.spec.input_specs}
        found = {len(value) for name, value in inputs.items() if specs[name].batched}
        if found != {self.batch}:
            raise UsageError(f"this run has {self.batch} samples, but the step got {sorted(found)}: start another run")
        for name, value in inputs.items():
            wanted = specs[name].dtype
            if isinstance(value, np.ndarray) and wanted and value.dtype != wanted:
                raise UsageError(f"input {name} is {value.dtype}, but the model needs {wanted}: convert it")
        if self.size == self.batch:
            return inputs
        return {n: fill_batch(value, self.size) if specs[n].batched else value for n, value in inputs.items()}


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
