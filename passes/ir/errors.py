"""The ways a command can end early, each with the exit code the command line gives it."""

from __future__ import annotations


class DcconvertError(Exception):
    """Base of every error dcconvert raises on purpose; the message is one line that says what to do."""

    exit_code = 1


class CheckFailedError(DcconvertError):
    """A check of the result failed: parity, isolation, tolerance, or an invariant of a pass (exit 1)."""

    exit_code = 1


class UsageError(DcconvertError):
    """The user's input cannot be used: bad option, unreadable file, wrong shapes (exit 2)."""

    exit_code = 2


class StoppedError(DcconvertError):
    """The user stopped long work that can be resumed (exit 130, as shells use for Ctrl-C; 128 + the signal)."""

    exit_code = 130

    def __init__(self, message: str, exit_code: int = exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UnsupportedModelError(DcconvertError):
    """The model is readable but contains something that no pass or rule supports (exit 3)."""

    exit_code = 3
