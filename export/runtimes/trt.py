"""TensorRT and TensorRT-RTX engines of a bundle's graphs."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dcconvert.export.buckets import BucketSet
from dcconvert.export.disk.hashes import listed_in
from dcconvert.export.engines.build import ENGINES, MODULES, file_hash, full_buckets
from dcconvert.export.engines.index import INDEX, Built, Device, read_index
from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.ir.spec import state_output
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.run import Runtime
from dcconvert.passes.runtime.state import TensorState, zeros


class TrtState(TensorState):
    """A run's state, in buffers on the GPU that stay where they are.

    Mode carry has two copies: a step reads one and writes the other, then they are swapped. Mode steps writes each
    update into the slot of the oldest one, which computed steps do not read.
    """

    in_place: ClassVar[bool] = True

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__(values)
        self.spare: dict[str, Tensor] = {}

    @property
    def into(self) -> dict[str, Any]:
        if not self.spare:
            self.spare = {name: torch.empty_like(value) for name, value in self.values.items()}
        return {state_output(name): value for name, value in self.spare.items()}

    def advance(self, made: Mapping[str, Any], distance: np.ndarray | None) -> None:
        self.spare = self.values
        super().advance(made, distance)

    def put(self, name: str, samples: np.ndarray, made: Tensor, rows: np.ndarray) -> None:
        self.values[name][self._index(samples, name)] = made[self._index(rows, name)]


class LoadedEngine:
    """An engine with one execution context, which switches its profile when the bucket changes.

    Buffers for the host's inputs and for outputs are allocated once per shape. It runs on its own stream, and this
    stream and the caller's wait for each other. Raises UsageError if there is no memory for the context.
    """

    def __init__(self, engine: Any, trt: Any, device: str) -> None:
        self.engine, self.device = engine, device
        self.context = engine.create_execution_context()
        if self.context is None:
            raise UsageError("cannot create an execution context for an engine: the GPU has too little free memory")
        self.stream = torch.cuda.Stream() if device != "cpu" else None
        self.profile: int | None = None
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        self.dtypes = {name: torch_dtype(engine.get_tensor_dtype(name), trt) for name in names}
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def __call__(self, profile: int, given: Mapping[str, Any], written: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, in the buffers of `written` if it has them.

        Raises UsageError for an input of another type than the engine's, and CheckFailedError if the engine does not
        run.
        """
        if self.stream is None:
            return self.run(profile, given, written, 0)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            found = self.run(profile, given, written, self.stream.cuda_stream)
        torch.cuda.current_stream().wait_stream(self.stream)
        return found

    def run(
        self, profile: int, given: Mapping[str, Any], written: Mapping[str, Tensor], stream: int
    ) -> dict[str, Tensor]:
        if profile != self.profile:
            require(self.context.set_optimization_profile_async(profile, stream), f"has no profile {profile}")
            self.profile = profile
        for name in self.inputs:
            value = self.on_device(name, given[name])
            shape = tuple(value.shape)
            require(
                self.context.set_input_shape(name, shape), f"does not accept {name} {list(shape)} in profile {profile}"
            )
            require(self.context.set_tensor_address(name, value.data_ptr()), f"does not take a buffer for {name}")
        outputs = {name: written[name] if name in written else self.output(name) for name in self.outputs}
        for name, value in outputs.items():
            require(self.context.set_tensor_address(name, value.data_ptr()), f"does not take a buffer for {name}")
        require(self.context.execute_async_v3(stream), "did not run")
        return outputs

    def on_device(self, name: str, value: Any) -> Tensor:
        source = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        if source.dtype != self.dtypes[name]:
            raise UsageError(f"input {name} is {source.dtype}, but the engine needs {self.dtypes[name]}: convert it")
        if isinstance(value, Tensor) and value.is_contiguous() and value.device.type == self.device:
            return value
        return self.buffer(name, tuple(source.shape)).copy_(source)

    def output(self, name: str) -> Tensor:
        return self.buffer(name, tuple(self.context.get_tensor_shape(name)))

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if (name, shape) not in self._buffers:
            self._buffers[name, shape] = torch.empty(shape, dtype=self.dtypes[name], device=self.device)
        return self._buffers[name, shape]


def torch_dtype(kind: Any, trt: Any) -> torch.dtype:
    """TensorRT's type of a tensor as torch's; numpy has no bfloat16."""
    if kind == getattr(trt, "bfloat16", None):
        return torch.bfloat16
    return torch.from_numpy(np.empty(0, trt.nptype(kind))).dtype


def require(done: Any, what: str) -> None:
    """Raises CheckFailedError if TensorRT reports that a call failed."""
    if not done:
        raise CheckFailedError(f"an engine {what}: build it again with 'dcconvert build'")


@dataclass(frozen=True)
class Place:
    """The place of a graph's bucket: an engine and a profile."""

    engine: LoadedEngine
    profile: int


class TrtModel(Runtime):
    """A converted model on TensorRT or TensorRT-RTX: inputs are numpy arrays by name.

    The bucket set has the buckets with engines: if the bucket of a batch is missing, the next larger one is used.
    `onnx`: the folder with the variants that the engines were built from. `device`: "cuda"; `trt`: the backend's
    module, imported if it is not given.

    Raises:
        UsageError: engines are missing, damaged, of another version or GPU, or older than the graphs.
    """

    def __init__(self, folder: Path, onnx: Path, planner: StepPlanner, device: str = "cuda", trt: Any = None) -> None:
        index = read_index(folder)
        self.trt = trt or backend_module(index.device, folder)
        self.planner, self.device, self.ranges = planner, device, index.ranges
        self.turn = threading.RLock()
        runtime = self.trt.Runtime(self.trt.Logger(self.trt.Logger.ERROR))
        self.places: dict[tuple[str, Bucket], Place] = {}
        for entry in index.engines:
            check_graph(entry, onnx, folder)
            loaded = LoadedEngine(load_engine(runtime, folder / entry.file), self.trt, device)
            for number, bucket in enumerate(entry.buckets):
                self.places[entry.graph, bucket] = Place(loaded, number)
        self.bucket_set: BucketSet = engine_buckets(self.places, planner, folder)

    def plan_shape(self, counts: np.ndarray) -> Bucket:
        """The bucket of a batch; with ranges, as short as its longest sample in the profile of that bucket."""
        chosen = self.bucket_set.choose(len(counts), counts)
        if not self.ranges:
            return chosen
        below = [b.row_tokens for b in self.bucket_set.buckets if b.batch == chosen.batch and b < chosen]
        length = max(int(np.max(counts)), max(below, default=0) + 1)
        return Bucket(chosen.batch, chosen.batch * length, chosen.rows, length, length)

    def call(
        self, graph: str, feed: Mapping[str, Any], bucket: Bucket | None, into: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Outputs by name, in buffers that the next call in this shape writes to, or in `into`."""
        assert bucket is not None
        place = self.places[graph, bucket]
        made = place.engine(place.profile, feed, into)
        return {name: value.clone() for name, value in made.items()} if graph == "prepare" else made

    def array(self, value: Tensor) -> np.ndarray:
        return value.cpu().numpy().copy()

    def empty_state(self, batch: int) -> TrtState:
        return TrtState(zeros(self.spec, batch, self.device).values)


def open_engines(bundle: Path, onnx: Path, planner: StepPlanner) -> TrtModel:
    """The engines of a bundle that run on this machine; if there are none, a UsageError that lists what exists."""
    folders = sorted(path.parent for path in (bundle / ENGINES).glob(f"*/{INDEX}"))
    if not folders:
        raise UsageError(f"{bundle} has no engines: make them with 'dcconvert build {bundle}'")
    reasons = []
    for folder in folders:
        try:
            return TrtModel(folder, onnx, planner)
        except UsageError as error:
            reasons.append(str(error))
    raise UsageError("; ".join(reasons))


def backend_module(wanted: Device, folder: Path) -> Any:
    """The module that runs engines of this device; raises UsageError if it is not installed or its version differs."""
    name, again = wanted.backend, "build them here with 'dcconvert build'"
    try:
        trt = importlib.import_module(MODULES[name])
    except (ImportError, OSError, KeyError) as error:
        raise UsageError(f"{folder} is for {name}, which is not installed: install it, or {again}") from error
    if trt.__version__ != wanted.version:
        raise UsageError(f"{folder} is for {name} {wanted.version}, but {trt.__version__} is installed: {again}")
    if not torch.cuda.is_available():
        raise UsageError(f"{folder}: engines need an NVIDIA GPU, but torch {torch.__version__} finds none")
    found = ".".join(map(str, torch.cuda.get_device_capability()))
    if wanted.capability and wanted.capability != found:
        raise UsageError(
            f"{folder} is for compute capability {wanted.capability}, but this GPU "
            f"({torch.cuda.get_device_name()}) has {found}: {again}"
        )
    return trt


def check_graph(entry: Built, onnx: Path, folder: Path) -> None:
    """Raises UsageError if an engine was not built from the bundle's current graph."""
    path = onnx / entry.variant / f"{entry.graph}.onnx"
    listed = listed_in(onnx.parent)  # a graph that was deleted to save space is still listed
    gone = bool(listed) and path.relative_to(onnx.parent).as_posix() not in listed
    if file_hash(path) != entry.onnx_sha256 if path.is_file() else gone:
        raise UsageError(f"{folder / entry.file} is older than {path}: build again with 'dcconvert build'")


def load_engine(runtime: Any, path: Path) -> Any:
    try:
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; build again with 'dcconvert build'") from error
    if engine is None:
        raise UsageError(
            f"{path} cannot be loaded: it is damaged ('dcconvert build' detects that and rebuilds it), or not for "
            "this GPU ('dcconvert build --compute-capability' builds for another)"
        )
    return engine


def engine_buckets(places: dict[tuple[str, Bucket], Place], planner: StepPlanner, folder: Path) -> BucketSet:
    """The buckets that can run; raises UsageError if none keeps everything."""
    tokens = planner.spec.tokens
    *others, last = planner.spec.graphs
    buckets = tuple(sorted(bucket for graph, bucket in places if graph == last))
    found = BucketSet(buckets, tokens, 0.0)
    complete = bool(buckets) and all((graph, b) in places for graph in others for b in full_buckets(buckets))
    if not complete or not any(b.fits([tokens] * found.batches[-1]) for b in buckets):
        raise UsageError(f"engines are missing in {folder}: build again with 'dcconvert build'")
    return found
