"""Threads that share a model: each has its own values, and a run is stepped by one of them."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from dcconvert.passes.ir.errors import UsageError

Value = TypeVar("Value")
Owner = TypeVar("Owner", bound="Guarded")
Given = ParamSpec("Given")
Result = TypeVar("Result")


TRACING = threading.RLock()  # tracing changes modules and settings of torch that all threads share


def one_at_a_time(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function that traces: one thread runs it at a time, and others wait."""

    @functools.wraps(function)
    def waiting(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with TRACING:
            return function(*args, **kwargs)

    return waiting


class PerThread(Generic[Value]):
    """A value of which every thread has its own. It is freed with its thread; copies and pickles have none."""

    def __init__(self, make: Callable[[], Value]) -> None:
        self.make = make
        self._start()

    def _start(self) -> None:
        self._local = threading.local()
        self._known: list[weakref.ref[Value]] = []
        self._lock = threading.Lock()

    @property
    def own(self) -> Value:
        """The calling thread's."""
        try:
            found: Value = self._local.value
        except AttributeError:
            found = self._local.value = self.make()
            with self._lock:
                self._known = [known for known in self._known if known() is not None] + [weakref.ref(found)]
        return found

    def all(self) -> list[Value]:
        """Those of all threads, in the order in which they were made."""
        with self._lock:
            return [value for known in self._known if (value := known()) is not None]

    def __getstate__(self) -> Any:
        return self.make

    def __setstate__(self, make: Callable[[], Value]) -> None:
        self.make = make
        self._start()


class OneThread:
    """A context that only the thread which entered it first may enter again, until `release`.

    Another thread takes over if the first one has ended. Otherwise it gets a UsageError, before anything is computed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None

    def release(self) -> None:
        """Let any thread enter next."""
        self._owner = None

    def __enter__(self) -> None:
        current = threading.current_thread()
        if not self._lock.acquire(blocking=False):
            raise UsageError(f"thread {current.name} steps a run that another thread is stepping: {HOW}")
        owner = self._owner or current
        if owner is not current and owner.is_alive():
            self._lock.release()
            raise UsageError(f"thread {current.name} steps a run that thread {owner.name} began: {HOW}")
        self._owner = current

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __getstate__(self) -> Any:
        return {}

    def __setstate__(self, _: Any) -> None:
        self.__init__()  # type: ignore[misc]


HOW = "start a run in each thread"


class Guarded:
    """Something with steps that only one thread may make, on a runtime that it may share with others."""

    guard: OneThread
    runtime: Any


def by_one_thread(
    step: Callable[Concatenate[Owner, Given], Result],
) -> Callable[Concatenate[Owner, Given], Result]:
    """A method that runs inside its object's `guard`, when it is its turn."""

    @functools.wraps(step)
    def guarded(self: Owner, /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        with self.guard, self.runtime.turn:
            return step(self, *args, **kwargs)

    return guarded
