"""What the tests of this floor share: a tiny converted DiT, its ONNX files, and inputs as numpy arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.export.onnx.export import export_denoise, export_route
from dcconvert.export.runtimes.ort import OrtModel
from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel
from tests.passes.harness import randomise

BATCH = 3
CONFIG = DiTConfig(depth=3, width=32, heads=2, patch=2, image_size=8, num_classes=10)  # a 4x4 grid
TOKENS = 16


def inputs(batch: int = BATCH, seed: int = 0) -> dict[str, Tensor]:
    """Every sample of another class and timestep."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, CONFIG.in_channels, CONFIG.image_size, CONFIG.image_size, generator=generator)
    return {"x": x, "t": torch.rand(batch, generator=generator) * 1000, "y": torch.arange(batch) % CONFIG.num_classes}


def arrays(batch: int = BATCH, seed: int = 0) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in inputs(batch, seed).items()}


def tensors(given: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in given.items()}


def convert(mode: str = "chunk", **options: Any) -> DynamicModel:
    """Two tokens in one kept; weights so small that rounding in float32 stays small too."""
    torch.manual_seed(0)
    dit = randomise(DiT(CONFIG), std=0.08)
    return rewrite(dit, tuple(inputs().values()), {}, method_of(mode, **options), Policy("constant", 2).timetable())


class OneStep:
    """Single steps of a model on ONNX Runtime, each a run of its own."""

    def __init__(self, model: OrtModel) -> None:
        self.model = model
        self.last_plan: Any = None
        self.last_times: Any = None

    def __call__(self, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self.step(given, None)

    def step(self, given: dict[str, np.ndarray], counts: np.ndarray | None) -> list[np.ndarray]:
        run = self.model.start(len(given["x"]))
        outputs = run.step(given, counts)
        self.last_plan, self.last_times = run.last_plan, run.last_times
        return outputs


def export(model: DynamicModel, folder: Path) -> Path:
    """`route.onnx` and `denoise.onnx`, exported with sizes that are all different."""
    given = inputs()
    with torch.no_grad():
        scores, live = model.route(given)
    rows = BATCH if model.method.row_packing == "rows" else BATCH + 1
    bucket = Bucket(BATCH, tokens=35, rows=rows, row_tokens=9, tile=5)
    keep = model.planner.planner.select(scores.numpy(), np.full(BATCH, 8))
    plan = model.planner.of_mask(keep, bucket)
    export_route(model, folder / "route.onnx", given)
    export_denoise(model, folder / "denoise.onnx", given, live, plan)
    return folder
