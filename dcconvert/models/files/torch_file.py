"""What `torch.save` wrote: a pickle and the bytes of its tensors, in a zip file or (before torch 1.6) in sequence.

The tensors stay mapped to the file. Nothing in the file is run: see `inert_pickle`.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from dcconvert.models.files.inert_pickle import STORAGES, Named, PickleError, Stored, read_pickle
from dcconvert.passes.ir.errors import UsageError

SAVE_PLAINLY = "save model.state_dict() with torch.save, or as safetensors, and pass that file"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of files before torch 1.6
LOCAL_HEADER, NAME_SIZES = 30, slice(26, 30)  # of a zip file's entry; its name and extra field follow


class Mapped:
    """A file's bytes, of which storages are parts."""

    def __init__(self, file: IO[bytes]) -> None:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.bytes = torch.frombuffer(view, dtype=torch.uint8).untyped_storage()

    def part(self, start: int, size: int, itemsize: int) -> torch.UntypedStorage:
        """PickleError where the file has no such bytes."""
        if not (start >= 0 and size >= 0 and start + size <= self.bytes.nbytes()):
            raise PickleError("the bytes of a tensor are missing")
        if not size:
            return torch.UntypedStorage(0)
        part: torch.UntypedStorage = self.bytes[start : start + size]
        return part if start % itemsize == 0 else part.clone()


def described(key: Any) -> tuple[torch.dtype, str, int, Any]:
    """A reference to a storage: its type, name, size in bytes, and part of another one (None, or name, start, size)."""
    _, kind, name, _, count, *view = key
    dtype = STORAGES.get(kind.name if isinstance(kind, Named) else "")
    if dtype is None or type(count) is not int or not 0 <= count < 2**62:
        raise PickleError("a storage of an unknown type")
    return dtype, name.decode() if isinstance(name, bytes) else str(name), count * dtype.itemsize, *(view or [None])


def read_torch(path: Path) -> Any:
    """The content of a torch file, in which placeholders stand for everything but tensors and plain data.

    UsageError for a file that is damaged, or that is something else.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                return read_zip(path, file)
            file.seek(0)
            return read_sequence(path, file)
    except UsageError:
        raise
    except Exception as error:  # a damaged file can fail anywhere
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UsageError(f"{path} is truncated or damaged ({said}); download or save it again.") from None


def read_zip(path: Path, file: IO[bytes]) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickled = pickle_entry(path, list(entries))
        root = pickled.removesuffix("data.pkl")
        if any(entry.compress_type or entry.flag_bits & 1 for entry in entries.values()):
            raise UsageError(
                f"{path} is a compressed or encrypted zip file, which torch does not write; {SAVE_PLAINLY}."
            )
        if root + "byteorder" in entries and archive.read(root + "byteorder") == b"big":
            raise UsageError(f"{path} was saved on a machine with another order of bytes; {SAVE_PLAINLY}.")
        mapped = Mapped(file)
        storages: dict[str, torch.UntypedStorage] = {}

        def stored(key: Any) -> Stored:
            dtype, name, size, _ = described(key)
            if name not in storages:
                start = data_start(file, entries[f"{root}data/{name}"].header_offset) if size else 0
                if size and entries[f"{root}data/{name}"].file_size < size:
                    raise PickleError("the bytes of a tensor are missing")
                storages[name] = mapped.part(start, size, dtype.itemsize)
            return Stored(dtype, storages[name])

        return read_pickle(io.BytesIO(archive.read(pickled)), stored)


def pickle_entry(path: Path, names: list[str]) -> str:
    """The pickle's name among those of a zip file; UsageError for a zip file that is no checkpoint."""
    last = {name.rpartition("/")[2]: name for name in reversed(names)}
    if "constants.pkl" in last:
        raise UsageError(f"{path} is a TorchScript archive, not a checkpoint; {SAVE_PLAINLY}.")
    if "archive_format" in last:
        raise UsageError(
            f"{path} is an exported program, which may contain code that torch.export.load runs: if you trust "
            "it, use dcconvert.convert(torch.export.load(path), ratio=4) in Python."
        )
    if "data.pkl" not in last:
        raise UsageError(f"{path} is a zip file but not a torch checkpoint (no data.pkl in it); {SAVE_PLAINLY}.")
    return last["data.pkl"]


def data_start(file: IO[bytes], header: int) -> int:
    """Where the bytes of a zip file's entry begin; the reader of the archive seeks before it reads."""
    before = file.tell()
    file.seek(header)
    local = file.read(LOCAL_HEADER)
    file.seek(before)
    name, extra = struct.unpack("<HH", local[NAME_SIZES])
    return header + LOCAL_HEADER + int(name) + int(extra)


def read_sequence(path: Path, file: IO[bytes]) -> Any:
    """Five pickles (magic number, protocol, machine, content, names of the storages), then the storages with sizes."""
    if read_pickle(file, no_storage) != MAGIC:
        file.seek(0)
        return read_pickle(file, no_storage)  # a pickle that torch.save did not write
    if read_pickle(file, no_storage) != PROTOCOL:
        raise PickleError("an unknown protocol")
    system = read_pickle(file, no_storage)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise UsageError(f"{path} was saved on a machine with another order of bytes; {SAVE_PLAINLY}.")
    content_at, kinds = file.tell(), dict[str, torch.dtype]()

    def seen(key: Any) -> Stored:
        dtype, name, *_ = described(key)
        kinds.setdefault(name, dtype)
        return Stored(dtype, None)

    read_pickle(file, seen)  # where the storages lie depends on their types
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in read_pickle(file, no_storage)]
    mapped, places, at = Mapped(file), dict[str, tuple[int, int]](), file.tell()
    for name in names:
        file.seek(at)
        (count,) = struct.unpack("<q", file.read(8))
        places[name] = (at + 8, count * kinds[name].itemsize)
        at += 8 + places[name][1]
    storages: dict[str, torch.UntypedStorage] = {}

    def stored(key: Any) -> Stored:
        dtype, name, _, view = described(key)
        if name not in storages:
            storages[name] = mapped.part(*places[name], dtype.itemsize)
        if view is None:
            return Stored(dtype, storages[name])
        _, start, count = view
        return Stored(dtype, storages[name][start * dtype.itemsize : (start + count) * dtype.itemsize])

    file.seek(content_at)
    return read_pickle(file, stored)


def no_storage(key: Any) -> Stored:
    raise PickleError("a tensor outside a torch file")
