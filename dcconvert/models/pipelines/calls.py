"""What one call of a diffusers transformer says: batch size, timestep scale, and the grid of the tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dcconvert.passes.ir.errors import UsageError

EXAMPLE_BATCH = 2  # at least, so that the batch axis can be seen

Grid = tuple[int, int]


def batch_of(given: Mapping[str, Any]) -> int:
    """The batch size of a call: that of its first tensor."""
    first = next((v for v in pytree.tree_leaves(given) if isinstance(v, Tensor) and v.ndim), None)
    if first is None or not len(first):
        raise UsageError("the batch size is unknown, because the call has no tensor with samples: pass one")
    return len(first)


def described(value: Any, batch: int) -> Any:
    """The properties of an argument that must stay the same to reuse a conversion: all except values and batch size."""
    leaves, spec = pytree.tree_flatten(value)

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return repr(leaf)
        batched = leaf.ndim > 0 and leaf.shape[0] == batch
        return (batched, tuple(leaf.shape[batched:]), leaf.dtype, leaf.device)

    return (str(spec), tuple(map(of, leaves)))


def several(value: Any, batch: int) -> Any:
    """An argument for at least two samples: those of a single one repeated."""
    if batch >= EXAMPLE_BATCH:
        return value

    def repeated(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch:
            return leaf.repeat_interleave(EXAMPLE_BATCH, dim=0)
        return leaf

    return pytree.tree_map(repeated, value)


def scale_of(timestep: Any) -> float:
    """The timestep at pure noise: 1 for models that count from 0 to 1, as the first call of a pipeline shows."""
    counts_to_one = isinstance(timestep, Tensor) and timestep.is_floating_point() and bool((timestep <= 1).all())
    return 1.0 if counts_to_one else 1000.0


def grid_of(given: Mapping[str, Any]) -> Grid | None:
    """The grid of the tokens of a call that gives the image as tokens [B, N, C]; None if the model can find it.

    Sizes are read from `img_shapes` (frames, height and width of each image), `img_ids` (the place of each token) or
    `num_frames`, `height` and `width`. Frames, and several images of one width, are stacked. Without any of them, a
    number of tokens that is no square is one column.
    """
    tokens = next((v.shape[1] for v in given.values() if isinstance(v, Tensor) and v.ndim == 3), None)
    image = given.get("hidden_states")
    if isinstance(image, Tensor):
        tokens = image.shape[1] if image.ndim == 3 else None
    if tokens is None:
        return None
    found = (stacked(sizes) for sizes in (*shapes_of(given), *places_of(given), *sides_of(given)))
    grid = next((grid for grid in found if grid and math.prod(grid) == tokens), None)
    return grid or (None if math.isqrt(tokens) ** 2 == tokens else (tokens, 1))


def stacked(sizes: list[Grid]) -> Grid | None:
    """One grid for images of these heights and widths, one below the other; None if their widths differ."""
    widths = {width for _, width in sizes}
    return (sum(height for height, _ in sizes), widths.pop()) if len(widths) == 1 else None


def shapes_of(given: Mapping[str, Any]) -> Iterator[list[Grid]]:
    """From `img_shapes`: (frames, height, width) for each sample, or for each image of each sample."""
    numbers = pytree.tree_leaves(given.get("img_shapes"))
    shapes = given.get("img_shapes")
    if not isinstance(shapes, list | tuple) or not shapes or not all(type(n) is int for n in numbers):
        return
    first = shapes[0] if isinstance(shapes[0], list | tuple) else shapes
    images = first if isinstance(first[0], list | tuple) else [first]
    yield [(math.prod(image[:-1]), image[-1]) for image in images]


def places_of(given: Mapping[str, Any]) -> Iterator[list[Grid]]:
    """From `img_ids` [N, A] or [B, N, A]: which image, row and column; tokens of one image are next to each other."""
    places = given.get("img_ids")
    if not isinstance(places, Tensor) or places.ndim not in (2, 3) or places.shape[-1] < 3:
        return
    first = (places[0] if places.ndim == 3 else places)[:, :3].detach().cpu()
    _, lengths = torch.unique_consecutive(first[:, 0], return_counts=True)
    images = [[len(torch.unique(part[:, axis])) for axis in (1, 2)] for part in first.split(lengths.tolist())]
    if all(height * width == length for (height, width), length in zip(images, lengths.tolist(), strict=True)):
        yield [(height, width) for height, width in images]


def sides_of(given: Mapping[str, Any]) -> Iterator[list[Grid]]:
    """From `num_frames`, `height` and `width`, in tokens."""
    sizes = given.get("num_frames", 1), given.get("height"), given.get("width")
    frames, height, width = (size if isinstance(size, int) else 0 for size in sizes)
    if frames and height and width:
        yield [(frames * height, width)]
