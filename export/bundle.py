"""The bundle: the folder one conversion leaves behind, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dcconvert.export.buckets import Ladder
from dcconvert.passes.errors import UsageError
from dcconvert.passes.model import ChunkedModel
from dcconvert.passes.serialise import model_from_dict, model_tensors, model_to_dict

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
GRAPH = "graph.json"
ONNX = "onnx"


@dataclass
class Bundle:
    """A bundle read back from disk."""

    folder: Path
    manifest: dict[str, Any]
    model: ChunkedModel
    ladder: Ladder

    @property
    def onnx(self) -> Path:
        return self.folder / ONNX


@contextmanager
def new_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends without an error.

    Raises UsageError if the target exists (and `force` is off) or cannot be written beside.
    """
    target = target.absolute()
    if target.exists() and not force:
        raise UsageError(f"{target} exists already: choose another folder with -o, or replace it with --force")
    if target.exists() and not (target.is_dir() and ((target / MANIFEST).exists() or not any(target.iterdir()))):
        raise UsageError(f"{target} is no bundle and will not be replaced: choose another folder with -o")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UsageError(f"cannot write beside {target}: {error.strerror or error}; choose another folder with -o") from error
    try:
        yield work
        work.chmod(0o777 & ~current_umask())
        if target.exists():
            shutil.rmtree(target)
        os.replace(work, target)
    except OSError as error:
        raise UsageError(f"writing {target} failed: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_model(model: ChunkedModel, folder: Path) -> None:
    """Weights and graphs of a model, in forms that load without pickle."""
    save_file(model_tensors(model), str(folder / WEIGHTS))
    write_json(model_to_dict(model), folder / GRAPH)


def write_json(data: Any, path: Path) -> None:
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_bundle(folder: Path) -> Bundle:
    """Load a bundle; UsageError if the folder is none, was damaged, or is of another format version."""
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        raise UsageError(f"{folder} is not a bundle (no {MANIFEST}): make one with 'dcconvert MODEL --ratio 4x'")
    manifest = read_json(manifest_path)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise UsageError(f"{folder} has bundle format {version}, this dcconvert reads {FORMAT_VERSION}: convert again")
    try:
        tensors = load_file(str(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read {folder / WEIGHTS}: {error}; convert the model again") from error
    model = model_from_dict(read_json(folder / GRAPH), tensors)
    return Bundle(folder, manifest, model, Ladder.from_dict(manifest.get("ladder", {})))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}; convert the model again") from error
