"""The model that clients of a Triton server call: it decides what a step computes; the graphs are other models.

Triton's Python backend imports a few lines (`model.py`) that call `Served`. It talks to the ONNX models by requests
inside the server (business logic scripting), through the module that the server provides,
`triton_python_backend_utils`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.export.buckets import BucketSet
from dcconvert.export.bundle import GRAPH, manifest_buckets
from dcconvert.export.files import MANIFEST, read_json
from dcconvert.passes.ir.errors import DcconvertError, UsageError
from dcconvert.passes.ir.spec import output_names
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.run import Run, Runtime
from dcconvert.passes.runtime.state import TensorState, zeros
from dcconvert.passes.serialise.graph_json import planner_from_dict

IDLE_SECONDS = 60.0  # after which a sampling run without requests is dropped
OUTPUTS = "outputs.json"  # how many outputs the original has, beside manifest and graph
START, END = 1, 2  # flags of a request in a sequence, as the server passes them


class TritonModel(Runtime):
    """The runtime whose graphs are models of the same server, `NAME_route` and so on.

    A state consists of the server's own outputs of the previous step, wherever they are. `outputs`: the original's
    number of outputs. Raises UsageError with the server's message if a model fails.
    """

    def __init__(self, planner: StepPlanner, bucket_set: BucketSet, name: str, outputs: int, server: Any) -> None:
        self.planner, self.bucket_set, self.server = planner, bucket_set, server
        self.name, self.outputs = name, outputs

    def call(
        self, graph: str, feed: Mapping[str, Any], bucket: Bucket | None, into: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Outputs of one of the server's models, in its memory."""
        results = self.outputs + len(self.spec.carried) + (graph == "full")  # the update too
        pb, wanted = self.server, list(self.spec.outputs_of(graph, results))
        request = pb.InferenceRequest(
            model_name=f"{self.name}_{graph}",
            requested_output_names=wanted,
            inputs=[self.tensor(name, value) for name, value in feed.items()],
        )
        response = request.exec()
        if response.has_error():
            raise UsageError(f"{self.name}_{graph}: {' '.join(response.error().message().split())}")
        found = {name: pb.get_output_tensor_by_name(response, name) for name in wanted}
        return {name: torch.from_dlpack(value.to_dlpack()) for name, value in found.items()}

    def array(self, value: Tensor) -> np.ndarray:
        return value.cpu().numpy()

    def empty_state(self, batch: int) -> TensorState:
        return zeros(self.spec, batch)

    def tensor(self, name: str, value: Any) -> Any:
        """A tensor of the server, of a torch tensor or an array."""
        source = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        return self.server.Tensor.from_dlpack(name, torch.utils.dlpack.to_dlpack(source.contiguous()))


class Served:
    """Answers the requests of one model instance.

    Mode chunk: every request is an independent step. Modes steps and carry: the requests of one sampling run are a
    sequence, from start to end under one id, a number or a string; its batch stays the same. A run without requests for
    IDLE_SECONDS is deleted.
    """

    def __init__(self, folder: Path, name: str, server: Any) -> None:
        manifest = read_json(folder / MANIFEST)
        planner = planner_from_dict(read_json(folder / GRAPH))
        self.server = server
        bucket_set = manifest_buckets(manifest)
        self.model = TritonModel(planner, bucket_set, name, int(read_json(folder / OUTPUTS)), server)
        self.runs: dict[Any, tuple[Run, float]] = {}

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request; an error is one line."""
        return [self.response(request) for request in requests]

    def response(self, request: Any) -> Any:
        pb = self.server
        try:
            outputs = self.step(request)
        except DcconvertError as error:
            code = pb.TritonError.INVALID_ARG if isinstance(error, UsageError) else pb.TritonError.INTERNAL
            return pb.InferenceResponse(output_tensors=[], error=pb.TritonError(str(error), code))
        names = output_names(len(outputs))
        return pb.InferenceResponse(output_tensors=list(map(self.model.tensor, names, outputs)))

    def step(self, request: Any) -> list[np.ndarray]:
        spec = self.model.planner.spec
        inputs: dict[str, Any] = {}
        for item in spec.input_specs:
            value = self.read(request, item.name) if item.dtype else item.value
            if value is None and item.dtype:
                raise UsageError(f"the request has no input {item.name}: it needs {', '.join(spec.inputs)}")
            inputs[item.name] = value
        batch = len(inputs[spec.image])
        if not self.model.planner.method.stateful:
            return self.model.start(batch).step(inputs)
        key, flags = request.correlation_id(), request.flags()  # a number or a string: 7 and "7" are two sequences
        if not key:
            raise UsageError("the request has no sequence id: call the model as a sequence")
        self.forget_idle()
        if flags & START:
            self.runs.pop(key, None)
        elif key not in self.runs:
            raise UsageError(f"sequence {key} is unknown or has expired: begin it with sequence_start")
        run = self.runs[key][0] if key in self.runs else self.model.start(batch)
        try:
            return run.step(inputs)
        finally:
            self.runs[key] = run, time.monotonic()  # when the step ended: a slow step is not idle time
            if flags & END:
                self.runs.pop(key)

    def read(self, request: Any, name: str) -> np.ndarray | None:
        """An input on the host. DLPack gives the right numbers even where `as_numpy` does not: Triton up to 24.10 with
        numpy 2."""
        tensor = self.server.get_input_tensor_by_name(request, name)
        return None if tensor is None else torch.from_dlpack(tensor.to_dlpack()).cpu().numpy()

    def forget_idle(self) -> None:
        now = time.monotonic()
        for key in [key for key, (_, last) in self.runs.items() if now - last > IDLE_SECONDS]:
            del self.runs[key]
