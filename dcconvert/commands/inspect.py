"""`dcconvert inspect`: shows what was detected in a checkpoint, and what the passes would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dcconvert.export.files import usable_folder
from dcconvert.models.load import open_source
from dcconvert.models.own_architecture import as_rewritten
from dcconvert.passes.frontend.token_stream import FindTokenStream
from dcconvert.passes.ir.errors import DcconvertError
from dcconvert.passes.ir.graph_tools import module_path
from dcconvert.passes.ir.pass_runner import run_passes
from dcconvert.passes.ir.program import Program
from dcconvert.passes.ir.spec import StateSpec
from dcconvert.passes.methods.method import SAME_OPS, Method
from dcconvert.passes.pipeline import captured
from dcconvert.report.notes import state_note
from dcconvert.terminal import plain


def inspect_checkpoint(path: Path, method: Method, console: Console, *, dump_graphs: Path | None, **read: Any) -> None:
    """Print what was detected, the cut points and what the passes would do, or why they would fail."""
    if dump_graphs:
        usable_folder(dump_graphs)
    source = open_source(path, **read)
    table = Table(title=f"{path.name}: {source.kind}", show_header=False, title_justify="left")
    for name, value in source.facts.items():
        table.add_row(name.replace("_", " "), str(value))
    table.add_row("parameters", f"{sum(p.numel() for p in source.module.parameters()) / 1e6:.1f} M")
    table.add_row("sha256", source.sha256)
    console.print(table)
    for note in source.notes:
        console.print(note, highlight=False)
    args, kwargs = ((), source.example) if isinstance(source.example, dict) else (source.example, None)
    program = captured(source.module, args, kwargs, method, grid=source.grid)
    run_passes(program, (*SAME_OPS, FindTokenStream()))
    print_cuts(program, console)
    try:
        module, _, router, method = as_rewritten(source.module, method.with_prediction(source.prediction))
        program = captured(module, args, kwargs, method, grid=source.grid)
        program.router, program.timestep_scale = router, source.timestep_scale
        records = run_passes(program, method.pipeline(), dump_graphs)
    except DcconvertError as error:
        console.print(Text.assemble(("would not convert:", "bold red"), " ", plain(str(error))))
        raise
    steps = Table(title="passes", title_justify="left")
    for column in ("pass", "matches", "nodes", "notes"):
        steps.add_column(column)
    for record in records:
        nodes = f"{record.nodes_before} -> {record.nodes_after}"
        steps.add_row(record.name, str(record.matches), nodes, "; ".join(record.notes))
    console.print(steps)
    if states := [StateSpec.of(node) for node in program.state.values()]:
        tokens = program.found_stream().tokens
        console.print(state_note(sum(state.bytes(tokens) for state in states), (1, 8)), highlight=False)


def print_cuts(program: Program, console: Console) -> None:
    """Print the cut points of the token stream, with marks for block boundaries and the trunk."""
    stream, (start, end) = program.found_stream(), program.found_trunk()
    title = f"{len(stream.cuts)} cut points on {stream.grid[0]}x{stream.grid[1]} tokens"
    table = Table(title=title, title_justify="left")
    for column in ("node", "op", "module", ""):
        table.add_column(column)
    numbers = {node: i for i, node in enumerate(stream.boundaries)}
    for node in stream.cuts:
        marks = [f"after block {numbers[node] - 1}"] if numbers.get(node) else []
        marks += ["trunk starts"] if node is start else ["trunk ends"] if node is end else []
        table.add_row(node.name, str(node.target), module_path(node), ", ".join(marks))
    console.print(table)
