"""The rewritten model: route, plan, denoise, with the call signature of the original."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from dcconvert.passes.errors import CheckFailedError, UsageError
from dcconvert.passes.infra import Options, PassRecord
from dcconvert.passes.plan import Bucket, Plan, Planner
from dcconvert.passes.schedule import Schedule
from dcconvert.passes.spec import ModelSpec


class StepPlanner:
    """From scores and timesteps to a plan: the schedule says how many, the router which, the planner where."""

    def __init__(self, spec: ModelSpec, options: Options, schedule: Schedule) -> None:
        self.spec = spec
        self.options = options
        schedule.check(spec.tokens)
        self.schedule = schedule
        self.planner = Planner(spec.grid, options.members, options.neighbours, options.packing, options.coverage)

    def counts(self, timesteps: np.ndarray | None, batch: int) -> np.ndarray:
        """Kept tokens of each of `batch` samples at their timesteps (scalar, [1] or [B])."""
        if self.schedule.kind == "constant" or self.schedule.ratio == 1:
            tau: np.ndarray = np.full(batch, 0.5)
        elif timesteps is None:
            raise UsageError(
                f"schedule '{self.schedule.kind}' needs the timestep, but no input of the model is known to be it; "
                "name it with timestep=..., or use the constant schedule"
            )
        else:
            tau = np.broadcast_to(np.asarray(timesteps, np.float64).reshape(-1) / self.spec.timestep_scale, (batch,))
        return self.schedule.counts(np.clip(tau, 0, 1), self.spec.tokens)

    def plan(self, scores: np.ndarray, counts: np.ndarray, bucket: Bucket | None = None) -> Plan:
        """A plan for scores [B, N]; CheckFailedError naming the sample whose scores are not finite."""
        bad = ~np.isfinite(scores).all(axis=1)
        if bad.any():
            raise CheckFailedError(
                f"sample {int(bad.argmax())} of the batch has non-finite values before the trunk: check its input "
                "(NaN would spread to other samples through padded attention)"
            )
        return self.planner(scores, counts, bucket)


class ChunkedModel(nn.Module):
    """A dynamic-chunking model in torch: call it like the original.

    `route` and `denoise` are GraphModules over the original's parameters; between them the plan is made on
    the host from the scores, once per call.
    """

    def __init__(
        self,
        route: GraphModule,
        denoise: GraphModule,
        original: GraphModule,
        spec: ModelSpec,
        options: Options,
        schedule: Schedule,
        records: Sequence[PassRecord] = (),
    ) -> None:
        super().__init__()
        self.route_graph = route
        self.denoise_graph = denoise
        self.original_graph = original
        self.spec = spec
        self.options = options
        self.records = list(records)
        self.step_planner = StepPlanner(spec, options, schedule)

    @property
    def schedule(self) -> Schedule:
        return self.step_planner.schedule

    def with_schedule(self, schedule: Schedule) -> ChunkedModel:
        """The same weights and graphs under another schedule."""
        parts = (self.route_graph, self.denoise_graph, self.original_graph, self.spec, self.options)
        return ChunkedModel(*parts, schedule, self.records)

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

    def denoise(self, inputs: dict[str, Any], live: dict[str, Tensor], plan: Plan) -> Any:
        """Flat outputs of the model for one plan."""
        hidden = live[self.spec.live[0]]
        arrays = {name: torch.from_numpy(a).to(hidden.device) for name, a in plan.arrays().items()}
        arrays |= {n: a.to(hidden.dtype) for n, a in arrays.items() if a.is_floating_point()}
        given = {**inputs, **live, **arrays}
        return self.denoise_graph(*(given[name] for name in self.spec.denoise_inputs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.flat_inputs(args, kwargs)
        scores, live = self.route(inputs)
        counts = self.step_planner.counts(self.timesteps(inputs), len(scores))
        plan = self.step_planner.plan(scores.detach().float().cpu().numpy(), counts)
        outputs = self.denoise(inputs, live, plan)
        return pytree.tree_unflatten(outputs, pytree.treespec_loads(self.spec.out_spec))

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The fixed-token original on the same weights."""
        inputs = self.flat_inputs(args, kwargs)
        outputs = self.original_graph(*inputs.values())
        return pytree.tree_unflatten(outputs, pytree.treespec_loads(self.spec.out_spec))

    def timesteps(self, inputs: dict[str, Any]) -> np.ndarray | None:
        if self.spec.timestep is None:
            return None
        return torch.as_tensor(inputs[self.spec.timestep]).detach().float().cpu().numpy()

    def summary(self) -> str:
        """A few lines: tokens, blocks, ratio, router, and how often each pass fired."""
        spec, options, schedule = self.spec, self.options, self.schedule
        kept = spec.tokens / schedule.ratio
        lines = [
            f"{spec.grid[0]}x{spec.grid[1]} = {spec.tokens} tokens, {kept:.0f} kept on average ({schedule.ratio:g}x)",
            f"{spec.depth} blocks: {options.head_blocks} head, "
            f"{spec.depth - options.head_blocks - options.tail_blocks} trunk, {options.tail_blocks} tail",
            f"router {options.router}, schedule {schedule.kind}",
        ]
        lines += [inspect.cleandoc(f"{r.name}: {r.matches} matches {'; '.join(r.notes)}") for r in self.records]
        return "\n".join(lines)
