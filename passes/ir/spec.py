"""Facts about a rewritten model that its graphs alone do not show."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.ir.graph_tools import placeholders, tensor_at
from dcconvert.passes.ir.program import Program, Reach

aten = torch.ops.aten
RETYPES = {aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.clone.default}

SLOTS = 2  # the last two computed values of a token: enough for a straight line in time
STATE_DTYPES = {"model": None, "fp16": torch.float16, "fp32": torch.float32}  # for the state of mode carry
ROUTER, DECHUNK = "router_adapter", "dechunk_adapter"  # prefixes of the adapters' weights
# Prefixes of the weights that a trunk has besides the original's, for restoring the grid from its tokens.
NEW_PATHS = (DECHUNK, "recovery", "patch_sizes")

TIMESTEP_NAMES = ("t", "timestep", "timesteps")
SCORES_NAME = "scores"
DISTANCE_NAME = "distance"  # between the last two updates of each token [B, N]
UPDATE, WEIGHTS = "update", "weights"  # of the trunk, in graphs of steps that compute it or skip it
UPDATES = 3  # past updates that a skipped step reads: enough for a parabola in time
EXAMPLE_BATCH = 3  # above one and unlike any other size, so that export cannot mistake another axis for the batch


@dataclass(frozen=True)
class InputSpec:
    """One flat input of the original: a tensor (`shape` without the batch axis, if `batched`), or a constant.

    `rows`: of the table that an integer input is an index of, such as a class label; 0 for all others.
    """

    name: str
    batched: bool = False
    shape: tuple[int, ...] = ()
    dtype: str = ""
    value: bool | int | float | str | None = None  # of an input that is not a tensor
    rows: int = 0

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
class StateSpec:
    """What mode carry stores for one value: C x E numbers per token, in SLOTS slots [P, B, C, N, E]."""

    name: str
    channels: int
    width: int
    dtype: str

    def shape(self, batch: int, tokens: int) -> tuple[int, ...]:
        return (SLOTS, batch, self.channels, tokens, self.width)

    def bytes(self, tokens: int) -> int:
        """Its size for one sample."""
        return math.prod(self.shape(1, tokens)) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return cast(torch.dtype, getattr(torch, self.dtype))

    @classmethod
    def of(cls, node: Node) -> StateSpec:
        value = node.meta["val"]
        return cls(node.name, int(value.shape[2]), int(value.shape[4]), str(value.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class ModelSpec:
    """Names and shapes at the interfaces of a rewritten model, all of which can be stored as JSON."""

    input_specs: tuple[InputSpec, ...]  # the original's flat inputs, in call order
    in_spec: str
    out_spec: str
    grid: tuple[int, int]
    width: int
    depth: int
    timestep: str | None
    timestep_scale: float  # the timestep that means pure noise
    image: str  # the input that patchify reads
    route_inputs: tuple[str, ...] = ()
    live: tuple[str, ...] = ()  # values that route passes to denoise, `h` first
    live_shapes: tuple[tuple[int, ...], ...] = ()  # their shapes, without the batch axis
    denoise_inputs: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()  # mode carry: what prepare computes once per run and denoise takes at every step
    prepare_inputs: tuple[str, ...] = ()
    states: tuple[StateSpec, ...] = ()  # mode carry: last inputs and last outputs of denoise, in this order
    updates: int = 0  # mode steps: how many of the trunk's last updates a skipped step reads
    update_dtype: str = ""
    reach: Reach | None = None  # None: unknown, in bundles of earlier versions

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.input_specs)

    def varies(self, item: InputSpec) -> bool:
        """Whether an input may be another at every step of a run: image, timestep, and values that have the width of
        the token stream and are given for every token, such as what a ControlNet adds to it."""
        return item.name in (self.image, self.timestep) or (item.batched and item.shape == (self.tokens, self.width))

    def with_rows(self, original: GraphModule) -> ModelSpec:
        """The same spec with the tables that the original's integer inputs are indices of."""
        nodes = {node.name: node for node in placeholders(original.graph)}
        specs = (replace(item, rows=table_rows(original, nodes.get(item.name))) for item in self.input_specs)
        return replace(self, input_specs=tuple(specs))

    def inputs_of(self, graph: str) -> tuple[str, ...]:
        """Names of a graph's inputs, in order."""
        known = {"route": self.route_inputs, "prepare": self.prepare_inputs, "denoise": self.denoise_inputs}
        if graph == "skip":
            return (*self.inputs, WEIGHTS, *map(update_name, range(self.updates)))
        return known.get(graph, self.inputs)

    def outputs_of(self, graph: str, results: int) -> tuple[str, ...]:
        """Names of a graph's results, in order; `results` says how many there are."""
        if graph == "route":
            return (SCORES_NAME, *self.live)
        if graph == "prepare":
            return self.constants
        if graph == "denoise":
            return (*output_names(results - len(self.carried)), *self.carried)
        if graph == "full":
            return (*output_names(results - 1), UPDATE)
        return output_names(results)

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs that a run calls, in the order in which it needs them."""
        if self.updates:
            return ("full", "skip")
        return ("route", "prepare", "denoise") if self.constants else ("route", "denoise")

    def state_shapes(self, batch: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of everything that a run of `batch` samples stores on the device, by name."""
        update: tuple[int, ...] = (batch, self.tokens, self.width)
        shapes = {update_name(number): (update, self.update_dtype) for number in range(self.updates)}
        return shapes | {state.name: (state.shape(batch, self.tokens), state.dtype) for state in self.states}

    @property
    def carried(self) -> tuple[str, ...]:
        """Mode carry: what denoise returns after the model's own outputs."""
        return (DISTANCE_NAME, *(state_output(state.name) for state in self.states)) if self.states else ()

    def example(self, batch: int, seed: int = 0) -> dict[str, Any]:
        """Inputs by name for `batch` samples: normal noise, timesteps over their whole range, class 0."""
        generator = torch.Generator().manual_seed(seed)
        scale = {self.timestep: self.timestep_scale}
        return {s.name: s.example(batch, generator, scale.get(s.name, 0.0)) for s in self.input_specs}

    @property
    def state_bytes(self) -> int:
        """The size of a run's state on the device for one sample, in bytes."""
        shapes = self.state_shapes(1).values()
        return sum(math.prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in shapes)

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelSpec:
        def frozen(value: Any) -> Any:
            return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value

        values = {
            name: frozen(value) for name, value in fields.items() if name not in ("input_specs", "states", "reach")
        }
        inputs = tuple(InputSpec(**{n: frozen(v) for n, v in item.items()}) for item in fields["input_specs"])
        states = tuple(StateSpec(**item) for item in fields["states"])
        reach = Reach(**{name: frozen(v) for name, v in found.items()}) if (found := fields.get("reach")) else None
        return cls(**values, input_specs=inputs, states=states, reach=reach)

    @classmethod
    def of(cls, program: Program) -> ModelSpec:
        added = {*program.plan_inputs, *program.state}
        facts = ModelSpec(
            input_specs=tuple(InputSpec.of(n) for n in placeholders(program.graph) if n.name not in added),
            in_spec=program.in_spec,
            out_spec=program.out_spec,
            grid=program.found_stream().grid,
            width=program.found_stream().width,
            depth=program.found_stream().depth,
            timestep=program.timestep,
            timestep_scale=program.timestep_scale,
            image=program.image,
            reach=program.reach,
        )
        if "skip" in program.parts:
            return facts.with_steps(program.parts["skip"])
        if "denoise" in program.parts:
            return facts.with_plan(program, added)
        raise CheckFailedError("the program was not split; fix the pipeline order")

    def with_steps(self, skip: GraphModule) -> ModelSpec:
        """The same spec with what a run of full and skipped steps needs."""
        given = placeholders(skip.graph)
        dtype = str(given[-1].meta["val"].dtype).removeprefix("torch.")
        return replace(self, updates=len(given) - len(self.inputs) - 1, update_dtype=dtype)

    def with_plan(self, program: Program, added: Collection[str]) -> ModelSpec:
        """The same spec with what a run of plans needs; `added`: the names of the plan's inputs and of the states."""
        prepare = program.parts.get("prepare")
        constants = count_outputs(prepare) if prepare else 0
        names = tuple(f"constant_{number}" for number in range(constants))
        known = {*program.inputs, *added, *names}
        given = {name: placeholders(part.graph) for name, part in program.parts.items()}
        live = [n for n in given["denoise"] if n.name not in known]
        return replace(
            self,
            route_inputs=tuple(n.name for n in given["route"]),
            live=tuple(n.name for n in live),
            live_shapes=tuple(tuple(int(size) for size in n.meta["val"].shape[1:]) for n in live),
            denoise_inputs=tuple(n.name for n in given["denoise"]),
            constants=names,
            prepare_inputs=tuple(n.name for n in given.get("prepare", ())),
            states=tuple(StateSpec.of(node) for node in program.state.values()),
        )


def table_rows(graph_module: GraphModule, index: Node | None) -> int:
    """Rows of the smallest table that an input is an index of, as it is or in another type; 0 if there is none."""
    found, ahead = [], list(index.users) if index is not None else []
    while ahead:
        node = ahead.pop()
        if node.target in RETYPES:
            ahead += node.users
        elif node.target is aten.embedding.default and node.args[1] in (index, *node.all_input_nodes[1:]):
            found.append(len(tensor_at(graph_module, str(cast(Node, node.args[0]).target))))
    return min(found, default=0)


def find_inputs(program: Program, timestep: str | None) -> None:
    """Record in the program which inputs the model has, and which of them are the image and the timestep.

    `timestep` is the name of the timestep, or None to guess it from TIMESTEP_NAMES. Raises UsageError if there is no
    such input, or if mode carry, which needs one, finds none.
    """
    program.inputs = tuple(node.name for node in placeholders(program.graph))
    if timestep is None:
        timestep = next((name for name in TIMESTEP_NAMES if name in program.inputs), None)
    elif timestep not in program.inputs:
        found = ", ".join(program.inputs)
        raise UsageError(f"the model has no input '{timestep}' to take the timestep from; it has {found}")
    if timestep is None and program.method.stateful:
        raise UsageError(
            f"method {program.method.name} needs to know which input is the timestep: name it with timestep=..., "
            "or use mode chunk"
        )
    program.timestep = timestep


def update_name(number: int) -> str:
    """The name of a skipped step's input for one of the last updates."""
    return f"{UPDATE}_{number}"


def state_output(name: str) -> str:
    """The name of the output that continues a state."""
    return f"next_{name}"


def output_names(count: int) -> tuple[str, ...]:
    """Names for the model's own outputs."""
    return ("output",) if count == 1 else tuple(f"output_{i}" for i in range(count))


def count_outputs(graph_module: GraphModule) -> int:
    output = next(iter(reversed(graph_module.graph.nodes)))
    return len(output.args[0])
