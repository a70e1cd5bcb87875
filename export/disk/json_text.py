"""Reading files that somebody else may have written: plain files only, and JSON within limits."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from dcconvert.export.disk.targets import KINDS, said
from dcconvert.passes.ir.errors import UsageError

AGAIN = "convert the model again"
MOST_BYTES = 256 << 20  # the graphs of the largest models need a few megabytes
MOST_DEPTH = 100
LARGEST = 2**63  # beyond the integers that tensors hold


def plain_file(path: Path, again: str = AGAIN) -> int:
    """The size of a file that can be read; UsageError for one that is missing, closed to us, a pipe or a device."""
    try:
        found = path.stat()  # before it is opened: a pipe without a writer would wait
        if not stat.S_ISREG(found.st_mode):
            kind = KINDS.get(stat.S_IFMT(found.st_mode), "something unknown")
            raise UsageError(f"cannot read {path}: it is {kind}, not a file; {again}")
        with path.open("rb"):
            return found.st_size
    except (OSError, ValueError) as error:  # a null character in the name
        raise UsageError(f"cannot read {path}: {said(error)}; {again}") from error


def part_of_folder(folder: Path, name: str, again: str = AGAIN) -> Path:
    """The path of a file in a folder that may come from somebody else; UsageError if it leads out of the folder."""
    path = folder / name
    try:
        inside = os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {said(error)}; {again}") from error
    if not inside:
        raise UsageError(f"{path} is a link that leads out of its folder: put the file itself there")
    return path


def read_json(path: Path, again: str = AGAIN) -> Any:
    """The contents of a JSON file; UsageError for one that cannot be read, is no JSON, or exceeds the limits.

    There are no numbers in it that are not finite, and no integers beyond 64 bits.
    """
    size = plain_file(path, again)
    if size > MOST_BYTES:
        raise UsageError(f"cannot read {path}: it has {size} bytes, more than {MOST_BYTES}; {again}")
    try:
        data = path.read_bytes()
        found = json.loads(data, parse_int=integer, parse_float=number, parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {path}: {said(error)}; {again}") from error
    if depth(found) > MOST_DEPTH:
        raise UsageError(f"cannot read {path}: it is nested more than {MOST_DEPTH} deep; {again}")
    return found


def integer(text: str) -> int:
    if len(text) > 20 or not -LARGEST <= int(text) < LARGEST:
        raise ValueError(f"the number {text[:20]}... has more than 64 bits")
    return int(text)


def number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def depth(value: Any) -> int:
    """How deep a JSON value is nested, counted up to a little beyond the limit."""
    level, found = [value], 0
    while level and found <= MOST_DEPTH:
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        found += bool(inner)
    return found
