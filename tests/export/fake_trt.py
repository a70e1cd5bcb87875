"""A stand-in for TensorRT without a GPU: engines are names of ONNX files, contexts run them on ONNX Runtime.

Only what engines are used through is here, with the names and the order of calls that TensorRT has; memory is given by
address, as there.
"""

from __future__ import annotations

import ctypes
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
__version__ = "1.2.3"


class Logger:
    ERROR = 1

    def __init__(self, severity: int) -> None:
        self.severity = severity


def nptype(dtype: Any) -> Any:
    return dtype


class Runtime:
    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        try:
            return Engine(**json.loads(data))
        except ValueError:
            return None


class Engine:
    """`profiles`: the exact shapes of every input in each."""

    def __init__(self, onnx: str, profiles: list[dict[str, list[list[int]]]]) -> None:
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.profiles = profiles
        self.nodes = {node.name: node for node in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.contexts: list[Context] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self.nodes)

    def get_tensor_name(self, i: int) -> str:
        return list(self.nodes)[i]

    def get_tensor_mode(self, name: str) -> str:
        return TensorIOMode.INPUT if name in {node.name for node in self.session.get_inputs()} else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return DTYPES[self.nodes[name].type]

    def create_execution_context(self) -> Context:
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, i: int, stream: int) -> bool:
        self.profile, self.shapes = i, {}
        return i < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        low, _, high = self.engine.profiles[self.profile][name]
        self.shapes[name] = shape
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes = {
            axis: size
            for node in self.engine.session.get_inputs()
            for axis, size in zip(node.shape, self.shapes[node.name], strict=True)
        }
        return tuple(size if isinstance(size, int) else sizes[size] for size in self.engine.nodes[name].shape)

    def execute_async_v3(self, stream: int) -> bool:
        feed = {name: self.array(name, shape).copy() for name, shape in self.shapes.items()}
        names = [node.name for node in self.engine.session.get_outputs()]
        for name, value in zip(names, self.engine.session.run(names, feed), strict=True):
            self.array(name, value.shape)[...] = value
        return True

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The memory at an address."""
        dtype = np.dtype(self.engine.get_tensor_dtype(name))
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_byte * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype=dtype).reshape(shape)
