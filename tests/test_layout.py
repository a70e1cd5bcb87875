"""The house: three floors, imports that run down only, one copy of each module, files a reader can hold in mind."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"passes": 0, "export": 1, "dcconvert": 2}
MAX_LINES = 400


def sources(*folders: str) -> list[Path]:
    """Python files by their real paths: the links inside the package are not followed."""
    linked = {ROOT / "dcconvert" / "passes", ROOT / "dcconvert" / "export"}
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in found if not linked.intersection(path.parents)]


def floor(module: str) -> int | None:
    """The floor an absolute module name belongs to; None for other people's modules."""
    first, *rest = module.split(".")
    if first != "dcconvert":
        return None
    return FLOORS.get(rest[0] if rest else "", FLOORS["dcconvert"])


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively: write the whole name"
            if node.module == "dcconvert":  # `from dcconvert import export` is about the submodule
                yield from ((node.lineno, f"dcconvert.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


@pytest.mark.parametrize("folder", ["passes", "export"])
def test_imports_run_down_only(folder):
    files = sources(folder)
    assert files
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imports(path)
        if (floor(name) or 0) > FLOORS[folder]
    ]
    assert not upward


def test_the_rule_sees_an_upward_import(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import torch\ndef f():\n    from dcconvert import export\n    import dcconvert.passes.pipeline\n")
    assert list(imports(path)) == [(1, "torch"), (3, "dcconvert.export"), (4, "dcconvert.passes.pipeline")]
    assert [floor(name) for _, name in imports(path)] == [None, 1, 0]
    assert floor("dcconvert.api") == floor("dcconvert") == 2


def test_nothing_imports_the_second_copies():
    everything = sources("passes", "export", "dcconvert", "tests", "benchmarks", "training")
    bare = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in everything
        for line, name in imports(path)
        if name.split(".")[0] in ("passes", "export")
    ]
    assert not bare


def test_importing_the_package_makes_one_copy_of_each_module():
    # The checkout is on sys.path, where the bare names could be imported too.
    code = "import sys, dcconvert, dcconvert.passes, dcconvert.export; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"dcconvert.passes", "dcconvert.export"} <= loaded
    assert not {"passes", "export"} & {name.split(".")[0] for name in loaded}


def test_no_file_is_too_long():
    files = sources("passes", "export", "dcconvert", "tests", "benchmarks", "training", ".ci")
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}
