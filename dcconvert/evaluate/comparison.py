"""Compares bundles with their common original: the cost of each run, and the time and memory of its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcconvert.evaluate.measure_steps import (
    RunTimes,
    Tick,
    compute_section,
    converted_memory,
    original_memory,
    shapes_of,
    take_turns,
    timing_inputs,
)
from dcconvert.export.buckets import BucketSet, PaddedShapes, choose_buckets, choose_guided_buckets
from dcconvert.export.bundle import Bundle
from dcconvert.export.checks.flops import converted_attention, converted_gmacs, original_attention
from dcconvert.export.checks.latency import interleaved
from dcconvert.export.checks.parity import as_array
from dcconvert.export.runtimes.ort import OrtModel, pick
from dcconvert.models.dit import DiTConfig
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.run import Run, Runtime
from dcconvert.sampling.bundle_runs import bundle_run, dit_config, run_planner
from dcconvert.sampling.default_tables import GRADED, original_run
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Guidance, Sampler, Step
from dcconvert.sampling.solver_rows import TRAIN_STEPS
from dcconvert.sampling.steps import ConvertedStep, OrtPair

MEGABYTE = 1e6
PHASES = 4  # moments at which a batch of runs that began one after the other is timed
NO_GUIDANCE = Guidance()
BEST = ("unipc", GRADED)  # solvers that do best with few steps of the original, beside the run's own solver


@dataclass(frozen=True)
class Candidate:
    """A bundle and its run: the sampler, and how many tokens its samples keep at every step, int64 [steps].

    `reference`: the original's run that this one replaces. `unconditional`: the planner of the unconditional half, if
    it has its own.
    """

    name: str
    bundle: Bundle
    sampler: Sampler | RunTable
    reference: Sampler
    planner: StepPlanner
    guidance: Guidance
    unconditional: StepPlanner | None = None

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        steps: int | None = None,
        solver: str | None = None,
        guidance: Guidance = NO_GUIDANCE,
        ratio: float | None = None,
    ) -> Candidate:
        """The bundle in its own run, or with other steps, another solver or at another ratio.

        Raises UsageError for a bundle without sampling facts, or for a ratio that it cannot reach."""
        sampler, planner = bundle_run(bundle, steps, solver, guidance.scale)
        if isinstance(sampler, RunTable) and (guidance.ratio is not None or ratio is not None):
            raise UsageError(
                f"{bundle.folder} is in mode steps, and its run table is for one ratio: leave out "
                "--ratio and --lite-cfg"
            )
        reference, _ = run_planner(bundle, steps, solver)
        lite = None
        if guidance.ratio is not None:
            lite = planner.at_ratio(guidance.ratio, sampler.taus)
        planner = planner if ratio is None else planner.at_ratio(ratio, sampler.taus)
        name = f"{bundle.model.method.mode} {planner.schedule.ratio:g}x, {sampler.steps} steps"
        return cls(name, bundle, sampler, reference, planner, guidance, lite)

    @property
    def mode(self) -> str:
        return self.bundle.model.method.mode

    @property
    def halves(self) -> list[np.ndarray]:
        """Kept tokens at every step of each half of guidance, or of the only half."""
        first = self.sampler.run_counts(self.planner)
        if self.guidance.halves == 1:
            return [first]
        return [first, first if self.unconditional is None else self.unconditional.run_counts(self.sampler.taus)]

    def counts(self, images: int) -> np.ndarray:
        """Kept tokens [steps, rows] of a batch of this many images."""
        return np.concatenate([np.repeat(half[:, None], images, 1) for half in self.halves], axis=1)

    def bucket_set(self, images: int) -> BucketSet:
        """Buckets for this run and batch."""
        tokens, halves = self.bundle.model.spec.tokens, self.halves
        if self.unconditional is not None:
            return choose_guided_buckets(images, halves[0], halves[1], tokens)
        shapes = self.planner.bucket_counts(self.sampler.taus)
        return choose_buckets((images * len(halves),), shapes, tokens)

    def new_step(self, runtime: Runtime) -> ConvertedStep:
        """The step function of one run of one batch."""
        by_table = isinstance(self.sampler, RunTable)
        return ConvertedStep(self.bundle.model, runtime, self.guidance.halves, self.unconditional, by_table=by_table)

    def cost_of(self, counts: np.ndarray) -> float:
        """GMACs of steps of one sample each, by how many tokens they keep."""
        model, (sizes, times) = self.bundle.model, np.unique(counts, return_counts=True)
        inputs = model.spec.example(2)
        costs = [converted_gmacs(model, inputs, int(size)) for size in sizes]
        return float(np.dot(costs, times))

    def compute(self) -> dict[str, float]:
        """GMACs of an image: of one step of the original, and of both runs."""
        model, before = self.bundle.model, self.reference.steps
        parts = [compute_section(model, half, self.sampler.taus, before) for half in self.halves]
        return {
            "original_step": sum(part["original_gmacs"] for part in parts),
            "original": sum(part["run_gmacs"]["original"] for part in parts),
            "converted": sum(part["run_gmacs"]["converted"] for part in parts),
        }


def named_apart(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with distinct names: numbered if there are several bundles, with the solver if there are several."""
    several, solvers = len(candidates) > 1, len({candidate.sampler.solver for candidate in candidates}) > 1
    return [
        replace(e, name=(f"#{i} " if several else "") + e.name + (f", {e.sampler.solver}" if solvers else ""))
        for i, e in enumerate(candidates, 1)
    ]


def check_same_original(bundles: Sequence[Bundle]) -> DiTConfig:
    """The architecture of the original that all bundles were made from; raises UsageError if there are several."""
    config = dit_config(bundles[0])

    def origin(bundle: Bundle) -> tuple[Any, ...]:
        facts = bundle.manifest
        return dit_config(bundle), facts.get("source", {}).get("sha256"), facts.get("sampler", {}).get("prediction")

    for other in bundles[1:]:
        if origin(other) != origin(bundles[0]):
            raise UsageError(
                f"{other.folder} and {bundles[0].folder} were made from different originals: evaluate them separately"
            )
    return config


@dataclass(frozen=True)
class Row:
    """One way of making the images: the original with so many steps, or a bundle in its run.

    `mode`: "original", or the bundle's mode. `control`: for a row with fewer steps, what it is a control for. A bundle
    also has `stages_ms`, and `kept`, the tokens at every step of each half of guidance.
    """

    name: str
    mode: str
    sampler: Sampler | RunTable
    gmacs: float
    new_step: Callable[[], Step]  # a step function for one run of one batch
    step_seconds: list[float] = field(default_factory=list)
    control: str = ""
    stages_ms: dict[str, float] | None = None
    kept: tuple[list[int], ...] | None = None

    @property
    def run_ms(self) -> float:
        """Milliseconds of a run of one batch."""
        return float(np.median(self.step_seconds)) * 1e3 * self.sampler.steps


@dataclass(frozen=True)
class Execution:
    """One way of running a batch whose images are at different steps of their runs.

    Tokens of a step: those that are kept, and those that are computed. Seconds of a step, in turns with the original's.
    """

    name: str
    form: str
    kept_tokens: float
    computed_tokens: float
    seconds: list[float]
    original_seconds: list[float]

    @property
    def waste(self) -> float:
        """Tokens that are computed without being kept, as a share of the kept ones."""
        return self.computed_tokens / self.kept_tokens - 1

    @property
    def speedup(self) -> float:
        return float(np.median(self.original_seconds) / np.median(self.seconds))


@dataclass(frozen=True)
class MemoryUse:
    """Megabytes: peak of a process (None if it died), attention's data in a layer and in a step, and a run's state."""

    peak_mb: float | None
    attention_layer_mb: float
    attention_step_mb: float
    state_mb: float

    @classmethod
    def of(cls, peak: float | None, layer: float, step: float, state: float) -> MemoryUse:
        """`peak` in megabytes, the others in bytes."""
        return cls(peak, *(round(size / MEGABYTE, 3) for size in (layer, step, state)))


class Comparison:
    """Sessions of an original and of candidates made from it, for batches of `batch` images."""

    def __init__(self, candidates: Sequence[Candidate], batch: int, scratch: Path, threads: int) -> None:
        self.candidates, self.batch, self.scratch = list(candidates), batch, scratch
        first = candidates[0]
        self.halves = first.guidance.halves
        opened = OrtPair.open(
            first.bundle.model, first.planner, first.bucket_set(batch), first.bundle.onnx, scratch, threads
        )
        self.original = opened
        self.runtimes = {first.name: opened}
        for candidate in candidates[1:]:
            session = OrtModel(candidate.bundle.onnx, candidate.planner, candidate.bucket_set(batch), threads=threads)
            self.runtimes[candidate.name] = OrtPair(candidate.bundle.model, session, opened.original)

    @property
    def rows(self) -> int:
        """Samples that the model sees for a batch of images."""
        return self.batch * self.halves

    def latency(self, runs: int, tick: Tick) -> tuple[list[float], dict[str, RunTimes]]:
        """Seconds of a batch's step, in turns: the original's, and every candidate's as the mean over its run."""
        converted = {}
        for candidate in self.candidates:
            session = self.runtimes[candidate.name].converted
            assert isinstance(session.bucket_set, BucketSet)
            shapes = shapes_of(session.bucket_set, candidate.counts(self.batch))
            converted[candidate.name] = (self.stepper(candidate, session), shapes)
        return take_turns(self.original_call(), converted, runs, lambda: tick("turns"))

    def feed(self, candidate: Candidate) -> dict[str, np.ndarray]:
        return {name: as_array(value) for name, value in timing_inputs(candidate.bundle.model, self.rows).items()}

    def original_call(self) -> Callable[[], Any]:
        session = self.original.original
        feed = pick(session, self.feed(self.candidates[0]))
        return lambda: session.run(None, feed)

    def stepper(self, candidate: Candidate, session: OrtModel) -> Callable[[np.ndarray], Run]:
        """A function that runs a step whose samples keep these numbers of tokens [rows]."""
        run, feed = session.start(self.rows, self.halves), self.feed(candidate)

        def step(counts: np.ndarray) -> Run:
            run.step(feed, counts)
            return run

        return step

    def executions(self, runs: int, tick: Tick) -> list[Execution]:
        """Ways of running a batch of images that are at different steps of their runs, timed in turns.

        Image i is i / batch of a run ahead of the first. `padded to the grid`: one static shape holds everything;
        `padded`: dynamic shapes, padded to the longest sample; `bucketed`: the shapes of the bundle; `packed`: dynamic
        shapes with no padding except in the attention's rows.
        """
        calls: dict[tuple[str, str, int], Callable[[], Run]] = {}
        packed = [c for c in self.candidates if not c.bundle.model.spec.updates]  # others have nothing to pack
        for candidate in packed:
            session, counts = self.runtimes[candidate.name].converted, self.staggered(candidate)
            tokens = candidate.bundle.model.spec.tokens
            forms: dict[str, Any] = {
                "padded to the grid": PaddedShapes(tokens, whole=True),
                "padded": PaddedShapes(tokens),
                "bucketed": session.bucket_set,
                "packed": None,
            }
            for form, shapes in forms.items():
                step = self.stepper(candidate, session.with_shapes(shapes))
                for phase, row in enumerate(counts):
                    calls[candidate.name, form, phase] = lambda step=step, row=row: step(row)  # type: ignore[misc]
        computed: dict[tuple[str, str, int], int] = {}

        def counted(key: tuple[str, str, int]) -> Callable[[], None]:
            def call() -> None:
                plan = calls[key]().last_plan
                assert plan is not None
                computed[key] = plan.packed_index.size

            return call

        names = {key: ", ".join(map(str, key)) for key in calls}
        candidates: dict[str, Callable[[], Any]] = {"original": self.original_call()}
        candidates |= {name: counted(key) for key, name in names.items()}
        times = interleaved(candidates, runs, tick=lambda: tick("turns"))
        result = []
        for candidate in packed:
            kept = float(self.staggered(candidate).sum(1).mean())
            for form in dict.fromkeys(key[1] for key in calls):
                keys = [key for key in calls if key[:2] == (candidate.name, form)]
                taken = np.mean([times[names[key]] for key in keys], axis=0)
                places = float(np.mean([computed[key] for key in keys]))
                result.append(Execution(candidate.name, form, kept, places, list(taken), times["original"]))
        return result

    def staggered(self, candidate: Candidate) -> np.ndarray:
        """Kept tokens [phases, rows] of a batch whose images began their runs one after the other."""
        steps = candidate.sampler.steps
        starts = np.arange(self.batch) * steps // self.batch
        phases = np.arange(PHASES) * steps // (PHASES * self.batch)  # later, each image is where another one was
        where = (starts[None] + phases[:, None]) % steps
        return np.concatenate([half[where] for half in candidate.halves], axis=1)

    def memory(self, tick: Tick) -> dict[str, MemoryUse]:
        """Memory by the candidates' names; that of the original is under "original"."""
        example = self.original.model.spec.example(self.rows)
        found: dict[str, MemoryUse] = {}
        with torch.inference_mode():
            tick("original")
            peak = original_memory(self.original, self.scratch / "original.onnx", self.rows)
            attention = original_attention(self.original.model, example)
            found["original"] = MemoryUse.of(peak, attention.peak, attention.total, 0)
            for candidate in self.candidates:
                tick(candidate.name)
                runtime, model = self.runtimes[candidate.name], candidate.bundle.model
                assert isinstance(runtime.converted.bucket_set, BucketSet)
                shapes = shapes_of(runtime.converted.bucket_set, candidate.counts(self.batch))
                parts = [
                    (
                        shape.weight,
                        converted_attention(model, model.spec.example(self.rows), shape.counts, shape.bucket),
                    )
                    for shape in shapes
                ]
                most = max(shapes, key=lambda shape: shape.bucket.tokens)
                found[candidate.name] = MemoryUse.of(
                    converted_memory(runtime, candidate.bundle.onnx, most.counts, most.bucket),
                    max(part.peak for _, part in parts),
                    sum(weight * part.total for weight, part in parts),
                    model.spec.state_bytes * self.rows,
                )
        return found


def comparison_rows(comparison: Comparison, runs: int, tick: Tick) -> list[Row]:
    """The original at the candidates' own steps and with fewer, and the candidates, timed in turns."""
    seconds, times = comparison.latency(runs, tick)
    costs = {candidate.name: candidate.compute() for candidate in comparison.candidates}
    controls: dict[tuple[str, int], list[str]] = {}
    converted = []
    for candidate in comparison.candidates:
        cost, taken = costs[candidate.name], times[candidate.name]
        before = candidate.reference
        faster = float(np.median(seconds) * before.steps / (np.median(taken.weighted) * candidate.sampler.steps))
        for steps, name in control_steps(before.steps, faster, cost["original"] / cost["converted"]).items():
            for solver in (before.solver, *(BEST if name else ())):
                names = controls.setdefault((solver, steps), [])
                names += [f"{name} {candidate.name.split()[0]}" if len(costs) > 1 else name] if name else []
        new_step = partial(candidate.new_step, comparison.runtimes[candidate.name].converted)
        converted.append(
            Row(
                candidate.name,
                candidate.mode,
                candidate.sampler,
                cost["converted"],
                new_step,
                taken.weighted,
                stages_ms=taken.stages_ms,
                kept=tuple(half.tolist() for half in candidate.halves),
            )
        )
    first, step = comparison.candidates[0], comparison.original.original_step
    gmacs = costs[first.name]["original_step"]
    rows = []
    several = len({solver for solver, _ in controls}) > 1
    for solver, steps in sorted(controls, key=lambda key: (key[0], -key[1])):
        sampler = original_run(first.sampler.prediction, steps, solver)
        control = "; ".join(dict.fromkeys(controls[solver, steps]))
        name = f"original, {f'{solver}, ' if several else ''}{steps} steps"
        rows.append(Row(name, "original", sampler, gmacs * steps, lambda: step, seconds, control))
    return [*rows, *converted]


def control_steps(steps: int, speedup: float, flop_ratio: float) -> dict[int, str]:
    """Numbers of steps of the original to compare with a converted run of `steps`, and what each has in common with it.

    The same number, three quarters, half, and the numbers that take as long or as many operations.
    """
    found = {max(1, round(steps * share)): "" for share in (1, 0.75, 0.5)}
    for name, ratio in (("time", speedup), ("GMACs", flop_ratio)):
        count = min(TRAIN_STEPS, max(1, round(steps / ratio)))
        found[count] = " and ".join(filter(None, (found.get(count), name)))
    return found
