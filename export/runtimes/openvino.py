"""OpenVINO: the bundle's portable graphs on Intel and other CPUs (and on Intel GPUs, untested)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.export.disk.onnx_files import checked_onnx, opset_of
from dcconvert.export.onnx.lowerings import PORTABLE
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.run import Buckets, Runtime
from dcconvert.passes.runtime.state import TensorState, zeros


class OpenVinoModel(Runtime):
    """A converted model on OpenVINO; inputs are numpy arrays by name, states are tensors on the host.

    `threads`: 0 for OpenVINO's own choice. Computes in fp32: by default OpenVINO would take bf16 on some CPUs.

    Raises UsageError if OpenVINO is not installed, or for a file that it cannot load or that is not portable.
    """

    def __init__(
        self,
        folder: Path,
        planner: StepPlanner,
        bucket_set: Buckets | None = None,
        threads: int = 0,
        device: str = "CPU",
    ) -> None:
        self.planner, self.bucket_set = planner, bucket_set
        self.graphs = {
            name: compiled(folder / f"{name}.onnx", device, {"INFERENCE_NUM_THREADS": threads} if threads else {})
            for name in planner.spec.graphs
        }

    def call(
        self, graph: str, feed: Mapping[str, Any], bucket: Bucket | None, into: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        model = self.graphs[graph]
        given = {name: on_host(feed[name]) for name in (port.get_any_name() for port in model.inputs)}
        made = model(given, share_inputs=True)
        names = self.spec.outputs_of(graph, len(model.outputs))
        # Copies: OpenVINO writes the next call's results to the same memory.
        return {name: torch.from_numpy(np.array(made[place])) for place, name in enumerate(names)}

    def array(self, value: Tensor) -> np.ndarray:
        return value.numpy()

    def empty_state(self, batch: int) -> TensorState:
        return zeros(self.spec, batch)


def on_host(value: Any) -> np.ndarray:
    return np.ascontiguousarray(value.numpy() if isinstance(value, Tensor) else value)


def compiled(path: Path, device: str, settings: Mapping[str, Any]) -> Any:
    """A graph on a device of OpenVINO, in fp32; errors as in `OpenVinoModel`."""
    try:
        import openvino
    except ImportError as error:
        raise UsageError("openvino is not installed: pip install 'dcconvert[openvino]'") from error
    if (opset := opset_of(checked_onnx(path))) > PORTABLE.opset:
        raise UsageError(
            f"{path} is of opset {opset}, of which some versions of OpenVINO silently leave out the mask of padding: "
            "convert the model again"
        )
    try:
        found = openvino.Core().compile_model(str(path), device, {"INFERENCE_PRECISION_HINT": "f32", **settings})
    except RuntimeError as error:
        raise UsageError(f"OpenVINO cannot load {path} on {device}: {' '.join(str(error).split())}") from error
    return found
