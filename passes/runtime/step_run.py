"""A run whose steps either compute the whole trunk or skip it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.spec import UPDATE, WEIGHTS, update_name
from dcconvert.passes.planning.nearest_kept import Ints, Mask
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.planning.token_history import Doubles
from dcconvert.passes.runtime.run import Run, Runtime, StageTimes, joined, rows_of
from dcconvert.passes.runtime.threads import by_one_thread
from dcconvert.passes.runtime.update_history import UpdateHistory


class StepRun(Run):
    """One batch of samples on their way from noise to image, where each step is computed or skipped.

    A computed step is the original's and also returns the trunk's update. A skipped step adds a weighted sum of the
    last updates instead. Samples may be at different timesteps, and some may be computed while others are skipped: each
    graph then runs on its own samples only.
    """

    def __init__(self, runtime: Runtime, batch: int, groups: int = 1, *, gradients: bool = False) -> None:
        super().__init__(runtime, batch, groups, gradients=gradients)
        self.updates = UpdateHistory(self.size, runtime.spec.updates)
        self.full: Mask = np.ones(self.size, bool)  # which samples the last step computed

    @property
    def kept(self) -> np.ndarray:
        """Tokens that each sample [B] computed at the last step: all or none."""
        return np.where(self.full, self.runtime.spec.tokens, 0)[: self.batch]

    @property
    def keep(self) -> np.ndarray:
        return np.repeat(self.full[: self.batch, None], self.runtime.spec.tokens, axis=1)

    @property
    def remembered(self) -> UpdateHistory:
        return self.updates

    def copied(self, samples: Ints) -> StepRun:
        """An independent run that continues from here: its sample k is sample samples[k] of this one."""
        other = StepRun(self.runtime, len(samples), self.groups, gradients=self.gradients)
        places = np.concatenate([samples, np.repeat(samples[-1:], other.size - len(samples))])
        other.updates = self.updates.copied(places)
        for name, value in self.state.values.items():
            other.state.put(name, np.arange(other.size), value, places)
        return other

    def forget(self, samples: Sequence[int]) -> None:
        self.updates.restart(samples)

    @by_one_thread
    def step(
        self,
        inputs: dict[str, Any],
        counts: np.ndarray | None = None,
        planners: Sequence[StepPlanner] = (),
        weights: Sequence[float] = (),
    ) -> list[Any]:
        """Flat outputs of one step; sample b is computed if counts[b], 0 to N, is not 0 (None: as the schedule says).

        `weights`: weights of the last updates, newest first, for the skipped samples; linear extrapolation if empty.
        Raises UsageError for more weights than a skipped step reads updates, or for noise that rose.
        """
        if len(weights) > self.updates.slots:
            raise UsageError(
                f"{len(weights)} weights: a skipped step needs one for each of the last {self.updates.slots} updates"
            )
        inputs, counts = self._filled(inputs), self._checked(counts, 0)
        start = time.perf_counter()
        taus = self.runtime.planner.taus(inputs, self.size)
        self.updates.check(taus)
        full = self._chosen(taus, counts)
        planned = time.perf_counter()
        try:
            with self._gradients():
                outputs = self._computed(inputs, taus, full, weights)
        except BaseException:
            self.restart()
            raise
        self.updates.note(taus, full)
        self.full = full
        self.computed.append(float(full[: self.batch].mean()))
        self.last_times = StageTimes(0.0, planned - start, time.perf_counter() - planned)
        return [output[: self.batch] for output in outputs] if self.size > self.batch else outputs

    def _chosen(self, taus: Doubles, counts: np.ndarray | None) -> Mask:
        """Which samples [B] this step computes."""
        if counts is None:
            return self.updates.due(self.runtime.planner.fraction(taus, self.updates.steps))
        wanted = np.concatenate([counts, np.repeat(counts[-1:], self.size - len(counts))])
        full: Mask = (wanted > 0) | (self.updates.computed == 0)
        return full

    def _computed(self, inputs: dict[str, Any], taus: Doubles, full: Mask, weights: Sequence[float]) -> list[Any]:
        """Outputs of the step; each graph runs on its own samples."""
        if not full.any():
            return self._call_skip(inputs, self._weights(taus, weights), self.state.values)
        if full.all() and np.ptp(self.updates.newest) == 0:
            return self._all_computed(inputs)
        computed, skipped = np.flatnonzero(full), np.flatnonzero(~full)
        parts = [self._some_computed(inputs, computed)]
        if len(skipped):
            parts.append(self._some_skipped(inputs, self._weights(taus, weights), skipped))
        order = np.argsort(np.concatenate([computed, skipped]))
        return [rows_of(joined(both), order) for both in zip(*parts, strict=True)]

    def _all_computed(self, inputs: dict[str, Any]) -> list[Any]:
        name = update_name((int(self.updates.newest[0]) + 1) % self.updates.slots)
        update, outputs = self._call_full(inputs, {UPDATE: self.state.values[name]} if self.state.in_place else {})
        if not self.state.in_place:
            self.state.values[name] = update
        return outputs

    def _some_computed(self, inputs: dict[str, Any], samples: Ints) -> list[Any]:
        """Outputs of some samples; the update of each goes to its own slot."""
        update, outputs = self._call_full(self._rows(inputs, samples), {})
        slots = (self.updates.newest[samples] + 1) % self.updates.slots
        for slot in np.unique(slots):
            rows = np.flatnonzero(slots == slot)
            self.state.put(update_name(int(slot)), samples[rows], update, rows)
        return [output[: len(samples)] for output in outputs]

    def _some_skipped(self, inputs: dict[str, Any], weights: np.ndarray, samples: Ints) -> list[Any]:
        places = self._filled_up(samples)
        updates = {name: self.state.rows(name, places) for name in self.state.values}
        outputs = self._call_skip(self._rows(inputs, samples), weights[:, places], updates)
        return [output[: len(samples)] for output in outputs]

    def _call_full(self, inputs: dict[str, Any], into: dict[str, Any]) -> tuple[Any, list[Any]]:
        """The trunk's update and the outputs."""
        made = self.runtime.call("full", self.runtime.feed("full", inputs), self.runtime.full_bucket(inputs), into)
        update = made.pop(UPDATE)
        return update, [self.runtime.result(value) for value in made.values()]

    def _call_skip(self, inputs: dict[str, Any], weights: np.ndarray, updates: Mapping[str, Any]) -> list[Any]:
        beside = self.runtime.beside(weights, next(iter(updates.values())))
        feed = self.runtime.feed("skip", {**inputs, **updates, WEIGHTS: beside})
        made = self.runtime.call("skip", feed, self.runtime.full_bucket(inputs), {})
        return [self.runtime.result(value) for value in made.values()]

    def _weights(self, taus: Doubles, weights: Sequence[float]) -> np.ndarray:
        """The weights of the slots [P, B], as a skipped step reads them."""
        newest_first = self.updates.line(taus)
        if len(weights):
            newest_first = np.zeros_like(newest_first)
            newest_first[: len(weights)] = np.asarray(weights)[:, None]
        return self.updates.by_slot(newest_first).astype(np.float32)

    def _rows(self, inputs: dict[str, Any], samples: Ints) -> dict[str, Any]:
        """The inputs of some samples, filled up to a batch size that the runtime has."""
        specs, places = {spec.name: spec for spec in self.runtime.spec.input_specs}, self._filled_up(samples)
        return {name: rows_of(value, places) if specs[name].batched else value for name, value in inputs.items()}

    def _filled_up(self, samples: Ints) -> Ints:
        return np.concatenate([samples, np.repeat(samples[-1:], self.runtime.padded(len(samples)) - len(samples))])
