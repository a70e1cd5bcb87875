"""The rewritten model in torch: route, plan, denoise, with the call signature of the original."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.pass_runner import PassRecord
from dcconvert.passes.ir.spec import ModelSpec
from dcconvert.passes.planning.carry_plan import CarryPlan
from dcconvert.passes.planning.chunk_plan import Plan
from dcconvert.passes.planning.schedule import Schedule
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.rewrite.retarget import retype, retyped_spec, to_device
from dcconvert.passes.runtime.infer_runs import FollowedRun
from dcconvert.passes.runtime.run import Run

if TYPE_CHECKING:
    from dcconvert.passes.methods.method import Method


class TorchState:
    """What a run remembers: a tensor [P, B, C, N, E] for every carried value."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.distance: np.ndarray | None = None

    def detach(self) -> None:
        """Cut what is remembered off from the gradients of the steps that computed it."""
        self.tensors = {name: tensor.detach() for name, tensor in self.tensors.items()}

    def clear(self, samples: Sequence[int]) -> None:
        index = torch.as_tensor(list(samples))
        self.tensors = {name: t.index_fill(1, index.to(t.device), 0) for name, t in self.tensors.items()}


class DynamicModel(nn.Module):
    """A converted model in torch: call it like the original, or step through a run that `start` gives.

    `route` and `denoise` are GraphModules over the original's parameters; between them the plan is made on
    the host from the scores, once per call.
    """

    def __init__(
        self,
        route: GraphModule,
        denoise: GraphModule,
        original: GraphModule,
        spec: ModelSpec,
        method: Method,
        schedule: Schedule,
        records: Sequence[PassRecord] = (),
        prepare: GraphModule | None = None,
    ) -> None:
        super().__init__()
        self.route_graph = route
        self.denoise_graph = denoise
        self.original_graph = original
        self.prepare_graph = prepare
        self.spec = spec
        self.method = method
        self.records = list(records)
        self.step_planner = StepPlanner(spec, method, schedule)
        self.target = place_of(self)
        self.followed = FollowedRun(self)

    @property
    def schedule(self) -> Schedule:
        return self.step_planner.schedule

    def with_schedule(self, schedule: Schedule) -> DynamicModel:
        """The same weights and graphs under another schedule."""
        parts = (self.route_graph, self.denoise_graph, self.original_graph, self.spec, self.method)
        return DynamicModel(*parts, schedule, self.records, self.prepare_graph)

    def flat_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's inputs by name; UsageError if it is not shaped like the call that was captured."""
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
            if isinstance(leaf, Tensor) and spec.batched and tuple(leaf.shape[1:]) != spec.shape:
                raise UsageError(
                    f"input {spec.name} has shape {list(leaf.shape)}, the model was captured for [batch, "
                    f"{', '.join(map(str, spec.shape))}]: convert again for another size"
                )
        return dict(zip(self.spec.inputs, leaves, strict=True))

    def route(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [B, N] and the values denoise needs."""
        scores, *live = self.route_graph(*(inputs[name] for name in self.spec.route_inputs))
        return scores, dict(zip(self.spec.live, live, strict=True))

    def prepare(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """What stays the same over a run, by name; nothing for most models."""
        if self.prepare_graph is None:
            return {}
        values = self.prepare_graph(*(inputs[name] for name in self.spec.prepare_inputs))
        return dict(zip(self.spec.constants, values, strict=True))

    def denoise(
        self, inputs: dict[str, Any], live: dict[str, Tensor], plan: Plan | CarryPlan, state: TorchState | None = None
    ) -> Any:
        """Flat outputs of the model for one plan; in mode carry the state (None: an empty one) is brought forward.

        `inputs` are the model's, and what `prepare` made of them (made here if it is missing).
        """
        if self.spec.constants and self.spec.constants[0] not in inputs:
            inputs = {**inputs, **self.prepare(inputs)}
        hidden = live[self.spec.live[0]]
        if self.spec.states:
            state = state or self.new_state(len(hidden), hidden.device)
        given = {**inputs, **live, **self.plan_tensors(plan, hidden), **(state.tensors if state else {})}
        results = self.denoise_graph(*(given[name] for name in self.spec.denoise_inputs))
        if state is None:
            return results
        outputs, distance = results[: -len(state.tensors) - 1], results[-len(state.tensors) - 1]
        state.tensors = dict(zip(state.tensors, results[-len(state.tensors) :], strict=True))
        state.distance = distance.detach().double().cpu().numpy()
        return outputs

    def plan_tensors(self, plan: Plan | CarryPlan, like: Tensor) -> dict[str, Tensor]:
        """The arrays of a plan that denoise takes, by name, on the device and of the precision of `like`."""
        found = {}
        for name, array in plan.arrays().items():
            if name in self.spec.denoise_inputs:
                tensor = torch.from_numpy(array)
                tensor = tensor.to(like.dtype) if tensor.is_floating_point() else tensor
                found[name] = tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicModel:
        """What `to`, `cuda`, `half` and the like come down to: the graphs follow the weights.

        Weights are shared with the module that was converted, and both weights and graphs with models that
        `with_schedule` made of this one: move each of those that you go on using.
        """
        super()._apply(fn, recurse)
        old, new = self.target, place_of(self)
        graphs = [g for g in (self.route_graph, self.denoise_graph, self.original_graph, self.prepare_graph) if g]
        if new.device != old.device:
            for graph in graphs:
                to_device(graph, new.device)
        if new.dtype != old.dtype:
            self.retype(old.dtype, new.dtype)
        if (new.device, new.dtype) != (old.device, old.dtype):
            self.target = new
            self.followed = FollowedRun(self)
        return self

    def retype(self, old: torch.dtype, new: torch.dtype) -> None:
        """Let graphs and spec follow weights that were cast from `old` to `new`."""
        self.spec = retyped_spec(self.spec, old, new)
        self.step_planner = StepPlanner(self.spec, self.method, self.schedule)
        batch, place = 2, place_of(self)
        inputs = {n: v.to(place.device) if isinstance(v, Tensor) else v for n, v in self.spec.example(batch).items()}

        def follow(graph: GraphModule, names: Sequence[str], given: dict[str, Any]) -> list[Any]:
            return [v.to(place.device) for v in retype(graph, [given[name] for name in names], old, new)]

        follow(self.original_graph, self.spec.inputs, inputs)
        _, *live = follow(self.route_graph, self.spec.route_inputs, inputs)
        given = {**inputs, **dict(zip(self.spec.live, live, strict=True))}
        if self.prepare_graph is not None:
            made = follow(self.prepare_graph, self.spec.prepare_inputs, inputs)
            given |= dict(zip(self.spec.constants, made, strict=True))
        given |= self.plan_tensors(self.step_planner.full_plan(batch), live[0])
        given |= self.new_state(batch).tensors if self.spec.states else {}
        follow(self.denoise_graph, self.spec.denoise_inputs, given)

    def new_state(self, batch: int, device: torch.device | str | None = None) -> TorchState:
        """An empty state for `batch` samples."""
        device = device or next((p.device for p in self.parameters()), torch.device("cpu"))
        tokens = self.spec.tokens
        shapes = {spec.name: (spec.shape(batch, tokens), spec.torch_dtype) for spec in self.spec.states}
        return TorchState({n: torch.zeros(shape, dtype=dtype, device=device) for n, (shape, dtype) in shapes.items()})

    @property
    def planner(self) -> StepPlanner:
        return self.step_planner

    def padded(self, batch: int) -> int:
        return batch

    def bucket(self, counts: np.ndarray) -> None:
        """Torch runs shapes as they come."""

    def start(self, batch: int, groups: int = 1) -> Run:
        """A new sampling run of `batch` samples; call its `step` for every timestep. `groups` as in `Run`."""
        return Run(self, batch, groups)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's call. In mode carry, calls that go on from the last one share its run (see `FollowedRun`)."""
        inputs = self.flat_inputs(args, kwargs)
        outputs = self.followed.step(inputs)
        return pytree.tree_unflatten(outputs, pytree.treespec_loads(self.spec.out_spec))

    def forget(self) -> None:
        """Drop what calls of the model remember (mode carry), and its memory; the next call starts anew."""
        self.followed.forget()

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The fixed-token original on the same weights."""
        inputs = self.flat_inputs(args, kwargs)
        outputs = self.original_graph(*inputs.values())
        return pytree.tree_unflatten(outputs, pytree.treespec_loads(self.spec.out_spec))

    def summary(self) -> str:
        """A few lines: tokens, blocks, ratio, router, and how often each pass fired."""
        spec, method, schedule = self.spec, self.method, self.schedule
        kept = f"{spec.tokens * schedule.expected:.0f} kept on average ({schedule.ratio:g}x)"
        if schedule.data_dependent and not schedule.mean:
            kept = f"asked for {schedule.ratio:g}x; what steps find was fitted to no runs: look at what they keep"
        lines = [
            f"{spec.grid[0]}x{spec.grid[1]} = {spec.tokens} tokens, {kept}",
            f"{spec.depth} blocks: {method.head_blocks} head, "
            f"{spec.depth - method.head_blocks - method.tail_blocks} trunk, {method.tail_blocks} tail",
            f"method {method.name}, router {method.router}, schedule {schedule.kind}",
        ]
        lines += [inspect.cleandoc(f"{r.name}: {r.matches} matches {'; '.join(r.notes)}") for r in self.records]
        return "\n".join(lines)


def place_of(module: nn.Module) -> Tensor:
    """An empty tensor on the device and of the precision of a module's weights."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return weight.detach().new_empty(0)
