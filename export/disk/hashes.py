"""The hashes of a bundle's files, which its manifest lists: what was written, and what was changed since."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from dcconvert.export.disk.json_text import AGAIN, part_of_folder, plain_file
from dcconvert.export.disk.targets import whole_file
from dcconvert.passes.ir.errors import UsageError

MANIFEST = "manifest.json"
LISTED = "files"  # in the manifest: {path: {"sha256": hexadecimal digits, "bytes": size}}
CHEAP_BYTES = 16 << 20  # files up to this size are hashed whenever they are read
BLOCK = 1 << 24


def seal(folder: Path, before: Path, foreign: Collection[str]) -> None:
    """List the hashes of a new bundle's files in its manifest, if it has one.

    `before`: the bundle that it replaces, if there is one; hashes of files that both have (hard links) are not computed
    again. `foreign` files are not listed.
    """
    if not (folder / MANIFEST).is_file():
        return
    manifest = json.loads((folder / MANIFEST).read_text())
    known = listed_in(before) if before.is_dir() else {}
    manifest[LISTED] = {
        path: known[path] if path in known and same_file(folder / path, before / path) else entry(folder / path)
        for path in sorted(files_in(folder))
        if path != MANIFEST and path not in foreign
    }
    (folder / MANIFEST).unlink()  # it may be a hard link to the old one
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n")


def add_to_list(folder: Path, paths: Collection[str]) -> None:
    """List these files of a bundle anew, and no longer engines that are gone; in a bundle without a list, do nothing.

    The manifest is replaced whole.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    if LISTED not in manifest:
        return
    gone = {path for path in manifest[LISTED] if path.startswith("engines/") and not (folder / path).exists()}
    kept = {path: known for path, known in manifest[LISTED].items() if path not in gone}
    files = kept | {path: entry(folder / path) for path in paths}
    if files == manifest[LISTED]:
        return
    manifest[LISTED] = dict(sorted(files.items()))
    with whole_file(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n")


def listed_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of a manifest that we trust no further than their types."""
    try:
        found = json.loads((folder / MANIFEST).read_text()).get(LISTED, {})
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def files_in(folder: Path) -> Iterator[str]:
    """Relative paths of the files below a folder, without links and without what only a running command needs."""
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root, name)
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(folder).as_posix()


def same_file(path: Path, other: Path) -> bool:
    return other.is_file() and os.path.samefile(path, other)


def entry(path: Path) -> dict[str, Any]:
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def unchanged(folder: Path, files: dict[str, Any], name: str, whole: bool = False) -> Path:
    """The path of a file of a bundle, which is what its manifest lists (`files`); by size only, if it is large and not
    compared as a `whole`. A file that is not listed is not compared.

    UsageError names the file if it is missing, was changed, is no plain file or leads out of the bundle.
    """
    path = part_of_folder(folder, name)
    size = plain_file(path)
    if name in files:
        same = size == files[name]["bytes"]
        if same and (whole or size <= CHEAP_BYTES):
            same = sha256(path) == files[name]["sha256"]
        if not same:
            raise UsageError(f"{path} was changed after the bundle was written: restore it, or {AGAIN}")
    return path
