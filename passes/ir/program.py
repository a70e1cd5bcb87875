"""The contract of a pass, and the runner that holds every pass to it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from dcconvert.passes.ir.errors import CheckFailedError, UnsupportedModelError

log = logging.getLogger(__name__)


@dataclass
class Options:
    """What the user may choose about the rewriting; defaults are the measured best (docs/carry.md, docs/choices.md).

    `members`, `neighbours`, `coverage` and `packing` are of mode chunk, `guard` and `state_dtype` of mode carry.
    Packing `varlen` is for torch on a GPU in half precision: attention by `torch.nn.attention.varlen`; no ONNX.
    `trunk` (`plain`, `sparse-dense`: SparseDiT's, `patch-sizes`: DDiT's), `dechunk` (`gaussian`, `smoothed`: DC-DiT's,
    `values`: the same of DC-DiT's own architecture, `refined` where that was made of another model)
    and router `merge` (token merging) are what the presets of the published methods choose, in mode chunk; `fewest` is
    the smallest fraction of the tokens that any step of `sparse-dense` or `merge` keeps, `prediction` (`eps` or
    `flow`, "" if it is not known) what the model predicts, for `patch-sizes`.
    """

    mode: str = "carry"
    head_blocks: int = -1  # -1: as MODE_DEFAULTS says
    tail_blocks: int = -1
    router: str = ""
    guard: float = 3.0
    state_dtype: str = "model"
    packing: str = "rows"
    members: int = 4
    neighbours: int = 4
    coverage: bool = True
    trunk: str = "plain"
    dechunk: str = "gaussian"
    fewest: float = 0.25
    prediction: str = ""
    refined: bool = False
    preset: str = ""  # whose choices these are
    seed: int = 0

    def __post_init__(self) -> None:
        blocks, router, _ = MODE_DEFAULTS.get(self.mode, MODE_DEFAULTS["chunk"])
        self.head_blocks = blocks if self.head_blocks == -1 else self.head_blocks
        self.tail_blocks = blocks if self.tail_blocks == -1 else self.tail_blocks
        self.router = self.router or router


# Head blocks, tail blocks (each), router and schedule of a mode.
MODE_DEFAULTS = {"carry": (0, "drift", "falling"), "chunk": (1, "pool", "constant")}


@dataclass
class TokenStream:
    """Where the tokens are: filled in by FindTokenStream, nodes refer to the program's graph."""

    patchify: Node
    grid: tuple[int, int]
    width: int
    cuts: list[Node]
    boundaries: list[Node]  # residual stream before block 0, after block 0, ..., after the last block
    contexts: dict[Node, tuple[Node, ...]] = field(default_factory=dict)  # tokens beside the grid at each cut

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def depth(self) -> int:
        return len(self.boundaries) - 1


@dataclass
class Program:
    """One captured model on its way through the passes.

    `graph_module` takes the flat tensor inputs and returns the flat outputs; `batch` is the symbol of the
    batch axis. `route` and `denoise` appear when SplitRoute has cut the graph in two.
    """

    graph_module: GraphModule
    batch: torch.SymInt
    in_spec: str
    out_spec: str
    options: Options
    example: tuple[Any, ...] = ()  # the flat inputs it was captured on
    stream: TokenStream | None = None
    trunk: tuple[Node, Node] | None = None  # trunk input and trunk output in the graph
    router: nn.Module | None = None  # that of the model itself, for option `own`
    scores: Node | None = None
    plan_inputs: dict[str, Node] = field(default_factory=dict)
    state: dict[str, Node] = field(default_factory=dict)  # graph inputs that hold what `carry` remembers
    route: GraphModule | None = None
    denoise: GraphModule | None = None
    prepare: GraphModule | None = None
    full: GraphModule | None = None
    skip: GraphModule | None = None
    inputs: tuple[str, ...] = ()  # the original's flat inputs, in call order
    image: str = ""  # the one that patchify reads
    timestep: str | None = None  # the one that holds the timestep, where it is known
    grid: tuple[int, int] | None = None  # given by the user, for models in which it cannot be seen
    timestep_scale: float = 1000.0  # the timestep that means pure noise

    @property
    def graph(self) -> torch.fx.Graph:
        return self.graph_module.graph

    @property
    def fake_mode(self) -> FakeTensorMode:
        return placeholders(self.graph)[0].meta["val"].fake_mode

    @property
    def device(self) -> torch.device:
        """Where the example inputs are."""
        return next((v.device for v in self.example if isinstance(v, Tensor)), torch.device("cpu"))

    def found_stream(self) -> TokenStream:
        if self.stream is None:
            raise CheckFailedError("the token stream was asked for before FindTokenStream ran; fix the pipeline order")
        return self.stream

    def found_trunk(self) -> tuple[Node, Node]:
        if self.trunk is None:
            raise CheckFailedError("the trunk was asked for before FindTokenStream ran; fix the pipeline order")
        return self.trunk

    def found_scores(self) -> Node:
        if self.scores is None:
            raise CheckFailedError("the scores were asked for before InsertRouter ran; fix the pipeline order")
        return self.scores

    def new_size(self, hint: int) -> torch.SymInt:
        """A fresh symbolic size, for an axis the original model does not have."""
        from torch._dynamo.source import ConstantSource

        context: StatelessSymbolicContext[..., Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        source = ConstantSource(f"dcconvert_size_{hint}")
        value = self.fake_mode.from_tensor(torch.empty(hint), symbolic_context=context, source=source)
        return cast(torch.SymInt, value.shape[0])

    def emit(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
        """Insert a call at the graph's insertion point, with its fake value computed."""
        node = self.graph.call_function(target, args, kwargs or {})
        node.meta["val"] = fake_result(self.fake_mode, node)
        return node

    def placeholder(self, name: str, shape: Sequence[int | torch.SymInt], dtype: torch.dtype) -> Node:
        """Add a graph input with a symbolic shape after the existing ones."""
        with self.graph.inserting_after(placeholders(self.graph)[-1]):
            node = self.graph.placeholder(name)
        node.name = name  # without the suffix that an input renamed by capture would leave
        with self.fake_mode:
            node.meta["val"] = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        return node


@dataclass(frozen=True)
class PassResult:
    """What a pass did: how many places matched, and remarks for the user."""

    matches: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassRecord:
    """A line of the pass log kept in the manifest."""

    name: str
    matches: int
    notes: tuple[str, ...]
    nodes_before: int
    nodes_after: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "notes": list(self.notes)}


class Pass:
    """A rewrite of a Program in place: one file, one class, `requires / call / ensures`.

    `optional` passes may match nothing; any other pass that matches nothing is an error. After an `exact` pass
    the graph still gives the original's outputs (with every token kept), which the numeric gate checks.
    """

    optional = False
    exact = False

    @property
    def name(self) -> str:
        return type(self).__name__

    def requires(self, program: Program) -> None:
        """Raise if the program is not ready for this pass."""

    def call(self, program: Program) -> PassResult:
        raise NotImplementedError

    def ensures(self, program: Program) -> None:
        """Raise if the rewritten program breaks what this pass promises."""


def run_passes(
    program: Program,
    passes: Iterable[Pass],
    dump: Path | None = None,
    gate: Callable[[Program, str], None] = lambda program, after: None,
) -> list[PassRecord]:
    """Run passes in order; after each one recompile, lint and check that every value has a fake tensor.

    `dump`: a folder that receives the readable graph after each pass. `gate` is called after each exact pass
    with its name. Raises CheckFailedError when a pass
    breaks an invariant, and UnsupportedModelError when one that should have fired did not.
    """
    records: list[PassRecord] = []
    for number, current in enumerate(passes):
        before, start = len(program.graph.nodes), time.perf_counter()
        current.requires(program)
        result = current.call(program)
        if result.matches == 0 and not current.optional:
            reason = "; ".join(result.notes) or "no reason recorded"
            raise UnsupportedModelError(f"{current.name} found nothing to do in this model: {reason}")
        for module in live_modules(program):
            check_graph(module, current.name)
        current.ensures(program)
        if current.exact:
            gate(program, current.name)
        after = sum(len(m.graph.nodes) for m in live_modules(program))
        records.append(
            PassRecord(current.name, result.matches, result.notes, before, after, time.perf_counter() - start)
        )
        log.info("%s: %d matches, %d -> %d nodes", current.name, result.matches, before, after)
        if dump is not None:
            dump_graphs(program, dump, f"{number:02d}_{current.name}")
    return records


def live_modules(program: Program) -> list[GraphModule]:
    if program.route is not None and program.denoise is not None:
        return [program.route, program.denoise, *([program.prepare] if program.prepare else [])]
    if program.full is not None and program.skip is not None:
        return [program.full, program.skip]
    return [program.graph_module]


def check_graph(module: GraphModule, after: str) -> None:
    """Lint and recompile; every call must carry a fake value."""
    try:
        module.graph.lint()
    except RuntimeError as error:
        message = f"{after} left a graph that does not lint ({error}); this is a bug of dcconvert"
        raise CheckFailedError(message) from error
    module.recompile()
    for node in module.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            raise CheckFailedError(f"{after} left {node.name} without a fake value; this is a bug of dcconvert")


def dump_graphs(program: Program, folder: Path, stem: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    modules = live_modules(program)
    halves = ("full", "skip") if program.full is not None else ("route", "denoise", "prepare")
    labels = ("graph",) if len(modules) == 1 else halves
    for label, module in zip(labels, modules, strict=False):
        (folder / f"{stem}.{label}.txt").write_text(readable(module))


def readable(module: GraphModule) -> str:
    """One line a node: name, shape, op, arguments, where it came from."""
    lines = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        shape = tuple(value.shape) if isinstance(value, Tensor) else ""
        args = ", ".join(map(str, node.args)) + "".join(f", {k}={v}" for k, v in node.kwargs.items())
        lines.append(f"{node.name} {shape} = {node.op}[{node.target}]({args})  # {module_path(node)}")
    return "\n".join(lines) + "\n"


def remove_dead_code(graph: torch.fx.Graph) -> None:
    """Drop calls whose results nothing uses (torch.fx itself keeps attention, for its dropout's sake)."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def placeholders(graph: torch.fx.Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def fake_result(mode: FakeTensorMode, node: Node) -> Any:
    """Run a node on the fake values of its arguments."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with enable_python_dispatcher(), mode, torch.no_grad():  # some ops take symbolic sizes no other way
        return node.target(*args, **kwargs)  # type: ignore[operator]


def owner_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds what a dotted path names, made where it is missing, and the path's last part."""
    *parents, leaf = name.split(".")
    for part in filter(None, parents):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root, leaf


def give_tensor(root: nn.Module, name: str, value: Tensor) -> None:
    """Give a module a tensor under a dotted name, as the parameter or the buffer that it is."""
    owner, leaf = owner_of(root, name)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def module_path(node: Node) -> str:
    """Dotted path of the module a node was captured from (for messages only)."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(list(stack.values()))), "")


def where(node: Node) -> str:
    """'aten.conv2d.default in blocks.0.attn (file.py:12)': how messages name a node."""
    frames = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip().startswith("File ")]
    line = ""
    if frames:
        parts = frames[-1].split(", ")
        line = f" ({Path(parts[0].removeprefix('File ').strip(chr(34))).name}:{parts[1].removeprefix('line ')})"
    return f"{node.target} in {module_path(node) or 'the model'}{line}"
