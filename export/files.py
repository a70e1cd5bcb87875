"""Writing files and folders completely or not at all, and reading JSON."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dcconvert.passes.ir.errors import UsageError

MANIFEST = "manifest.json"


@contextmanager
def new_folder(target: Path, force: bool = False, kind: str = "bundle", mark: str = MANIFEST) -> Iterator[Path]:
    """A temporary folder beside `target` that replaces it when the block ends without an error.

    With `force`, an existing folder is moved away first and deleted last; it is kept if anything goes wrong. Raises
    UsageError if the target exists (and `force` is off), if it is not a folder of this `kind` with the file `mark`, or
    if it cannot be written (no permission, disk full).
    """
    target = target.resolve()  # a link to a bundle stays a link
    if target.exists() and not force:
        raise UsageError(f"{target} exists already: choose another folder with -o, or replace it with --force")
    if target.exists() and not (target.is_dir() and ((target / mark).exists() or not any(target.iterdir()))):
        raise UsageError(f"{target} is not a {kind} and will not be replaced: choose another folder with -o")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UsageError(f"cannot write beside {target}: {said(error)}; choose another folder with -o") from error
    try:
        yield work
        work.chmod(0o777 & ~current_umask())
        put_in_place(work, target)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors
        raise UsageError(f"writing {target} failed: {said(error)}; nothing was left behind") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def said(error: Exception) -> str:
    """The system's error text without its number and path, if it has one."""
    return str(getattr(error, "strerror", None) or error)


def put_in_place(work: Path, target: Path) -> None:
    """Rename `work` to `target`; the old target is restored if that fails."""
    old = work.with_name(f"{work.name}-old")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(work, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(data: Any, path: Path) -> None:
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def writable(path: Path) -> None:
    """Raise UsageError unless a file can be written at `path`."""
    if path.is_dir() or not os.access(path.parent if path.parent.parts else Path(), os.W_OK):
        raise UsageError(f"cannot write {path}: choose a file in a folder that exists and can be written")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file completely or not at all; raises UsageError if it cannot be written."""
    writable(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another place") from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {path}: {error}; convert the model again") from error


def file_sha256(parts: Iterable[Path]) -> str:
    """The hash of the concatenation of some files, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
