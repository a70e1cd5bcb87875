"""Weights in fewer bits: scaled fp8 is multiplied out, other kinds are refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dcconvert.passes.ir.errors import UnsupportedModelError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (".scale_weight", ".weight_scale")  # behind the name of a layer: what its fp8 weight is multiplied by
OF_FP8 = re.compile(r"(^scaled_fp8|\.(scale_weight|weight_scale|scale_input|input_scale))$")
KINDS = (
    (r"\.quant_state\.bitsandbytes__|\.absmax$|\.quant_map$", "bitsandbytes, 4 bits"),
    (r"\.(SCB|weight_format)$", "bitsandbytes, 8 bits"),
    (r"\.(qweight|qzeros|wscales|smooth_factor)$", "GPTQ, AWQ or SVDQuant"),
    (r"\.(int_data|tensor_impl|layout_tensor)\b|:(qdata|scale)$", "torchao"),
    (r"\.weight\._(data|scale|shift)$", "Quanto"),
    (r"\.(weight_scale_inv|weight_scale_2|comfy_quant)$|_packed_params", "scaled in blocks"),
)
USE_FLOATS = "pass the file with its float weights (fp32, bf16, fp16 or fp8), and quantise the result of the conversion"


def unquantised(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with scaled fp8 weights multiplied out; UnsupportedModelError, with its name, for another kind."""
    for pattern, kind in KINDS:
        if found := next((name for name in tensors if re.search(pattern, name)), None):
            raise UnsupportedModelError(f"{path}: its weights are quantised ({kind}: {found}): {USE_FLOATS}.")
    integers = [name for name, value in tensors.items() if not value.is_floating_point() and value.ndim > 1]
    if integers:
        dtype = tensors[integers[0]].dtype
        raise UnsupportedModelError(
            f"{path}: {integers[0]} is not a plain float tensor ({dtype}, as of quantised weights): {USE_FLOATS}."
        )
    made = {name: value for name, value in tensors.items() if not OF_FP8.search(name)}
    for name, value in tensors.items():
        layer, suffix = next(((name.removesuffix(end), end) for end in SCALES if name.endswith(end)), ("", ""))
        weight = made.get(f"{layer}.weight")
        if suffix and weight is not None and weight.dtype not in FP8:
            raise UnsupportedModelError(
                f"{path}: {name} is a scale, but the weight is not fp8 ({weight.dtype}): {USE_FLOATS}."
            )
        if suffix and weight is not None:
            made[f"{layer}.weight"] = multiplied(path, name, weight, value)
    return made


def multiplied(path: Path, name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """A weight times one scale, or one scale for each row."""
    if scale.numel() == 1:
        return weight.float() * scale.float().reshape(())
    if scale.numel() == len(weight):
        return weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))
    raise UnsupportedModelError(
        f"{path}: {name} has {scale.numel()} scales for a weight of {list(weight.shape)} (blocks): {USE_FLOATS}."
    )
