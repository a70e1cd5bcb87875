"""The pipeline: which passes turn a captured DiT into a dynamic-chunking one, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from dcconvert.passes.capture import capture
from dcconvert.passes.errors import CheckFailedError
from dcconvert.passes.gate import NumericGate
from dcconvert.passes.infra import Options, Pass, Program, run_passes
from dcconvert.passes.insert_router import InsertRouter
from dcconvert.passes.model import ChunkedModel
from dcconvert.passes.normalise import Normalise
from dcconvert.passes.pack_trunk import PackTrunk
from dcconvert.passes.schedule import Schedule
from dcconvert.passes.spec import ModelSpec
from dcconvert.passes.split_route import SplitRoute
from dcconvert.passes.token_stream import FindTokenStream

PIPELINE: tuple[Pass, ...] = (
    Normalise(),  #       one spelling for each op
    FindTokenStream(),  # patchify, cut points, blocks, trunk
    InsertRouter(),  #    h -> scores
    PackTrunk(),  #       h -> chunk -> packed trunk -> dechunk -> h'
    SplitRoute(),  #      route | plan on the host | denoise
)


def rewrite(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    options: Options,
    schedule: Schedule,
    *,
    timestep: str | None = None,
    timestep_scale: float = 1000.0,
    dump: Path | None = None,
) -> ChunkedModel:
    """Capture `module` on the example inputs and run the pipeline.

    `timestep` names the input that holds the timestep (guessed from TIMESTEP_NAMES when None) and
    `timestep_scale` is its value at pure noise. `dump`: folder for the graph after each pass. Raises the
    errors of `capture` and of the passes; the module is put in eval mode and not changed otherwise.
    """
    program = capture(module, args, kwargs, options)
    original = copy_graph(program)
    records = run_passes(program, PIPELINE, dump, NumericGate(program))
    Normalise().call(replace(program, graph_module=original))
    original.recompile()
    if program.route is None or program.denoise is None:
        raise CheckFailedError("the pipeline ended without route and denoise graphs; this is a bug of dcconvert")
    spec = ModelSpec.of(program, timestep, timestep_scale)
    schedule.check(spec.tokens)
    return ChunkedModel(program.route, program.denoise, original, spec, options, schedule, records)


def copy_graph(program: Program) -> GraphModule:
    """The captured graph, before anything is rewritten; it shares the program's tensors."""
    graph = Graph()
    output = graph.graph_copy(program.graph, {})
    graph.output(output)
    return GraphModule(program.graph_module, graph, class_name="Original")
