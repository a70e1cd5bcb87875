"""The bundle: the output folder of a conversion, written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dcconvert.export import schemas
from dcconvert.export.buckets import BucketSet
from dcconvert.export.disk.hashes import LISTED, add_to_list, files_in, unchanged
from dcconvert.export.disk.interrupts import uninterrupted
from dcconvert.export.disk.json_text import part_of_folder
from dcconvert.export.disk.onnx_files import checked_onnx
from dcconvert.export.disk.targets import current_umask, locked, real_place, said
from dcconvert.export.files import ADDED, MANIFEST, matches, read_json, write_json
from dcconvert.export.schemas import fitting
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.serialise.graph_json import model_from_dict, model_tensors, model_to_dict
from dcconvert.passes.serialise.treespec import shown

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
    """Load a bundle; raises UsageError if the folder is not a bundle, is damaged, or has another format version.

    Nothing in it is trusted (docs/trust.md).
    """
    manifest = read_manifest(folder)
    bucket_set = manifest_buckets(manifest)
    listed = manifest.get(LISTED, {})
    weights = unchanged(folder, listed, WEIGHTS)
    path = unchanged(folder, listed, GRAPH)
    graph = fitting(read_json(path), schemas.GRAPH, path)
    try:
        tensors = load_file(str(weights))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read {weights}: {said(error)}; convert the model again") from error
    model = model_from_dict(graph, tensors)
    if bucket_set.tokens != model.spec.tokens:
        raise UsageError(
            f"{folder / MANIFEST}: buckets.tokens is {bucket_set.tokens}, but must be {model.spec.tokens} as in "
            f"{GRAPH}; convert the model again"
        )
    return Bundle(folder, manifest, model, bucket_set)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of a bundle holds; UsageError if the folder is not a bundle that can be read."""
    try:
        there = (folder / MANIFEST).exists()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {folder}: {said(error)}; name another bundle") from error
    if not there:
        raise UsageError(f"{folder} is not a bundle (no {MANIFEST}): make one with 'dcconvert MODEL --ratio 4x'")
    path = part_of_folder(folder, MANIFEST)
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise UsageError(f"cannot read {path}: it is not a JSON object; convert the model again")
    version = manifest.get("format_version")
    if type(version) is not int or version not in READABLE:
        raise UsageError(
            f"{folder} has bundle format {shown(version)}, but this dcconvert reads {FORMAT_VERSION}: convert again"
        )
    return dict(fitting(manifest, schemas.MANIFEST, path))


@dataclass(frozen=True)
class Verified:
    """What was found in a bundle: how many files are what its manifest lists, what is wrong with others, and which
    files are not listed. `listed`: whether there is a list at all, which older bundles have not."""

    listed: bool
    same: int
    wrong: tuple[str, ...]
    others: tuple[str, ...]


def verify(folder: Path) -> Verified:
    """Compare every file of a bundle with the manifest's list, and check its graphs as every command does.

    UsageError if the folder is not a bundle, or for the first fault of its graphs if all its files are as listed.
    """
    manifest = read_manifest(folder)
    files = manifest.get(LISTED, {})
    wrong = []
    for name in files:
        try:
            unchanged(folder, files, name, whole=True)
        except UsageError as error:
            wrong.append(str(error))
    there = sorted(set(files_in(folder)) - {MANIFEST})
    if not wrong:
        read_bundle(folder)
        for name in there:
            if matches(name, ("onnx/*.onnx", "onnx/*/*.onnx")):
                checked_onnx(part_of_folder(folder, name))
    others = tuple(name for name in there if name not in files)
    return Verified(LISTED in manifest, len(files) - len(wrong), tuple(wrong), others)


@contextmanager
def adding_to(folder: Path) -> Iterator[None]:
    """Add files to a bundle, one by one: it is locked, and at the end its manifest lists what is new.

    UsageError at once if it cannot be written or another run is writing it.
    """
    place = real_place(folder)
    with locked(place):
        if not os.access(place, os.W_OK):
            raise UsageError(f"{folder} may not be written: copy it to another place")
        try:
            yield
        except OSError as error:
            raise UsageError(f"writing into {folder} failed: {said(error)}; the bundle is as it was") from error
        finally:
            with uninterrupted():
                add_to_list(place, [path for path in files_in(place) if matches(path, ADDED)])


def manifest_buckets(manifest: dict[str, Any]) -> BucketSet:
    """The buckets of a manifest; raises UsageError if it has none."""
    return BucketSet.from_dict(manifest.get("buckets", manifest.get("ladder", {})))  # "ladder" up to format 3
