"""Models with DC-DiT's own architecture: the part that is rewritten, and its router."""

from __future__ import annotations

from torch import nn
from torch.export import ExportedProgram

from dcconvert.models.dc_dit import Refined, RefinedDiT
from dcconvert.models.dit import DiT
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.methods.dc_dit import of_own_architecture
from dcconvert.passes.methods.method import Method


def as_rewritten(
    module: nn.Module | ExportedProgram, method: Method, refine_grid: bool = False
) -> tuple[nn.Module | ExportedProgram, nn.Module | None, nn.Module | None, Method]:
    """What is rewritten, what that is compared with where it is another module, its own router, and the method.

    `refine_grid`: a DC-DiT is made of a DiT first. UsageError for another module, and as `of_own_architecture`.
    """
    original = None
    if refine_grid:
        if not isinstance(module, DiT):
            raise UsageError("refine_grid converts only a DiT: pass a DiT")
        original, module = module, Refined(module, method.seed)
    if not isinstance(module, RefinedDiT | Refined):
        return module, None, None, method
    own = module if isinstance(module, RefinedDiT) else module.refined
    return module, original, own.router(), of_own_architecture(method, refine_grid)
