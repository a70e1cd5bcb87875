"""What the tests of a run share, also between test processes: folders that are filled once, and ONNX exports.

Most of the suite's time went into exporting the same few tiny models again and again: in every test file, every
conversion from the command line and every test process. Here `export_graph` first looks whether exactly this graph,
with these weights and for these arguments, was exported before in this run. Everything is in the folder of the run and
nothing is kept for the next one, so that every run exports every graph that it tests.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor
from torch.fx import GraphModule
from torch.onnx._internal.exporter import _registration

from dcconvert.export.onnx import export
from dcconvert.export.onnx.lowerings import PORTABLE, Lowerings
from dcconvert.passes.ir.graph_tools import attributes

REAL = export.export_graph
EXPORTER = torch.onnx.export


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, filled by the first process that asks for it; the others wait. Nobody may change what is in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = folder.with_name(f"{folder.name}.done")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


class SharedExports:
    """`export_graph` with a folder of what it has written; `made` and `copied` count its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = self.copied = 0

    def __call__(
        self,
        graph_module: GraphModule,
        path: Path,
        args: Sequence[Any],
        axes: Sequence[tuple[str, ...]],
        outputs: Sequence[str],
        lowerings: Lowerings = PORTABLE,
        most_inside: int = export.EXTERNAL_DATA_BYTES,
    ) -> None:
        def make(target: Path) -> None:
            self.made += 1
            REAL(graph_module, target, args, axes, outputs, lowerings, most_inside)

        text = described(graph_module, args, axes, outputs, lowerings, most_inside)
        if " at 0x" in text or torch.onnx.export is not EXPORTER:  # a function without a name; a test's own exporter
            make(path)
        else:
            self.share(digest(text, graph_module), path, make)

    def share(self, key: str, path: Path, make: Callable[[Path], None]) -> None:
        """Put the files of an export at `path` and beside it."""
        before = self.made
        kept = made_once(self.folder / f"{key}-{path.name}", lambda folder: make(folder / path.name))
        self.copied += self.made == before
        for file in kept.iterdir():
            shutil.copyfile(file, path.parent / file.name)


def read_translations_once(patch: pytest.MonkeyPatch) -> None:
    """The exporter reads the source text of all its translations anew for every graph: a third of a second each."""
    translations = _registration.onnxscript_apis
    patch.setattr(translations, "get_torchlib_ops", cache(translations.get_torchlib_ops))


def described(
    graph_module: GraphModule,
    args: Sequence[Any],
    axes: Sequence[tuple[str, ...]],
    outputs: Sequence[str],
    lowerings: Lowerings,
    most_inside: int,
) -> str:
    """Everything that an export depends on but the weights; tensors among the arguments by shape and type.

    The exporter traces on tensors without values, so those of the arguments cannot matter.
    """
    lines = [
        f"{n.op} {n.name} {n.target} {n.args} {n.kwargs} {n.meta.get('nn_module_stack')}"
        for n in graph_module.graph.nodes
    ]
    given = [(a.dtype, a.shape, a.stride()) if isinstance(a, Tensor) else a for a in args]
    written = {
        str(op): f"{function.__module__}.{function.__qualname__}" for op, function in lowerings.functions.items()
    }
    settings = (type(graph_module).__name__, given, axes, outputs, lowerings.opset, written, most_inside)
    return "\n".join([*lines, *map(repr, settings)])


def digest(text: str, graph_module: GraphModule) -> str:
    """A key of what was described and of every tensor that the graph holds, value by value."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted({**graph_module.state_dict(), **attributes(graph_module)}.items()):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad} ".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
