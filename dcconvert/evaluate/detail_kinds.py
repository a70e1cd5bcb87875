"""Kinds of detail that a router may starve, as measures of an image: how much of it there is, and where.

All of them use the mean over the channels, g [n, H, W], of images in [-1, 1]; latents are treated in the same way.
A measure gives a score [n], by which images are ranked, and a non-negative response [n, H, W]: where the detail is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))  # (down, right)
REACH = 2  # pixels from the middle of a stroke to where it must have ended: strokes are up to three pixels wide
LINE = 7  # pixels over which a line must continue to count as hair
CELL = 4  # side of the cells over which texture must be spread
WINDOW = 8  # side of the window in which strokes are counted
PLAIN = 0.05  # deviation in a 3x3 window below which ground is plain
OBJECT = 0.25  # distance from the ground from which a pixel belongs to an object
AT_ONCE = 512  # images measured at a time
SMALL = 0.25  # share of the image up to which an object is small

Measured = tuple[Tensor, Tensor]


def texture(g: Tensor) -> Measured:
    """Fine texture: high-frequency energy, (g - 3x3 mean)^2, spread over the image.

    The score is the mean over cells of the root of their energy, so that texture everywhere beats one strong edge.
    """
    response = (g - box(g, 3)).square()
    return pooled(response, CELL).sqrt().mean((1, 2)), response


def strokes(g: Tensor) -> Measured:
    """Strokes as in writing: many thin lines, light or dark, in a small area.

    The response is the height of a ridge or the depth of a valley across its best direction. The score is the mean
    response in the fullest window.
    """
    response = torch.stack([ridge(g, across) for across in DIRECTIONS]).amax(0)
    size = min(WINDOW, *g.shape[1:])
    return F.avg_pool2d(response[:, None], size, stride=max(1, size // 2)).amax((1, 2, 3)), response


def hair(g: Tensor) -> Measured:
    """Long thin lines: ridges or valleys that continue for some pixels across their profile.

    The response is that of strokes, averaged along the line. The score is the mean of its highest 5 %.
    """
    found = []
    for along, across in zip(DIRECTIONS, (DIRECTIONS[1], DIRECTIONS[0], DIRECTIONS[3], DIRECTIONS[2]), strict=True):
        profile = ridge(g, across)
        parts = [shifted(profile, along, step) for step in range(-(LINE // 2), LINE // 2 + 1)]
        found.append(torch.stack(parts).mean(0))
    response = torch.stack(found).amax(0)
    highest = max(1, round(0.05 * response[0].numel()))
    return response.flatten(1).topk(highest, 1).values.mean(1), response


def small_object(g: Tensor) -> Measured:
    """A small object on plain ground.

    The ground is the median of the border, and whatever differs from it by more than `OBJECT` is the object. The score
    is the share of the image that is plain, reduced for larger objects. It is zero if there is no object, or if the
    object covers more than `SMALL` of the image.
    """
    border = torch.cat([g[:, 0], g[:, -1], g[:, 1:-1, 0], g[:, 1:-1, -1]], 1)
    away = (g - border.median(1).values[:, None, None]).abs()
    response = torch.where(away > OBJECT, away, 0)
    area = (response > 0).float().mean((1, 2))
    deviation = (box(g.square(), 3) - box(g, 3).square()).clamp_min(0).sqrt()
    plain = (deviation < PLAIN).float().mean((1, 2))
    score = plain * (1 - area / SMALL)
    return torch.where((area > 0) & (area < SMALL), score, torch.zeros_like(score)), response


KINDS: dict[str, Callable[[Tensor], Measured]] = {
    "texture": texture,
    "strokes": strokes,
    "hair": hair,
    "small object": small_object,
}


def measured(images: Tensor, kind: str) -> Measured:
    """Scores [n] and responses [n, H, W] of images [n, C, H, W] for one kind of detail."""
    return KINDS[kind](images.float().mean(1))


def choose(images: Tensor, count: int) -> dict[str, list[int]]:
    """The `count` images out of [n, C, H, W] with the most of each kind of detail, highest score first.

    The kinds choose in turn, and no image is chosen twice. Images with a score of 0 for a kind are not chosen for it.
    """
    order: dict[str, Sequence[int]] = {}
    for kind in KINDS:
        scores = torch.cat([measured(part, kind)[0] for part in images.split(AT_ONCE)])
        order[kind] = [int(i) for i in scores.argsort(descending=True, stable=True) if scores[i] > 0]
    chosen: dict[str, list[int]] = {kind: [] for kind in KINDS}
    taken: set[int] = set()
    for _ in range(count):
        for kind, ranked in order.items():
            if (best := next((i for i in ranked if i not in taken), None)) is not None:
                chosen[kind].append(best)
                taken.add(best)
    return chosen


def on_tokens(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sums of pixel values [n, H, W] over the cells of a token grid, [n, h, w]."""
    height, width = values.shape[1] // grid[0], values.shape[2] // grid[1]
    return F.avg_pool2d(values[:, None], (height, width))[:, 0] * (height * width)


def ridge(g: Tensor, across: tuple[int, int]) -> Tensor:
    """How far a pixel rises above (or lies below) its two sides in a direction, [n, H, W]; 0 at plain edges."""
    sides = [g - shifted(g, across, step) for step in (-REACH, REACH)]
    above = torch.minimum(*sides)
    below = torch.minimum(*(-side for side in sides))
    return torch.maximum(above, below).clamp_min(0)


def shifted(values: Tensor, direction: tuple[int, int], steps: int) -> Tensor:
    """Values [n, H, W] of the pixels so many steps further in a direction; the border is repeated beyond the edge."""
    down, right = direction[0] * steps, direction[1] * steps
    margin = max(abs(down), abs(right))
    padded = F.pad(values[:, None], (margin,) * 4, mode="replicate")[:, 0]
    height, width = values.shape[1:]
    return padded[:, margin + down : margin + down + height, margin + right : margin + right + width]


def box(values: Tensor, side: int) -> Tensor:
    """Mean over a square window, [n, H, W]; the border is repeated beyond the edge."""
    padded = F.pad(values[:, None], (side // 2,) * 4, mode="replicate")
    return F.avg_pool2d(padded, side, stride=1)[:, 0]


def pooled(values: Tensor, side: int) -> Tensor:
    """Means over cells, [n, h, w]."""
    return F.avg_pool2d(values[:, None], min(side, *values.shape[1:]))[:, 0]
