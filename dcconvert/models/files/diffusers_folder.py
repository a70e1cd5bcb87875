"""The folder of a transformer that diffusers saved: its configuration, and the safetensors that hold its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dcconvert.models.files.built import built
from dcconvert.models.files.chosen_weights import UNUSED_HEADS, check_stored, is_averaged
from dcconvert.models.files.flattened import printable
from dcconvert.models.files.tensor_files import check_regular, plain, read_safetensors, some
from dcconvert.models.files.unquantised import unquantised
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError

MODEL_INDEX, CONFIG = "model_index.json", "config.json"
PART = re.compile(r"transformer(_?ema|_averaged)?")  # of the folder of a pipeline or of a training run
STEM, ENDING, INDEX = "diffusion_pytorch_model", ".safetensors", "safetensors.index"
OLD_CLASS = "Transformer2DModel"  # stood for two of today's classes
OLD_CLASSES = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
MOST_BLOCKS = 1000
MOST = 2**31  # of any number in a configuration
BLOCKS = re.compile(r"layers|blocks|depth")
SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass
class Folder:
    """A transformer's folder: `files` hold the weights that are read, and `passed_over` names others that lie there."""

    path: Path
    config: dict[str, Any]
    files: list[Path]
    variant: str
    passed_over: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The class of diffusers."""
        name = str(self.config.get("_class_name"))
        return OLD_CLASSES.get(str(self.config.get("norm_type")), name) if name == OLD_CLASS else printable(name[:100])

    def as_dict(self) -> dict[str, Any]:
        """For manifests and reports."""
        return {
            "files": [file.name for file in self.files],
            "variant": self.variant,
            "averaged": is_averaged(self.variant) or is_averaged(self.path.name),
            "passed_over": self.passed_over,
        }

    def lines(self) -> list[str]:
        """What was taken, and what not, for people; nothing where there was no choice."""
        averaged = " (averaged)" if self.as_dict()["averaged"] else ""
        if not (self.variant or averaged or self.passed_over):
            return []
        found = [f"Weights: {some([file.name for file in self.files])}{averaged}."]
        over = [name or "the usual file" for name in self.passed_over]
        return found + ([f"Passed over: {'; '.join(over)}."] if over else [])


def read_folder(folder: Path) -> Folder:
    """The transformer in a folder, or in a part of it; averaged weights first. UsageError for a folder without one."""
    passed_over: list[str] = []
    if not (folder / CONFIG).exists():
        parts = [part for part in sorted(folder.iterdir()) if PART.fullmatch(part.name) and (part / CONFIG).exists()]
        parts.sort(key=lambda part: not is_averaged(part.name))
        if parts:
            folder, passed_over = parts[0], [part.name for part in parts[1:]]
    config = read_config(folder)
    files, variant, others = weight_files(folder)
    return Folder(folder, config, files, variant, passed_over + others)


def read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists():
        raise UsageError(
            f"{folder} is a folder without {CONFIG}: pass a checkpoint file, or the folder of a diffusers transformer "
            "or pipeline"
        )
    return read_object(folder / CONFIG)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; UsageError for anything else."""
    try:
        check_regular(path)
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
    except (OSError, ValueError, RecursionError):
        pass
    raise UsageError(f"cannot read {path}: it is not a JSON object; save the model again")


def weight_files(folder: Path) -> tuple[list[Path], str, list[str]]:
    """The files of one set of weights, its variant ("fp16", or "" for the usual one), and the variants passed over."""
    variants: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        stem = path.name.removeprefix(f"{STEM}.")
        if path.name.endswith(".json") and stem.startswith(INDEX):
            variants[stem.removeprefix(INDEX).removesuffix("json").strip(".")] = path
        elif path.name.startswith(STEM) and path.name.endswith(ENDING) and not SHARD.search(path.stem):
            variants.setdefault(path.stem.removeprefix(STEM).strip("."), path)
    if not variants:
        there = some([path.name for path in sorted(folder.iterdir())])
        raise UsageError(f"{folder} has no {STEM}{ENDING} (there: {there}): save the model as safetensors.")
    order = ["", "fp32", "bf16", "fp16"]
    ranked = sorted(variants, key=lambda name: (not is_averaged(name), (order.index(name) if name in order else 9)))
    first = variants[ranked[0]]
    return (shards(first) if first.suffix == ".json" else [first]), ranked[0], ranked[1:]


def shards(index: Path) -> list[Path]:
    """The files of an index; UsageError unless they lie beside it."""
    named = read_object(index).get("weight_map")
    names = (
        set(named.values()) if isinstance(named, dict) and all(isinstance(v, str) for v in named.values()) else set()
    )
    if not names or any(Path(name).name != name or not name.endswith(ENDING) for name in names):
        raise UsageError(f"cannot read {index}: it does not name the files of the weights; save the model again")
    found = [index.parent / name for name in sorted(names)]
    if missing := [path.name for path in found if not path.exists()]:
        raise UsageError(
            f"{index.parent} lacks {some([printable(name) for name in missing])}, which {index.name} names."
        )
    return found


def folder_model(folder: Folder) -> nn.Module:
    """The model of a folder, in fp32 and in eval mode.

    UsageError for weights that are not there, or that do not belong to the configuration; UnsupportedModelError for
    quantised ones.
    """
    name, path, config = folder.name, folder.path, folder.config
    if quantisation := config.get("quantization_config"):
        kind = printable(str(quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation)[:40])
        raise UnsupportedModelError(
            f"{path}: its weights are quantised ({kind}): pass the folder of the model before that."
        )
    tensors: dict[str, Tensor] = {}
    for file in folder.files:
        check_regular(file)
        tensors |= read_safetensors(file)[0]
    check_stored(path, tensors)
    tensors = unquantised(path, tensors)
    check_config(path, config, tensors)
    try:
        module = built(name, config)
    except Exception as error:  # a class raises what it likes for a configuration that is none
        said = " ".join(str(error).split())[:150]
        raise UsageError(f"cannot make the {name} in {path} from its {CONFIG}: {printable(said)}") from None
    ignored = [UNUSED_HEADS.pattern, *(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())]
    wanted = {key: list(value.shape) for key, value in module.state_dict().items()}
    extra = [key for key in tensors if key not in wanted and not any(re.search(pattern, key) for pattern in ignored)]
    unsaved = {key for key, _ in module.named_buffers()}
    fit(path, name, wanted, tensors, [key for key in extra if key not in unsaved])
    module.load_state_dict({key: plain(path, key, tensors[key]) for key in wanted}, assign=True)
    return module.eval()


def fit(
    path: Path, name: str, wanted: Mapping[str, list[int]], tensors: Mapping[str, Tensor], extra: list[str]
) -> None:
    """UsageError unless the tensors are those of the class, each in its shape."""
    if missing := [key for key in wanted if key not in tensors]:
        raise UsageError(
            f"{path}: {len(missing)} tensors of {name} are missing ({some(missing)}): save the whole model."
        )
    if extra:
        raise UsageError(f"{path}: {name} with this {CONFIG} has no {some([printable(key) for key in extra])}.")
    for key, shape in wanted.items():
        if list(tensors[key].shape) != shape:
            raise UsageError(
                f"{path}: {key} is {list(tensors[key].shape)}, but by {CONFIG} it is {shape}: save the model again."
            )


def check_config(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """UsageError for numbers that the tensors do not bear out; a class makes as many blocks as it is told."""
    parts = [key.split(".") for key in tensors]
    blocks: dict[str, set[str]] = {}
    for first, second in [(key[0], key[1]) for key in parts if len(key) > 1 and key[1].isdecimal()]:
        blocks.setdefault(first, set()).add(second)
    most = min(MOST_BLOCKS, max(map(len, blocks.values()), default=0))
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        numbers = [number for number in values if isinstance(number, int | float)]
        limit = most if BLOCKS.search(name) and not isinstance(value, list) else MOST
        if bad := [number for number in numbers if not -MOST < number <= limit]:
            shown = bad[0] if abs(bad[0]) < 2**63 else "out of range"
            beside = f", but its tensors have {most} blocks" if limit == most else ""
            raise UsageError(
                f"{path}: its {CONFIG} says {printable(name[:60])} is {shown}{beside}: save the model again."
            )
