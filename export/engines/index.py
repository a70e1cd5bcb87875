"""`engines.json`: what the engines in a folder are for, and what each engine was built from."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dcconvert.export.files import file_sha256, whole_file
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.layout import Bucket

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

INDEX = "engines.json"

Record = TypeVar("Record", bound="DataclassInstance")


@dataclass(frozen=True)
class Device:
    """What engines are built for. `capability`: for example "8.9", or "" for the backend's default."""

    backend: str
    version: str
    capability: str = ""
    gpu: str = ""

    @property
    def folder(self) -> str:
        words = (
            self.backend,
            self.version,
            self.gpu,
            f"sm{self.capability.replace('.', '')}" if self.capability else "",
        )
        return "-".join(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-") for word in words if word)


@dataclass(frozen=True)
class Built:
    """A finished engine: a graph in a variant, with a profile for each of `buckets`, in this order."""

    file: str
    graph: str
    variant: str
    onnx_sha256: str
    precision: str
    buckets: tuple[Bucket, ...]
    bytes: int
    sha256: str
    seconds: float
    layers: int

    def intact(self, folder: Path) -> bool:
        """Whether its file exists unchanged."""
        path = folder / self.file
        return path.is_file() and path.stat().st_size == self.bytes and file_sha256([path]) == self.sha256


@dataclass(frozen=True)
class Index:
    """The engines of one device. `ranges`: profiles accept all lengths down to the next smaller bucket.

    `unfinished`: engines of a later build with other options, which are used once that build is complete.
    """

    device: Device
    ranges: bool
    engines: tuple[Built, ...] = ()
    unfinished: tuple[Built, ...] = ()


def read_index(folder: Path) -> Index:
    """The contents of a folder's `engines.json`; raises UsageError if it is missing or damaged."""
    path = folder / INDEX
    try:
        found = json.loads(path.read_text())
        parts = [tuple(map(built, found[name])) for name in ("engines", "unfinished")]
        return checked(Index(checked(Device(**found["device"])), found["ranges"], *parts))
    except FileNotFoundError as error:
        raise UsageError(f"{folder} has no engines: make them with 'dcconvert build'") from error
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"cannot read {path}: build the engines again with 'dcconvert build'") from None


def write_index(folder: Path, index: Index) -> None:
    with whole_file(folder / INDEX) as partial:
        partial.write_text(json.dumps(asdict(index), indent=1) + "\n")


def built(entry: dict[str, Any]) -> Built:
    if "flavour" in entry:  # the name of `variant` in older files
        entry = {("variant" if name == "flavour" else name): value for name, value in entry.items()}
    return checked(Built(**{**entry, "buckets": tuple(checked(Bucket(**sizes)) for sizes in entry["buckets"])}))


def checked(value: Record) -> Record:
    """A dataclass whose values have its declared types; raises TypeError otherwise."""
    kinds: dict[str, Any] = {"str": str, "bool": bool, "int": int, "float": (int, float)}
    for item in fields(value):
        if not isinstance(getattr(value, item.name), kinds.get(str(item.type), object)):
            raise TypeError(item.name)
    return value
