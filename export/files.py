"""The one door through which results are written: files and folders completely or not at all."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dcconvert.export.disk.hashes import LISTED, MANIFEST, seal
from dcconvert.export.disk.interrupts import uninterrupted
from dcconvert.export.disk.json_text import read_json
from dcconvert.export.disk.targets import (
    OLD,
    current_umask,
    kind_of,
    locked,
    real_place,
    remove,
    said,
    temporary_folder,
    temporary_name,
    whole_file,
)
from dcconvert.passes.ir.errors import StoppedError, UsageError

__all__ = [
    "BUNDLE", "MANIFEST", "Format", "Kind", "current_umask", "file_sha256", "new_folder", "put_in_place", "read_json",
    "said", "usable_folder", "whole_file", "writable", "write_json", "write_whole",
]  # fmt: skip

# Folders


@dataclass(frozen=True)
class Kind:
    """A kind of folder that commands write. `mark`: the JSON file by which one is recognised.

    `ours` says whether what the mark holds is that of such a folder; `made`, which relative paths in it dcconvert
    writes. Everything else in it is the user's.
    """

    name: str
    mark: str
    ours: Callable[[Any], bool]
    made: Callable[[Any, str], bool]

    def contents(self, folder: Path) -> Any:
        """What the mark of a folder holds; None for a folder that is not of this kind."""
        try:
            found = read_json(folder / self.mark)
        except UsageError:
            return None
        return found if isinstance(found, dict) and self.ours(found) else None


# What a conversion writes, and what later commands add.
CONVERTED = (
    MANIFEST, "graph.json", "model.safetensors", "run.json", "report.json", "report.html", "samples.png",
    "token_maps.png", "onnx/*.onnx", "onnx/*.onnx.data", "onnx/example_inputs/*.json",
)  # fmt: skip
ADDED = (
    "failures.json", "failures.png", "onnx/*/*.onnx", "onnx/*/*.onnx.data", "onnx/*/example_inputs/*.json",
    "engines/*/engines.json",
    "engines/*/*.engine", "engines/*/timing.cache",
)  # fmt: skip


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a relative path fits a pattern, part for part."""
    parts = path.split("/")
    return any(
        len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
        for wanted in (pattern.split("/") for pattern in patterns)
    )


def is_bundle(manifest: Any) -> bool:
    buckets = manifest.get("buckets", manifest.get("ladder"))  # "ladder" up to format 3
    return type(manifest.get("format_version")) is int and isinstance(buckets, dict)


def in_bundle(manifest: Any, path: str) -> bool:
    """Whether dcconvert wrote a file of a bundle: it is listed there or, in older bundles, has such a name."""
    listed = manifest.get(LISTED)
    written = path in listed or path == MANIFEST if isinstance(listed, dict) else matches(path, CONVERTED)
    return written or matches(path, ADDED)


BUNDLE = Kind("bundle", MANIFEST, is_bundle, in_bundle)


@contextmanager
def new_folder(
    target: Path,
    force: bool = False,
    kind: Kind = BUNDLE,
    *,
    inputs: Iterable[Path] = (),
    update: bool = False,
    without: Collection[str] = (),
    after_failure: str = "",
) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends without an error.

    With `force`, a folder of this `kind` is replaced, or an empty one; what lies in it that dcconvert did not write is
    kept. `update` keeps everything else in it as well, except for what dcconvert wrote at the places in `without`,
    which the block may still change. The target is locked, and whatever can be refused is refused before the block
    runs: a target that exists (without `force`), is of another kind, cannot be written, holds one of the `inputs`, or
    is being written by another run. UsageError says which; `after_failure` is what it says at the end if writing fails
    in the block.
    """
    target = real_place(target)  # a link to a bundle stays a link
    check_replaceable(target, force, kind, inputs)
    with parents_of(target), locked(target):
        check_replaceable(target, force, kind, inputs)
        existed = target.exists()
        work = temporary_folder(target)
        try:
            yield work
            check_replaceable(target, force, kind, inputs)
            kept = take_over(target, work, kind, everything=update, without=without)
            if kind is BUNDLE:
                seal(work, target, kept)
            work.chmod(mode_of(target))
            try:
                put_in_place(work, target)
            except KeyboardInterrupt:
                raise StoppedError(f"interrupted, but {target} is complete") from None
        except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors
            left = after_failure or ("it is as it was" if existed else "nothing was left behind")
            raise UsageError(f"writing {target} failed: {said(error)}; {left}") from error
        finally:
            with uninterrupted():
                remove(work)


@contextmanager
def parents_of(target: Path) -> Iterator[None]:
    """Folders that a target needs above it; those that were made for it go again if it does not come."""
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UsageError(f"cannot write beside {target}: {said(error)}; choose another folder with -o") from error
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()  # it is not empty, if there is a result


def check_replaceable(target: Path, force: bool, kind: Kind, inputs: Iterable[Path]) -> None:
    """UsageError for a target that must not be replaced."""
    found = kind_of(target)
    if not found:
        return
    if found not in ("a folder", "a file"):
        raise UsageError(f"{target} is {found} and will not be replaced: choose another folder with -o")
    if not force:
        raise UsageError(f"{target} exists already: choose another folder with -o, or replace it with --force")
    try:
        replaceable = found == "a folder" and (kind.contents(target) is not None or not any(target.iterdir()))
    except OSError as error:
        raise UsageError(f"cannot read {target}: {said(error)}; choose another folder with -o") from error
    if not replaceable:
        raise UsageError(f"{target} is not a {kind.name} and will not be replaced: choose another folder with -o")
    for path in inputs:
        real = real_place(path)
        if target == real or target in real.parents:
            raise UsageError(f"{target} holds {path}, which is read: choose another folder with -o")
    if not os.access(target, os.W_OK):
        raise UsageError(f"{target} may not be written (its mode is {stat.filemode(target.stat().st_mode)})")


def take_over(old: Path, new: Path, kind: Kind, everything: bool, without: Collection[str]) -> set[str]:
    """Put what an old folder holds into its successor: what is not ours, or `everything` that is not there yet.

    Files become hard links, so nothing is copied and the old folder stays whole; links stay links. Returns the paths
    of what is not ours.
    """
    foreign = set()
    about = (kind.contents(old) if old.is_dir() else None) or {}
    for root, folders, files in os.walk(old) if old.is_dir() else ():
        linked = [name for name in folders if os.path.islink(os.path.join(root, name))]
        empty = not (folders or files) and root != str(old)
        for name in (*files, *linked, *([""] if empty else [])):
            source = Path(root, name)
            path = source.relative_to(old).as_posix()
            goal = new / path
            ours = kind.made(about, path) and not empty
            dropped = ours and (not everything or covered(path, without))
            if dropped or goal.exists() or goal.is_symlink():
                continue
            goal.parent.mkdir(parents=True, exist_ok=True)
            goal.mkdir() if empty else link_or_copy(source, goal)
            if not ours:
                foreign.add(path)
    return foreign


def covered(path: str, places: Collection[str]) -> bool:
    """Whether a relative path is one of some places, or lies in one."""
    return any(path == place or path.startswith(f"{place}/") for place in places)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link to a file, or a copy if the disk does not support links. A link is copied as a link."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.is_file():
            shutil.copy2(source, target)
        else:
            raise


def mode_of(target: Path) -> int:
    """The permissions of a folder that is replaced, or those of a new one."""
    return stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o777 & ~current_umask()


def put_in_place(work: Path, target: Path) -> None:
    """Rename `work` to `target`; the old target is restored if that fails. No signal gets between the two renames."""
    old = work.with_name(f"{work.name}{OLD}")
    with uninterrupted():
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(work, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        remove(old)


# Files


@dataclass(frozen=True)
class Format:
    """A format of single files. `heads`: what the data of an old file may begin with for it to be replaced."""

    name: str
    heads: tuple[bytes, ...]


PNG = Format("a PNG image", (b"\x89PNG",))
JSON = Format("JSON", (b"{", b"["))
HTML = Format("an HTML page", (b"<",))
NPZ = Format("an npz file", (b"PK",))


def writable(path: Path, form: Format) -> None:
    """Raise UsageError unless a file of this format can be written at `path`: nothing is there, or an older one."""
    found = kind_of(path)
    if found not in ("", "a file"):
        raise UsageError(f"cannot write {path}: it is {found}, which is not replaced; choose another file")
    if found:
        if folder := next((up for up in path.absolute().parents if part_of(path.absolute(), up)), None):
            raise UsageError(f"cannot write {path}: it belongs to the bundle {folder}; choose another file")
        with suppress(OSError):
            start = path.open("rb").read(64).lstrip()
            if start and not start.startswith(form.heads):
                raise UsageError(f"cannot write {path}: it exists and is not {form.name}; choose another file")
    try:
        with tempfile.NamedTemporaryFile(prefix=temporary_name(path), dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {said(error)}; choose a file in a folder that exists and can be written"
        ) from error


def usable_folder(path: Path) -> None:
    """Make a folder for several files; UsageError if it cannot be made or nothing can be written in it."""
    if kind_of(path) not in ("", "a folder") and not path.is_dir():
        raise UsageError(f"{path} is {kind_of(path)}, not a folder: give a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(f"cannot write into {path}: {said(error)}; choose another folder") from error


def part_of(path: Path, folder: Path) -> bool:
    """Whether a file is one that dcconvert wrote as part of a bundle."""
    if not (folder / MANIFEST).is_file():
        return False
    about = BUNDLE.contents(folder)
    return about is not None and in_bundle(about, path.relative_to(folder).as_posix())


def write_whole(path: Path, data: bytes, form: Format) -> None:
    """Write a file completely or not at all; raises UsageError if it cannot be written."""
    writable(path, form)
    try:
        with whole_file(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {said(error)}; choose another place") from error


def write_json(data: Any, path: Path) -> None:
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def file_sha256(parts: Iterable[Path]) -> str:
    """The hash of the concatenation of some files, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
