"""Checkpoints of DC-DiT's release: which weights they must hold, and the module they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dcconvert.models.dc_dit import NARROW, RefinedConfig, RefinedDiT
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from dcconvert.passes.planning.planners import SmoothedPlanner

BLOCKS = "hnet.main_network.main_network.layers."
INNER = "hnet.main_network.main_network.main_network."  # of a model of more than one stage
# What tells the architecture, and how many dimensions each has.
DIMENSIONS = {
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "pos_embed": 3,
    "final_layer.linear.weight": 2,
}


def is_refined(names: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint is one of DC-DiT."""
    return any(name.startswith("hnet.") for name in names)


def refined_config(
    path: Path, tensors: Mapping[str, Tensor], choose_heads: Callable[[int], int], null_class: bool = True
) -> RefinedConfig:
    """The architecture of a DC-DiT checkpoint; UsageError or UnsupportedModelError for one that is not whole or other.

    `choose_heads` gives the attention heads for a width. `null_class`: whether the last class is that of guidance; a
    single class never is.
    """
    if any(name.startswith(INNER) for name in tensors):
        raise UnsupportedModelError(f"{path}: a DC-DiT with more than one stage; only one stage is supported.")
    blocks = {name.removeprefix(BLOCKS).split(".")[0] for name in tensors if name.startswith(BLOCKS)}
    if odd := sorted(blocks - {str(number) for number in range(len(blocks))}):
        raise UsageError(f"{path}: {BLOCKS}{odd[0]} is not one of {len(blocks)} blocks: save the whole state dict.")
    hidden = f"{BLOCKS}0.mlp.fc1.weight"
    if missing := [name for name in (*DIMENSIONS, hidden) if name not in tensors]:
        raise UsageError(f"{path}: a DC-DiT without the keys {', '.join(missing)}: save the whole state dict.")
    for name, dimensions in (*DIMENSIONS.items(), (hidden, 2)):
        if tensors[name].dim() != dimensions or not tensors[name].numel():
            raise UsageError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, in a DC-DiT it has {dimensions} dimensions."
            )
    pixels, table, positions, output = (tensors[name].shape for name in DIMENSIONS)
    side = math.isqrt(positions[1])
    if side**2 != positions[1]:
        raise UnsupportedModelError(
            f"{path}: pos_embed has {positions[1]} positions, but only square grids are supported."
        )
    width, narrow = int(table[1]), int(pixels[0])
    if width < 4 or width % 4:  # positions are sines and cosines of two coordinates
        raise UsageError(f"{path}: width {width} is not a multiple of 4, as a DC-DiT needs.")
    if narrow > width:
        raise UsageError(f"{path}: width {width} with convolutions of {narrow} is not that of a DC-DiT.")
    null_class = null_class and int(table[0]) > 1
    return RefinedConfig(
        depth=len(blocks),
        width=width,
        heads=choose_heads(width),
        image_size=side,
        in_channels=int(pixels[1]),
        num_classes=int(table[0]) - null_class,
        null_class=null_class,
        learn_sigma=int(output[0]) == 2 * int(pixels[1]),
        mlp_width=int(tensors[hidden].shape[0]),
        adapter="hnet.condition.weight" in tensors,
        narrow_width=0 if narrow == width // NARROW else narrow,
    )


def check_sigma(path: Path, stated: float | None, config: RefinedConfig) -> None:
    """UsageError if the training's options say another width of the dechunk's Gaussian than the one that is used."""
    used = SmoothedPlanner((config.image_size, config.image_size), members=1, neighbours=1).sigma
    if stated is not None and not math.isclose(stated, used):
        side = config.image_size
        raise UsageError(
            f"{path}: its dechunk_kernel_sigma is {stated:g}, but at {side}x{side} tokens only {used:g} is supported."
        )


def check_refined(path: Path, tensors: Mapping[str, Tensor], config: RefinedConfig) -> None:
    """UsageError unless the tensors are those of a DC-DiT, all of them, in their shapes."""
    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in RefinedDiT(config).state_dict().items()}
    missing = [name for name in shapes if name not in tensors]
    extra = [name for name in tensors if name not in shapes]
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {shape}"
        for name, shape in shapes.items()
        if name in tensors and list(tensors[name].shape) != shape
    ]
    for problem, found in (
        ("missing keys", missing),
        ("keys that a DC-DiT does not have", extra),
        ("wrong shapes", wrong),
    ):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UsageError(f"{path}: {problem}: {', '.join(found[:3])}{more}.")
