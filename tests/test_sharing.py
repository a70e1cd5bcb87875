"""What tests share is what the exporter writes: copies have the same bytes, and whatever matters is exported anew."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch.fx import Graph, GraphModule

from dcconvert.export.onnx.lowerings import TENSORRT
from tests.sharing import REAL, SharedExports, made_once

ROOT = Path(__file__).resolve().parent.parent
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


def test_another_graph_is_another_export(shared: SharedExports, tmp_path: Path) -> None:
    x = torch.ones(3, 4)
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
    code = """if True:
        import sys, time
        from pathlib import Path
        from tests.sharing import made_once
        def fill(folder):
            time.sleep(0.5)
            (folder / sys.argv[2]).touch()
        print(*(path.name for path in made_once(Path(sys.argv[1]), fill).iterdir()))
    """
    words = [sys.executable, "-c", code, str(tmp_path / "one")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    asked = [
        subprocess.Popen([*words, name], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env) for name in ("a", "b")
    ]
    said = {process.communicate()[0].strip() for process in asked}
    assert said in ({"a"}, {"b"})
