"""The program that passes rewrite: one captured model, and where its tokens are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.graph_tools import add_input, emit, fake_mode, placeholders

if TYPE_CHECKING:
    from dcconvert.passes.methods.method import Method


@dataclass
class TokenStream:
    """Where the tokens are. FindTokenStream fills this in; the nodes are those of the program's graph."""

    patchify: Node
    grid: tuple[int, int]
    width: int
    cuts: list[Node]
    boundaries: list[Node]  # residual stream before block 0, after block 0, ..., after the last block
    # Tokens beside the grid at each cut. In a single stream, that is the value itself, which holds the others too, and
    # `starts` says where the grid's tokens begin in it.
    contexts: dict[Node, tuple[Node, ...]] = field(default_factory=dict)
    starts: dict[Node, int] = field(default_factory=dict)

    def beside(self, node: Node) -> int:
        """How many tokens there are besides those of the grid at a cut."""
        found = sum(int(value.meta["val"].shape[1]) for value in self.contexts.get(node, ()))
        return found - self.tokens if node in self.starts else found

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def depth(self) -> int:
        return len(self.boundaries) - 1


@dataclass(frozen=True)
class Reach:
    """How much of a model its trunk holds: attention ops out of those on the image's path, and operations.

    `share`: the operations that can shrink, of all. `head` and `tail`: blocks before and after the trunk. `notes`: what
    users should know.
    """

    held: int
    attentions: int
    share: float
    head: int
    tail: int
    notes: tuple[str, ...] = ()


@dataclass
class Program:
    """One captured model on its way through the passes.

    `graph_module` takes the flat tensor inputs and returns the flat outputs; `batch` is the symbol of the
    batch axis. Once a pass has split the model, later passes rewrite its `parts`.
    """

    graph_module: GraphModule
    batch: torch.SymInt
    in_spec: str
    out_spec: str
    method: Method
    example: tuple[Any, ...] = ()  # the flat inputs it was captured on
    stream: TokenStream | None = None
    trunk: tuple[Node, Node] | None = None  # trunk input and trunk output in the graph
    reach: Reach | None = None
    router: nn.Module | None = None  # the model's own router, for option `own`
    scores: Node | None = None
    plan_inputs: dict[str, Node] = field(default_factory=dict)
    state: dict[str, Node] = field(default_factory=dict)  # graph inputs that hold the state of `carry`
    parts: dict[str, GraphModule] = field(default_factory=dict)  # graphs it was split into, by their names in `Graphs`
    inputs: tuple[str, ...] = ()  # the original's flat inputs, in call order
    image: str = ""  # the input that patchify reads
    timestep: str | None = None  # the input that holds the timestep, if it is known
    grid: tuple[int, int] | None = None  # given by the user, for models in which it cannot be inferred
    timestep_scale: float = 1000.0  # the timestep that means pure noise

    @property
    def graph(self) -> torch.fx.Graph:
        return self.graph_module.graph

    @property
    def fake_mode(self) -> FakeTensorMode:
        return fake_mode(self.graph)

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
        return emit(self.graph, target, args, kwargs)

    def placeholder(self, name: str, shape: Sequence[int | torch.SymInt], dtype: torch.dtype) -> Node:
        """Add a graph input with a symbolic shape after the existing ones."""
        like = torch.empty(0, dtype=dtype, device=self.device)
        return add_input(self.graph, name, shape, like, after=placeholders(self.graph)[-1])
