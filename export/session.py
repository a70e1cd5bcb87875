"""ONNX Runtime sessions over a bundle's graphs: route, plan on the host, denoise."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dcconvert.export.buckets import Ladder
from dcconvert.passes.errors import CheckFailedError, UsageError
from dcconvert.passes.model import StepPlanner
from dcconvert.passes.plan import Plan

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


def make_session(path: Path, provider: str = CPU, threads: int = 0) -> Any:
    """An InferenceSession on exactly `provider`.

    `threads`: intra-op threads, 0 for one a core. Spinning stops at the end of a run: two sessions that take
    turns (route, denoise) would otherwise burn each other's cores while they wait.

    Raises:
        UsageError: onnxruntime is not installed, the provider is not in this build, or the file cannot be read.
        CheckFailedError: the session runs on another provider than the one asked for.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UsageError("onnxruntime is not installed: pip install 'dcconvert[cpu]' or 'dcconvert[gpu]'") from error
    if provider not in ort.get_available_providers():
        raise UsageError(f"this onnxruntime has no {provider} (it has {', '.join(ort.get_available_providers())})")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = [provider] if provider == CPU else [provider, CPU]
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # the base of onnxruntime's own
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot load {path} on {provider}: {reason}; convert the model again") from error
    running = session.get_providers()[0]
    if running != provider:
        raise CheckFailedError(f"{path.name} was asked to run on {provider} but runs on {running}")
    return session


@dataclass
class StageTimes:
    """Seconds spent in the stages of one step."""

    route: float
    plan: float
    denoise: float

    @property
    def total(self) -> float:
        return self.route + self.plan + self.denoise


class OrtModel:
    """A converted model on ONNX Runtime; call it with the original's inputs as numpy arrays, by name.

    A batch that is not on the ladder is filled up by repeating its last sample, and the copies are cut off
    the result. Without a ladder every step runs in the smallest shape that holds it.
    """

    def __init__(
        self,
        folder: Path,
        planner: StepPlanner,
        ladder: Ladder | None = None,
        provider: str = CPU,
        threads: int = 0,
    ) -> None:
        self.route_session = make_session(folder / "route.onnx", provider, threads)
        self.denoise_session = make_session(folder / "denoise.onnx", provider, threads)
        self.planner = planner
        self.ladder = ladder
        self.provider = provider
        self.last_plan: Plan | None = None
        self.last_times: StageTimes | None = None
        self._live = [output.name for output in self.route_session.get_outputs()][1:]

    def __call__(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Flat outputs of one step; the schedule says how many tokens are kept."""
        batch = len(next(value for value in inputs.values() if np.ndim(value)))
        return self.step(inputs, self.planner.counts(self._timesteps(inputs), batch))

    def step(self, inputs: dict[str, np.ndarray], counts: np.ndarray) -> list[np.ndarray]:
        """Flat outputs of one step in which sample b keeps counts[b] tokens."""
        start = time.perf_counter()
        batch = len(counts)
        bucket = self.ladder.choose(batch, counts) if self.ladder else None
        if bucket is not None and bucket.batch > batch:
            batched = {spec.name for spec in self.planner.spec.input_specs if spec.batched}
            inputs = {n: fill_batch(value, bucket.batch) if n in batched else value for n, value in inputs.items()}
            counts = fill_batch(counts, bucket.batch)
        scores, live = self.route(inputs)
        routed = time.perf_counter()
        plan = self.planner.plan(scores, counts, bucket)
        planned = time.perf_counter()
        outputs = self.denoise(inputs, live, plan)
        self.last_plan = plan
        self.last_times = StageTimes(routed - start, planned - routed, time.perf_counter() - planned)
        return [output[:batch] for output in outputs]

    def route(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores [B, N] and the values denoise needs, by name."""
        scores, *live = self.route_session.run(None, pick(self.route_session, inputs))
        return scores, dict(zip(self._live, live, strict=True))

    def denoise(self, inputs: dict[str, np.ndarray], live: dict[str, np.ndarray], plan: Plan) -> list[np.ndarray]:
        return self.denoise_session.run(None, pick(self.denoise_session, {**inputs, **live, **plan.arrays()}))

    def _timesteps(self, inputs: dict[str, np.ndarray]) -> np.ndarray | None:
        name = self.planner.spec.timestep
        return None if name is None else np.asarray(inputs[name])


def pick(session: Any, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs a session takes, out of all there are."""
    return {node.name: given[node.name] for node in session.get_inputs()}


def fill_batch(value: np.ndarray, batch: int) -> np.ndarray:
    """Repeat the last sample until there are `batch`."""
    return np.concatenate([value, np.repeat(value[-1:], batch - len(value), axis=0)])
