"""ONNX Runtime with buffers that are allocated once per bucket and never move, as a CUDA graph requires."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dcconvert.export.buckets import BucketSet
from dcconvert.export.runtimes.ort import CPU, CUDA, OrtModel, OrtState, device_of, on_device
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.step_planner import StepPlanner

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
_graph_ids = itertools.count(1)


def batch_of(value: Any) -> int:
    return int(value.shape[0] if isinstance(value, np.ndarray) else value.shape()[0])


class BoundStep:
    """A session bound once to everything that it reads and writes in one shape, with its own CUDA graph on CUDA.

    `inputs` and `outputs`: OrtValues by name. The graph is captured when it first runs. Values on the device are read
    where they are, except those in `copied`: values that another run gives in their place are copied into them.
    """

    def __init__(
        self,
        session: Any,
        inputs: dict[str, Any],
        outputs: dict[str, Any],
        graphs: bool,
        copied: Collection[str] = (),
    ) -> None:
        import onnxruntime as ort

        self.session, self.inputs, self.outputs = session, inputs, outputs
        self.sources: dict[str, Any] = dict.fromkeys(copied)  # the values that were last copied
        self.binding = session.io_binding()
        for name, value in inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self.binding.bind_ortvalue_output(name, value)
        self.options = ort.RunOptions()
        if graphs:
            self.options.add_run_config_entry("gpu_graph_id", str(next(_graph_ids)))

    def __call__(self, arrays: Mapping[str, Any]) -> None:
        """Run on new values of the inputs that are arrays."""
        for name, value in self.inputs.items():
            if isinstance(arrays[name], np.ndarray):
                value.update_inplace(np.ascontiguousarray(arrays[name]))
            elif name in self.sources and self.sources[name] is not arrays[name]:
                value.update_inplace(arrays[name].numpy())
                self.sources[name] = arrays[name]
        self.session.run_with_iobinding(self.binding, self.options)

    def reads(self, values: Mapping[str, Any]) -> bool:
        """Whether it reads exactly these values, considering only those on the device that are not copied."""
        return all(
            isinstance(values[name], np.ndarray) or name in self.sources or values[name] is value
            for name, value in self.inputs.items()
        )


def bound(
    session: Any,
    given: Mapping[str, Any],
    batch: int,
    graphs: bool,
    written: Mapping[str, Any] | None = None,
    copied: Collection[str] = (),
) -> BoundStep:
    """A step that writes to `written` and to new buffers; it has its own for arrays and what is `copied`.

    New buffers are on the session's device.
    """
    device = device_of(session)

    def buffer(name: str, value: Any) -> Any:
        array = value if isinstance(value, np.ndarray) else value.numpy() if name in copied else None
        return value if array is None else on_device(np.ascontiguousarray(array), device)

    inputs = {name: buffer(name, value) for name, value in given.items()}
    outputs = dict(written or {})
    for node in session.get_outputs():
        if node.name not in outputs:
            shape = [size if isinstance(size, int) else batch for size in node.shape]
            outputs[node.name] = on_device(np.zeros(shape, DTYPES[node.type]), device)
    return BoundStep(session, inputs, outputs, graphs, copied)


class StaticModel(OrtModel):
    """An `OrtModel` that allocates nothing after the first step in a bucket.

    On CUDA, every bucket becomes a CUDA graph with its own id (`gpu_graph_id` of ONNX Runtime); in mode carry, there is
    one for every state in use at the same time. Values that are constant over a run (text) are copied into it when the
    run changes. The caller may keep what a step returns.
    """

    def __init__(
        self, folder: Path, planner: StepPlanner, bucket_set: BucketSet, provider: str = CUDA, threads: int = 0
    ) -> None:
        self.graphs = provider != CPU
        settings = {"enable_cuda_graph": "1"} if self.graphs else None
        super().__init__(folder, planner, bucket_set, provider, threads, settings)
        self.turn = threading.RLock()
        self.steps: dict[Any, BoundStep] = {}
        self._free: dict[int, list[dict[str, Any]]] = {}

    def call(
        self, graph: str, feed: Mapping[str, Any], bucket: Bucket | None, into: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Outputs by name, in the buffers of this shape, which the next call in this shape writes to."""
        if graph == "prepare":  # once per run
            return super().call(graph, feed, bucket, into)
        given = {name: feed[name] for name in self.names_in[graph]}
        copied = [name for name in self.spec.constants if name in given]
        # States are never freed, so that the identity of a buffer says which one it is.
        buffers = (id(v) for n, v in given.items() if n not in copied and not isinstance(v, np.ndarray))
        shapes = tuple(value.shape for value in given.values() if isinstance(value, np.ndarray))
        key = (graph, shapes, *buffers, *map(id, into.values()))
        if key not in self.steps or not self.steps[key].reads(given):
            batch = batch_of(feed[self.spec.live[0] if graph == "denoise" else self.spec.image])
            self.steps[key] = bound(self.sessions[graph], given, batch, self.graphs, into, copied)
        self.steps[key](given)
        return {name: self.steps[key].outputs[name] for name in self.names_out[graph]}

    def array(self, value: Any) -> np.ndarray:
        array = super().array(value)
        return array.copy() if value.device_name() == "cpu" else array

    def empty_state(self, batch: int) -> OrtState:
        """A borrowed state: when this run ends, another run reuses its buffers and the steps that are bound to them."""
        free = self._free.setdefault(batch, [])
        values = free.pop() if free else super().empty_state(batch).values
        state = OrtState(values)
        state.clear(range(batch))
        weakref.finalize(state, free.append, values)
        return state
