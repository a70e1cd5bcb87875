"""The files that checkpoints come in: recognised by content, read without running any code in them.

Only regular files are opened: reading a pipe or a device may never end.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dcconvert.models.files.torch_file import SAVE_PLAINLY, read_torch
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError

PREDICTIONS = ("eps", "flow")
METADATA_KEY = "dcconvert"  # safetensors metadata entry that holds what shapes cannot tell, as JSON
MAX_SHOWN = 150  # characters of a name in a message
MAX_HEADER = 100_000_000  # bytes; the safetensors format allows no longer JSON header


@dataclass
class Facts:
    """What a file says about itself beyond its tensors; all empty for torch files."""

    config: dict[str, int] = field(default_factory=dict)
    prediction: str | None = None
    class_names: list[str] | None = None


def read_file(path: Path) -> tuple[Any, Facts]:
    """Whatever the file holds (for a checkpoint: a dict, perhaps nested), and its metadata."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    if not head:
        raise UsageError(f"{path} is empty: download or save it again.")
    if head.startswith(b"PK\x03\x04"):
        return read_torch(path), Facts()
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):  # PROTO opcode of a pickle
        return read_torch(path), Facts()
    if head[257:262] == b"ustar":
        raise UsageError(f"{path} is a tar file, which torch cannot read without running code; {SAVE_PLAINLY}.")
    header_size = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_size <= MAX_HEADER:
        return read_safetensors(path)
    if head.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path} is a Git LFS pointer, not the checkpoint: run `git lfs pull`.")
    raise UsageError(f"{path} is not a checkpoint (it starts with {head[:8]!r}): pass a torch or safetensors file.")


def check_regular(path: Path) -> None:
    """UsageError for what is no regular file, and OSError for what cannot be looked at."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: check the path.") from None
    except ValueError as error:  # a path with a null character
        raise UsageError(f"{str(path)!r} is no path ({error}).") from None
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path} is a folder: pass the checkpoint file inside it.")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is a pipe, device or socket: pass a regular file.")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], Facts]:
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
    if 8 + header_size > path.stat().st_size:
        raise UsageError(
            f"{path} is truncated or damaged: its safetensors header is cut off; download or save it again."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors and torch raise what they like for a damaged file
        raise UsageError(f"{path} is truncated or damaged ({_first_line(error)}); download or save it again.") from None
    return tensors, _parse_metadata(path, metadata.get(METADATA_KEY, "{}"))


def _parse_metadata(path: Path, text: str) -> Facts:
    try:
        entry = json.loads(text)
        config = {str(name): int(value) for name, value in entry.get("config", {}).items()}
        names = entry.get("class_names")
        facts = Facts(config, entry.get("prediction"), None if names is None else [str(name) for name in names])
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"{path}: metadata {METADATA_KEY!r} is malformed ({_first_line(error)}).") from None
    if facts.prediction not in (None, *PREDICTIONS):
        raise UsageError(
            f"{path}: metadata has prediction {facts.prediction!r}, supported are {', '.join(PREDICTIONS)}."
        )
    return facts


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def plain(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor as contiguous fp32, checked to be finite; it stays mapped to the file where it was that."""
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
        kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
        raise UnsupportedModelError(f"{path}: {name} is not a plain float tensor ({kind}): save it as float32.")
    plain = tensor.detach().float().contiguous()
    if not torch.isfinite(plain).all():
        bad = int((~torch.isfinite(plain)).sum())
        raise UsageError(
            f"{path}: {name} has {bad} NaN or infinite values (of {plain.numel()}): use another checkpoint."
        )
    return plain


def some(names: Collection[str]) -> str:
    """The first three names, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..." for name in list(names)[:3]) + rest
