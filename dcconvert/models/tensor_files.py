"""The files that checkpoints come in: recognised by content, read without running any code in them.

Torch files are read with `weights_only=True`; what is neither tensors nor plain data is refused.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError

PREDICTIONS = ("eps", "flow")
METADATA_KEY = "dcconvert"  # safetensors metadata entry that holds what shapes cannot tell, as JSON
MAX_HEADER = 100_000_000  # bytes; the safetensors format allows no longer JSON header
NESTING = ("ema", "model", "state_dict")  # averaged weights first: they are what people sample from
SAVE_PLAINLY = "save model.state_dict() with torch.save, or as safetensors, and pass that file"


@dataclass
class Facts:
    """What a file says about itself beyond its tensors; all empty for torch files."""

    config: dict[str, int] = field(default_factory=dict)
    prediction: str | None = None
    class_names: list[str] | None = None


def read_file(path: Path) -> tuple[Any, Facts]:
    """Whatever the file holds (for a checkpoint: a dict, perhaps nested), and its metadata."""
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder: pass the checkpoint file inside it.")
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: check the path.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    if not head:
        raise UsageError(f"{path} is empty: download or save it again.")
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return _read_torch(path, mmap=True), Facts()
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):  # PROTO opcode of a pickle
        return _read_torch(path, mmap=False), Facts()
    if head[257:262] == b"ustar":
        raise UsageError(f"{path} is a tar file, which torch cannot read without running code; {SAVE_PLAINLY}.")
    header_size = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_size <= MAX_HEADER:
        return _read_safetensors(path, header_size)
    if head.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path} is a Git LFS pointer, not the checkpoint: run `git lfs pull`.")
    raise UsageError(f"{path} is not a checkpoint (it starts with {head[:8]!r}): pass a torch or safetensors file.")


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [Path(name).name for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError):
        raise UsageError(
            f"{path} is truncated or damaged: its zip directory is missing; download or save it again."
        ) from None
    if "constants.pkl" in entries:
        raise UsageError(f"{path} is a TorchScript archive, not a checkpoint; {SAVE_PLAINLY}.")
    if "archive_format" in entries:
        raise UsageError(
            f"{path} is an exported program, which may contain code that torch.export.load runs: if you trust "
            "it, use dcconvert.convert(torch.export.load(path), ratio=4) in Python."
        )
    if "data.pkl" not in entries:
        raise UsageError(f"{path} is a zip file but not a torch checkpoint (no data.pkl in it); {SAVE_PLAINLY}.")


def _read_torch(path: Path, mmap: bool) -> Any:
    """Read a torch file, letting in no class but argparse.Namespace (training scripts store their options)."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the pickled code {name[1]}" if name else "pickled objects that are not tensors"
        raise UsageError(f"{path} holds {what}, which dcconvert does not run; {SAVE_PLAINLY}.") from None
    except Exception as error:  # a damaged file can fail anywhere inside torch
        raise UsageError(f"{path} is truncated or damaged ({_first_line(error)}); download or save it again.") from None


def _read_safetensors(path: Path, header_size: int) -> tuple[dict[str, Tensor], Facts]:
    if 8 + header_size > path.stat().st_size:
        raise UsageError(
            f"{path} is truncated or damaged: its safetensors header is cut off; download or save it again."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} is truncated or damaged ({_first_line(error)}); download or save it again.") from None
    return tensors, _parse_metadata(path, metadata.get(METADATA_KEY, "{}"))


def _parse_metadata(path: Path, text: str) -> Facts:
    try:
        entry = json.loads(text)
        config = {str(name): int(value) for name, value in entry.get("config", {}).items()}
        names = entry.get("class_names")
        facts = Facts(config, entry.get("prediction"), None if names is None else [str(name) for name in names])
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: metadata {METADATA_KEY!r} is malformed ({_first_line(error)}).") from None
    if facts.prediction not in (None, *PREDICTIONS):
        raise UsageError(
            f"{path}: metadata has prediction {facts.prediction!r}, supported are {', '.join(PREDICTIONS)}."
        )
    return facts


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


# --- tensors -------------------------------------------------------------------------------------------


def named_tensors(path: Path) -> tuple[dict[str, Tensor], str, Facts]:
    """A file's tensors by name, the dotted key they were under, and its metadata; UsageError for one without any."""
    content, facts = read_file(path)
    found, source = _find_tensors(content)
    if not found:
        raise UsageError(f"{path}: holds no named tensors ({_describe(content)}); {SAVE_PLAINLY}.")
    return _strip_wrappers(path, found), source, facts


def _find_tensors(content: Any, source: str = "") -> tuple[dict[str, Tensor], str]:
    """The named tensors, from the first of NESTING that has any, and the dotted key they were under."""
    if not isinstance(content, Mapping):
        return {}, source
    for key in NESTING:
        found, where = _find_tensors(content.get(key), f"{source}.{key}".lstrip("."))
        if found:
            return found, where
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}, source


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"found a {type(content).__name__}"
    return f"top-level keys: {some([str(key) for key in content])}" if content else "found an empty dict"


def _strip_wrappers(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop what DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) put into the names."""
    stripped = {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): t for name, t in tensors.items()}
    if len(stripped) != len(tensors):
        raise UsageError(f"{path}: some tensors appear twice, with and without a `module.` prefix; {SAVE_PLAINLY}.")
    return stripped


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
    return ", ".join(list(names)[:3]) + rest
