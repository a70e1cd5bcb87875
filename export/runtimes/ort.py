"""ONNX Runtime sessions over a bundle's graphs: route, plan on the host, denoise."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcconvert.export.buckets import BucketSet, PaddedShapes
from dcconvert.export.onnx.export import state_output
from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.ir.spec import SCORES_NAME, StateSpec
from dcconvert.passes.planning.carry_plan import CarryPlan
from dcconvert.passes.planning.chunk_plan import Plan
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.run import Run

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


def make_session(path: Path, provider: str = CPU, threads: int = 0, settings: Mapping[str, str] | None = None) -> Any:
    """An InferenceSession on exactly `provider`, with some of that provider's own settings.

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
        there = ", ".join(ort.get_available_providers())
        raise UsageError(f"this onnxruntime has no {provider} (it has {there}): install one that has, or use the CPU")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    wanted = (provider, dict(settings or {}))
    providers = [wanted] if provider == CPU else [wanted, CPU]
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # the base of onnxruntime's own
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot load {path} on {provider}: {reason}; convert the model again") from error
    running = session.get_providers()[0]
    if running != provider:
        raise CheckFailedError(f"{path.name} was asked to run on {provider} but runs on {running}")
    return session


class OrtState:
    """What a run remembers, in buffers on a session's device that it reads and writes in place.

    Between steps nothing is copied: every step binds the same memory as input and output. That is safe because the
    only reader of a state in the graph is the node that writes it, and that node copies only between two buffers.
    """

    def __init__(self, specs: Sequence[StateSpec], batch: int, tokens: int, device: str = "cpu") -> None:
        shapes = {spec.name: (spec.shape(batch, tokens), spec.dtype) for spec in specs}
        self.values = {name: on_device(np.zeros(shape, dtype), device) for name, (shape, dtype) in shapes.items()}
        self.distance: np.ndarray | None = None

    def clear(self, samples: Sequence[int]) -> None:
        for value in self.values.values():
            array = value.numpy()
            array[:, list(samples)] = 0
            value.update_inplace(array)

    def bind(self, binding: Any) -> None:
        """Name the buffers as inputs and as outputs of a session's binding."""
        for name, value in self.values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(state_output(name), value)


def on_device(array: np.ndarray, device: str) -> Any:
    """An OrtValue of ONNX Runtime's own memory: on the CPU one made from an array would go on using that."""
    import onnxruntime as ort

    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, device, 0)
    value.update_inplace(np.ascontiguousarray(array))
    return value


class OrtModel:
    """A converted model on ONNX Runtime: the backend of a `Run` over the original's inputs as numpy arrays, by name.

    a batch size without buckets is filled up by repeating its last sample, and the copies are cut off
    the result. Without a bucket set every step runs in the smallest shape that holds it.
    """

    def __init__(
        self,
        folder: Path,
        planner: StepPlanner,
        bucket_set: BucketSet | PaddedShapes | None = None,
        provider: str = CPU,
        threads: int = 0,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        def opened(graph: str) -> Any:
            return make_session(folder / f"{graph}.onnx", provider, threads, settings)

        self.route_session, self.denoise_session = opened("route"), opened("denoise")
        self.prepare_session = (
            make_session(folder / "prepare.onnx", provider, threads) if planner.spec.constants else None
        )
        self.planner = planner
        self.bucket_set = bucket_set
        self.provider = provider
        self.device = "cpu" if provider == CPU else "cuda"
        self._outputs = [output.name for output in self.denoise_session.get_outputs()]
        states = {spec.name for spec in planner.spec.states}
        self._plain_inputs = [node.name for node in self.denoise_session.get_inputs() if node.name not in states]

    def with_shapes(self, bucket_set: BucketSet | PaddedShapes | None) -> OrtModel:
        """The same sessions with other shapes for the steps."""
        other = copy.copy(self)
        other.bucket_set = bucket_set
        return other

    def start(self, batch: int, groups: int = 1) -> Run:
        """A new sampling run of `batch` samples; call its `step` for every timestep. `groups` as in `Run`."""
        return Run(self, batch, groups)

    def padded(self, batch: int) -> int:
        """The smallest batch size in the set that holds `batch` samples; UsageError if none does."""
        if self.bucket_set is None:
            return batch
        return self.bucket_set.choose(batch, self.planner.spec.tokens).batch

    def bucket(self, counts: np.ndarray) -> Bucket | None:
        return self.bucket_set.choose(len(counts), counts) if self.bucket_set else None

    def prepare(self, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
        """What stays the same over a run, by name, on the device; nothing for most models."""
        if self.prepare_session is None:
            return {}
        return self._on_device(self.prepare_session, inputs)

    def route(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, Any]]:
        """Scores [B, N], and the values denoise needs, by name, on the device."""
        live = self._on_device(self.route_session, inputs)
        return live.pop(SCORES_NAME).numpy(), live

    def _on_device(self, session: Any, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
        """Outputs of a session, by name, left where they were made."""
        binding = session.io_binding()
        for node in session.get_inputs():
            binding.bind_cpu_input(node.name, np.ascontiguousarray(inputs[node.name]))
        names = [output.name for output in session.get_outputs()]
        for name in names:
            binding.bind_output(name, self.device)
        session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))

    def denoise(
        self,
        inputs: dict[str, np.ndarray],
        live: dict[str, Any],
        plan: Plan | CarryPlan,
        state: OrtState | None = None,
    ) -> list[np.ndarray]:
        """Flat outputs of the model; in mode carry the state (None: an empty one) is brought forward."""
        constants = self.planner.spec.constants
        if constants and constants[0] not in inputs:
            inputs = {**inputs, **self.prepare(inputs)}
        given = {**inputs, **live, **plan.arrays()}
        binding, plain = self.denoise_session.io_binding(), self._outputs
        if self.planner.spec.states:
            state = state or self.new_state(len(plan.counts))
            state.bind(binding)
            plain = self._outputs[: -len(self.planner.spec.states)]
        for name in self._plain_inputs:
            if isinstance(given[name], np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(given[name]))
            else:
                binding.bind_ortvalue_input(name, given[name])
        for name in plain:
            binding.bind_output(name)
        self.denoise_session.run_with_iobinding(binding)
        outputs = [value.numpy() for value in binding.get_outputs()[-len(plain) :]]
        if state is not None:
            state.distance = outputs.pop()
        return outputs

    def new_state(self, batch: int) -> OrtState:
        """An empty state for `batch` samples."""
        return OrtState(self.planner.spec.states, batch, self.planner.spec.tokens, self.device)


def pick(session: Any, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs a session takes, out of all there are."""
    return {node.name: given[node.name] for node in session.get_inputs()}
