"""ONNX Runtime with buffers that are allocated once a bucket and stay where they are, as a CUDA graph needs them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dcconvert.export.buckets import BucketSet
from dcconvert.export.onnx.export import state_output
from dcconvert.export.runtimes.ort import CPU, CUDA, OrtModel, OrtState, on_device
from dcconvert.passes.ir.spec import SCORES_NAME
from dcconvert.passes.planning.carry_plan import CarryPlan
from dcconvert.passes.planning.chunk_plan import Plan
from dcconvert.passes.planning.step_planner import StepPlanner

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
_graph_ids = itertools.count(1)


class BoundStep:
    """A session bound once to all that it reads and writes in one shape; a CUDA graph of its own where there are such.

    `inputs` and `outputs`: OrtValues by name. The graph is captured when it first runs. Values on the device are read
    where they are, but for those in `copied`: what another run gives in their place is copied into them.
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
        """Whether it reads these very values, of those on the device that are not copied."""
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
    """A step that writes to `written` and to new buffers; it has its own for arrays and what is `copied`."""
    device = "cuda" if graphs else "cpu"

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


class StaticState(OrtState):
    """A state on loan: its buffers, and the steps that are bound to them, go to another run when this one is over."""

    def __init__(self, values: dict[str, Any], steps: dict[Any, BoundStep]) -> None:
        self.values, self.steps = values, steps
        self.distance = None


class StaticModel(OrtModel):
    """An `OrtModel` that allocates nothing after the first step in a bucket.

    On CUDA every bucket becomes a CUDA graph under an id of its own (`gpu_graph_id` of ONNX Runtime), in mode carry one
    for every state that is in use at the same time. What is constant over a run (text) is copied into it when the run
    changes. What a step returns is the caller's to keep.
    """

    def __init__(
        self, folder: Path, planner: StepPlanner, bucket_set: BucketSet, provider: str = CUDA, threads: int = 0
    ) -> None:
        self.graphs = provider != CPU
        settings = {"enable_cuda_graph": "1"} if self.graphs else None
        super().__init__(folder, planner, bucket_set, provider, threads, settings)
        self._routes: dict[int, BoundStep] = {}
        self._steps: dict[Any, BoundStep] = {}
        self._free: dict[int, list[tuple[dict[str, Any], dict[Any, BoundStep]]]] = {}

    def route(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, Any]]:
        """Scores [B, N], and the values denoise needs, in the buffers of this batch size."""
        given = {node.name: inputs[node.name] for node in self.route_session.get_inputs()}
        batch = len(inputs[self.planner.spec.image])
        if batch not in self._routes:
            self._routes[batch] = bound(self.route_session, given, batch, self.graphs)
        step = self._routes[batch]
        step(given)
        live = dict(step.outputs)
        return live.pop(SCORES_NAME).numpy().copy(), live

    def denoise(
        self, inputs: dict[str, Any], live: dict[str, Any], plan: Plan | CarryPlan, state: OrtState | None = None
    ) -> list[np.ndarray]:
        """Flat outputs of the model; in mode carry the state (None: an empty one) is brought forward."""
        spec = self.planner.spec
        if spec.constants and spec.constants[0] not in inputs:
            inputs = {**inputs, **self.prepare(inputs)}
        if spec.states and state is None:
            state = self.new_state(len(plan.counts))
        held = state.values if state else {}
        given = {**inputs, **live, **plan.arrays(), **held}
        given = {node.name: given[node.name] for node in self.denoise_session.get_inputs()}
        steps = state.steps if isinstance(state, StaticState) else self._steps
        key = (plan.grid_index.shape, plan.packed_index.shape, len(plan.counts))
        if key not in steps or not steps[key].reads(given):
            written = {state_output(name): value for name, value in held.items()}
            steps[key] = bound(self.denoise_session, given, len(plan.counts), self.graphs, written, self._constants)
        steps[key](given)
        outputs = [steps[key].outputs[name].numpy().copy() for name in self._outputs if name not in self._carried]
        if state is not None:
            state.distance = outputs.pop()
        return outputs

    @property
    def _constants(self) -> tuple[str, ...]:
        taken = {node.name for node in self.denoise_session.get_inputs()}
        return tuple(name for name in self.planner.spec.constants if name in taken)

    @property
    def _carried(self) -> set[str]:
        return {state_output(spec.name) for spec in self.planner.spec.states}

    def new_state(self, batch: int) -> StaticState:
        """An empty state for `batch` samples, in buffers that no run uses any more where there are such."""
        free = self._free.setdefault(batch, [])
        if free:
            values, steps = free.pop()
        else:
            spec = self.planner.spec
            values, steps = OrtState(spec.states, batch, spec.tokens, self.device).values, {}
        state = StaticState(values, steps)
        state.clear(range(batch))
        weakref.finalize(state, free.append, (values, steps))
        return state
