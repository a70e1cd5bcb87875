"""Checks that the parts of a model agree, because otherwise a call would fail far from the cause."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.graph_tools import placeholders
from dcconvert.passes.ir.spec import DECHUNK, NEW_PATHS
from dcconvert.passes.methods.method import Method
from dcconvert.passes.planning.carry_plan import CARRY_ARRAYS
from dcconvert.passes.planning.chunk_plan import PLAN_ARRAYS
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.serialise.treespec import shown

MATCHING = "router.destinations"  # which MergeRouter has


def check_seams(model: DynamicModel, graphs: Mapping[str, GraphModule]) -> None:
    """Check that the graphs and the spec have the same inputs; otherwise a call would fail far from the cause."""
    spec = model.spec
    results = pytree.treespec_loads(spec.out_spec).num_leaves
    returned = {
        "route": 1 + len(spec.live),
        "denoise": results + len(spec.carried),
        "prepare": len(spec.constants),
        "full": results + 1,
    }
    for name, graph in graphs.items():
        output = next(iter(reversed(graph.graph.nodes)))
        found = (tuple(node.name for node in placeholders(graph.graph)), len(output.args[0]))
        wanted = (spec.inputs_of(name), returned.get(name, results))
        if found != wanted:
            raise damaged(f"has {shown(found)} as inputs and outputs of {name}, but its spec has {shown(wanted)}")
    unknown = {*spec.route_inputs, *spec.prepare_inputs, spec.timestep or spec.image, spec.image} - {*spec.inputs}
    arrays = {*CARRY_ARRAYS, *(state.name for state in spec.states)} if spec.states else {*PLAN_ARRAYS}
    unknown |= {*spec.denoise_inputs} - {*spec.inputs, *spec.live, *spec.constants, *arrays}
    remembers = "tokens" if spec.states else "updates" if spec.updates else ""
    if remembers != model.method.remembers:
        raise damaged(f"remembers {remembers or 'nothing'}, which its method {model.method.name} does not")
    if unknown or pytree.treespec_loads(spec.in_spec).num_leaves != len(spec.inputs):
        raise damaged(f"has inputs that do not match its in_spec ({shown(sorted(unknown))})")
    if not spec.updates:
        check_kind(model.method, graphs)


def check_kind(method: Method, graphs: Mapping[str, GraphModule]) -> None:
    """Check the kind of trunk and router, because another kind would silently misinterpret the plan."""
    read = {str(node.target).split(".")[0] for node in graphs["denoise"].graph.nodes if node.op == "get_attr"}
    for weights in NEW_PATHS:
        if (method.new_weights == weights) != (weights in read) and weights != DECHUNK:  # which training adds
            raise damaged(f"has the method {method.name}, but its graphs have another")
    matches = any(str(node.target).endswith(MATCHING) for node in graphs["route"].graph.nodes)
    if (method.router == "merge") != matches:
        raise damaged(f"has the router {shown(method.router)}, but its graphs have another")


def damaged(fault: str) -> UsageError:
    return UsageError(f"the graph file {fault}: it was damaged or tampered with, convert the model again")
