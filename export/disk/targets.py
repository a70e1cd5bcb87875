"""Where a result may be written: what is there already, whether it can be written, and who else is writing to it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dcconvert.export.disk.interrupts import uninterrupted
from dcconvert.passes.ir.errors import UsageError

OURS = ".dcconvert-"  # in the names of what exists only while a run is writing
OLD = "-old"  # ends the name of a target that was moved away until its successor is in place
NAME_BYTES = 150  # of a target's name in that of a temporary one, which must not exceed the system's 255

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def said(error: Exception) -> str:
    """The system's error text without its number and path, if it has one; one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def kind_of(path: Path) -> str:
    """What lies at a path, in words, links not followed; "" for nothing. UsageError if that cannot be found out."""
    try:
        return KINDS.get(stat.S_IFMT(path.lstat().st_mode), "something unknown")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:  # a null character in the name
        raise UsageError(f"cannot look at {path}: {said(error)}; choose another place with -o") from error


def real_place(path: Path) -> Path:
    """The place that a path names, links followed; UsageError for a link that leads nowhere or in a circle."""
    try:
        if path.is_symlink() and not path.exists():
            raise UsageError(f"{path} is a link that leads nowhere: name the place itself")
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path} cannot be followed ({said(error)}): choose another place with -o") from error


def temporary_name(target: Path) -> str:
    """How the names of a target's temporary files begin."""
    name = os.fsencode(target.name)
    if len(name) > NAME_BYTES:
        name = name[:NAME_BYTES] + hashlib.sha256(name).hexdigest()[:16].encode()
    return f".{os.fsdecode(name)}{OURS}"


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold a target against other runs, and remove what a killed one left there. UsageError if another run holds it.

    The lock is a file beside the target, which is gone when the block ends, and void when the process dies. (filelock
    leaves its file behind.)
    """
    path = target.with_name(f"{temporary_name(target)}lock")
    holder, held = acquired(path, target)
    try:
        if held:
            remove_litter(target)
        yield
    finally:
        with uninterrupted():
            with suppress(OSError):
                path.unlink()  # while it is held: whoever opened it meanwhile sees that it is another's
            os.close(holder)


def acquired(path: Path, target: Path) -> tuple[int, bool]:
    """A file descriptor of the file at `path`, and whether it is locked; it is not where there are no locks."""
    while True:
        try:
            holder = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise UsageError(f"cannot write beside {target}: {said(error)}; choose another place with -o") from error
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(holder)
            raise UsageError(
                f"another run of dcconvert is writing {target}: wait until it has ended, or choose another place"
            ) from None
        except OSError:  # a file system without locks
            return holder, False
        with suppress(OSError):
            if os.path.samestat(os.fstat(holder), path.lstat()):
                return holder, True
        os.close(holder)


def remove_litter(target: Path) -> None:
    """Remove what killed runs left of a target, which must be locked; a target that one had moved away comes back."""
    start, lock = temporary_name(target), f"{temporary_name(target)}lock"
    found = [path for path in beside(target) if path.name.startswith(start) and path.name != lock]
    for path in found:
        if path.name.endswith(OLD) and not target.exists() and path.is_dir():
            with suppress(OSError):
                path.rename(target)
    for path in found:
        remove(path)


def beside(target: Path) -> list[Path]:
    with suppress(OSError):
        return list(target.parent.iterdir())
    return []


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, even one that its owner may not write to; gone is fine."""
    if not path.is_dir() or path.is_symlink():
        with suppress(OSError):
            path.unlink()
        return
    with suppress(OSError):
        path.chmod(stat.S_IRWXU)
    for root, folders, _ in os.walk(path):
        for inner in (os.path.join(root, name) for name in folders):
            if not os.path.islink(inner):
                with suppress(OSError):
                    os.chmod(inner, stat.S_IRWXU)
    shutil.rmtree(path, ignore_errors=True)


def temporary_folder(target: Path) -> Path:
    """An empty folder beside a target that only its owner can read, with a name that nobody can guess."""
    try:
        return Path(tempfile.mkdtemp(prefix=temporary_name(target), dir=target.parent))
    except OSError as error:
        raise UsageError(f"cannot write beside {target}: {said(error)}; choose another folder with -o") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path` that takes its place when the block ends without an error."""
    with locked(path):
        number, name = tempfile.mkstemp(prefix=temporary_name(path), dir=path.parent)
        os.close(number)
        partial = Path(name)
        try:
            yield partial
            partial.chmod(0o666 & ~current_umask())
            os.replace(partial, path)
        finally:
            with uninterrupted():
                remove(partial)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
