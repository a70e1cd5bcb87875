"""Ops that are other names of ops, or short for several: what each of them stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

aten = torch.ops.aten

# Views, which torch itself writes as other views.
VIEWS = (
    *(aten.swapaxes.default, aten.swapdims.default, aten.mT.default, aten.mH.default, aten.adjoint.default),
    *(aten.numpy_T.default, aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist),
    *(aten.narrow.default, aten.tensor_split.sections, aten.tensor_split.indices, aten.expand_as.default),
)


def hstack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors), 1 if tensors[0].ndim > 1 else 0)


def tile(x: Tensor, dims: Sequence[int]) -> Tensor:
    return x.repeat(*(1,) * (x.ndim - len(dims)), *dims)


def pad(x: Tensor, widths: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    return aten.constant_pad_nd.default(x, widths, value or 0.0)


def std(x: Tensor, dim: list[int] | None, unbiased: bool = True, keepdim: bool = False) -> Tensor:
    return torch.std(x, dim, correction=int(unbiased), keepdim=keepdim)


def var(x: Tensor, dim: list[int] | None, unbiased: bool = True, keepdim: bool = False) -> Tensor:
    return torch.var(x, dim, correction=int(unbiased), keepdim=keepdim)


def repeat_each(x: Tensor, repeats: int, dim: int | None = None, output_size: int | None = None) -> Tensor:
    x, dim = (x.flatten(), 0) if dim is None else (x, dim % x.ndim)
    return torch.stack([x] * repeats, dim + 1).flatten(dim, dim + 1)


def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.softmax(x, dim, dtype=dtype)


def norm(x: Tensor, order: Any = None, dim: Any = None, keepdim: bool = False, **more: Any) -> Tensor:
    return torch.linalg.vector_norm(x, 2 if order is None else order, dim, keepdim, **more)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.multiply.Tensor: torch.mul,
    aten.multiply.Scalar: torch.mul,
    aten.divide.Tensor: torch.div,
    aten.divide.Scalar: torch.div,
    aten.true_divide.Tensor: torch.div,
    aten.true_divide.Scalar: torch.div,
    aten.subtract.Tensor: torch.sub,
    aten.subtract.Scalar: torch.sub,
    aten.concat.default: torch.cat,
    aten.concatenate.default: torch.cat,
    aten.hstack.default: hstack,
    aten.special_softmax.default: softmax,
    aten.tile.default: tile,
    aten.pad.default: pad,
    aten.std.dim: std,
    aten.var.dim: var,
    aten.repeat_interleave.self_int: repeat_each,
    aten.linalg_norm.default: norm,
    **{target: target.decompose for target in VIEWS},
}


def aliases_in(graph: Graph) -> dict[Any, Callable[..., Any]]:
    """What the aliases in a graph stand for. Padding with anything but a constant stays as it is."""
    found = {node.target for node in graph.nodes} & set(TABLE)
    pads = [node for node in graph.nodes if node.target is aten.pad.default]
    if any((len(node.args) > 2 and node.args[2] != "constant") or "mode" in node.kwargs for node in pads):
        found.discard(aten.pad.default)
    return {target: TABLE[target] for target in found}
