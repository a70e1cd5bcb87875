"""What the tests of this floor share: a tiny checkpoint, the command line run in this process, and folder contents."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dcconvert.cli import main
from dcconvert.dit import DiT, DiTConfig
from tests.passes.harness import randomise

CONFIG = DiTConfig(
    depth=3, width=32, heads=2, patch=2, image_size=16, in_channels=1, num_classes=4, learn_sigma=False
)  # an 8x8 grid
TOKENS = 64
CLASS_NAMES = ["bag", "boot", "coat", "shirt"]


def tiny_dit(config: DiTConfig = CONFIG) -> DiT:
    """Random weights, the same every time, none of them zero."""
    torch.manual_seed(0)
    model = DiT(config)
    randomise(model, std=0.08)
    return model


def write_checkpoint(path: Path, **facts: Any) -> Path:
    """The tiny DiT as safetensors; `facts` go into dcconvert's metadata beside its configuration."""
    entry = {"config": CONFIG.as_dict(), "prediction": "flow", "class_names": CLASS_NAMES, **facts}
    save_file(tiny_dit().state_dict(), path, metadata={"dcconvert": json.dumps(entry)})
    return path


@dataclass
class Run:
    """What a command left in the terminal."""

    code: int
    out: str
    err: str


def run_cli(*words: Any) -> Run:
    """Run the command line in this process; an exception that `main` lets through fails the test."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return Run(code, out.getvalue(), err.getvalue())


def refusal(code: int, *words: Any, after: Sequence[str] = ()) -> str:
    """The one line with which a command stops with `code`; `after` names the stages that were done before."""
    run = run_cli(*words)
    lines = run.err.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["done"] * len(after), run.err
    assert all(name in line for name, line in zip(after, lines, strict=False))
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in run.out + run.err
    assert run.code == code, run.err
    return lines[-1].removeprefix("error: ")


def contents(folder: Path) -> list[str]:
    """Everything below a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
