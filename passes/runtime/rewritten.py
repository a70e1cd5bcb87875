"""Graph passes over a finished model, which change its graphs after the conversion or convert them to another form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dcconvert.passes.ir.graph_tools import copied, placeholders
from dcconvert.passes.ir.output_gate import OutputGate
from dcconvert.passes.ir.pass_runner import GraphPass, run_graph_passes
from dcconvert.passes.ir.spec import UPDATE, WEIGHTS, update_name
from dcconvert.passes.runtime.model import DynamicModel

BATCH = 2  # samples of the example


def rewritten(
    model: DynamicModel, passes: Mapping[str, GraphPass], added: Mapping[str, Any] | None = None
) -> DynamicModel:
    """The model with a pass run over some of its graphs, by their names, and a record of each pass.

    The graphs are copies and the weights are shared; `model` is not changed. Fake values and the numeric gate use
    `example_of(model)`; `added` holds values for inputs that passes add. Errors as in `run_graph_passes`.
    """
    example = {**example_of(model), **(added or {})}
    graphs, records = {}, list(model.records)
    for name, current in passes.items():
        graph = copied(model.graph(name))
        found = run_graph_passes(graph, [current], example, OutputGate(graph, example, scores=name == "route"))
        records += [replace(record, notes=(f"in {name}", *record.notes)) for record in found]
        graphs[name] = copied(graph)  # without the tensors that it no longer reads
    spec = model.spec
    if "denoise" in graphs:
        spec = replace(spec, denoise_inputs=tuple(node.name for node in placeholders(graphs["denoise"].graph)))
    made = model.with_graphs(spec, **graphs)
    made.records = records
    return made


@torch.no_grad()
def example_of(model: DynamicModel) -> dict[str, Any]:
    """Inputs of a model's graphs, by name, for a step that returns the original's output.

    Contains all arrays of the step's plan, including those that no graph takes yet.
    """
    inputs = model.spec.example(BATCH)
    if model.spec.updates:
        update = model.call("full", model.feed("full", inputs))[UPDATE]
        own = np.eye(model.spec.updates, dtype=np.float32)[:, [0] * BATCH]  # the step's own update, no forecast
        updates = {update_name(number): update for number in range(model.spec.updates)}
        return {**inputs, WEIGHTS: model.beside(own, update), **updates}
    _, live = model.route(inputs)
    hidden = live[model.spec.live[0]]
    plan = {n: model.beside(array, hidden) for n, array in model.planner.full_plan(BATCH).arrays().items()}
    return {**inputs, **model.prepare(inputs), **live, **plan, **model.empty_state(BATCH).values}
