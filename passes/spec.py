"""Facts about a rewritten model that its graphs alone do not tell."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dcconvert.passes.errors import CheckFailedError, UsageError
from dcconvert.passes.infra import Program, placeholders

TIMESTEP_NAMES = ("t", "timestep", "timesteps")
SCORES_NAME = "scores"


@dataclass(frozen=True)
class InputSpec:
    """One flat input of the original: a tensor (`shape` without the batch axis, if `batched`), or a constant."""

    name: str
    batched: bool = False
    shape: tuple[int, ...] = ()
    dtype: str = ""
    value: bool | int | float | str | None = None  # of an input that is no tensor

    @classmethod
    def of(cls, node: Node) -> InputSpec:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return cls(node.name, value=value)
        batched = value.ndim > 0 and isinstance(value.shape[0], torch.SymInt)
        shape = tuple(int(size) for size in value.shape[batched:])
        return cls(node.name, batched, shape, str(value.dtype).removeprefix("torch."))

    def example(self, batch: int, generator: torch.Generator, high: float) -> Any:
        """A value of the right shape: normal floats (below `high` if it is given), zeros for integers."""
        if not self.dtype:
            return self.value
        shape = (batch, *self.shape) if self.batched else self.shape
        dtype = getattr(torch, self.dtype)
        if high:
            return (torch.rand(shape, generator=generator) * high).to(dtype)
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        return torch.zeros(shape, dtype=dtype)


@dataclass(frozen=True)
class ModelSpec:
    """Names and shapes at the seams of a rewritten model; all of it fits into JSON."""

    input_specs: tuple[InputSpec, ...]  # the original's flat inputs, in call order
    route_inputs: tuple[str, ...]
    live: tuple[str, ...]  # what route hands to denoise, `h` first
    live_shapes: tuple[tuple[int, ...], ...]  # theirs, without the batch axis
    denoise_inputs: tuple[str, ...]
    in_spec: str
    out_spec: str
    grid: tuple[int, int]
    width: int
    depth: int
    timestep: str | None
    timestep_scale: float  # the timestep that means pure noise

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.input_specs)

    def example(self, batch: int, seed: int = 0) -> dict[str, Any]:
        """Inputs by name for `batch` samples: normal noise, timesteps over their whole range, class 0."""
        generator = torch.Generator().manual_seed(seed)
        scale = {self.timestep: self.timestep_scale}
        return {s.name: s.example(batch, generator, scale.get(s.name, 0.0)) for s in self.input_specs}

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelSpec:
        def frozen(value: Any) -> Any:
            return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value

        values = {name: frozen(value) for name, value in fields.items() if name != "input_specs"}
        inputs = tuple(InputSpec(**{n: frozen(v) for n, v in item.items()}) for item in fields["input_specs"])
        return cls(**values, input_specs=inputs)

    @classmethod
    def of(cls, program: Program, timestep: str | None, timestep_scale: float) -> ModelSpec:
        stream = program.found_stream()
        if program.route is None or program.denoise is None:
            raise CheckFailedError("the program was not split into route and denoise; fix the pipeline order")
        specs = tuple(InputSpec.of(n) for n in placeholders(program.graph) if n.name not in program.plan_inputs)
        inputs = tuple(spec.name for spec in specs)
        if timestep is None:
            timestep = next((name for name in TIMESTEP_NAMES if name in inputs), None)
        elif timestep not in inputs:
            found = ", ".join(inputs)
            raise UsageError(f"the model has no input '{timestep}' to take the timestep from; it has {found}")
        live = [n for n in placeholders(program.denoise.graph) if n.name not in {*inputs, *program.plan_inputs}]
        denoise_inputs = tuple(n.name for n in placeholders(program.denoise.graph))
        return cls(
            input_specs=specs,
            route_inputs=tuple(n.name for n in placeholders(program.route.graph)),
            live=tuple(n.name for n in live),
            live_shapes=tuple(tuple(int(size) for size in n.meta["val"].shape[1:]) for n in live),
            denoise_inputs=denoise_inputs,
            in_spec=program.in_spec,
            out_spec=program.out_spec,
            grid=stream.grid,
            width=stream.width,
            depth=stream.depth,
            timestep=timestep,
            timestep_scale=timestep_scale,
        )
