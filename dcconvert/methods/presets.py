"""The published methods by name: which router, schedule, trunk and dechunk each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn
from torch.export import ExportedProgram

from dcconvert.models.dc_dit import Refined, RefinedDiT
from dcconvert.models.dit import DiT
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.options import MODE_DEFAULTS, Options
from dcconvert.passes.modules.routers import OWN
from dcconvert.passes.planning.latent_difference import THRESHOLD
from dcconvert.passes.planning.schedule import CURVE, DIFFERENCE, NATURAL, Schedule

# SparseDiT's pruning rates: (r_min, r_max) of its four models (arXiv 2412.06028).
PRUNING = ((0.44, 0.61), (0.61, 0.86), (0.90, 0.96))
WARM_END = 0.25  # up to this noise level the rate stays at r_min


@dataclass(frozen=True)
class Preset:
    """A method: its name in full, what it asks of the rewriting, what a user has to know of a conversion, and what
    `dcconvert upcycle` trains unless told otherwise."""

    title: str
    options: Mapping[str, Any]
    limit: str
    train: tuple[str, ...] = ("all",)


PRESETS = {
    "dc-dit": Preset(
        "DC-DiT (arXiv 2603.06351): tokens scored above 0.5 by a learned router, smoothed dechunk",
        {"router": "predictability", "dechunk": "smoothed", "members": 1},
        "DC-DiT's router is trained. Here it starts from the residual of a local predictor, shifted so that as many "
        "tokens as the ratio says are scored above 0.5; 'dcconvert upcycle' trains it.",
        ("all", "router"),
    ),
    "sparsedit": Preset(
        "SparseDiT (arXiv 2412.06028): pooled grids in groups of sparse and dense blocks, more tokens at cleaner steps",
        {"router": "pool", "trunk": "sparse-dense", "head_blocks": 2, "tail_blocks": 2},
        "SparseDiT changes the blocks: with every token kept it is not the original, and before training its images "
        "are not usable; 'dcconvert upcycle' trains it.",
    ),
    "ddit": Preset(
        "DDiT (arXiv 2602.16968): one patch size a step, chosen by the third difference of the latents",
        {"router": "pool", "trunk": "patch-sizes", "head_blocks": 0, "tail_blocks": 0},
        "DDiT trains embeddings and low-rank changes for its larger patches. Here they start from a bilinear resize; "
        "'dcconvert upcycle' trains them.",
        ("lora", "adapters"),
    ),
    "tome": Preset(
        "token merging (arXiv 2210.09461, 2303.17604) around the trunk: the training-free control",
        {"router": "merge", "members": 8},
        "Tokens are merged once around the trunk, where ToMe does it in every block.",
    ),
}


def find(name: str) -> Preset:
    """The preset of a name; UsageError for another name."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset '{name}': choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_options(name: str, ratio: float, given: Mapping[str, Any] | None = None) -> Options:
    """The options of a preset at a ratio, with those that the user gave in their place.

    UsageError for an unknown preset, or for an option that would make it another method.
    """
    wanted, given = find(name).options, dict(given or {})
    for field in ("mode", "router", "trunk", "dechunk"):
        fixed = {"mode": "chunk", **wanted}.get(field)
        if fixed is not None and given.get(field, fixed) != fixed:
            raise UsageError(f"preset {name} has {field} {fixed}: leave --{field} out, or the preset")
    fewest = float(preset_schedule(name, ratio).fraction(np.linspace(0, 1, 101)).min())
    return Options(**{"mode": "chunk", "preset": name, "fewest": fewest, **wanted, **given})


def own_architecture(options: Options, refined: bool = False) -> Options:
    """The options of DC-DiT's own architecture: its router, its dechunk, all blocks on the kept tokens.

    `refined`: it was made of a DiT of larger patches. UsageError for options of anything else than preset dc-dit.
    """
    if options.preset != "dc-dit":
        raise UsageError("a DC-DiT is converted in its own way: choose preset dc-dit")
    if any(blocks not in (0, MODE_DEFAULTS["chunk"][0]) for blocks in (options.head_blocks, options.tail_blocks)):
        raise UsageError("all blocks of a DC-DiT run on the kept tokens: leave out --head-blocks and --tail-blocks")
    return replace(options, router=OWN, dechunk="values", head_blocks=0, tail_blocks=0, refined=refined)


def as_rewritten(
    module: nn.Module | ExportedProgram, options: Options, refine_grid: bool = False
) -> tuple[nn.Module | ExportedProgram, nn.Module | None, nn.Module | None, Options]:
    """What is rewritten, what that is compared with where it is another module, its own router, and the options.

    `refine_grid`: a DC-DiT is made of a DiT first. UsageError as `own_architecture`, or for another module.
    """
    original = None
    if refine_grid:
        if not isinstance(module, DiT):
            raise UsageError("refine_grid makes a DC-DiT of a DiT: give one")
        original, module = module, Refined(module, options.seed)
    if not isinstance(module, RefinedDiT | Refined):
        return module, None, None, options
    own = module if isinstance(module, RefinedDiT) else module.refined
    return module, original, own.router(), own_architecture(options, refine_grid)


def preset_schedule(name: str, ratio: float) -> Schedule:
    """The schedule of a preset; its mean over even steps is 1/ratio, where it does not find its own numbers."""
    find(name)
    if ratio == 1:
        return Schedule("constant", 1)
    if name == "dc-dit":
        return Schedule(NATURAL, ratio, base=ratio)
    if name == "ddit":
        return Schedule(DIFFERENCE, ratio, threshold=THRESHOLD)
    if name == "sparsedit":
        return sparsedit_schedule(ratio)
    return Schedule("constant", ratio)


def sparsedit_schedule(ratio: float) -> Schedule:
    """SparseDiT's r(t): r_min up to a quarter of the noise, then linear to r_max; its kept fraction is 1 - r.

    The shape is that of the published pair whose mean is nearest to 1/ratio; it is scaled to that mean.
    """

    def mean(pair: tuple[float, float]) -> float:
        low, high = (1 - rate for rate in pair)
        return WARM_END * low + (1 - WARM_END) * (low + high) / 2

    low, high = min(PRUNING, key=lambda pair: abs(np.log(mean(pair) * ratio)))
    knots = ((0.0, 1 - low), (WARM_END, 1 - low), (1.0, 1 - high))
    return Schedule(CURVE, ratio, knots=knots).fitted(np.linspace(0, 1, 1001))
