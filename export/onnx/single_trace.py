"""Spare the ONNX exporter a second trace of graphs that it can translate as they are.

After `torch.export`, the exporter traces every program again, to replace ops that it cannot translate. For graphs of
this package that takes as long as everything else, and most of them have no such op.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten

# The exporter translates these, and a trace replaces them all the same. (`to` is in our own table, `lowerings`.)
KEPT = {aten.chunk.default, aten.flatten.using_ints, aten.reshape.default, aten.to.dtype, aten.unflatten.int}

ONE_AT_A_TIME = threading.RLock()


@contextmanager
def single_trace() -> Iterator[None]:
    """Inside, `run_decompositions` returns the program itself if nothing in it has to be replaced.

    Only in this thread; other threads wait for their turn to export.
    """
    with ONE_AT_A_TIME:
        yield from replaced_trace()


def replaced_trace() -> Iterator[None]:
    trace, here = ExportedProgram.run_decompositions, threading.get_ident()
    composite = torch.export.default_decompositions()

    def run(program: ExportedProgram, table: Mapping[Any, Any] | None = None, **options: Any) -> ExportedProgram:
        nodes = program.graph.nodes
        if threading.get_ident() != here or table is None or not all(stays(n, table, composite) for n in nodes):
            return trace(program, table, **options)
        return program

    ExportedProgram.run_decompositions = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = trace  # type: ignore[method-assign]


def stays(node: Node, replaced: Mapping[Any, Any], composite: Mapping[Any, Any]) -> bool:
    """Whether a trace with a table of what is `replaced` leaves this call, or one that is translated alike.

    `composite`: all ops that a trace leaves although they consist of others, unless a table says otherwise.
    """
    op = node.target
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if not isinstance(op, OpOverload):
        return callable(op) and op.__module__ in ("_operator", "math")  # on sizes
    if op in replaced or op._schema.is_mutable:
        return False
    consists = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
    return op in KEPT or op in composite or not consists
