"""Progress on the terminal: one line a stage, with a spinner while it runs and its time when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


class Stages:
    """Announces the stages of a job on a console; on anything but a terminal a line per finished stage."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, text: str) -> None:
        """A line of information between the stages."""
        self.console.print(f"[cyan]note[/cyan]  {text}", highlight=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Run a stage; what is yielded takes notes on what is being worked at, and counts them."""
        start = time.perf_counter()
        ticks: dict[str, int] = {}
        with self.console.status(f"{name} ...") as status:

            def tick(note: str) -> None:
                ticks[note] = ticks.get(note, 0) + 1
                elapsed = time.perf_counter() - start
                status.update(f"{name}: {note} ({ticks[note]}), {elapsed:.0f} s")

            yield tick
        self.console.print(f"[green]done[/green]  {name:<28}{time.perf_counter() - start:7.1f} s", highlight=False)
