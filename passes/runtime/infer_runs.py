"""Detects which calls of a model continue an earlier call, for sampling loops that know nothing about runs."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.spec import InputSpec
from dcconvert.passes.planning.nearest_kept import Mask
from dcconvert.passes.planning.schedule import Timetable
from dcconvert.passes.planning.token_history import Doubles
from dcconvert.passes.runtime.run import Run, Runtime
from dcconvert.passes.runtime.threads import PerThread

log = logging.getLogger(__name__)

# How far a sample may have moved between two calls, relative to its norm: PACE times the noise levels passed, and
# SLACK, but never more than LIMIT. Samplers move by one to three times the noise levels;  two unrelated
# images are 1.4 apart as noise, and hardly ever closer than LIMIT as pictures.
PACE, SLACK, LIMIT = 4.0, 0.05, 0.5
SAME = 1e-6  # noise levels closer than this are one
TURNS = 4  # runs of one model that may take turns at each noise level, such as those with and without the prompt
CLEAR = 2.0  # how many times further away than the nearest run all others must be
OFF = 0.02  # relative deviation of a ratio from what was asked for that is worth a word
WARN_AFTER = 2  # calls in a row that continued nothing, although the noise fell, before a warning is logged


WARNED: weakref.WeakSet[Runtime] = weakref.WeakSet()


class FollowedRuns:
    """The runs of one thread, inferred from the calls themselves.

    A sample continues that of an earlier call if its noise level fell, all inputs except the image are equal, and the
    image changed no more than one sampler step would change it. A call at the noise level of the one before is another
    image, except for one second look at a level that the run has just reached, as Heun's method takes. Otherwise a
    sample starts again and is computed in full, which is always correct and only slower.

    Calls may take turns, for instance with and without the prompt: up to TURNS runs that meet at every noise level are
    kept. All others are dropped when a new one starts, so that memory does not grow. If a call fits two runs, it starts
    a new one.

    A sample that passes is close to the stored one in noise level, conditioning and content. This is a heuristic: if a
    loop can hold a `Run`, it should.
    """

    def __init__(self) -> None:
        self.tracks: list[Track] = []  # the last one used is the last
        self.loops: list[Loop] = [Loop()]  # the one before the present one, and the present one
        self.context = ""  # only calls of the same one belong together
        self.used = 0.0
        self._level = np.inf  # noise level of the last call
        self._beside = 0  # calls at that level
        self._crowded = False
        self._stopped = 0  # calls in a row that continued nothing, although the noise fell

    @property
    def run(self) -> Run | None:
        """The run of the last call, if it is kept."""
        return self.tracks[-1].run if self.tracks else None

    @property
    def loop(self) -> Loop:
        """What the last sampling loop computed: the present one, unless it has just begun."""
        before, present = self.loops[0], self.loops[-1]
        return before if before.computed and present.steps < 2 else present

    def step(self, runtime: Runtime, inputs: dict[str, Any], limit: float | None = None) -> list[Any]:
        """Flat outputs of one call.

        `limit`: how far an image may move in any step, relative to its norm, if the caller is known.
        """
        specs = runtime.planner.spec.input_specs
        batch = next(len(inputs[spec.name]) for spec in specs if spec.batched)
        if not batch:
            raise UsageError("the call has a batch of 0 samples: give at least 1")
        self.used = time.monotonic()
        if not (runtime.planner.method.stateful or runtime.planner.watches):
            run = runtime.start(batch)
            outputs = run.step(inputs)
            self._enter(np.inf if runtime.planner.spec.timestep is None else level_of(runtime, inputs, batch))
            self.loops[-1].add(self._level, run)
            return outputs
        try:
            return self._step(runtime, inputs, batch, limit)
        except BaseException:
            self.forget()
            raise

    def _step(self, runtime: Runtime, inputs: dict[str, Any], batch: int, limit: float | None) -> list[Any]:
        context, taus = self.context, runtime.planner.taus(inputs, batch)
        self._enter(float(taus.max()))
        fits = [track.fit(inputs, taus) for track in self.tracks if track.belongs(runtime, inputs, batch, context)]
        chosen, why = (None, CROWDED) if self._crowded else nearest(fits)
        fell = self._crowded or any((fit.fell & ~fit.goes_on).any() for fit in fits)
        whole = chosen is not None and bool(chosen.goes_on.all())
        self.loops[-1].continued += whole
        self._note(runtime, fell and not whole, why or (chosen.why if chosen else ""))
        track = self._started(runtime, batch, context, limit) if chosen is None else chosen.track
        outputs = track.step(inputs, taus, chosen)
        self.tracks = [other for other in self.tracks if other is not track]
        if not self._crowded:
            self.tracks.append(track)
        self.loops[-1].add(self._level, track.run)
        return outputs

    def _enter(self, level: float) -> None:
        """Note the noise level of a call: where it rises, another loop begins."""
        rises, falls = level > self._level + SAME, level < self._level - SAME
        if rises:
            self.loops = [self.loops[-1], Loop()]
        if rises or (falls and self._beside == 1):
            self._crowded = False
        self._beside = 1 if rises or falls else self._beside + 1
        self._level = level

    def _started(self, runtime: Runtime, batch: int, context: str, limit: float | None) -> Track:
        """A new track. Others are kept if they are at this noise level, so that they may be taking turns."""
        self.tracks = [track for track in self.tracks if abs(track.level - self._level) <= SAME]
        self._crowded |= sum(track.of(runtime, context) for track in self.tracks) >= TURNS
        if self._crowded:
            self.tracks = [track for track in self.tracks if not track.of(runtime, context)]
        return Track(runtime, batch, context, limit)

    def _note(self, runtime: Runtime, stopped: bool, why: str) -> None:
        """Count calls that continue nothing although the noise falls, and say so once for each model."""
        self._stopped = self._stopped + 1 if stopped else 0
        if stopped:
            self.loops[-1].why = why
        if self._stopped >= WARN_AFTER and runtime not in WARNED and not self.loops[-1].continued:
            WARNED.add(runtime)
            log.warning(
                "%d calls in a row did not continue the previous one, although the noise fell: every token is computed "
                "and nothing is saved, because %s. If this is one image, step through model.start(batch) instead",
                self._stopped,
                why,
            )

    def forget(self) -> None:
        """Drop all runs and their states; the next call starts a new one."""
        self.tracks, self._level, self._crowded = [], np.inf, False
        self.loops = [self.loops[-1], Loop()]

    def begin(self) -> None:
        """Drop the runs of the present context: the next call starts a new one."""
        self.tracks = [track for track in self.tracks if track.context != self.context]

    def drop(self, runtime: Runtime) -> None:
        """Drop the runs of one model."""
        self.tracks = [track for track in self.tracks if track.runtime is not runtime]


class Track:
    """A run, and the call that continued it last."""

    def __init__(self, runtime: Runtime, batch: int, context: str, limit: float | None) -> None:
        self.runtime, self.context, self.limit = runtime, context, limit
        self.run = runtime.start(batch)
        self.taus: Doubles = np.full(batch, np.inf)
        self.fell: Mask = np.zeros(batch, bool)  # whether the noise fell before the last call
        self.moved: Doubles = np.zeros(batch)  # how far the image moved before the last call
        self.last: dict[str, Any] = {}  # copies of the last inputs
        self.given: dict[str, Given] = {}  # the last inputs themselves
        self.lasting: set[str] | None = None  # inputs for which each call was given the same tensor so far

    @property
    def level(self) -> float:
        return float(self.taus.max())

    def of(self, runtime: Runtime, context: str) -> bool:
        return self.runtime is runtime and self.context == context

    def belongs(self, runtime: Runtime, inputs: dict[str, Any], batch: int, context: str) -> bool:
        """Whether a call can be compared with the last one: same model, context, batch size, device and type."""
        if not self.of(runtime, context) or self.run.batch != batch:
            return False
        now, before = (given[runtime.planner.spec.image] for given in (inputs, self.last))
        return bool(now.device == before.device and now.dtype == before.dtype)

    def fit(self, inputs: dict[str, Any], taus: Doubles) -> Fit:
        """Which samples of a call at noise levels `taus` [B] continue this run."""
        spec = self.runtime.planner.spec
        passed = self.taus - taus
        fell, again = passed > SAME, (np.abs(passed) <= SAME) & self.fell
        image, before = inputs[spec.image], self.last[spec.image]
        whole = image.shape == before.shape
        distance = moved(image, before) if whole else np.full(len(taus), np.inf)
        allowed = self.limit or np.minimum(PACE * passed + SLACK, LIMIT)
        near = distance <= np.where(fell, allowed, np.maximum(SLACK, self.moved / 2))
        found = Fit(self, fell, (fell | again) & near, distance)
        if not near.all():
            found.why = f"the image moved by {distance.max():.2g} times its size"
        for item in spec.input_specs:
            if item.name not in (spec.timestep, spec.image) and not spec.varies(item):
                found.take(self._same(item, inputs[item.name]), f"input {item.name} is not the same at every step")
        return found

    def _same(self, spec: InputSpec, now: Any) -> Mask | bool:
        """Whether an input is what it was at the last call, for each sample [B] or for all of them."""
        before = self.last[spec.name]
        if not isinstance(now, Tensor):
            return bool(now == before)
        if spec.name in self.given and self.given[spec.name].same(now):
            return True
        if now.shape != before.shape or now.device != before.device:
            return False
        if not spec.batched:
            equal: Mask = np.array(torch.equal(now, before))
        else:
            equal = (now == before).reshape(len(now), -1).all(1).cpu().numpy()
        # A loop that passed the same tensor so far would do so again: an equal one is another loop's.
        return False if spec.name in (self.lasting or ()) and equal.all() else equal

    def step(self, inputs: dict[str, Any], taus: Doubles, fit: Fit | None) -> list[Any]:
        """Flat outputs of a call that continues the run as `fit` says, or begins it."""
        going = np.zeros(len(taus), bool) if fit is None else fit.goes_on
        if fit is not None and not going.all():
            self.run.restart(np.flatnonzero(~going).tolist())
        outputs = self.run.step(inputs)
        given = {name: Given.of(value) for name, value in inputs.items() if isinstance(value, Tensor)}
        if self.given:
            kept = {name for name, before in self.given.items() if name in given and before.same(inputs[name])}
            self.lasting = kept if self.lasting is None else self.lasting & kept
        self.fell = going & (taus < self.taus - SAME)
        self.moved = np.zeros(len(taus)) if fit is None else fit.distance
        self.given, self.taus = given, taus
        self.last = {name: self._copied(name, value) for name, value in inputs.items()}
        return outputs

    def _copied(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if name in (self.lasting or ()) and name in self.last:
            return self.last[name]
        return value.detach().clone()


@dataclass
class Fit:
    """How a call fits a run: which samples [B] continue it, how far their images are, and why others do not."""

    track: Track
    fell: Mask
    goes_on: Mask
    distance: Doubles
    why: str = ""

    def take(self, same: Mask | bool, why: str) -> None:
        """Only the samples that are the same go on."""
        if not np.all(same):
            self.why = why
        self.goes_on = self.goes_on & same


@dataclass(frozen=True)
class Given:
    """A tensor that was passed to a call, without keeping it alive."""

    tensor: weakref.ref[Tensor]
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Given:
        return cls(weakref.ref(tensor), version_of(tensor))

    def same(self, tensor: object) -> bool:
        """Whether it is the same tensor, and unchanged."""
        return tensor is self.tensor() and isinstance(tensor, Tensor) and 0 <= self.version == version_of(tensor)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; -1 if torch does not count that, as in inference mode."""
    return -1 if tensor.is_inference() else tensor._version


class Loop:
    """What the calls of one sampling loop computed."""

    def __init__(self) -> None:
        self.levels: list[float] = []
        self.computed: list[float] = []  # the fraction of the tokens that each call computed
        self.continued = 0  # calls all of whose samples continued earlier ones
        self.why = ""  # why others did not

    def add(self, level: float, run: Run) -> None:
        if not self.levels or level < self.levels[-1] - SAME:
            self.levels.append(level)
        self.computed.append(run.computed[-1])

    @property
    def steps(self) -> int:
        """Noise levels at which the model was called."""
        return len(self.levels)

    def kept(self, tokens: int) -> list[int]:
        """How many of `tokens` each call computed."""
        return [round(fraction * tokens) for fraction in self.computed]

    @property
    def ratio(self) -> float:
        """All tokens divided by the computed ones, over the loop."""
        return len(self.computed) / max(sum(self.computed), 1e-9)


def last_loop(runs: PerThread[FollowedRuns]) -> Loop | None:
    """The last sampling loop of plain calls in any thread."""
    last = max(runs.all(), key=lambda found: found.used, default=None)
    return last.loop if last is not None and last.loop.computed else None


def spent(loop: Loop, schedule: Timetable, steps: int | None = None) -> str:
    """A line on what a loop computed. `steps`: of the runs that the schedule was made for."""
    said = f"last run: {loop.steps} steps, {loop.ratio:.3g}x fewer tokens computed"
    if abs(loop.ratio / schedule.ratio - 1) > OFF:
        said += f" (asked for: {schedule.ratio:g}x" + (f" over {steps} steps)" if steps else ")")
    if loop.why:
        said += f"; {'some' if loop.continued else 'no'} calls continued the ones before, because {loop.why}"
    return said


CROWDED = f"more than {TURNS} images take turns"
TWO_FIT = "it fits two runs equally well"


def nearest(fits: Sequence[Fit]) -> tuple[Fit | None, str]:
    """The run that a call continues, in whole or in part, and why there is none."""
    whole = sorted((fit for fit in fits if fit.goes_on.all()), key=lambda fit: fit.distance.max())
    if len(whole) > 1 and unclear(*whole[:2]):
        return None, TWO_FIT
    some = whole or sorted((fit for fit in fits if fit.goes_on.any()), key=lambda fit: -fit.goes_on.sum())
    return (some[0], "") if some else (None, fits[-1].why if fits else "")


def unclear(first: Fit, second: Fit) -> bool:
    """Whether two runs of different images are about as near."""
    if second.distance.max() >= CLEAR * first.distance.max():
        return False
    image = first.track.runtime.planner.spec.image
    return bool((first.track.last[image] != second.track.last[image]).any())


def level_of(runtime: Runtime, inputs: dict[str, Any], batch: int) -> float:
    return float(runtime.planner.taus(inputs, batch).max())


def moved(now: Tensor, before: Tensor) -> np.ndarray:
    """Distance between two batches of images relative to their norm, [B]."""
    change = (now - before).double().flatten(1).norm(dim=1)
    size = torch.minimum(now.double().flatten(1).norm(dim=1), before.double().flatten(1).norm(dim=1))
    return (change / size.clamp_min(1e-12)).cpu().numpy()
