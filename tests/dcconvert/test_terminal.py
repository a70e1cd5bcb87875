"""Progress: a line a stage, notes while it runs, no false success."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from dcconvert.terminal import Stages, prepare_streams, terminal


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
        self.shown: list[Any] = []

    @contextmanager
    def status(self, status: Any, **_: Any) -> Iterator[Any]:  # type: ignore[override]
        self.shown.append(status)
        yield SimpleNamespace(update=self.shown.append)


def test_notes_are_counted():
    console = Watched()
    with Stages(console).stage("measure") as tick:
        for note in ("torch", "ONNX Runtime", "torch"):
            tick(note)
    shown = [str(text) for text in console.shown]
    assert [text.rsplit(",", 1)[0] for text in shown] == [
        "measure ...",
        "measure: torch (1)",
        "measure: ONNX Runtime (1)",
        "measure: torch (2)",
    ]
    assert shown[-1].endswith(" 0 s")


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


# What is printed is shown as it is, wherever it goes


def shown(text: Any, monkeypatch: pytest.MonkeyPatch, encoding: str = "utf-8") -> str:
    """What a command's terminal gets in an encoding."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    prepare_streams()
    terminal().print(text, highlight=False, soft_wrap=True)
    sys.stdout.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("x[/y].npz", "x[/y].npz"),
        ("[bold red]x[/bold red]:smile:", "[bold red]x[/bold red]:smile:"),
        ("\x1b[2Jx\x1b]0;title\x07", "\\x1b[2Jx\\x1b]0;title\\x07"),
        (os.fsdecode(b"\xff\xfe.png"), "\\xff\\xfe.png"),
        ("a\u202egnp.exe", "a\\u202egnp.exe"),
        ("\x9b31m\x7f\r", "\\x9b31m\\x7f\\x0d"),
        ("é ± 東", "é ± 東"),
    ],
)
def test_names_are_shown_letter_by_letter(name, wanted, monkeypatch):
    assert shown(name, monkeypatch) == f"{wanted}\n"
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    assert shown(table, monkeypatch).count(wanted) == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_any_encoding_will_do(encoding, monkeypatch):
    text = shown("1 → 2, 3 ± 1, 4\N{MULTIPLICATION SIGN} … 東", monkeypatch, encoding)
    assert text.startswith("1 -> 2")
    assert text.endswith(" ?\n")
    table = Table("a very long heading that does not fit", title="t")
    monkeypatch.setenv("COLUMNS", "24")
    assert shown(table, monkeypatch, encoding)


@pytest.mark.parametrize("columns", ["0", "1", "7"])
def test_a_terminal_without_width_is_no_terminal_without_text(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert shown("some words", monkeypatch) == "some words\n"


class Broken(io.StringIO):
    """A stream that cannot be written to."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ""),
        (OSError(errno.ENOSPC, "No space left on device"), "note  the output cannot be written: No space left"),
    ],
)
def test_output_that_cannot_be_written_does_not_end_the_work(error, note, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    console = terminal()
    console.print("first")
    assert capsys.readouterr().err.startswith(note)


def test_a_closed_pipe_and_a_full_disk_do_not_reach_the_end_of_the_program():
    code = "from dcconvert.terminal import terminal\nfor _ in range(3): terminal().print('x' * 100_000)\nprint('more')"
    for command in ("{} | true", "{} > /dev/full"):
        line = command.format(f'{sys.executable} -c "{code}"')
        done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception" not in done.stderr
