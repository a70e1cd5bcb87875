"""New paths that training may add to a rewritten model of mode chunk; both start at zero and change nothing then.

The router adapter learns where tokens are needed; the dechunk adapter learns what the dropped tokens miss. Their
parameters are called `router_adapter.*` and `dechunk_adapter.*`, in every graph and file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.capture import capture
from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.graph_tools import attributes, give_tensor, placeholders
from dcconvert.passes.ir.spec import DECHUNK, NEW_PATHS, ROUTER, ModelSpec
from dcconvert.passes.runtime.model import DynamicModel

GATE = "gate"
RANK = 4  # the width is divided by this inside an adapter, as in DC-DiT's router (arXiv 2603.06351)

aten = torch.ops.aten


class RouterAdapter(nn.Module):
    """Learned change of any router's scores: what a local predictor misses, as in DC-DiT v2 (arXiv 2603.06351).

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
    """Learned correction of what dechunk gives, from the token itself and the updates around it.

    The update h' - h is looked at through a depthwise 3x3 convolution, the token through its normalised trunk input;
    both are projected, added and projected back. The way back starts at zero.
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
    """Whether a tensor of a model is none of the original: of an adapter, or of a trunk with weights of its own."""
    return name.split(".")[0] in (ROUTER, *NEW_PATHS)


def has_adapter(model: DynamicModel, name: str) -> bool:
    graphs = (model.route_graph, model.denoise_graph)
    return any(key.split(".")[0] == name for graph in graphs for key in attributes(graph))


def with_router_adapter(model: DynamicModel, seed: int = 0) -> DynamicModel:
    """The model with a router adapter, which changes nothing yet; the model itself if it has one.

    CheckFailedError for a model of mode carry, whose router looks at the history of a run.
    """
    if model.spec.states:
        raise CheckFailedError("mode carry has no learned router: its routers look at the history of a run")
    if has_adapter(model, ROUTER):
        return model
    route = copied(model.route_graph)
    output = output_of(route.graph)
    scores, hidden, *_ = output.args[0]
    module = made_for(model, RouterAdapter, seed)
    with route.graph.inserting_before(output):
        found = spliced(route, module, ROUTER, (scores, hidden), ((model.spec.tokens,), width_of(model)))
    output.args = ((found, *output.args[0][1:]),)
    return with_graphs(model, route, model.denoise_graph)


def with_dechunk_adapter(model: DynamicModel, seed: int = 0) -> DynamicModel:
    """The model with a dechunk adapter, which changes nothing yet; the model itself if it has one.

    CheckFailedError for a model without a dechunk (mode carry).
    """
    if has_adapter(model, DECHUNK):
        return model
    denoise = copied(model.denoise_graph)
    filled: Any = dechunk_of(denoise.graph)
    module = made_for(model, DechunkAdapter, seed)
    users = list(filled.users)
    with denoise.graph.inserting_before(filled.next):
        added = spliced(denoise, module, DECHUNK, (filled, filled.args[0]), (width_of(model),) * 2)
        result = denoise.graph.call_function(aten.add.Tensor, (filled, added))
    for user in users:
        user.replace_input_with(filled, result)
    return with_graphs(model, model.route_graph, denoise)


def with_gate(model: DynamicModel) -> DynamicModel:
    """The model whose `denoise` takes one more input, `gate` [G, L, 1]: the trunk's update is multiplied by it.

    For training only: a gate of 1 whose gradient goes to the scores is DC-DiT's straight-through estimator.
    """
    denoise = copied(model.denoise_graph)
    filled = dechunk_of(denoise.graph)
    with denoise.graph.inserting_after(placeholders(denoise.graph)[-1]):
        gate = denoise.graph.placeholder(GATE)
    with denoise.graph.inserting_before(filled):
        gated = denoise.graph.call_function(aten.mul.Tensor, (filled.args[1], gate))
    filled.update_arg(1, gated)
    spec = replace(model.spec, denoise_inputs=(*model.spec.denoise_inputs, GATE))
    return with_graphs(model, model.route_graph, denoise, spec)


def show_features(model: DynamicModel) -> None:
    """Make what leaves the trunk, h' [B, N, D], the last output of `denoise`; CheckFailedError without a dechunk."""
    graph = model.denoise_graph.graph
    found = dechunk_of(graph)
    if has_adapter(model, DECHUNK):
        found = next(user for user in found.users if user.target is aten.add.Tensor)
    output = output_of(graph)
    output.args = ((*output.args[0], found),)
    model.denoise_graph.recompile()


def width_of(model: DynamicModel) -> tuple[int, int]:
    """Shape of the trunk's input, without the batch axis."""
    return model.spec.tokens, model.spec.width


def dechunk_of(graph: Graph) -> Node:
    found = [node for node in graph.nodes if node.target is torch.ops.dcconvert.dechunk.default]
    if len(found) != 1:
        raise CheckFailedError(f"the graph has {len(found)} dechunks where one was expected: mode chunk has one")
    return found[0]


def output_of(graph: Graph) -> Any:
    return next(iter(reversed(graph.nodes)))


def with_graphs(
    model: DynamicModel, route: GraphModule, denoise: GraphModule, spec: ModelSpec | None = None
) -> DynamicModel:
    for graph in (route, denoise):
        graph.graph.lint()
        graph.recompile()
    return model.with_graphs(spec, route=route, denoise=denoise)


def copied(source: GraphModule) -> GraphModule:
    """A graph of its own on the same tensors."""
    root = nn.Module()
    for name, value in attributes(source).items():
        give_tensor(root, name, value)
    return GraphModule(root, copy.deepcopy(source.graph))


def made_for(model: DynamicModel, kind: Callable[[tuple[int, int], int], nn.Module], seed: int) -> nn.Module:
    """An adapter for a model's grid, width and precision; its values are those of the seed and of nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = kind(model.spec.grid, model.spec.width)
    weight = next(model.route_graph.parameters())
    return made.to(weight.device, weight.dtype).requires_grad_(False)


def spliced(
    target: GraphModule, module: nn.Module, name: str, inputs: Sequence[Node], shapes: Sequence[tuple[int, ...]]
) -> Node:
    """Copy `module(*inputs)` to where the graph's insertion point is; its tensors are called `name.*`.

    `shapes`: those of the inputs, without the batch axis.
    """
    weight = next(module.parameters())
    inner = capture(module, [weight.new_zeros((2, *shape)) for shape in shapes])
    Normalise().call(inner)
    for key, value in attributes(inner.graph_module).items():
        give_tensor(target, f"{name}.{key}", value)
    mapping: dict[Node, Any] = dict(zip(placeholders(inner.graph), inputs, strict=True))
    for node in inner.graph.nodes:
        if node.op == "get_attr":
            mapping[node] = target.graph.get_attr(f"{name}.{node.target}")
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), mapping.__getitem__)
            mapping[node] = target.graph.call_function(node.target, args, kwargs)
    result: Node = mapping[output_of(inner.graph).args[0][0]]
    return result
