"""What the benchmark scripts share: random-weight DiTs, converted sessions, JSON results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dcconvert
from dcconvert.api import Converted
from dcconvert.environment import machine
from dcconvert.export.onnx.export import export_onnx
from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.models.dit_checkpoint import LoadedDiT
from dcconvert.models.load import shipped_model
from dcconvert.passes.methods import method_of

RESULTS = Path(__file__).parent / "results"
ASSETS = Path(__file__).parent / "assets"

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads


def random_dit(size: str, patch: int, pixels: int, seed: int = 0, depth: int = 0, std: float = 0.02) -> DiT:
    """A DiT of a published size with random weights, none of them zero; `depth` makes it shallower for a trial.

    With the standard deviation of an initialisation its blocks hardly matter; near 1 / sqrt(width) they do.
    """
    blocks, width, heads = SIZES[size]
    torch.manual_seed(seed)
    model = DiT(DiTConfig(depth=depth or blocks, width=width, heads=heads, patch=patch, image_size=pixels // 8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
    return model


def shipped_in_steps(folder: Path) -> tuple[LoadedDiT, Converted]:
    """The shipped model, and itself in mode steps with its ONNX files in `folder`."""
    dit = dcconvert.load_checkpoint(shipped_model())
    assert isinstance(dit, LoadedDiT)
    model = dcconvert.convert(dit, 4, options=method_of("steps"))
    export_onnx(model, folder)
    return dit, model


def write_result(name: str, settings: dict[str, Any], rows: list[dict[str, Any]], path: Path | None = None) -> Path:
    """Write `results/NAME.json`, or `path`, with machine, versions and settings: whole, or not at all."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"dcconvert": dcconvert.__version__, "machine": machine(), "settings": settings, "rows": rows}
    work = path.with_name(f".{path.name}.part")
    work.write_text(json.dumps(facts, indent=1) + "\n")
    work.replace(path)
    return path


def cifar_dit(folder: Path) -> Path:
    """Write the CIFAR-10 reference model, which is kept in two parts, as one checkpoint in `folder`; its path."""
    parts = sorted((ASSETS / "cifar_dit").glob("part_*.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    for part in parts:
        tensors |= load_file(part)
    with safe_open(parts[0], "pt") as first:
        facts = first.metadata()
    path = folder / "cifar_dit.safetensors"
    save_file(tensors, path, metadata=facts)
    return path
