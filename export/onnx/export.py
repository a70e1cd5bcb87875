"""Write the graphs of a converted model as ONNX files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from dcconvert.export.onnx.example_inputs import write_example_inputs
from dcconvert.export.onnx.lowerings import PORTABLE, Lowerings
from dcconvert.export.onnx.single_trace import single_trace
from dcconvert.export.onnx.trt_attention_op import add_function
from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.ir.graph_tools import placeholders
from dcconvert.passes.ir.plan_inputs import PLAN_INPUTS, symbolic_axes
from dcconvert.passes.ir.spec import EXAMPLE_BATCH, WEIGHTS, count_outputs
from dcconvert.passes.planning.carry_plan import CarryPlan
from dcconvert.passes.planning.chunk_plan import Plan
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.runtime.model import DynamicModel

EXTERNAL_DATA_BYTES = 1_000_000_000
STACK_TRACE = "pkg.torch.onnx.stack_trace"  # metadata that the exporter adds to every node, with local paths


def export_onnx(model: DynamicModel, folder: Path, lowerings: Lowerings = PORTABLE) -> None:
    """Write the graphs that a run calls: `route.onnx` and `denoise.onnx`, with `prepare.onnx` for models with text, or
    `full.onnx` and `skip.onnx`.

    Raises UsageError for a model that cannot be expressed in ONNX.
    """
    if model.method.row_packing == "varlen":
        raise UsageError("packing varlen works only in torch: convert with packing rows to export ONNX")
    folder.mkdir(parents=True, exist_ok=True)
    inputs = model.spec.example(EXAMPLE_BATCH)
    if model.spec.updates:
        export_plain(model, "full", folder / "full.onnx", inputs, lowerings)
        export_skip(model, folder / "skip.onnx", inputs, lowerings)
        return
    export_route(model, folder / "route.onnx", inputs, lowerings)
    export_prepare(model, folder / "prepare.onnx", inputs, lowerings)
    with torch.no_grad():
        scores, live = model.route(inputs)
    tokens = model.spec.tokens
    row, tile = max(2, tokens // 2 - 1), max(2, tokens // 4 - 1)
    # Five tiles of a length unlike any other size, so that export keeps the symbolic axes apart.
    tiles = EXAMPLE_BATCH * -(-row // tile) + 1
    bucket = Bucket(EXAMPLE_BATCH, tiles * tile, EXAMPLE_BATCH, row, tile)
    keep = model.planner.planner.select(scores.numpy(), np.full(EXAMPLE_BATCH, max(1, row - 2)))
    plan = model.planner.of_mask(keep, bucket)
    export_denoise(model, folder / "denoise.onnx", inputs, live, plan, lowerings)


def export_route(model: DynamicModel, path: Path, inputs: dict[str, Any], lowerings: Lowerings = PORTABLE) -> None:
    """`route.onnx`: model inputs -> scores [B, N] and the values denoise needs."""
    export_plain(model, "route", path, inputs, lowerings)


def export_prepare(model: DynamicModel, path: Path, inputs: dict[str, Any], lowerings: Lowerings = PORTABLE) -> None:
    """`prepare.onnx`: model inputs -> values that stay the same during a run. Only for models with such values."""
    if model.spec.constants:
        export_plain(model, "prepare", path, inputs, lowerings)


def export_denoise(
    model: DynamicModel,
    path: Path,
    inputs: dict[str, Any],
    live: dict[str, Tensor],
    plan: Plan | CarryPlan,
    lowerings: Lowerings = PORTABLE,
) -> None:
    """`denoise.onnx`: the values of route and the plan's arrays -> the model's output.

    In mode carry the states are inputs too, and after the model's output come `distance` and the new states.
    """
    state = model.empty_state(len(plan.counts))
    feed = model.feed("denoise", inputs, live, plan, state)
    axes = []
    one_row = model.method.row_packing == "rows"
    for name, plain in zip(feed, batch_axes(model, list(feed)), strict=True):
        named = ("", "batch") if name in state.values else symbolic_axes(name) if name in PLAN_INPUTS else plain
        axes.append(tuple("batch" if axis == "rows" and one_row else axis for axis in named))
    write_graph(model, "denoise", path, feed, axes, lowerings)


def export_skip(model: DynamicModel, path: Path, inputs: dict[str, Any], lowerings: Lowerings = PORTABLE) -> None:
    """`skip.onnx`: model inputs, weights [P, B] and the trunk's last P updates [B, N, D] -> the model's output."""
    feed = model.skip_feed(inputs)
    axes = [
        ("", "batch") if name == WEIGHTS else axis
        for name, axis in zip(feed, batch_axes(model, list(feed)), strict=True)
    ]
    write_graph(model, "skip", path, feed, axes, lowerings)


def export_original(model: DynamicModel, path: Path, inputs: dict[str, Any]) -> None:
    """The unconverted original, for comparison with the converted model."""
    export_plain(model, "original", path, inputs)


def export_plain(
    model: DynamicModel, graph: str, path: Path, inputs: dict[str, Any], lowerings: Lowerings = PORTABLE
) -> None:
    """A graph that takes only the model's own inputs."""
    feed = {name: inputs[name] for name in model.spec.inputs_of(graph)}
    write_graph(model, graph, path, feed, batch_axes(model, list(feed)), lowerings)


def write_graph(
    model: DynamicModel,
    graph: str,
    path: Path,
    feed: dict[str, Any],
    axes: Sequence[tuple[str, ...]],
    lowerings: Lowerings,
) -> None:
    """A graph of the model, and the inputs that it was exported with."""
    module = model.graph(graph)
    outputs = model.spec.outputs_of(graph, count_outputs(module))
    export_graph(module, path, list(feed.values()), axes, outputs, lowerings)
    write_example_inputs(path, feed)


def batch_axes(model: DynamicModel, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The leading symbolic axes of a model's inputs, or of values passed between its graphs; all have a batch axis."""
    once = {spec.name for spec in model.spec.input_specs if not spec.batched}
    return [() if name in once else ("batch",) for name in names]


def export_graph(
    graph_module: GraphModule,
    path: Path,
    args: Sequence[Any],
    axes: Sequence[tuple[str, ...]],
    outputs: Sequence[str],
    lowerings: Lowerings = PORTABLE,
    most_inside: int = EXTERNAL_DATA_BYTES,
) -> None:
    """Export one graph with named symbolic axes (leading axes of each input, in order).

    Weights of more than `most_inside` bytes go to a file of their own beside the graph.
    """
    symbols = {axis for named in axes for axis in named if axis}
    dims = {name: torch.export.Dim(name, min=1, max=1 << 22) for name in symbols}
    shapes = tuple({i: dims[name] for i, name in enumerate(named) if name} or None for named in axes)
    inputs = zip(placeholders(graph_module.graph), args, strict=True)
    names = [node.name for node, value in inputs if isinstance(value, Tensor)]  # others become constants
    size = sum(t.numel() * t.element_size() for t in graph_module.state_dict().values())
    with quiet_exporter(), single_trace(), torch.no_grad():
        exported = torch.onnx.export(
            graph_module,
            tuple(args),
            dynamic_shapes=shapes,
            input_names=names,
            output_names=list(outputs),
            opset_version=lowerings.opset,
            dynamo=True,
            custom_translation_table=dict(lowerings.functions),
            verbose=False,
        )
        if exported is None:
            raise CheckFailedError(
                f"the ONNX exporter returned nothing to write to {path.name}; this is a bug in dcconvert"
            )
        for node in exported.model.graph:
            node.metadata_props.pop(STACK_TRACE, None)
        add_function(exported.model)
        exported.save(str(path), external_data=size > most_inside)


class quiet_exporter(warnings.catch_warnings):  # noqa: N801  (used like a function)
    """Silence the exporter's progress messages; errors are still shown."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        self.loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir")]
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)
        return entered

    def __exit__(self, *details: Any) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)
        super().__exit__(*details)
