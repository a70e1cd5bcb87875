"""A converted model and its original in torch: as they are, compiled, or captured as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from dcconvert.models.dit import DiT
from dcconvert.models.example_inputs import dit_inputs
from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.complex_to_real import RealNumbers
from dcconvert.passes.frontend.token_stream import FindTokenStream
from dcconvert.passes.ir.graph_tools import placeholders
from dcconvert.passes.ir.pass_runner import run_passes
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import captured, copy_graph
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.rewrite.retarget import retype, to_device
from dcconvert.passes.rewrite.split_steps import SplitSteps
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.run import Runtime
from dcconvert.passes.runtime.state import TensorState

RUNTIMES = ("eager", "CUDA graph", "compiled", "compiled, CUDA graph")


class Captured:
    """A function of tensors as a CUDA graph over buffers of its own; other arguments stay what they were."""

    def __init__(self, function: Callable[..., Sequence[Any]], args: Sequence[Any], fixed: Sequence[bool]) -> None:
        """`fixed` says of each argument whether its own memory is read and written in place."""
        self.fixed = fixed
        self.args = [a if keep or not isinstance(a, Tensor) else a.clone() for a, keep in zip(args, fixed, strict=True)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function(*self.args)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = function(*self.args)

    def __call__(self, *args: Any) -> Sequence[Any]:
        """The function's results; their memory is used again by the next call."""
        for own, given, fixed in zip(self.args, args, self.fixed, strict=True):
            if not isinstance(own, Tensor) or own.data_ptr() == given.data_ptr():
                continue
            if fixed:
                raise ValueError("a captured graph keeps to the state it was captured with: use it for one run only")
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.results


def in_runtime(function: Callable[..., Sequence[Any]], runtime: str) -> Callable[..., Sequence[Any]]:
    """A graph module compiled for the shapes it is called with, or as it is."""
    return torch.compile(function, dynamic=False) if runtime.startswith("compiled") else function


class TorchRuntime(Runtime):
    """Route and denoise of a converted model in one of RUNTIMES, for shapes that stay what they are.

    Captured, it is the backend of one run only, and of mode carry the model's graph must write in place.
    """

    def __init__(self, model: DynamicModel, runtime: str) -> None:
        self.model, self.planner, self.bucket_set = model, model.planner, None
        self.captures = runtime.endswith("CUDA graph")
        self._functions = {name: in_runtime(graph, runtime) for name, graph in model.graphs.named().items()}
        self._captured: dict[Any, Captured] = {}

    def call(
        self, graph: str, feed: Mapping[str, Any], bucket: Bucket | None, into: Mapping[str, Any]
    ) -> dict[str, Any]:
        results = self.results(graph, list(feed.values()))
        return dict(zip(self.spec.outputs_of(graph, len(results)), results, strict=True))

    def results(self, graph: str, args: list[Any]) -> Any:
        """Results of a graph; the states, which are the last arguments of denoise, are written to in place."""
        function = self._functions[graph]
        if not self.captures or graph == "prepare":
            return function(*args)
        key = (graph, *(tuple(a.shape) if isinstance(a, Tensor) else a for a in args))
        states = len(self.spec.states) if graph == "denoise" else 0
        if key not in self._captured:
            before = [a.clone() for a in args[len(args) - states :]]  # trial runs of the capture write to them
            fixed = [False] * (len(args) - states) + [True] * states
            self._captured[key] = Captured(function, args, fixed)
            for own, was in zip(args[len(args) - states :], before, strict=True):
                own.copy_(was)
        return self._captured[key](*args)

    def array(self, value: Tensor) -> np.ndarray:
        return self.model.array(value)

    def result(self, value: Tensor) -> Tensor:
        return value

    def beside(self, array: np.ndarray, value: Tensor) -> Tensor:
        return self.model.beside(array, value)

    def empty_state(self, batch: int) -> TensorState:
        return self.model.empty_state(batch)


class OriginalRuntime:
    """The fixed-token original in one of RUNTIMES: called with its inputs by name."""

    def __init__(self, model: DynamicModel, runtime: str) -> None:
        self.names = model.spec.inputs
        self.captures = runtime.endswith("CUDA graph")
        self._function = in_runtime(model.original_graph, runtime)
        self._captured: Captured | None = None

    def __call__(self, inputs: dict[str, Any]) -> Any:
        args = [inputs[name] for name in self.names]
        if not self.captures:
            return self._function(*args)
        if self._captured is None:
            self._captured = Captured(self._function, args, [False] * len(args))
        return self._captured(*args)


class Steps:
    """A DiT as the graphs of runs that compute the whole trunk or nothing of it; all share the DiT's weights."""

    def __init__(self, original: GraphModule, full: GraphModule, skip: GraphModule) -> None:
        self.graphs: dict[str, GraphModule] = {"original": original, "full": full, "skip": skip}

    @classmethod
    def of(cls, dit: DiT) -> Steps:
        program = captured(dit, dit_inputs(dit, 3), {}, method_of("carry"))
        run_passes(program, (Normalise(), RealNumbers(), FindTokenStream()))
        original = copy_graph(program)
        run_passes(program, (SplitSteps(),))
        assert program.full is not None
        assert program.skip is not None
        return cls(original, program.full, program.skip)

    def moved(self, device: torch.device, dtype: torch.dtype) -> Steps:
        """On a device and in a precision; the weights may be there already."""
        for graph in self.graphs.values():
            graph.to(device, dtype)
        for name, graph in self.graphs.items():
            to_device(graph, device)
            if dtype != torch.float32:
                retype(graph, self.example(name, dtype), torch.float32, dtype)
        return self

    def example(self, name: str, dtype: torch.dtype) -> list[Tensor]:
        """Inputs of a graph by their captured shapes, batch 2."""
        found = []
        for node in placeholders(self.graphs[name].graph):
            value = node.meta["val"]
            shape = [size if isinstance(size, int) else 2 for size in value.shape]
            kept = node.name == "t" or not value.is_floating_point()
            found.append(torch.zeros(shape, dtype=value.dtype if kept else dtype, device=value.device))
        return found
