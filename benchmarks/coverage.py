"""Which of diffusers' transformer classes dcconvert converts, and how much of each one its trunk holds.

    python -m benchmarks.coverage            # ten minutes or more; --only CLASS ... tries some of them

Models are the real classes in small configurations with random weights (benchmarks/coverage_models.py and
coverage_video.py). For each class and mode: the attention ops in the trunk out of those on the image's path, the share
of the operations that can shrink, the error with every token kept (relative to the module itself), or the reason why it
is not converted. Classes without a configuration are listed too.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils import _pytree as pytree

import benchmarks.coverage_video  # noqa: F401  (registers its classes)
from benchmarks.common import RESULTS, write_result
from benchmarks.coverage_models import MODELS
from dcconvert.export.checks.parity import check_identity, relative_error
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel

MODES = ("carry", "chunk")
GIVEN_GRIDS = {"LTXVideoTransformer3DModel": (20, 4), "SanaWMLTX2RefinerTransformer3DModel": (20, 4)}
# Why a class has no configuration here.
NOT_TRIED = {
    "AnyFlowFARTransformer3DModel": "a causal variant of AnyFlow with a cache",
    "Cosmos3OmniTransformer": "a language model that also makes images",
    "DreamLiteTransformer2DModel": "a part of a U-Net",
    "JoyImageEditPlusTransformer3DModel": "its inputs are lists of images of different sizes",
    "Kandinsky6SRTransformer3DModel": "needs flex attention",
    "MiniMaxMusic3RVQDepthDecoder": "no diffusion model",
    "RFD4ProteinaTransformer": "makes proteins, with a bias for every pair of tokens",
    "SanaWMTransformer3DModel": "linear attention",
    "T5FilmDecoder": "an older model of spectrograms",
    "TransformerTemporalModel": "a part of a U-Net",
    "WanAnimate2Transformer3DModel": "needs a cache of an earlier call",
}


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model of a class with random weights, all of which matter, and one call of it."""
    make, _ = MODELS[name]
    torch.manual_seed(0)
    config, call = make()
    cls = getattr(diffusers, name.split(" ")[0])
    module = cls(**config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.normal_(std=0.08)
    return module, {**call, "return_dict": False}


def converted(name: str, mode: str) -> DynamicModel:
    """The small model of a class in a mode; DcconvertError if it cannot be converted."""
    module, call = made(name)
    half = Policy("constant", 2).timetable()
    grid = GIVEN_GRIDS.get(name)
    return rewrite(module, (), call, method_of(mode), half, timestep_scale=MODELS[name][1], grid=grid)


def measured(name: str, mode: str) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"class": name, "mode": mode}
    try:
        model = converted(name, mode)
    except Exception as error:  # any other type than DcconvertError is a fault that the table shows
        return {**row, "reason": " ".join(str(error).split()), "error": type(error).__name__}
    module, call = made(name)
    inputs = dict(zip(model.spec.inputs, pytree.tree_leaves(((), call)), strict=True))
    with torch.no_grad():
        wanted = [value for value in pytree.tree_leaves(module(**call)) if isinstance(value, torch.Tensor)]
        captured = model.original_graph(*inputs.values())
    kept = [relative_error(one, other) for one, other in zip(captured, wanted, strict=True)]
    reach, identity = model.spec.reach, max(check_identity(model, inputs).value, *kept)
    assert reach is not None
    facts = {"attentions": [reach.held, reach.attentions], "share": round(reach.share, 3), "notes": reach.notes[1:]}
    return {**row, **facts, "identity": identity}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--modes", nargs="*", choices=MODES, default=["carry"])
    parser.add_argument("--output", type=Path, default=RESULTS / "coverage.json", help="rows of other classes are kept")
    args = parser.parse_args(words)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    known = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    rows = {(row["class"], row["mode"]): row for row in known}
    for name in args.only:
        for mode in args.modes:
            row = rows[name, mode] = measured(name, mode)
            said = row.get("reason") or f"{row['attentions'][0]} of {row['attentions'][1]}, {row['identity']:.0e}"
            print(f"{name}, {mode}: {said}", flush=True)
            ordered = [rows[key] for key in sorted(rows)]
            write_result("coverage", {"not tried": NOT_TRIED}, ordered, args.output)  # after each: it takes long


if __name__ == "__main__":
    main()
