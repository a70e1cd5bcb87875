"""The rewritten model in torch: route, plan, denoise, with the call signature of the original."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.pass_runner import PassRecord
from dcconvert.passes.ir.spec import WEIGHTS, ModelSpec, update_name
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.schedule import LEVELS, Timetable, noise_levels
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.rewrite.retarget import retarget, retyped_spec
from dcconvert.passes.runtime.infer_runs import FollowedRuns
from dcconvert.passes.runtime.run import Runtime, check_shape
from dcconvert.passes.runtime.state import TensorState, zeros
from dcconvert.passes.runtime.threads import PerThread

if TYPE_CHECKING:
    from dcconvert.passes.methods.method import Method


@dataclass(frozen=True)
class Graphs:
    """The graphs of a converted model, over one set of weights. `original` is the fixed-token model.

    `route` scores the tokens, and `denoise` computes those that the host then chooses; `prepare`, if there is one,
    computes the values that stay the same during a run. In mode steps, `full` computes all tokens, and `skip` none.
    """

    original: GraphModule
    route: GraphModule | None = None
    denoise: GraphModule | None = None
    prepare: GraphModule | None = None
    full: GraphModule | None = None
    skip: GraphModule | None = None

    def named(self) -> dict[str, GraphModule]:
        """The existing graphs, by name."""
        return {item.name: found for item in fields(self) if (found := getattr(self, item.name)) is not None}


class DynamicModel(nn.Module, Runtime):
    """A converted model in torch: call it like the original, or step through a run that `start` returns.

    Its graphs are GraphModules over the original's parameters, called `route_graph` and so on; it has only the graphs
    of its method.
    """

    original_graph: GraphModule
    route_graph: GraphModule
    denoise_graph: GraphModule
    full_graph: GraphModule
    skip_graph: GraphModule

    def __init__(self, graphs: Graphs, planner: StepPlanner, records: Sequence[PassRecord] = ()) -> None:
        super().__init__()
        self.prepare_graph: GraphModule | None = None
        for name, graph in graphs.named().items():
            setattr(self, f"{name}_graph", graph)
        self.planner, self.bucket_set = planner, None
        self.records = list(records)
        self.target = place_of(self)
        self.runs: PerThread[FollowedRuns] = PerThread(FollowedRuns)

    @property
    def graphs(self) -> Graphs:
        return Graphs(**{item.name: getattr(self, f"{item.name}_graph", None) for item in fields(Graphs)})  # type: ignore[arg-type]

    @property
    def followed(self) -> FollowedRuns:
        """The runs of this thread's plain calls."""
        return self.runs.own

    @property
    def method(self) -> Method:
        return self.planner.method

    @property
    def schedule(self) -> Timetable:
        return self.planner.schedule

    def with_schedule(self, schedule: Timetable) -> DynamicModel:
        """The same weights and graphs with another schedule."""
        return DynamicModel(self.graphs, StepPlanner(self.spec, self.method, schedule), self.records)

    def with_steps(self, steps: int) -> DynamicModel:
        """The same weights and graphs for runs of another number of steps; UsageError if they cannot reach the
        ratio."""
        taus = noise_levels(steps)
        planner = StepPlanner(self.spec, self.method, self.schedule.fitted(taus))
        return self.with_schedule(planner.levelled(taus, max(len(self.schedule.levels), LEVELS)))

    def with_graphs(self, spec: ModelSpec | None = None, /, **graphs: GraphModule) -> DynamicModel:
        """The same model with some graphs replaced, and another spec if their interfaces changed."""
        planner = StepPlanner(spec or self.spec, self.method, self.schedule)
        return DynamicModel(replace(self.graphs, **graphs), planner, self.records)

    def flat_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's inputs by name; raises UsageError if they do not have the structure of the captured call."""
        in_spec = pytree.treespec_loads(self.spec.in_spec)
        wanted = in_spec.children()[1].context if hasattr(in_spec, "children") else in_spec.children_specs[1].context
        if set(wanted) == set(kwargs):
            kwargs = {name: kwargs[name] for name in wanted}
        leaves, found = pytree.tree_flatten((args, kwargs))
        if found != in_spec or len(leaves) != len(self.spec.inputs):
            raise UsageError(
                f"the converted model was captured for a call with {', '.join(self.spec.inputs)} and must be called "
                f"the same way (got {len(args)} positional inputs and {sorted(kwargs) or 'no'} keywords)"
            )
        for spec, leaf in zip(self.spec.input_specs, leaves, strict=True):
            if isinstance(leaf, Tensor) != bool(spec.dtype) or not (spec.dtype or leaf == spec.value):
                was = f"a tensor of {spec.dtype}" if spec.dtype else repr(spec.value)
                now = "a tensor" if isinstance(leaf, Tensor) else repr(leaf)
                raise UsageError(f"input {spec.name} was {was} when the model was captured and is {now}: convert again")
            if isinstance(leaf, Tensor) and spec.batched:
                check_shape(spec, leaf)
        return dict(zip(self.spec.inputs, leaves, strict=True))

    def graph(self, name: str) -> GraphModule:
        """One of the graphs; raises AttributeError for one that the model does not have."""
        found: GraphModule = getattr(self, f"{name}_graph")
        return found

    def call(
        self,
        graph: str,
        feed: Mapping[str, Any],
        bucket: Bucket | None = None,
        into: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A graph's outputs by name. torch accepts every shape, and the states are new tensors."""
        results = self.graph(graph)(*(feed[name] for name in self.spec.inputs_of(graph)))
        return dict(zip(self.spec.outputs_of(graph, len(results)), results, strict=True))

    def skip_feed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of a skipped step for a run without a state: zeros of the right shapes."""
        batch = len(inputs[self.spec.image])
        state = self.empty_state(batch)
        weights = state.values[update_name(0)].new_zeros(self.spec.updates, batch)
        return self.feed("skip", {**inputs, WEIGHTS: weights}, state=state)

    def array(self, value: Tensor) -> np.ndarray:
        return value.detach().float().cpu().numpy()

    def result(self, value: Tensor) -> Tensor:
        return value

    def beside(self, array: np.ndarray, value: Tensor) -> Tensor:
        """The array on the device of another value and, if it is floating-point, in its precision."""
        tensor = torch.from_numpy(array)
        tensor = tensor.to(value.dtype) if tensor.is_floating_point() else tensor
        return tensor.pin_memory().to(value.device, non_blocking=True) if value.is_cuda else tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicModel:
        """Implements `to`, `cuda`, `half` and similar methods: the graphs follow the weights.

        The weights are shared with the converted module, and weights and graphs are shared with models made by
        `with_schedule`: move each of those that you continue to use.
        """
        super()._apply(fn, recurse)
        old, new = self.target, place_of(self)
        if (new.device, new.dtype) != (old.device, old.dtype):
            self.retarget(old, new)
            self.target = new
            self.forget()
        return self

    def retarget(self, old: Tensor, new: Tensor) -> None:
        """Adapt graphs and spec to weights that were moved or cast from `old` to `new`."""
        self.planner = StepPlanner(retyped_spec(self.spec, old.dtype, new.dtype), self.method, self.schedule)
        batch = 2
        inputs = self.spec.example(batch)

        def follow(graph: str, feed: Mapping[str, Any]) -> dict[str, Any]:
            there = {name: v.to(new.device) if isinstance(v, Tensor) else v for name, v in feed.items()}
            made = retarget(self.graph(graph), there, old, new)
            return dict(zip(self.spec.outputs_of(graph, len(made)), made, strict=True))

        follow("original", self.feed("original", inputs))
        state = self.empty_state(batch)
        if self.spec.updates:
            follow("full", self.feed("full", inputs))
            follow("skip", self.skip_feed(inputs))
            return
        live = follow("route", self.feed("route", inputs))
        if self.spec.constants:
            inputs |= follow("prepare", self.feed("prepare", inputs))
        follow("denoise", self.feed("denoise", inputs, live, self.planner.full_plan(batch), state))

    def empty_state(self, batch: int) -> TensorState:
        return zeros(self.spec, batch, place_of(self).device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's call. In modes with a state, a call may continue an earlier one of its thread
        (`FollowedRuns`)."""
        inputs = self.flat_inputs(args, kwargs)
        outputs = self.followed.step(self, inputs)
        return pytree.tree_unflatten(outputs, pytree.treespec_loads(self.spec.out_spec))

    def forget(self) -> None:
        """Drop the state of plain calls in all threads and free its memory; the next call starts a new run."""
        for runs in self.runs.all():
            runs.forget()

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The fixed-token original on the same weights."""
        inputs = self.flat_inputs(args, kwargs)
        outputs = self.original_graph(*inputs.values())
        return pytree.tree_unflatten(outputs, pytree.treespec_loads(self.spec.out_spec))

    def summary(self) -> str:
        """A few lines: tokens, blocks, ratio, router, and how often each pass fired."""
        spec, method, schedule = self.spec, self.method, self.schedule
        kept = f"{spec.tokens * schedule.expected:.0f} kept on average ({schedule.ratio:g}x)"
        if schedule.data_dependent and not schedule.seen:
            kept = f"{schedule.ratio:g}x was requested, but not fitted on sampling runs: check what steps keep"
        head, tail = method.head_blocks, method.tail_blocks
        if spec.reach is not None:
            head, tail = spec.reach.head, spec.reach.tail
        lines = [
            f"{spec.grid[0]}x{spec.grid[1]} = {spec.tokens} tokens, {kept}",
            f"{spec.depth} blocks: {head} head, {spec.depth - head - tail} trunk, {tail} tail",
            f"method {method.name}, router {method.router}, schedule {schedule.kind}",
        ]
        lines += [inspect.cleandoc(f"{r.name}: {r.matches} matches {'; '.join(r.notes)}") for r in self.records]
        return "\n".join(lines)


def place_of(module: nn.Module) -> Tensor:
    """An empty tensor with the device and the precision of a module's weights."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return weight.detach().new_empty(0)
