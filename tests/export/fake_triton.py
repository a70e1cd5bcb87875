"""A stand-in for a Triton server: its Python module, with requests to ONNX models answered by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import torch


class FakeTensor:
    def __init__(self, name: str, value: np.ndarray) -> None:
        assert isinstance(value, np.ndarray)
        self._name, self.value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        """Wrong numbers, as Triton up to 24.10 gives them with numpy 2."""
        return np.zeros_like(self.value)

    def to_dlpack(self) -> Any:
        return torch.utils.dlpack.to_dlpack(torch.from_numpy(self.value))

    @staticmethod
    def from_dlpack(name: str, capsule: Any) -> FakeTensor:
        return FakeTensor(name, torch.from_dlpack(capsule).numpy())


class FakeError:
    INVALID_ARG, INTERNAL = "invalid argument", "internal"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


class Response:
    def __init__(self, output_tensors: list[FakeTensor], error: FakeError | None = None) -> None:
        self.tensors, self._error = {tensor.name(): tensor for tensor in output_tensors}, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> FakeError:
        assert self._error is not None
        return self._error


class Server:
    """What `triton_python_backend_utils` is inside a server that has loaded a model repository."""

    Tensor, TritonError, InferenceResponse = FakeTensor, FakeError, Response

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.sessions: dict[str, Any] = {}
        self.asked: list[str] = []

    def get_input_tensor_by_name(self, request: Any, name: str) -> FakeTensor | None:
        found = request.tensors.get(name)
        assert found is None or isinstance(found, FakeTensor)
        return found

    def get_output_tensor_by_name(self, response: Response, name: str) -> FakeTensor:
        return response.tensors[name]

    def InferenceRequest(  # noqa: N802  (the server's name)
        self, model_name: str, requested_output_names: list[str], inputs: list[FakeTensor]
    ) -> Any:
        return SimpleNamespace(exec=lambda: self.answer(model_name, requested_output_names, inputs))

    def answer(self, model: str, names: list[str], inputs: list[FakeTensor]) -> Response:
        self.asked.append(model)
        if model not in self.sessions:
            path = self.repository / model / "1" / "model.onnx"
            self.sessions[model] = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        try:
            found = self.sessions[model].run(names, {tensor.name(): tensor.value for tensor in inputs})
        except Exception as error:  # whatever ONNX Runtime has against it
            return Response([], FakeError(str(error)))
        return Response([FakeTensor(name, value) for name, value in zip(names, found, strict=True)])


def request(sequence: int | str = 0, flags: int = 0, **values: Any) -> Any:
    tensors = {name: FakeTensor(name, np.asarray(value)) for name, value in values.items()}
    return SimpleNamespace(tensors=tensors, correlation_id=lambda: sequence, flags=lambda: flags)
