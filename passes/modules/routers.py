"""Routers: modules that give every token a keep score p in [0, 1] from the hidden state at the trunk's input.

None of these needs training. A router only ranks tokens; the schedule decides how many are kept, and the planner which
positions must be covered.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PredictabilityRouter(nn.Module):
    """How badly a token is predicted by its neighbours: DC-DiT v2's spatial predictability without training.

    The learned local predictor is replaced by the mean over the 3x3 window of the layer-normalised hidden
    state. p = r / (r + mean r) with r the norm of the residual: 0.5 for an average token.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, h: Tensor) -> Tensor:
        """h [B, N, D] -> p [B, N]."""
        h = F.layer_norm(h, h.shape[-1:])
        residual = (h - window_mean(h, self.grid)).square().sum(-1).sqrt()
        return residual / (residual + residual.mean(1, keepdim=True) + 1e-6)


class CosineRouter(nn.Module):
    """Dissimilarity to the neighbourhood, as in H-Net and DC-DiT v1 with identity projections.

    p = (1 - cos(h, mean of the 3x3 window)) / 2.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, h: Tensor) -> Tensor:
        """h [B, N, D] -> p [B, N]."""
        similarity = (F.normalize(h, dim=-1) * F.normalize(window_mean(h, self.grid), dim=-1)).sum(-1)
        return (1 - similarity) / 2


class FixedRouter(nn.Module):
    """The same priorities for every sample and step: `pool` (even coverage at any budget) or `random`.

    They are stored as integer ranks and returned in float32, because many would be equal in half precision.
    """

    priorities: Tensor

    def __init__(self, priorities: Tensor) -> None:
        super().__init__()
        self.register_buffer("priorities", priorities.argsort().argsort())

    def forward(self, h: Tensor) -> Tensor:
        """h [B, N, D] -> p [B, N]; NaN for a token that is not finite."""
        spoiled = (0 * h).sum(-1).float()
        # Not a sum: OpenVINO's CPU plugin adds a constant [N] to a reduced value along the wrong axis.
        return torch.where(spoiled == 0, (self.priorities.float() + 0.5) / len(self.priorities), spoiled)


class MergeRouter(nn.Module):
    """Bipartite soft matching, as in token merging (ToMe, arXiv 2210.09461; for diffusion arXiv 2303.17604).

    One token of every `cell` x `cell` square is a destination (the first; the paper on diffusion draws it at random).
    Each other token is matched with the most similar destination, by cosine. Destinations are kept first, evenly
    spread, then the tokens that are least similar to their match.
    """

    destinations: Tensor
    priority: Tensor

    def __init__(self, grid: tuple[int, int], cell: int) -> None:
        super().__init__()
        y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        chosen = ((y % cell == 0) & (x % cell == 0)).flatten()
        self.register_buffer("destinations", chosen.nonzero().squeeze(1))
        self.register_buffer("priority", torch.where(chosen, 0.5 + 0.5 * even_priorities(grid), 0.0))

    def forward(self, h: Tensor) -> Tensor:
        """h [B, N, D] -> [B, N, 2]: the keep score, and the grid index of the match; float32."""
        direction = F.normalize(h, dim=-1)
        likeness = direction @ direction.index_select(1, self.destinations).transpose(1, 2)
        worst = (1 - likeness.amax(-1).float()).clamp(0, 2) / 4
        score = torch.where(self.priority > 0, self.priority + 0 * worst, worst)
        owner = self.destinations[likeness.argmax(-1)].float()
        return torch.stack([score, owner], -1)


def merge_cell(fewest: float) -> int:
    """Side of the squares in each of which one token is always kept, for steps that keep at least this fraction."""
    return max(1, math.ceil(math.sqrt(1 / fewest) - 1e-9))


def window_mean(h: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of each token's 3x3 neighbourhood (itself included, smaller at the border): [B, N, D]."""
    image = h.transpose(1, 2).reshape(h.shape[0], h.shape[2], *grid)
    return F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False).flatten(2).transpose(1, 2)


def even_priorities(grid: tuple[int, int]) -> Tensor:
    """Priorities [N] whose top k lie evenly on the grid for any k: bit-reversed interleaved coordinates."""
    bits = max(side - 1 for side in grid).bit_length()
    rows, cols = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    rank = torch.zeros_like(rows)
    for bit in range(bits):
        # The lowest bit of a coordinate separates neighbours, so it weighs most: neighbours are far in rank.
        diagonal = ((rows >> bit) ^ (cols >> bit)) & 1
        rank = rank * 4 + 2 * diagonal + ((rows >> bit) & 1)
    order = rank.flatten().argsort(stable=True)
    priorities = torch.empty(order.numel())
    priorities[order] = 1 - (torch.arange(order.numel()) + 0.5) / order.numel()
    return priorities


def random_priorities(grid: tuple[int, int], seed: int) -> Tensor:
    count = grid[0] * grid[1]
    return (torch.randperm(count, generator=torch.Generator().manual_seed(seed)) + 0.5) / count


def make_router(name: str, grid: tuple[int, int], seed: int) -> nn.Module:
    """The router called `name`, one of CARRY_ROUTERS, for an H x W grid."""
    return {
        "predictability": lambda: PredictabilityRouter(grid),
        "cosine": lambda: CosineRouter(grid),
        "pool": lambda: FixedRouter(even_priorities(grid)),
        "random": lambda: FixedRouter(random_priorities(grid, seed)),
        "age": lambda: FixedRouter(even_priorities(grid)),
        "drift": lambda: FixedRouter(even_priorities(grid)),
    }[name]()


PLAIN_ROUTERS = ("pool", "predictability", "cosine", "random")
CARRY_ROUTERS = ("drift", "age", *PLAIN_ROUTERS)  # the first two look at a token's history

OWN = "own"  # the model's own router, if it has one
