"""What tests share is what the exporter writes: copies have the same bytes, and whatever matters is exported anew."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch.fx import Graph, GraphModule

from dcconvert.export.onnx.lowerings import TENSORRT
from dcconvert.passes.frontend import capture
from tests import sharing
from tests.shared_captures import SharedCaptures
from tests.sharing import REAL, SharedExports, made_once

AXES = (("batch",),)


@pytest.fixture
def shared(tmp_path: Path) -> SharedExports:
    return SharedExports(tmp_path / "shared")


def scaled(factor: float = 2.0, weight: float = 1.0) -> GraphModule:
    """x * weights * factor, as one graph."""
    root = torch.nn.Module()
    root.register_buffer("weight", torch.full((4,), weight))
    graph = Graph()
    x = graph.placeholder("x")
    product = graph.call_function(torch.ops.aten.mul.Tensor, (x, graph.get_attr("weight")))
    graph.output((graph.call_function(torch.ops.aten.mul.Scalar, (product, factor)),))
    return GraphModule(root, graph)


def test_a_copy_is_what_the_exporter_writes(shared: SharedExports, tmp_path: Path) -> None:
    files = [tmp_path / folder / "g.onnx" for folder in ("real", "made", "copied")]
    writers: tuple[Callable[..., None], ...] = (REAL, shared, shared)
    for path, write in zip(files, writers, strict=True):
        path.parent.mkdir()
        write(scaled(), path, (torch.ones(3, 4),), AXES, ("y",))
    assert (shared.made, shared.copied) == (1, 1)
    assert len({path.read_bytes() for path in files}) == 1
    files[2].write_bytes(b"")  # a copy is its owner's
    shared(scaled(), files[2], (torch.ones(3, 4),), AXES, ("y",))
    assert files[2].read_bytes() == files[0].read_bytes()


def test_weights_beside_the_graph_are_copied_too(shared: SharedExports, tmp_path: Path) -> None:
    for folder in (tmp_path / "made", tmp_path / "copied"):
        folder.mkdir()
        shared(scaled(), folder / "g.onnx", (torch.ones(3, 4),), AXES, ("y",), most_inside=0)
        assert onnx.load(folder / "g.onnx").graph.input[0].name == "x"
    assert (shared.made, shared.copied) == (1, 1)
    assert len({tuple(sorted(p.name for p in (tmp_path / f).iterdir())) for f in ("made", "copied")}) == 1


def test_another_graph_is_another_export(
    shared: SharedExports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "REAL", lambda graph, path, *options: path.touch())  # which ones are made is enough
    path, other, x = tmp_path / "g.onnx", tmp_path / "other.onnx", torch.ones(3, 4)
    shared(scaled(), path, (x,), AXES, ("y",))
    shared(scaled(weight=1.5), path, (x,), AXES, ("y",))
    shared(scaled(factor=2.5), path, (x,), AXES, ("y",))
    shared(scaled(), other, (x,), AXES, ("y",))
    shared(scaled(), path, (x.double(),), AXES, ("y",))
    shared(scaled(), path, (x,), ((),), ("y",))
    shared(scaled(), path, (x,), AXES, ("z",))
    shared(scaled(), path, (x,), AXES, ("y",), TENSORRT)
    shared(scaled(), path, (x,), AXES, ("y",), replace(TENSORRT, opset=20))
    shared(scaled(), path, (x,), AXES, ("y",), most_inside=0)
    assert (shared.made, shared.copied) == (10, 0)


def test_an_exporter_of_a_test_is_asked_every_time(
    shared: SharedExports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared(scaled(), tmp_path / "g.onnx", (torch.ones(3, 4),), AXES, ("y",))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    with pytest.raises(Exception, match="returned nothing"):
        shared(scaled(), tmp_path / "g.onnx", (torch.ones(3, 4),), AXES, ("y",))


def test_a_folder_is_filled_once_and_not_by_halves(tmp_path: Path) -> None:
    tries: list[int] = []

    def fail_first(folder: Path) -> None:
        tries.append(len(tries))
        (folder / f"half-{len(tries)}").touch()
        if len(tries) == 1:
            raise OSError("disk full")

    folder = tmp_path / "shared" / "one"
    with pytest.raises(OSError, match="disk full"):
        made_once(folder, fail_first)
    assert [made_once(folder, fail_first) for _ in range(2)] == [folder] * 2
    assert [path.name for path in folder.iterdir()] == ["half-2"]
    assert len(tries) == 2


def test_processes_wait_for_each_other(tmp_path: Path) -> None:
    def ask(name: str) -> None:
        def fill(folder: Path) -> None:
            time.sleep(0.5)
            (folder / name).touch()

        (tmp_path / f"{name}.said").write_text(
            " ".join(path.name for path in made_once(tmp_path / "one", fill).iterdir())
        )

    forked = multiprocessing.get_context("fork")  # without importing everything again
    asked = [forked.Process(target=ask, args=(name,)) for name in ("a", "b")]
    for process in asked:
        process.start()
    for process in asked:
        process.join()
    said = {(tmp_path / f"{name}.said").read_text() for name in ("a", "b")}
    assert said in ({"a"}, {"b"})


def captured(module: torch.nn.Module, x: torch.Tensor, *others: Any) -> torch.export.ExportedProgram:
    return capture.export(module, (x, *others))


def linear(weight: float = 1.0, size: int = 4) -> torch.nn.Linear:
    module = torch.nn.Linear(4, size)
    torch.nn.init.constant_(module.weight, weight)
    torch.nn.init.zeros_(module.bias)
    return module


X = torch.ones(3, 4)


def test_a_model_that_was_captured_before_gets_its_graph_over_its_own_weights(shared_captures: SharedCaptures) -> None:
    modules = [linear(0.25), linear(0.25)]
    before = shared_captures.made
    first, second = (captured(module, X).module() for module in modules)
    assert shared_captures.made == before + 1
    assert str(first.graph) == str(second.graph)
    assert second.weight is modules[1].weight
    torch.nn.init.constant_(modules[1].weight, 3.0)
    assert second(X).max() == 12
    assert first(X).max() == 1
    first.graph.erase_node(next(iter(reversed(first.graph.nodes))))  # a graph is its owner's
    assert len(captured(linear(0.25), X).module().graph.nodes) == len(second.graph.nodes)


@pytest.mark.parametrize("change", ["weight", "attribute", "call", "code", "precision", "frozen"])
def test_another_model_or_call_is_captured(
    change: str, shared_captures: SharedCaptures, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured(linear(0.5), X)
    module, x, before = linear(0.75 if change == "weight" else 0.5), X, shared_captures.made
    if change == "attribute":
        module.out_features = 5
    elif change == "call":
        x = torch.ones(3, 2, 4)
    elif change == "code":
        monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: 2 * x)
    elif change == "precision":
        module, x = module.double(), x.double()
    elif change == "frozen":
        module.weight.requires_grad_(False)
    captured(module, x)
    assert shared_captures.made == before + 1


def test_what_a_pass_finds_out_about_sizes_stays_with_it(shared_captures: SharedCaptures) -> None:
    """A batch that was taken for a constant would be one for all that come later."""
    program = captured(linear(0.125), X)
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == "x" or node.name == "input")
    assert isinstance(value.shape[0], torch.SymInt)
    assert int(value.shape[0]) == 3
    before = shared_captures.made
    again = captured(linear(0.125), X)
    assert shared_captures.made == before + 1
    sizes = [node.meta["val"].shape[0] for node in again.graph.nodes if node.name == "input"]
    assert all(isinstance(size, torch.SymInt) for size in sizes)


def test_a_model_that_cannot_be_described_is_captured_every_time(shared_captures: SharedCaptures) -> None:
    class Local(torch.nn.Linear):
        pass

    before = shared_captures.made
    for _ in range(2):
        captured(Local(4, 4), X)
    assert shared_captures.made == before + 2
