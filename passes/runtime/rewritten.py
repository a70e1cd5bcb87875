"""Graph passes over a finished model: what changes its graphs after the conversion, or takes them to another form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dcconvert.passes.ir.graph_tools import copied, placeholders
from dcconvert.passes.ir.output_gate import OutputGate
from dcconvert.passes.ir.pass_runner import GraphPass, run_graph_passes
from dcconvert.passes.runtime.model import DynamicModel

BATCH = 2  # samples of the example


def rewritten(
    model: DynamicModel, passes: Mapping[str, GraphPass], added: Mapping[str, Any] | None = None
) -> DynamicModel:
    """The model with a pass run over some of its graphs, by their names, and a record of each pass.

    The graphs are copies and the weights are shared: `model` stays as it is. Fake values and the numeric gate are those
    of `example_of(model)`; `added` holds values of inputs that passes add. Errors as `run_graph_passes`.
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
    """What graphs of a model take in a step that keeps every token, by name; all arrays of its plan included."""
    inputs = model.spec.example(BATCH)
    _, live = model.route(inputs)
    arrays = model.planner.full_plan(BATCH).arrays()
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    hidden = live[model.spec.live[0]]
    plan = {name: t.to(hidden) if t.is_floating_point() else t.to(hidden.device) for name, t in tensors.items()}
    return {**inputs, **model.prepare(inputs), **live, **plan, **model.empty_state(BATCH).values}
