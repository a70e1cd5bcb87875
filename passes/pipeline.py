"""The pipelines: which passes turn a captured DiT into a dynamic-chunking one, in order, for each mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule

from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.capture import capture, opened
from dcconvert.passes.frontend.complex_to_real import RealNumbers
from dcconvert.passes.frontend.token_stream import FindTokenStream
from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.options import Options
from dcconvert.passes.ir.pass_runner import Pass, run_passes
from dcconvert.passes.ir.program import Program
from dcconvert.passes.ir.spec import ModelSpec, find_inputs
from dcconvert.passes.numeric_gate import NumericGate
from dcconvert.passes.option_checks import check_options
from dcconvert.passes.planning.schedule import Schedule
from dcconvert.passes.rewrite.carry_trunk import CarryTrunk
from dcconvert.passes.rewrite.hoist_constants import HoistConstants
from dcconvert.passes.rewrite.insert_router import InsertRouter
from dcconvert.passes.rewrite.pack_trunk import PackTrunk
from dcconvert.passes.rewrite.patch_sizes import PatchSizes
from dcconvert.passes.rewrite.sparse_dense import SparseDense
from dcconvert.passes.rewrite.split_projections import SplitProjections
from dcconvert.passes.rewrite.split_route import SplitRoute
from dcconvert.passes.runtime.model import DynamicModel

PIPELINES: dict[str, tuple[Pass, ...]] = {
    "carry": (
        Normalise(),  #       one spelling for each op
        RealNumbers(),  #     no complex ones
        FindTokenStream(),  # patchify, cut points, blocks, trunk
        InsertRouter(),  #    h -> scores
        CarryTrunk(),  #      h -> kept tokens -> packed trunk -> state -> h'
        SplitRoute(),  #      route | plan on the host | denoise
        HoistConstants(),  #  what stays the same over a run, out of denoise
    ),
    "chunk": (
        Normalise(),
        RealNumbers(),
        FindTokenStream(),
        InsertRouter(),
        PackTrunk(),  #       h -> chunk -> packed trunk -> dechunk -> h'
        SplitRoute(),
    ),
    "sparse-dense": (
        Normalise(),
        RealNumbers(),
        FindTokenStream(),
        SplitProjections(),  # queries, keys and values apart
        InsertRouter(),
        SparseDense(),  #        pooled grids in groups of blocks
        SplitRoute(),
    ),
    "patch-sizes": (
        Normalise(),
        RealNumbers(),
        FindTokenStream(),
        InsertRouter(),
        PatchSizes(),  #         embeddings of every size -> one of them, packed -> pixels of that size
        SplitRoute(),
    ),
}


def pipeline_of(options: Options) -> tuple[Pass, ...]:
    """The passes for these options; UsageError if they do not go together."""
    check_options(options)
    return PIPELINES[options.mode if options.trunk == "plain" else options.trunk]


def captured(
    module: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    options: Options,
    timestep: str | None = None,
    grid: tuple[int, int] | None = None,
) -> Program:
    """Capture `module` on the example inputs, ready for the pipeline of the mode; errors as `rewrite`."""
    pipeline_of(options)  # for what it refuses
    program = opened(module, options) if isinstance(module, ExportedProgram) else capture(module, args, kwargs, options)
    program.grid = grid
    find_inputs(program, timestep)
    return program


def rewrite(
    module: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    options: Options,
    schedule: Schedule,
    *,
    timestep: str | None = None,
    timestep_scale: float = 1000.0,
    grid: tuple[int, int] | None = None,
    router: nn.Module | None = None,
    original: nn.Module | None = None,
    dump: Path | None = None,
) -> DynamicModel:
    """Capture `module` on the example inputs (or take what is captured already) and run the pipeline.

    `timestep` names the input that holds the timestep (guessed from TIMESTEP_NAMES when None) and
    `timestep_scale` is its value at pure noise. `grid`: (H, W) of the tokens, where it cannot be seen. `router`: the
    model's own. `original`: another model, called in the same way, that takes the place of `module` as what the result
    is compared with. `dump`: folder for the graph after each pass. Raises the errors of `capture` and of the passes;
    the module is put in eval mode and not changed otherwise.
    """
    program = captured(module, args, kwargs, options, timestep, grid)
    program.router, program.timestep_scale = router, timestep_scale
    beside = copy_graph(program if original is None else captured(original, args, kwargs, options, timestep))
    records = run_passes(program, pipeline_of(options), dump, NumericGate(program))
    for tidy in (Normalise(), RealNumbers()):
        tidy.call(replace(program, graph_module=beside))
    beside.recompile()
    if program.route is None or program.denoise is None:
        raise CheckFailedError("the pipeline ended without route and denoise graphs; this is a bug of dcconvert")
    spec = ModelSpec.of(program)
    schedule.check(spec.tokens)
    return DynamicModel(program.route, program.denoise, beside, spec, options, schedule, records, program.prepare)


def copy_graph(program: Program) -> GraphModule:
    """The captured graph, before anything is rewritten; it shares the program's tensors."""
    graph = Graph()
    output = graph.graph_copy(program.graph, {})
    graph.output(output)
    return GraphModule(program.graph_module, graph, class_name="Original")
