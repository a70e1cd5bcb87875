"""The contract of a pass, and the runner that holds every pass to it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from dcconvert.passes.ir.errors import CheckFailedError, UnsupportedModelError
from dcconvert.passes.ir.graph_tools import readable
from dcconvert.passes.ir.program import Program

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassResult:
    """What a pass did: how many places matched, and remarks for the user."""

    matches: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassRecord:
    """A line of the pass log kept in the manifest."""

    name: str
    matches: int
    notes: tuple[str, ...]
    nodes_before: int
    nodes_after: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "notes": list(self.notes)}


class Pass:
    """A rewrite of a Program in place: one file, one class, `requires / call / ensures`.

    `optional` passes may match nothing; any other pass that matches nothing is an error. After an `exact` pass
    the graph still gives the original's outputs (with every token kept), which the numeric gate checks.
    """

    optional = False
    exact = False

    @property
    def name(self) -> str:
        return type(self).__name__

    def requires(self, program: Program) -> None:
        """Raise if the program is not ready for this pass."""

    def call(self, program: Program) -> PassResult:
        raise NotImplementedError

    def ensures(self, program: Program) -> None:
        """Raise if the rewritten program breaks what this pass promises."""


def run_passes(
    program: Program,
    passes: Iterable[Pass],
    dump: Path | None = None,
    gate: Callable[[Program, str], None] = lambda program, after: None,
) -> list[PassRecord]:
    """Run passes in order; after each one recompile, lint and check that every value has a fake tensor.

    `dump`: a folder that receives the readable graph after each pass. `gate` is called after each exact pass
    with its name. Raises CheckFailedError when a pass
    breaks an invariant, and UnsupportedModelError when one that should have fired did not.
    """
    records: list[PassRecord] = []
    for number, current in enumerate(passes):
        before, start = len(program.graph.nodes), time.perf_counter()
        current.requires(program)
        result = current.call(program)
        if result.matches == 0 and not current.optional:
            reason = "; ".join(result.notes) or "no reason recorded"
            raise UnsupportedModelError(f"{current.name} found nothing to do in this model: {reason}")
        for module in live_modules(program):
            check_graph(module, current.name)
        current.ensures(program)
        if current.exact:
            gate(program, current.name)
        after = sum(len(m.graph.nodes) for m in live_modules(program))
        records.append(
            PassRecord(current.name, result.matches, result.notes, before, after, time.perf_counter() - start)
        )
        log.info("%s: %d matches, %d -> %d nodes", current.name, result.matches, before, after)
        if dump is not None:
            dump_graphs(program, dump, f"{number:02d}_{current.name}")
    return records


def live_modules(program: Program) -> list[GraphModule]:
    if program.route is not None and program.denoise is not None:
        return [program.route, program.denoise, *([program.prepare] if program.prepare else [])]
    if program.full is not None and program.skip is not None:
        return [program.full, program.skip]
    return [program.graph_module]


def check_graph(module: GraphModule, after: str) -> None:
    """Lint and recompile; every call must carry a fake value."""
    try:
        module.graph.lint()
    except RuntimeError as error:
        message = f"{after} left a graph that does not lint ({error}); this is a bug of dcconvert"
        raise CheckFailedError(message) from error
    module.recompile()
    for node in module.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            raise CheckFailedError(f"{after} left {node.name} without a fake value; this is a bug of dcconvert")


def dump_graphs(program: Program, folder: Path, stem: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    modules = live_modules(program)
    halves = ("full", "skip") if program.full is not None else ("route", "denoise", "prepare")
    labels = ("graph",) if len(modules) == 1 else halves
    for label, module in zip(labels, modules, strict=False):
        (folder / f"{stem}.{label}.txt").write_text(readable(module))
