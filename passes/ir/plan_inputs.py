"""The inputs of `denoise` that come from a step's plan: one table of their names, axes and types.

Axes, with the letters that docstrings use: `tiles` G and `tile_tokens` L of the packed tokens, `rows` R and
`row_tokens` S of the attention grid, `batch` B, `tokens` N of the grid, `segments` of the packed axis. Others are the
same in every step of a model: `members` M of a chunk, `neighbours` K of a grid position, `slots` P of a state, and
`address`, the four numbers that locate a value in a state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MODEL = None  # the type of the model's tokens


@dataclass(frozen=True)
class PlanInput:
    """One input: its axes, and its type; MODEL stands for that of the model's tokens."""

    axes: tuple[str, ...]
    dtype: torch.dtype | None = torch.int64


LAYOUT_INPUTS = {
    "sample_ids": PlanInput(("tiles",)),
    "packed_index": PlanInput(("tiles", "tile_tokens")),
    "grid_index": PlanInput(("rows", "row_tokens")),
}
CHUNK_INPUTS = {
    "chunk_index": PlanInput(("tiles", "tile_tokens", "members")),
    "chunk_weight": PlanInput(("tiles", "tile_tokens", "members"), MODEL),
    **LAYOUT_INPUTS,
    "row_lengths": PlanInput(("rows",)),
    "segment_ids": PlanInput(("rows", "row_tokens")),
    "fill_index": PlanInput(("batch", "tokens", "neighbours")),
    "fill_weight": PlanInput(("batch", "tokens", "neighbours"), MODEL),
    "cu_seqlens": PlanInput(("segments",), torch.int32),
}
CARRY_INPUTS = {
    "token_index": PlanInput(("tiles", "tile_tokens")),
    **LAYOUT_INPUTS,
    "write_index": PlanInput(("tiles", "tile_tokens", "address")),
    "recall_weight": PlanInput(("slots", "batch", "tokens"), MODEL),
}
# Bounds of the keys' segments, which only the ONNX form of packed attention reads.
KEY_SEGMENTS = {"cu_seqlens_kv": PlanInput(("segments",), torch.int32)}
PLAN_INPUTS = {**CHUNK_INPUTS, **CARRY_INPUTS, **KEY_SEGMENTS}

SYMBOLIC = ("tiles", "tile_tokens", "rows", "row_tokens", "batch", "segments")  # axes that differ from step to step


def symbolic_axes(name: str) -> tuple[str, ...]:
    """The names of an input's symbolic axes, with "" for a fixed axis before them; fixed axes at the end are left
    out."""
    axes = [axis if axis in SYMBOLIC else "" for axis in PLAN_INPUTS[name].axes]
    while axes and not axes[-1]:
        axes.pop()
    return tuple(axes)
