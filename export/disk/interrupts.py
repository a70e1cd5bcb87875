"""Signals that end a run: SIGINT, SIGTERM and SIGHUP all unwind the program, and none of them in a critical section."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHELL_BASE = 128  # shells give a command that a signal ended this exit code plus the signal's number


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end. Like Ctrl-C it passes every `except Exception` and runs every `finally`."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """While open, each of the signals raises Interrupted in the main thread; `last` is the one that came.

    A signal that is ignored stays ignored, as `nohup` wants it.
    """

    def __init__(self) -> None:
        self.last: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = handled_by(self.arrived)
        return self

    def __exit__(self, *_: object) -> None:
        restore(self._before)

    def arrived(self, number: int, frame: Any) -> None:
        self.last = number
        raise Interrupted(number)

    @property
    def exit_code(self) -> int:
        return SHELL_BASE + (self.last or signal.SIGINT)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that arrive in the block are raised again at its end. Outside the main thread there are none to hold."""
    arrived: list[int] = []
    before = handled_by(lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        restore(before)
        if arrived:
            signal.raise_signal(arrived[0])


def handled_by(handler: Any) -> dict[int, Any]:
    """Install a handler; returns those from before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in STOPPING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in heard}


def restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
