"""Running the pipeline of a method: from a module to a converted model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from dcconvert.passes.frontend.capture import capture, opened
from dcconvert.passes.ir.graph_tools import copied
from dcconvert.passes.ir.pass_runner import run_passes
from dcconvert.passes.ir.program import Program
from dcconvert.passes.ir.spec import ModelSpec, find_inputs
from dcconvert.passes.methods.method import SAME_OPS, Method
from dcconvert.passes.numeric_gate import NumericGate
from dcconvert.passes.planning.schedule import Timetable
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.model import DynamicModel, Graphs
from dcconvert.passes.runtime.threads import one_at_a_time


@one_at_a_time
def captured(
    module: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    method: Method,
    timestep: str | None = None,
    grid: tuple[int, int] | None = None,
) -> Program:
    """Capture `module` on the example inputs, ready for the pipeline of the method; errors as `rewrite`."""
    program = opened(module, method) if isinstance(module, ExportedProgram) else capture(module, args, kwargs, method)
    program.grid = grid
    find_inputs(program, timestep)
    return program


@one_at_a_time
def rewrite(
    module: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    method: Method,
    schedule: Timetable,
    *,
    timestep: str | None = None,
    timestep_scale: float = 1000.0,
    grid: tuple[int, int] | None = None,
    router: nn.Module | None = None,
    original: nn.Module | None = None,
    dump: Path | None = None,
) -> DynamicModel:
    """Capture `module` on the example inputs (unless it is captured already) and run the pipeline.

    `timestep` names the input that holds the timestep (guessed from TIMESTEP_NAMES when None) and `timestep_scale` is
    its value at pure noise. `grid`: (H, W) of the tokens, if it cannot be inferred. `router`: the model's own router.
    `original`: another model with the same call signature, with which the result is compared instead of `module`.
    `dump`: folder for the graph after each pass. Raises the errors of `capture` and of the passes. The module is put in
    eval mode and is otherwise unchanged. Other threads wait until it is done, and must not call the module meanwhile.
    """
    program = captured(module, args, kwargs, method, timestep, grid)
    program.router, program.timestep_scale = router, timestep_scale
    beside = copy_graph(program if original is None else captured(original, args, kwargs, method, timestep))
    run_passes(replace(program, graph_module=beside), SAME_OPS)
    records = run_passes(program, method.pipeline(), dump, NumericGate(program))
    spec = ModelSpec.of(program).with_rows(beside)
    schedule.policy.check(spec.tokens)
    graphs = Graphs(beside, **program.parts)
    return DynamicModel(graphs, StepPlanner(spec, method, schedule), records)


def copy_graph(program: Program) -> GraphModule:
    """The captured graph, before anything is rewritten; it shares the program's tensors."""
    return copied(program.graph_module, "Original")
