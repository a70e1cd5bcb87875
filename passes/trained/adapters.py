"""New paths that training may add to a rewritten model in mode chunk; both start at zero and change nothing at first.

The router adapter learns where tokens are needed; the dechunk adapter learns what the dropped tokens miss. Their
parameters are called `router_adapter.*` and `dechunk_adapter.*`, in every graph and file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.graph_tools import add_input, attributes, emit, output_node, placeholders
from dcconvert.passes.ir.node_args import operand
from dcconvert.passes.ir.pass_runner import GraphPass, PassResult
from dcconvert.passes.ir.spec import DECHUNK, NEW_PATHS, ROUTER
from dcconvert.passes.rewrite.inline import inline
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.rewritten import BATCH, rewritten

GATE = "gate"
RANK = 4  # the width is divided by this inside an adapter, as in DC-DiT's router (arXiv 2603.06351)

aten = torch.ops.aten

Adapter = TypeVar("Adapter", bound=nn.Module)


class RouterAdapter(nn.Module):
    """Learned change of any router's scores, from the error of a local predictor, as in DC-DiT v2 (arXiv 2603.06351).

    z = projection of the normalised token, r = z - 3x3 convolution of z, and a linear score of r is added to the
    router's own in logits. The score starts at zero.
    """

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.grid, rank = grid, max(8, width // RANK)
        self.project = nn.Linear(width, rank)
        self.predict = nn.Conv2d(rank, rank, 3, padding=1)
        self.score = zeroed(nn.Linear(rank, 1))

    def forward(self, scores: Tensor, h: Tensor) -> Tensor:
        """scores [B, N] and trunk input h [B, N, D] -> scores [B, N] in [0, 1]."""
        z = self.project(F.layer_norm(h, h.shape[-1:]))
        residual = z - as_tokens(self.predict(as_image(z, self.grid)))
        logits = torch.logit(scores, 1e-4)
        moved = torch.sigmoid(logits + self.score(F.silu(residual)).squeeze(-1))
        return (scores + moved - torch.sigmoid(logits)).clamp(0, 1)


class DechunkAdapter(nn.Module):
    """Learned correction of dechunk's output, from the token itself and the updates around it.

    The update h' - h goes through a depthwise 3x3 convolution, and the token's trunk input is normalised. Both are
    projected, added and projected back; the last projection starts at zero.
    """

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.grid, rank = grid, max(8, width // RANK)
        self.around = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.update = nn.Linear(width, rank)
        self.token = nn.Linear(width, rank)
        self.back = zeroed(nn.Linear(rank, width))

    def forward(self, filled: Tensor, h: Tensor) -> Tensor:
        """filled h' [B, N, D] and trunk input h [B, N, D] -> what is added to h' [B, N, D]."""
        around = as_tokens(self.around(as_image(filled - h, self.grid)))
        return self.back(F.silu(self.update(around) + self.token(F.layer_norm(h, h.shape[-1:]))))


def zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def as_image(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, N, D] -> [B, D, H, W]."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


def as_tokens(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)


def is_adapter(name: str) -> bool:
    """Whether a tensor is not part of the original model, but of an adapter or of a trunk with its own weights."""
    return name.split(".")[0] in (ROUTER, *NEW_PATHS)


def has_adapter(model: DynamicModel, name: str) -> bool:
    graphs = (model.route_graph, model.denoise_graph)
    return any(key.split(".")[0] == name for graph in graphs for key in attributes(graph))


class AddRouterAdapter(GraphPass):
    """Add an adapter to the scores of a `route` graph; it changes nothing before it is trained."""

    exact = True

    def __init__(self, adapter: RouterAdapter) -> None:
        self.adapter = adapter

    def call(self, module: GraphModule) -> PassResult:
        output = output_node(module.graph)
        scores, hidden, *_ = output.args[0]
        with module.graph.inserting_before(output):
            found = inline(module, self.adapter, (scores, hidden), ROUTER)
        output.args = ((found, *output.args[0][1:]),)
        return PassResult(1)


class AddDechunkAdapter(GraphPass):
    """Add an adapter to dechunk's output in a `denoise` graph; it changes nothing before it is trained."""

    exact = True

    def __init__(self, adapter: DechunkAdapter) -> None:
        self.adapter = adapter

    def call(self, module: GraphModule) -> PassResult:
        filled: Any = dechunk_of(module.graph)
        users = list(filled.users)
        with module.graph.inserting_before(filled.next):
            added = inline(module, self.adapter, (filled, filled.args[0]), DECHUNK)
            result = emit(module.graph, aten.add.Tensor, (filled, added))
        for user in users:
            user.replace_input_with(filled, result)
        return PassResult(1)


class AddGate(GraphPass):
    """Multiply the trunk's update in a `denoise` graph by one more input, `gate` [G, L, 1]; exact where that is 1."""

    exact = True

    def call(self, module: GraphModule) -> PassResult:
        filled = dechunk_of(module.graph)
        update = operand(filled, 1)
        like = update.meta["val"]
        gate = add_input(module.graph, GATE, (*like.shape[:2], 1), like, after=placeholders(module.graph)[-1])
        with module.graph.inserting_before(filled):
            filled.update_arg(1, emit(module.graph, aten.mul.Tensor, (update, gate)))
        return PassResult(1)


class ShowFeatures(GraphPass):
    """Make the trunk's output, h' [B, N, D], the last output of a `denoise` graph."""

    exact = True

    def call(self, module: GraphModule) -> PassResult:
        found, output = dechunk_of(module.graph), output_node(module.graph)
        if any(name.startswith(f"{DECHUNK}.") for name in attributes(module)):
            found = next(user for user in found.users if user.target is aten.add.Tensor)
        output.args = ((*output.args[0], found),)
        return PassResult(1)


def with_router_adapter(model: DynamicModel, seed: int = 0) -> DynamicModel:
    """The model with a router adapter, which changes nothing yet; the model itself if it has one.

    Raises CheckFailedError for a model in mode carry, whose router uses the history of a run.
    """
    if model.spec.states:
        raise CheckFailedError("mode carry has no learned router, because its routers use the history of a run")
    if has_adapter(model, ROUTER):
        return model
    return rewritten(model, {"route": AddRouterAdapter(made_for(model, RouterAdapter, seed))})


def with_dechunk_adapter(model: DynamicModel, seed: int = 0) -> DynamicModel:
    """The model with a dechunk adapter, which changes nothing yet; the model itself if it has one.

    Raises CheckFailedError for a model without a dechunk (mode carry).
    """
    if has_adapter(model, DECHUNK):
        return model
    return rewritten(model, {"denoise": AddDechunkAdapter(made_for(model, DechunkAdapter, seed))})


def with_gate(model: DynamicModel) -> DynamicModel:
    """The model whose `denoise` takes one more input, `gate` [G, L, 1]: the trunk's update is multiplied by it.

    For training only: a gate of 1 whose gradient goes to the scores is DC-DiT's straight-through estimator.
    Raises CheckFailedError for a model without a dechunk.
    """
    dechunk_of(model.denoise_graph.graph)
    tiles = model.planner.full_plan(BATCH).arrays()["chunk_index"].shape[:2]
    return rewritten(model, {"denoise": AddGate()}, {GATE: torch.ones(*tiles, 1)})


def with_features(model: DynamicModel) -> DynamicModel:
    """The model whose `denoise` also returns the trunk's output, last; raises CheckFailedError without a dechunk."""
    return rewritten(model, {"denoise": ShowFeatures()})


def dechunk_of(graph: Graph) -> Node:
    found = [node for node in graph.nodes if node.target is torch.ops.dcconvert.dechunk.default]
    if len(found) != 1:
        raise CheckFailedError(f"the graph has {len(found)} dechunks, but mode chunk needs one")
    return found[0]


def made_for(model: DynamicModel, kind: Callable[[tuple[int, int], int], Adapter], seed: int) -> Adapter:
    """An adapter for a model's grid, width and precision; its values depend only on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = kind(model.spec.grid, model.spec.width)
    weight = next(model.route_graph.parameters())
    return made.to(weight.device, weight.dtype).requires_grad_(False)
