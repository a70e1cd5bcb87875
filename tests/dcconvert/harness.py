"""What the tests of this floor share: a tiny checkpoint, the command line run in this process, and folder contents."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from dcconvert.cli import main
from dcconvert.models.dit import DiT, DiTConfig
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

    def write(self, folder: Path) -> None:
        """For other test processes."""
        (folder / "run.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Run:
        return cls(**json.loads((folder / "run.json").read_text()))


class Terminal(io.StringIO):
    """Somebody presses Ctrl-C as soon as it shows a text."""

    def __init__(self, interrupt_at: str) -> None:
        super().__init__()
        self.interrupt_at = interrupt_at

    def write(self, text: str) -> int:
        count = super().write(text)
        if self.interrupt_at and self.interrupt_at in self.getvalue():
            self.interrupt_at = ""
            signal.raise_signal(signal.SIGINT)
        return count


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt, also where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_cli(*words: Any, interrupt_at: str = "") -> Run:
    """Run the command line in this process; an exception that `main` lets through fails the test.

    `interrupt_at`: a message at which the user presses Ctrl-C.
    """
    out, err = io.StringIO(), Terminal(interrupt_at)
    code = 0
    with interruptible(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return Run(code, out.getvalue(), err.getvalue())


def refusal(code: int, *words: Any, after: Sequence[str] = ()) -> str:
    """The one line with which a command stops with `code`; `after` names the stages that were done before."""
    run = run_cli(*words)
    lines = [line for line in run.err.splitlines() if not line.startswith("note ")]
    assert [line.split()[0] for line in lines[:-1]] == ["done"] * len(after), run.err
    assert all(name in line for name, line in zip(after, lines, strict=False))
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in run.out + run.err
    assert run.code == code, run.err
    return lines[-1].removeprefix("error: ")


def contents(folder: Path) -> list[str]:
    """Everything below a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Network(nn.Module):
    """A feature network: mean colours and some filters, of which the first classes are."""

    def __init__(self, outputs: Sequence[str], channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.outputs = outputs
        self.filters = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x / 255
        first = self.filters(x)
        features = torch.cat([x.mean((2, 3)), first.relu().mean((2, 3))], 1)
        found = {"features": features, "logits": features[:, :4], "flat": features}
        found |= {"map_0": first, "map_1": F.avg_pool2d(first, 2)}
        return tuple(found[name] for name in self.outputs)


def write_network(
    path: Path,
    outputs: Sequence[str] = ("features", "logits", "map_0", "map_1"),
    shape: tuple[int, ...] = (2, 3, 8, 8),
    *,
    dynamic: bool = True,
) -> Path:
    """A small feature network as an ONNX file, in the place of one that has seen pictures."""
    axes = {name: {0: "batch"} for name in ("x", *outputs)} if dynamic else {}
    options: dict[str, Any] = {"input_names": ["x"], "output_names": list(outputs), "dynamic_axes": axes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Network(outputs, shape[1]).eval(), (torch.zeros(shape),), str(path), dynamo=False, **options)
    return path
