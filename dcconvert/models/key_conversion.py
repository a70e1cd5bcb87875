"""Checkpoints of Stable Diffusion 3, FLUX and PixArt under the names of their own repositories."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from dcconvert.models.dit_checkpoint import choose_heads
from dcconvert.models.files.built import built
from dcconvert.models.files.diffusers_folder import MOST_BLOCKS
from dcconvert.models.files.tensor_files import plain, some
from dcconvert.models.key_tables import LAYOUTS, Layout, Size, SizeNeededError, Tensors
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError

POSITIONS = "pos_embed.pos_embed"
SAVE_WHOLE = "save the whole state dict"


def layout_of(tensors: Tensors) -> Layout | None:
    """The layout that a file's tensors have, if it is one of these."""
    return next((layout for layout in LAYOUTS if layout.marker in tensors), None)


def original_model(
    layout: Layout, path: Path, tensors: Tensors, heads: int | None = None, image: Size | None = None
) -> nn.Module:
    """The module of diffusers with a file's weights, in fp32 and in eval mode.

    `heads`, `image` (latent pixels): for models whose tensors do not tell. UsageError for missing tensors and for
    shapes that do not belong together, UnsupportedModelError for tensors that the class does not have.
    """
    try:
        width = len(tensors[layout.patches])
        size = layout.head_size(tensors)
        heads = heads or (width // size if size else None)
        config = layout.config(tensors, width, choose_heads(path, width, heads), image)
        if (
            max(value for name, value in config.items() if name.endswith("_layers") and type(value) is int)
            > MOST_BLOCKS
        ):
            raise ValueError(f"more than {MOST_BLOCKS} blocks")
        module: Any = built(layout.cls, config)
    except SizeNeededError as error:
        raise UsageError(f"{path}: {error}") from None
    except KeyError as error:
        raise UsageError(f"{path}: {error.args[0]} is missing: {SAVE_WHOLE}.") from None
    except (IndexError, TypeError, ValueError, ZeroDivisionError, OverflowError, RuntimeError) as error:
        what = " ".join(str(error).split())[:120]
        raise UsageError(f"{path}: wrong shapes: its tensors do not make one {layout.title} ({what}).") from None
    found = renamed(layout, path, tensors, width)
    check(layout, path, module, found)
    found = {name: plain(path, name, value) for name, value in found.items()}
    if POSITIONS in found and POSITIONS not in module.state_dict():  # a buffer that diffusers does not save
        module.pos_embed.pos_embed = found.pop(POSITIONS)
    module.load_state_dict(found, assign=True)
    return cast(nn.Module, module.eval())


def renamed(layout: Layout, path: Path, tensors: Tensors, width: int) -> dict[str, Tensor]:
    """The tensors under the names of diffusers; UnsupportedModelError for those that have none."""
    table = dict(line.split(": ") for line in layout.names.split("\n") if line)
    made: dict[str, Tensor] = {}
    unknown = []
    for name, value in tensors.items():
        module, kind = split_name(name)
        if value.ndim == 0:
            raise UsageError(
                f"{path}: wrong shapes: {name} is a single number; its tensors do not make one {layout.title}."
            )
        block = re.fullmatch(r"(\w*blocks)\.(\d+)\.(.+)", module)
        new = table.get(f"{block[1]}.#.{block[3]}" if block else module)
        if new is None:
            unknown += [] if name in layout.ignored else [name]
            continue
        stem, parts = new.split("#.") if block else ("", new)
        names = [f"{stem}{block[2]}.{part}{kind}" if block else part + kind for part in parts.split("|")]
        if "modulation" in module and len(value) == 2 * width:
            value = value.roll(width, 0)  # shift and scale
        rest = len(value) - width * (len(names) - 1)
        if rest < 0:
            raise UsageError(
                f"{path}: wrong shapes: {name} is {list(value.shape)}, too few rows for {len(names)} parts of {width}; "
                f"its tensors do not make one {layout.title}."
            )
        made |= zip(names, value.split([width] * (len(names) - 1) + [rest]) if len(names) > 1 else [value], strict=True)
    if unknown:
        raise UnsupportedModelError(
            f"{path}: looks like a variant of {layout.title}: {layout.cls} of diffusers does not have "
            f"{len(unknown)} of its tensors ({some(unknown)}). Pass such a model to dcconvert.convert() in Python."
        )
    return made


def split_name(name: str) -> tuple[str, str]:
    """A tensor's module, and what diffusers has it as in there: ".weight", ".bias", or "" for a bare tensor."""
    module, dot, kind = name.rpartition(".")
    return (module, {"scale": ".weight"}.get(kind, dot + kind)) if kind in ("weight", "bias", "scale") else (name, "")


def check(layout: Layout, path: Path, module: nn.Module, found: Tensors) -> None:
    """Raise UsageError unless these are the module's tensors, each of its shape."""
    wanted = {name: list(value.shape) for name, value in module.state_dict().items()}
    if missing := sorted(wanted.keys() - found.keys()):
        raise UsageError(f"{path}: {len(missing)} tensors of {layout.cls} are missing ({some(missing)}): {SAVE_WHOLE}.")
    wrong = [name for name, shape in wanted.items() if list(found[name].shape) != shape]
    if extra := sorted(found.keys() - wanted.keys() - {POSITIONS}):
        raise UnsupportedModelError(
            f"{path}: {layout.cls} of diffusers has no {some(extra)}: this variant is not supported."
        )
    if wrong:
        name = wrong[0]
        raise UsageError(
            f"{path}: wrong shapes: {name} is {list(found[name].shape)}, expected {wanted[name]}; its tensors do not "
            f"make one {layout.title}."
        )
