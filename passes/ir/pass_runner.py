"""The contract of a pass, and the runner that enforces it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.fx import GraphModule, Node

from dcconvert.passes.ir.errors import CheckFailedError, DcconvertError, UnsupportedModelError
from dcconvert.passes.ir.fake_values import check_fake_values, give_fake_values
from dcconvert.passes.ir.graph_tools import readable, where
from dcconvert.passes.ir.program import Program

log = logging.getLogger(__name__)

Subject = TypeVar("Subject")


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


class Rewrite(Generic[Subject]):
    """An in-place change with `requires`, `call` and `ensures`: a `Pass` rewrites a Program, a `GraphPass` one graph.

    An `optional` one may match nothing; for any other, that is an error. After an `exact` one, the graph still returns
    the original's outputs (with every token kept), which the numeric gate checks. `rounds_to`: the precision to which
    an exact one rounds values.
    """

    optional = False
    exact = False
    rounds_to: torch.dtype | None = None

    @property
    def name(self) -> str:
        return type(self).__name__

    def requires(self, subject: Subject) -> None:
        """Raise if the program or graph is not ready for this rewrite."""

    def call(self, subject: Subject) -> PassResult:
        raise NotImplementedError

    def ensures(self, subject: Subject) -> None:
        """Raise if the result is not what this rewrite promises."""


class Pass(Rewrite[Program]):
    """A rewrite of a Program: one file, one class."""


class GraphPass(Rewrite[GraphModule]):
    """A rewrite that needs nothing but one graph, in a pipeline or in a finished model."""


Passes = tuple[Pass | GraphPass, ...]
Gate = Callable[[Any, Any], None]  # called with the program or graph, and the exact pass that ran


def no_gate(subject: Any, current: Rewrite[Any]) -> None:
    """For passes whose outputs are not compared."""


def run_passes(
    program: Program, passes: Iterable[Pass | GraphPass], dump: Path | None = None, gate: Gate = no_gate
) -> list[PassRecord]:
    """Run passes in order; after each one recompile, lint and check that every value has a fake tensor.

    `dump`: a folder that receives the readable graph after each pass. `gate` is called with the program after each
    exact pass. Raises CheckFailedError when a pass breaks an invariant, and UnsupportedModelError when one that should
    have fired did not.
    """
    records: list[PassRecord] = []
    for number, current in enumerate(passes):
        if isinstance(current, Pass):
            records.append(run_one(current, program, live_modules, check_graph, gate))
        elif program.parts:
            raise CheckFailedError(
                f"{current.name} works on one graph, but the program was split; fix the pipeline order"
            )
        else:
            whole = program.graph_module
            records.append(run_one(current, whole, alone, check_graph, lambda _, done: gate(program, done)))
        if dump is not None:
            dump_graphs(program, dump, f"{number:02d}_{current.name}")
    return records


def run_graph_passes(
    module: GraphModule,
    passes: Iterable[GraphPass],
    example: Mapping[str, Any] | None = None,
    gate: Gate = no_gate,
) -> list[PassRecord]:
    """Run passes over a graph that is not part of a Program. Checks and errors are as in `run_passes`; in addition, the
    fake values must match the calls.

    `example`: values of the graph's inputs by name, from which every node first gets its fake value. Without it, the
    graph must already have fake values, or the first pass must add them.
    """
    if example is not None:
        give_fake_values(module, example)

    def check(graph: GraphModule, after: str) -> None:
        check_graph(graph, after)
        check_fake_values(graph, after)

    return [run_one(current, module, alone, check, gate) for current in passes]


def alone(module: GraphModule) -> list[GraphModule]:
    return [module]


def run_one(
    current: Rewrite[Subject],
    subject: Subject,
    graphs: Callable[[Subject], list[GraphModule]],
    check: Callable[[GraphModule, str], None],
    gate: Gate,
) -> PassRecord:
    """Run one pass and check the result; `graphs` returns the graphs of its subject."""
    before, start = count_nodes(graphs(subject)), time.perf_counter()
    current.requires(subject)
    try:
        result = current.call(subject)
    except DcconvertError:
        raise
    except Exception as error:  # ops and torch.fx raise any type
        raise unforeseen(current, error) from error
    if result.matches == 0 and not current.optional:
        reason = "; ".join(result.notes) or "no reason recorded"
        raise UnsupportedModelError(f"{current.name} found nothing to do in this model: {reason}")
    for module in graphs(subject):
        check(module, current.name)
    current.ensures(subject)
    after = count_nodes(graphs(subject))
    if current.exact:
        gate(subject, current)
    seconds = time.perf_counter() - start
    log.info("%s: %d matches, %d -> %d nodes", current.name, result.matches, before, after)
    return PassRecord(current.name, result.matches, result.notes, before, after, seconds)


def unforeseen(current: Rewrite[Any], error: Exception) -> UnsupportedModelError:
    """One line about an error that no pass or rule expects: the pass, the op it was at, and the reason."""
    at = ""
    trace = error.__traceback__
    while trace is not None:
        node = trace.tb_frame.f_locals.get("node")
        at = f" at {where(node)}" if isinstance(node, Node) else at
        trace = trace.tb_next
    reason = " ".join(str(error).split())[:200]
    return UnsupportedModelError(
        f"{current.name} cannot rewrite this model{at}: {type(error).__name__} {reason}".strip()
        + "; this is a gap in dcconvert, please report it with this line"
    )


def count_nodes(modules: Iterable[GraphModule]) -> int:
    return sum(len(module.graph.nodes) for module in modules)


def live_modules(program: Program) -> list[GraphModule]:
    return list(program.parts.values()) or [program.graph_module]


def check_graph(module: GraphModule, after: str) -> None:
    """Lint and recompile; every value must have a fake value."""
    try:
        module.graph.lint()
    except RuntimeError as error:
        message = f"{after} left a graph that does not lint ({error}); this is a bug in dcconvert"
        raise CheckFailedError(message) from error
    module.recompile()
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "call_function") and "val" not in node.meta:
            raise CheckFailedError(f"{after} left {node.name} without a fake value; this is a bug in dcconvert")


def dump_graphs(program: Program, folder: Path, stem: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for label, module in (program.parts or {"graph": program.graph_module}).items():
        (folder / f"{stem}.{label}.txt").write_text(readable(module))
