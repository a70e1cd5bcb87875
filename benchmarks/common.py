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


MODELS = ("shipped", "cifar", "eps")


def checkpoint_of(model: str, folder: Path) -> Path:
    """The file of one of MODELS; one that is kept in parts is put together in `folder`.

    "shipped": with dcconvert. "cifar": trained on CIFAR-10. "eps": like the shipped one, but it predicts noise.
    """
    if model == "cifar":
        return cifar_dit(folder)
    return ASSETS / "fashion_eps" / "fashion_eps_dit.safetensors" if model == "eps" else shipped_model()


def in_steps(model: str, folder: Path) -> tuple[LoadedDiT, Converted]:
    """One of MODELS, and itself in mode steps; `folder` as in `checkpoint_of`."""
    dit = dcconvert.load_checkpoint(checkpoint_of(model, folder))
    assert isinstance(dit, LoadedDiT)
    return dit, dcconvert.convert(dit, 4, options=method_of("steps"))


def write_result(
    name: str,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    path: Path | None = None,
    made_on: dict[str, Any] | None = None,
) -> Path:
    """Write `results/NAME.json`, or `path`, with machine, versions and settings: whole, or not at all.

    `made_on`: the machine of rows that are kept, if not this one.
    """
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"dcconvert": dcconvert.__version__, "machine": made_on or machine(), "settings": settings, "rows": rows}
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
