"""Graphs that read other weights: what training needs around a rewritten model.

A model after training holds two sets of weights: the original's, under their own names, and those that were trained,
under the same names after ``trained.``. So one file of weights serves both the original, which remains the control and
the teacher for further training, and the trained model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.graph_tools import attributes, give_tensor
from dcconvert.passes.ir.node_args import operand
from dcconvert.passes.ir.spec import DECHUNK
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.trained.adapters import is_adapter

PREFIX = "trained."

aten = torch.ops.aten


def original_name(name: str) -> str:
    return name.removeprefix(PREFIX)


def with_tensors(source: GraphModule, tensors: Mapping[str, tuple[str, Tensor]]) -> GraphModule:
    """A copy of a graph in which each tensor is read under another name, with another value.

    `tensors`: new name and value for every tensor it reads now, by its name.
    """
    graph, root = copy.deepcopy(source.graph), nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target, value = tensors[str(node.target)]
            give_tensor(root, str(node.target), value)
    return GraphModule(root, graph)


def rebuilt(model: DynamicModel, tensors: Mapping[str, tuple[str, Tensor]]) -> DynamicModel:
    """The model with other tensors in route and denoise, by their present names; the original stays as it is."""
    graphs = model.graphs.named().items()
    return model.with_graphs(**{name: with_tensors(graph, tensors) for name, graph in graphs if name != "original"})


def all_tensors(model: DynamicModel) -> dict[str, Tensor]:
    """Every tensor of route, denoise and prepare, by its present name."""
    graphs = (model.route_graph, model.denoise_graph, model.prepare_graph)
    return {name: value for graph in graphs if graph is not None for name, value in attributes(graph).items()}


def teacher_of(model: DynamicModel) -> DynamicModel:
    """The original in the form of the rewritten model: the same passes, the original's weights.

    With every token kept, it returns what the original returns, and has its intermediate values in the same places. An
    adapter adds nothing to it. Raises CheckFailedError if the bundle lacks one of the original's weights.
    """
    own = attributes(model.original_graph)
    found = {}
    for name, value in all_tensors(model).items():
        plain = original_name(name)
        if name != plain and plain not in own:
            raise CheckFailedError(f"the original has no tensor {plain}, which was trained: convert the model again")
        if name.startswith(f"{DECHUNK}."):
            value = nn.Parameter(torch.zeros_like(value), requires_grad=False)
        found[name] = (plain, own.get(plain, value))
    return rebuilt(model, found)


def plainly_named(model: DynamicModel) -> DynamicModel:
    """The model with its own weights under the original's names."""
    return rebuilt(model, {name: (original_name(name), value) for name, value in all_tensors(model).items()})


def trained_model(model: DynamicModel, trained: Mapping[str, Tensor]) -> DynamicModel:
    """The model with these tensors, by their original names, in place of its own; adapters keep theirs."""
    found: dict[str, tuple[str, Tensor]] = {}
    for name, value in all_tensors(model).items():
        plain = original_name(name)
        if plain in trained:
            weight = nn.Parameter(trained[plain].detach().clone(), requires_grad=False)
            found[name] = (plain if is_adapter(plain) else PREFIX + plain, weight)
        else:
            found[name] = (name, value)
    return rebuilt(model, found)


def linear_weights(model: DynamicModel) -> set[str]:
    """Names of the matrices that linear layers of route and denoise multiply by, except in adapters."""
    layers = [
        node
        for graph in (model.route_graph, model.denoise_graph)
        for node in graph.graph.nodes
        if node.target is aten.linear.default
    ]
    weights = [operand(layer, 1) for layer in layers]
    # Each part of a projection that was split reads some rows of the weight.
    weights = [operand(weight) if weight.target is aten.slice.Tensor else weight for weight in weights]
    names = {str(weight.target) for weight in weights if weight.op == "get_attr"}
    return {name for name in names if not is_adapter(name)}
