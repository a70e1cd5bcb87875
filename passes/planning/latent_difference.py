"""DDiT's criterion: how large a patch the next step may have, from how the latents changed (arXiv 2602.16968)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.passes.ir.errors import UsageError

ORDER = 3
PERCENTILE = 0.4  # of a sample's patches, ordered by how much they changed
THRESHOLD = 1e-3  # as published, for FLUX.1 in 50 steps


class ThirdDifference:
    """The last latents of every sample of a run, and the criterion computed from them."""

    def __init__(self, batch: int) -> None:
        self.seen: list[Tensor] = []
        self.age = np.zeros(batch, np.int64)  # latents of each sample so far
        self.tau = np.full(batch, np.inf)  # noise level of the last step

    def restart(self, samples: Sequence[int]) -> None:
        """Forget the latents of these samples."""
        self.age[list(samples)] = 0
        self.tau[list(samples)] = np.inf

    def note(self, latents: Any, taus: np.ndarray) -> None:
        """Record the latents [B, C, H, W] of the next step; raises UsageError if the noise of a sample rose."""
        if (taus > self.tau + 1e-6).any():
            sample = int((taus > self.tau + 1e-6).argmax())
            raise UsageError(
                f"the noise of sample {sample} rose from one step to the next: start another run, or restart the sample"
            )
        self.seen = [*self.seen[-ORDER:], torch.as_tensor(latents).detach().clone()]
        self.age += 1
        self.tau = np.array(taus, np.float64)

    def spread(self, patches: Sequence[int]) -> np.ndarray:
        """How much the latents changed [B, patches], for patches of these sizes in pixels; infinite if too early."""
        if len(self.seen) <= ORDER:
            return np.full((len(self.age), len(patches)), np.inf)
        found = patch_spread(third_difference(self.seen), patches)
        found[self.age <= ORDER] = np.inf
        return found


def third_difference(latents: Sequence[Tensor]) -> Tensor:
    """The third difference of four latents in order."""
    first, second, third, fourth = (value.float() for value in latents)
    return fourth - 3 * third + 3 * second - first


def patch_spread(difference: Tensor, patches: Sequence[int]) -> np.ndarray:
    """Standard deviation within a patch, at PERCENTILE of a sample's patches: [B, C, H, W] -> [B, patches]."""
    batch, channels, height, width = difference.shape
    found = []
    for patch in patches:
        cells = difference.reshape(batch, channels, height // patch, patch, width // patch, patch)
        deviation = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).std(-1, correction=0).flatten(1)
        found.append(deviation.quantile(PERCENTILE, dim=1))
    return torch.stack(found, 1).double().cpu().numpy()


def largest_below(spread: np.ndarray, threshold: float) -> np.ndarray:
    """The index [B] of the largest patch whose spread is below the threshold; 0, the smallest patch, if none is.

    spread [B, patches], from the smallest patch to the largest.
    """
    below = spread < threshold
    last = spread.shape[1] - 1 - below[:, ::-1].argmax(1)
    return np.where(below.any(1), last, 0)
