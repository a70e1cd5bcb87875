"""What the command line converts: a DiT checkpoint, or a folder with a diffusers transformer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcconvert.export.files import file_sha256
from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.models.dit_checkpoint import LoadedDiT, LoadedRefined, load_dit
from dcconvert.models.example_inputs import FLUX, dit_call, dit_inputs, flux_call, pixart_call, sd3_call, sides
from dcconvert.models.files.chosen_weights import Weights, read_weights
from dcconvert.models.files.diffusers_folder import folder_model, read_folder
from dcconvert.models.files.tensor_files import PREDICTIONS
from dcconvert.models.key_conversion import layout_of, original_model
from dcconvert.models.key_tables import Layout, Size
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.ir.spec import EXAMPLE_BATCH

MAX_SIDE_DIGITS = 5  # of a size in latent pixels
MAX_TOKENS = 2**16  # of an image for the example call


@dataclass(frozen=True)
class Source:
    """A model to convert, and what is known about it.

    `config`: of a DiT that can be sampled on the command line, else None. `facts`: name and value, for people. `notes`:
    which weights of the file were taken, and which not; `weights` the same for machines.
    """

    module: nn.Module
    example: Any  # one call's inputs: a sequence, or a mapping
    kind: str
    sha256: str
    prediction: str
    facts: Mapping[str, Any]
    config: DiTConfig | None = None
    assumed: bool = False  # what it predicts
    timestep_scale: float = 1000.0
    grid: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    weights: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dit(self) -> DiT | None:
        return self.module if isinstance(self.module, DiT) else None


def parse_size(text: str | int) -> Size:
    """Read a size written as ``64`` or, height before width, ``96x64``; UsageError for anything else."""
    parts = str(text).lower().split("x")
    good = [part.strip().isdecimal() and len(part.strip()) <= MAX_SIDE_DIGITS and int(part) > 0 for part in parts]
    if len(parts) > 2 or not all(good):
        raise UsageError(
            f"size {str(text)[:20]!r} is not a number of latent pixels: write it as 64, or 96x64 (height, width)"
        )
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 else int(parts[0])


def load_model(
    path: str | Path,
    heads: int | None = None,
    image_size: Size | None = None,
    prediction: str | None = None,
    null_class: bool | None = None,
    weights: str | None = None,
) -> nn.Module:
    """The model of a checkpoint file or a diffusers folder, in fp32 and in eval mode; errors as in `open_source`."""
    return open_source(Path(path), heads, image_size, prediction, null_class, weights).module


def open_source(
    path: Path,
    heads: int | None = None,
    image_size: Size | None = None,
    prediction: str | None = None,
    null_class: bool | None = None,
    weights: str | None = None,
) -> Source:
    """The model at `path`, in eval mode, and what to call it with.

    `heads`, `image_size`, `prediction` ("eps" or "flow") and `null_class` (whether a DiT's last class is the "no class"
    of guidance) give facts that the file does not have. `weights`: the key under which the file has them, as in "model"
    [averaged ones, if there are any]. Raises UsageError for a file that is unreadable or incomplete,
    and UnsupportedModelError for another architecture.
    """
    if prediction not in (None, *PREDICTIONS):
        raise UsageError(f"Unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}.")
    if path.is_dir():
        only_for_dits(path, null_class)
        if weights is not None:
            raise UsageError(f"{path}: --weights is for checkpoint files: pass the folder that holds the weights.")
        return diffusers_source(path, image_size, prediction)
    found = read_weights(path, weights)
    if layout := layout_of(found.tensors):
        only_for_dits(path, null_class)
        return original_source(layout, path, found, heads, image_size, prediction)
    if isinstance(image_size, tuple):
        if image_size[0] != image_size[1]:
            raise UsageError(f"{path}: a DiT checkpoint has square images: pass --image-size with one number.")
        image_size = image_size[0]
    return dit_source(load_dit(path, heads, image_size, prediction, null_class, found))


def only_for_dits(path: Path, null_class: bool | None) -> None:
    if null_class is not None:
        raise UsageError(f"{path}: --no-null-class (null_class) is for DiT checkpoints: leave it out.")


def dit_source(dit: LoadedDiT | LoadedRefined) -> Source:
    """The source of a DiT or DC-DiT from a file."""
    info, kind = dit.checkpoint_info, "DiT" if isinstance(dit, DiT) else "DC-DiT"
    facts = {**info.config.as_dict(), "predicts": info.prediction, "weights from": info.source or "the top level"}
    if info.null_class_assumed:
        facts["null_class"] = "True (assumed: the last class; change it with --no-null-class)"
    if info.weights and info.weights.stated.get("num_heads") == info.config.heads:
        facts["heads"] = f"{info.config.heads} (as the training's options say)"
    assumed = " (assumed; change it with --prediction)" if info.prediction_assumed else ""
    return Source(
        dit,
        dit_inputs(dit, EXAMPLE_BATCH),
        f"{kind} checkpoint{f' ({info.source})' if info.source else ''}, predicts {info.prediction}{assumed}",
        info.sha256,
        info.prediction,
        facts,
        info.config,
        info.prediction_assumed,
        notes=tuple(info.weights.lines() if info.weights else ()),
        weights=info.weights.as_dict() if info.weights else {},
    )


def original_source(
    layout: Layout,
    path: Path,
    weights: Weights,
    heads: int | None,
    image_size: Size | None,
    prediction: str | None,
) -> Source:
    """A checkpoint under the names of its own repository: the class of diffusers with its weights."""
    module = original_model(layout, path, weights.tensors, heads, image_size)
    where = f" ({weights.source})" if weights.source else ""
    kind = f"{layout.title} checkpoint{where}, as {layout.cls}"
    made = called(module, layout.cls, kind, file_sha256([path]), image_size, prediction)
    config: Any = module.config
    facts = dict(made.facts)
    if "interpolation_scale" in config and "pos_embed" not in weights.tensors:
        scale = f"interpolation scale {config.interpolation_scale:g}"
        facts["positions"] = f"not stored; computed for {config.sample_size} latent pixels, {scale} (assumed)"
    return replace(made, facts=facts, notes=tuple(weights.lines()), weights=weights.as_dict())


def diffusers_source(path: Path, image_size: Size | None = None, prediction: str | None = None) -> Source:
    """A transformer that diffusers saved, alone or in a pipeline's folder; only safetensors are read.

    `image_size`: in latent pixels [the model's]. UsageError for a folder without one, or one that
    cannot be read; UnsupportedModelError for a class whose inputs are not known here.
    """
    folder = read_folder(path)
    if folder.name not in CLASSES:
        raise UnsupportedModelError(
            f"{folder.path} holds a {folder.name}; supported are {', '.join(CLASSES)}. In Python, any module can be "
            "converted: dcconvert.convert(module, ratio, example_inputs=...)"
        )
    module = folder_model(folder)
    version = str(folder.config.get("_diffusers_version", ""))[:20]
    kind = f"{folder.name} of diffusers {version}".strip()
    made = called(module, folder.name, kind, file_sha256(folder.files), image_size, prediction)
    return replace(made, notes=tuple(folder.lines()), weights=folder.as_dict())


def called(module: Any, name: str, kind: str, digest: str, image_size: Size | None, prediction: str | None) -> Source:
    """The source of a module of diffusers, with a call as its pipeline would make it."""
    example, usual = CLASSES[name]
    patch = 2 if name == FLUX else module.config.patch_size
    if image_size is not None and any(side < patch or side % patch for side in sides(image_size)):
        raise UsageError(f"--image-size: each side must be a multiple of {patch}, the patch size of {name}.")
    if image_size is not None and math.prod(sides(image_size)) > MAX_TOKENS * patch**2:
        raise UsageError(f"--image-size: more than {MAX_TOKENS} tokens: pass a smaller size.")
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay what they are
        torch.default_generator.manual_seed(0)
        made = example(module.config, image_size)
    shapes = {key: list(value.shape) for key, value in made.items() if isinstance(value, Tensor)}
    counts_to_one = bool((made["timestep"] <= 1).all()) and made["timestep"].is_floating_point()
    return Source(
        module,
        {**made, "return_dict": False},
        kind,
        digest,
        prediction or usual,
        {"class": name, **{f"example {key}": str(shape) for key, shape in shapes.items()}},
        timestep_scale=1.0 if counts_to_one else 1000.0,
        grid=tuple(int(n) + 1 for n in made["img_ids"][-1, 1:]) if name == FLUX else None,  # type: ignore[arg-type]
    )


# The call of a class, and what its models predict
CLASSES: dict[str, tuple[Callable[[Any, Size | None], dict[str, Any]], str]] = {
    "DiTTransformer2DModel": (dit_call, "eps"),
    "PixArtTransformer2DModel": (pixart_call, "eps"),
    "SD3Transformer2DModel": (sd3_call, "flow"),
    FLUX: (flux_call, "flow"),
}


SHIPPED = "fashion_dit.safetensors"


def shipped_model() -> Path:
    """Path of the small trained DiT that comes with the package."""
    path = Path(str(resources.files("dcconvert") / "assets" / SHIPPED))
    if not path.is_file():
        raise UsageError(f"this installation has no {SHIPPED}: install dcconvert from a wheel or a full checkout")
    return path
