"""Progress: a line a stage, notes while it runs, no false success."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from dcconvert.terminal import Stages


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_finished_stage_is_one_line(console):
    stages = Stages(console)
    for name in ("read checkpoint", "rewrite"):
        with stages.stage(name) as tick:
            tick("block")
            tick("block")
    first, second = printed(console).splitlines()
    assert first.startswith("done  read checkpoint  ")
    assert first.endswith(" s")
    assert second.startswith("done  rewrite  ")
    assert len(first) == len(second)


def test_a_stage_that_fails_is_not_done(console):
    def fail() -> None:
        with Stages(console).stage("rewrite"):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert printed(console) == ""


class Watched(Console):
    """A console that keeps what its status line said."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO())
        self.shown: list[str] = []

    @contextmanager
    def status(self, status: Any, **_: Any) -> Iterator[Any]:  # type: ignore[override]
        self.shown.append(status)
        yield SimpleNamespace(update=self.shown.append)


def test_notes_are_counted():
    console = Watched()
    with Stages(console).stage("measure") as tick:
        for note in ("torch", "ONNX Runtime", "torch"):
            tick(note)
    assert [text.rsplit(",", 1)[0] for text in console.shown] == [
        "measure ...",
        "measure: torch (1)",
        "measure: ONNX Runtime (1)",
        "measure: torch (2)",
    ]
    assert console.shown[-1].endswith(" 0 s")


def test_a_terminal_shows_the_stage_while_it_runs():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Stages(console).stage("rewrite"):
        pass
    assert 0 < printed(console).index("rewrite ...") < printed(console).index("done")


def test_a_note_stands_between_the_stages(console):
    stages = Stages(console)
    with stages.stage("rewrite"):
        pass
    stages.note("State of a sampling run: [1.5] MB")
    assert printed(console).splitlines()[1] == "note  State of a sampling run: [1.5] MB"
