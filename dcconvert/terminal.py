"""What commands print: names as they are, on any terminal, and never at the cost of the work."""

from __future__ import annotations

import codecs
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from rich.console import Console
from rich.text import Text

LEAST_COLUMNS = 20
# Characters that a terminal obeys instead of showing, and bytes of names that are not UTF-8. Tab and newline stay.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
PLAIN = {"→": "->", "±": "+-", "…": ".", "≥": ">=", "≤": "<=", "“": '"', "”": '"'}
PLAIN |= {"\N{MULTIPLICATION SIGN}": "x", "\N{RIGHT SINGLE QUOTATION MARK}": "'"}
ERRORS = "dcconvert.plain"  # the name under which `in_plain_letters` is known to codecs


def plain(text: str) -> str:
    """Text of which a terminal shows every character: control characters and broken names are written as escapes."""
    return OBEYED.sub(lambda found: escaped(found[0]), text)


def escaped(letter: str) -> str:
    code = ord(letter)
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code  # a byte of a name that is not UTF-8
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    """For terminals that do not know a character: the nearest that they do."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter, "?") for letter in letters), error.end


codecs.register_error(ERRORS, in_plain_letters)


def prepare_streams() -> None:
    """Let the program's output be written in any encoding, and at a width at which something can be read."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ERRORS)
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns[:9]) < LEAST_COLUMNS:
        del os.environ["COLUMNS"]


class Output:
    """The program's stdout or stderr. What cannot be written is lost, once with a note; the work goes on."""

    def __init__(self, stderr: bool) -> None:
        self._stderr = stderr

    @property
    def _stream(self) -> Any:
        return sys.stderr if self._stderr else sys.stdout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._losses():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._losses():
            self._stream.flush()

    @contextmanager
    def _losses(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError, ValueError):  # what is still buffered goes nowhere, at the end of the program too
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            if not self._stderr and not isinstance(error, BrokenPipeError):
                with suppress(OSError):
                    sys.stderr.write(f"note  the output cannot be written: {error.strerror}; the work goes on\n")


class Terminal(Console):
    """A console that shows text as it is: no markup in it, no escapes."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options)


def terminal(stderr: bool = False, quiet: bool = False) -> Console:
    return Terminal(file=cast("IO[str]", Output(stderr)), quiet=quiet, markup=False, emoji=False, highlight=False)


class Stages:
    """Announces the stages of a job on a console; on anything but a terminal a line per finished stage."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, word: str, style: str, text: str) -> None:
        self.console.print(Text.assemble((word, style), "  ", plain(text)), soft_wrap=True)

    def note(self, text: str) -> None:
        """A line of information between the stages."""
        self.line("note", "cyan", text)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Run a stage; what is yielded takes notes on what is being worked at, and counts them."""
        start = time.perf_counter()
        ticks: dict[str, int] = {}
        with self.console.status(Text(plain(f"{name} ..."))) as status:

            def tick(note: str) -> None:
                ticks[note] = ticks.get(note, 0) + 1
                elapsed = time.perf_counter() - start
                status.update(Text(plain(f"{name}: {note} ({ticks[note]}), {elapsed:.0f} s")))

            yield tick
        self.line("done", "green", f"{name:<28}{time.perf_counter() - start:7.1f} s")
