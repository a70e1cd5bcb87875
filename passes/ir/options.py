"""What the user may choose about the rewriting."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Options:
    """What the user may choose about the rewriting; defaults are the measured best (docs/carry.md, docs/choices.md).

    `members`, `neighbours`, `coverage` and `packing` are of mode chunk, `guard` and `state_dtype` of mode carry.
    Packing `varlen` is for torch on a GPU in half precision: attention by `torch.nn.attention.varlen`; no ONNX.
    `trunk` (`plain`, `sparse-dense`: SparseDiT's, `patch-sizes`: DDiT's), `dechunk` (`gaussian`, `smoothed`: DC-DiT's,
    `values`: the same of DC-DiT's own architecture, `refined` where that was made of another model)
    and router `merge` (token merging) are what the presets of the published methods choose, in mode chunk; `fewest` is
    the smallest fraction of the tokens that any step of `sparse-dense` or `merge` keeps, `prediction` (`eps` or
    `flow`, "" if it is not known) what the model predicts, for `patch-sizes`.
    """

    mode: str = "carry"
    head_blocks: int = -1  # -1: as MODE_DEFAULTS says
    tail_blocks: int = -1
    router: str = ""
    guard: float = 3.0
    state_dtype: str = "model"
    packing: str = "rows"
    members: int = 4
    neighbours: int = 4
    coverage: bool = True
    trunk: str = "plain"
    dechunk: str = "gaussian"
    fewest: float = 0.25
    prediction: str = ""
    refined: bool = False
    preset: str = ""  # whose choices these are
    seed: int = 0

    def __post_init__(self) -> None:
        blocks, router, _ = MODE_DEFAULTS.get(self.mode, MODE_DEFAULTS["chunk"])
        self.head_blocks = blocks if self.head_blocks == -1 else self.head_blocks
        self.tail_blocks = blocks if self.tail_blocks == -1 else self.tail_blocks
        self.router = self.router or router


# Head blocks, tail blocks (each), router and schedule of a mode.
MODE_DEFAULTS = {"carry": (0, "drift", "falling"), "chunk": (1, "pool", "constant")}


STATE_DTYPES = {"model": None, "fp16": torch.float16, "fp32": torch.float32}


MODES = ("carry", "chunk")


TRUNKS = ("plain", "sparse-dense", "patch-sizes")  # those but the first are of mode chunk and have their own passes


PREDICTIONS = ("", "eps", "flow")
