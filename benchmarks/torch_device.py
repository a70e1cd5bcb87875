"""A converted model in torch on a device, called from the host: scores many images where there is a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.run import Runtime
from dcconvert.passes.runtime.state import TensorState


class TorchDevice(Runtime):
    """Takes and returns host arrays as ONNX Runtime does, so that one script can use either. The state stays there."""

    def __init__(self, model: DynamicModel, device: str) -> None:
        torch.backends.cudnn.allow_tf32 = False  # or float32 would mean something else in convolutions
        self.model, self.device = model.to(device), device
        self.planner, self.bucket_set = self.model.planner, None

    def call(
        self, graph: str, feed: Mapping[str, Any], bucket: Bucket | None, into: Mapping[str, Any]
    ) -> dict[str, Any]:
        there = {name: torch.as_tensor(value, device=self.device) for name, value in feed.items()}
        return self.model.call(graph, there)

    def empty_state(self, batch: int) -> TensorState:
        return self.model.empty_state(batch)

    def array(self, value: Any) -> np.ndarray:
        return self.model.array(value)
