"""The bundle: the output folder of a conversion, written completely or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dcconvert.export.buckets import BucketSet
from dcconvert.export.files import MANIFEST, current_umask, read_json, write_json
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.serialise.graph_json import model_from_dict, model_tensors, model_to_dict

FORMAT_VERSION = 4
READABLE = (2, 3, FORMAT_VERSION)
WEIGHTS = "model.safetensors"
GRAPH = "graph.json"
ONNX = "onnx"


@dataclass
class Bundle:
    """A bundle read back from disk."""

    folder: Path
    manifest: dict[str, Any]
    model: DynamicModel
    bucket_set: BucketSet

    @property
    def onnx(self) -> Path:
        return self.folder / ONNX


def write_model(model: DynamicModel, folder: Path) -> None:
    """Weights and graphs of a model, in forms that load without pickle."""
    save_file(model_tensors(model), str(folder / WEIGHTS))
    (folder / WEIGHTS).chmod(0o666 & ~current_umask())  # safetensors makes it readable by its owner only
    write_json(model_to_dict(model), folder / GRAPH)


def read_bundle(folder: Path) -> Bundle:
    """Load a bundle; raises UsageError if the folder is not a bundle, is damaged, or has another format version."""
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        raise UsageError(f"{folder} is not a bundle (no {MANIFEST}): make one with 'dcconvert MODEL --ratio 4x'")
    manifest = read_json(manifest_path)
    if not isinstance(manifest, dict):
        raise UsageError(f"cannot read {manifest_path}: it is not a JSON object; convert the model again")
    version = manifest.get("format_version")
    if type(version) is not int or version not in READABLE:
        raise UsageError(
            f"{folder} has bundle format {version}, but this dcconvert reads {FORMAT_VERSION}: convert again"
        )
    try:
        tensors = load_file(str(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read {folder / WEIGHTS}: {error}; convert the model again") from error
    model = model_from_dict(read_json(folder / GRAPH), tensors)
    return Bundle(folder, manifest, model, manifest_buckets(manifest))


def manifest_buckets(manifest: dict[str, Any]) -> BucketSet:
    """The buckets of a manifest; raises UsageError if it has none."""
    return BucketSet.from_dict(manifest.get("buckets", manifest.get("ladder", {})))  # "ladder" up to format 3
