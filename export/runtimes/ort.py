"""ONNX Runtime sessions over a bundle's graphs: route, plan on the host, denoise."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dcconvert.export.disk.onnx_files import checked_onnx, opset_of
from dcconvert.export.onnx.lowerings import PORTABLE
from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.ir.spec import UPDATE, state_output
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.run import Buckets, Runtime
from dcconvert.passes.runtime.state import State

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
OLDEST = (1, 20)  # ONNX Runtime: the oldest that was tried
FUSED_OLDEST = (1, 25)  # the oldest for opset 24: others reject it, or attend to padding that they should leave out


def make_session(path: Path, provider: str = CPU, threads: int = 0, settings: Mapping[str, str] | None = None) -> Any:
    """An InferenceSession on exactly `provider`, with some of that provider's own settings.

    `threads`: intra-op threads, 0 for one per core. Spinning stops at the end of a run: two sessions that take
    turns (route, denoise) would otherwise burn each other's cores while they wait.

    Raises:
        UsageError: onnxruntime is not installed or too old, the provider is not in this build, or the file cannot be
            read.
        CheckFailedError: the session runs on another provider than the one asked for.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UsageError("onnxruntime is not installed: pip install 'dcconvert[cpu]' or 'dcconvert[gpu]'") from error
    check_version(ort.__version__, path)
    if provider not in ort.get_available_providers():
        there = ", ".join(ort.get_available_providers())
        raise UsageError(f"this onnxruntime has no {provider} (it has {there}): install one that has, or use the CPU")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    wanted = (provider, dict(settings or {}))
    providers = [wanted] if provider == CPU else [wanted, CPU]
    missing = load_libraries() if provider == CUDA else ""
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # the base class of onnxruntime's own
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot load {path} on {provider}: {reason}; convert the model again") from error
    running = session.get_providers()[0]
    if running != provider:
        raise CheckFailedError(f"{path.name} should run on {provider} but runs on {running}; {missing}".rstrip("; "))
    return session


def load_libraries() -> str:
    """Load CUDA and cuDNN from the NVIDIA packages or wherever else they are; what could not be loaded, and why.

    ONNX Runtime does not look into these packages itself, and would run on the CPU instead.
    """
    import onnxruntime as ort

    with contextlib.redirect_stdout(io.StringIO()) as said:
        ort.preload_dlls()
    return " ".join(said.getvalue().split())


def device_of(session: Any) -> str:
    """Where a session has its buffers, as ONNX Runtime names devices."""
    return "cpu" if session.get_providers()[0] == CPU else "cuda"


def check_version(version: str, path: Path) -> None:
    """Raises UsageError for an ONNX Runtime that would reject a graph or give wrong results without an error."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers >= FUSED_OLDEST:
        return
    needed = OLDEST if opset_of(checked_onnx(path)) <= PORTABLE.opset else FUSED_OLDEST
    if numbers < needed:
        least = ".".join(map(str, needed))
        raise UsageError(
            f"onnxruntime {version} is too old for {path}: versions before {least} refuse it or give wrong results; "
            f"install one with pip install 'onnxruntime>={least}'"
        )


class OrtState(State):
    """Buffers on a session's device, which steps read and write in place.

    Between steps nothing is copied: every step binds the same memory as input and output. That is safe because the
    only reader of a state in the graph is the node that writes it, and that node copies only between two buffers.
    """

    in_place: ClassVar[bool] = True

    @property
    def into(self) -> dict[str, Any]:
        return {state_output(name): value for name, value in self.values.items()}

    def advance(self, made: Mapping[str, Any], distance: np.ndarray | None) -> None:
        self.distance = distance  # the buffers hold the rest

    def rows(self, name: str, samples: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.values[name].numpy()[samples]
        return found

    def put(self, name: str, samples: np.ndarray, made: Any, rows: np.ndarray) -> None:
        array = self.values[name].numpy()
        array[samples] = made.numpy()[rows]
        self.values[name].update_inplace(array)

    def clear(self, samples: Sequence[int]) -> None:
        for value in self.values.values():
            array = value.numpy()
            array[:, list(samples)] = 0
            value.update_inplace(array)


def on_device(array: np.ndarray, device: str) -> Any:
    """An OrtValue in ONNX Runtime's own memory: on the CPU, one made from an array would keep using the array's
    memory."""
    import onnxruntime as ort

    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, device, 0)
    value.update_inplace(np.ascontiguousarray(array))
    return value


class OrtModel(Runtime):
    """A converted model on ONNX Runtime; inputs are numpy arrays by name.

    A batch of a size without buckets is filled up by repeating its last sample, and the copies are cut off the result.
    Without a bucket set, every step runs in the smallest shape that holds it.
    """

    def __init__(
        self,
        folder: Path,
        planner: StepPlanner,
        bucket_set: Buckets | None = None,
        provider: str = CPU,
        threads: int = 0,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.planner = planner
        self.bucket_set = bucket_set
        self.provider = provider
        self.device = "cpu" if provider == CPU else "cuda"
        for graph in planner.spec.graphs:
            checked_onnx(folder / f"{graph}.onnx")
        self.sessions = {
            graph: make_session(folder / f"{graph}.onnx", provider, threads, None if graph == "prepare" else settings)
            for graph in planner.spec.graphs
        }
        # ONNX Runtime makes these lists anew every time, which takes as long as a small copy.
        self.names_in = {graph: [node.name for node in s.get_inputs()] for graph, s in self.sessions.items()}
        self.names_out = {graph: [node.name for node in s.get_outputs()] for graph, s in self.sessions.items()}

        for graph in self.sessions:
            self.check_names(graph, folder / f"{graph}.onnx")

    def check_names(self, graph: str, path: Path) -> None:
        """UsageError for a file with the inputs and outputs of another graph."""
        found, takes = self.names_out[graph], self.planner.spec.inputs_of(graph)
        try:
            gives = self.planner.spec.outputs_of(graph, len(found))
        except (ValueError, IndexError):
            gives = ()
        if not set(self.names_in[graph]) <= set(takes) or tuple(found) != tuple(gives):
            raise UsageError(f"{path} is not the graph {graph} of this bundle: convert the model again")

    def with_shapes(self, bucket_set: Buckets | None) -> OrtModel:
        """The same sessions with other shapes for the steps."""
        other = copy.copy(self)
        other.bucket_set = bucket_set
        return other

    def call(
        self, graph: str, feed: Mapping[str, Any], bucket: Bucket | None, into: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Outputs by name: the model's own on the host, others left on the device for later calls."""
        session = self.sessions[graph]
        binding = session.io_binding()
        for name in self.names_in[graph]:
            value = feed[name]
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                binding.bind_ortvalue_input(name, value)
        names = self.names_out[graph]
        for name in names:
            if name in into:
                binding.bind_ortvalue_output(name, into[name])
            else:
                binding.bind_output(name, self.device if name in self.kept_there else "cpu")
        session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))

    @cached_property
    def kept_there(self) -> set[str]:
        """Outputs that later calls read on the device."""
        return {UPDATE, *self.spec.live, *self.spec.constants}

    def array(self, value: Any) -> np.ndarray:
        return np.asarray(value.numpy())

    def empty_state(self, batch: int) -> OrtState:
        shapes = self.spec.state_shapes(batch).items()
        return OrtState({name: on_device(np.zeros(shape, dtype), self.device) for name, (shape, dtype) in shapes})


def pick(session: Any, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs that a session takes, out of those given."""
    return {node.name: given[node.name] for node in session.get_inputs()}
