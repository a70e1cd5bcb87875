"""What the command line converts: a DiT checkpoint, or a folder with a diffusers transformer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcconvert.export.files import file_sha256
from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.models.dit_checkpoint import load_dit
from dcconvert.models.example_inputs import FLUX, Size, dit_call, dit_inputs, flux_call, pixart_call, sd3_call, sides
from dcconvert.models.key_conversion import layout_of, original_model
from dcconvert.models.key_tables import Layout, Tensors
from dcconvert.models.tensor_files import PREDICTIONS, named_tensors
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.ir.spec import EXAMPLE_BATCH

MODEL_INDEX, CONFIG = "model_index.json", "config.json"
PART = "transformer"  # of a pipeline folder


@dataclass(frozen=True)
class Source:
    """A model to convert, and what is known about it.

    `config`: of a DiT that can be sampled on the command line, else None. `facts`: name and value, for people.
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

    @property
    def dit(self) -> DiT | None:
        return self.module if isinstance(self.module, DiT) else None


def parse_size(text: str | int) -> Size:
    """Read a size written as ``64`` or, height before width, ``96x64``; UsageError for anything else."""
    parts = str(text).lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UsageError(f"size {text!r} is not a number of latent pixels: write it as 64, or 96x64 (height, width)")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 else int(parts[0])


def load_model(
    path: str | Path, heads: int | None = None, image_size: Size | None = None, prediction: str | None = None
) -> nn.Module:
    """The model of a checkpoint file or a diffusers folder, in fp32 and in eval mode; errors as in `open_source`."""
    return open_source(Path(path), heads, image_size, prediction).module


def open_source(
    path: Path, heads: int | None = None, image_size: Size | None = None, prediction: str | None = None
) -> Source:
    """The model at `path`, in eval mode, and what to call it with.

    `heads`, `image_size` and `prediction` ("eps" or "flow") give facts that the file does not have. Raises UsageError
    for a file that is unreadable or incomplete, and UnsupportedModelError for another architecture.
    """
    if prediction not in (None, *PREDICTIONS):
        raise UsageError(f"Unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}.")
    if path.is_dir():
        return diffusers_source(path, image_size, prediction)
    tensors, where, _ = named_tensors(path)
    if layout := layout_of(tensors):
        return original_source(layout, path, tensors, where, heads, image_size, prediction)
    del tensors
    if isinstance(image_size, tuple):
        if image_size[0] != image_size[1]:
            raise UsageError(f"{path}: a DiT checkpoint has square images: pass --image-size with one number.")
        image_size = image_size[0]
    dit = load_dit(path, heads=heads, image_size=image_size, prediction=prediction)
    info, kind = dit.checkpoint_info, "DiT" if isinstance(dit, DiT) else "DC-DiT"
    assumed = " (assumed; change it with --prediction)" if info.prediction_assumed else ""
    facts = {**info.config.as_dict(), "predicts": info.prediction, "weights from": info.source or "the top level"}
    return Source(
        dit,
        dit_inputs(dit, EXAMPLE_BATCH),
        f"{kind} checkpoint{f' ({info.source})' if info.source else ''}, predicts {info.prediction}{assumed}",
        info.sha256,
        info.prediction,
        facts,
        info.config,
        info.prediction_assumed,
    )


def original_source(
    layout: Layout,
    path: Path,
    tensors: Tensors,
    where: str,
    heads: int | None,
    image_size: Size | None,
    prediction: str | None,
) -> Source:
    """A checkpoint under the names of its own repository: the class of diffusers with its weights."""
    module = original_model(layout, path, tensors, heads)
    kind = f"{layout.title} checkpoint{f' ({where})' if where else ''}, as {layout.cls}"
    return called(module, layout.cls, kind, file_sha256([path]), image_size, prediction)


def diffusers_source(folder: Path, image_size: Size | None = None, prediction: str | None = None) -> Source:
    """A transformer that diffusers saved, alone or in a pipeline's folder; only safetensors are read.

    `image_size`: in latent pixels [the model's]. UsageError for a folder without one, or one that
    cannot be read; UnsupportedModelError for a class whose inputs are not known here.
    """
    if (folder / MODEL_INDEX).is_file():
        folder = folder / PART
    config = read_config(folder)
    name = str(config.get("_class_name"))
    if name not in CLASSES:
        raise UnsupportedModelError(
            f"{folder} holds a {name}; supported are {', '.join(CLASSES)}. In Python, any module can be "
            "converted: dcconvert.convert(module, ratio, example_inputs=...)"
        )
    module = loaded(folder, name)
    kind = f"{name} of diffusers {config.get('_diffusers_version', '')}".strip()
    return called(module, name, kind, file_sha256(sorted(folder.glob("*.safetensors"))), image_size, prediction)


def called(module: Any, name: str, kind: str, digest: str, image_size: Size | None, prediction: str | None) -> Source:
    """The source of a module of diffusers, with a call as its pipeline would make it."""
    example, usual = CLASSES[name]
    patch = 2 if name == FLUX else module.config.patch_size
    if image_size is not None and any(side < patch or side % patch for side in sides(image_size)):
        raise UsageError(f"--image-size: each side must be a multiple of {patch}, the patch size of {name}.")
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


def read_config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text())
        if isinstance(found, dict):
            return found
    except FileNotFoundError:
        raise UsageError(
            f"{folder} is a folder without {CONFIG}: pass a checkpoint file, or the folder of a diffusers transformer "
            "or pipeline"
        ) from None
    except (OSError, ValueError):
        pass
    raise UsageError(f"cannot read {folder / CONFIG}: it is not a JSON object; save the model again")


def loaded(folder: Path, name: str) -> Any:
    """The model of a folder, in fp32 and eval mode."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    try:
        module = getattr(diffusers, name).from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
        )
    except Exception as error:  # diffusers, safetensors and the system raise what they like
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"cannot load the {name} in {folder}: {reason}") from error
    return module.eval()


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
