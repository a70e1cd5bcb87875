"""Texts of different lengths in one conversion: filled up to the next length of a ladder, and masked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dcconvert.models.pipelines.calls import described

LOUD = 10.0  # standard deviation of the values that must not matter
EXACT, CLOSE, CLOSE_HALF = 1e-6, 1e-4, 5e-2  # relative differences: of masked values, and of a longer text


@dataclass(frozen=True)
class Text:
    """An input [B, L, E] and the name of its mask [B, L]."""

    name: str
    mask: str

    def without_length(self, given: Mapping[str, Any], batch: int) -> Any:
        """What describes a call, apart from the length of this text."""
        others = {name: value for name, value in given.items() if name not in (self.name, self.mask)}
        return (self, given[self.name].shape[2], tuple((n, described(v, batch)) for n, v in others.items()))

    def filled(self, given: Mapping[str, Any], fill: float = 0.0, least: int = 0) -> dict[str, Any]:
        """The call with this text filled up to the next length, and masked.

        `fill`: the deviation of what is added, `least`: how much at least.
        """
        text = given[self.name]
        mask = given.get(self.mask)
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        more = next_length(text.shape[1] + least) - text.shape[1]
        generator = torch.Generator().manual_seed(0)
        added = torch.randn(len(text), more, text.shape[2], generator=generator).to(text) * fill
        longer = {self.name: torch.cat([text, added], 1), self.mask: nn.functional.pad(mask, (0, more))}
        order = [*given, *(name for name in longer if name not in given)]
        return {name: longer.get(name, given.get(name)) for name in order}


def next_length(length: int) -> int:
    """The next length of the ladder 32, 48, 64, 96, 128, ..."""
    step = 32
    while step < length:
        step = step * 3 // 2 if step & (step - 1) == 0 else step * 4 // 3
    return step


def texts_of(module: nn.Module, given: Mapping[str, Any]) -> Iterator[Text]:
    """The texts of a call for which the module takes a mask."""
    known = signature(module.forward).parameters
    for name, value in given.items():
        if not (isinstance(value, Tensor) and value.ndim == 3):
            continue
        for mask in (f"{name}_mask", name.replace("hidden_states", "attention_mask")):
            found = given.get(mask)
            fits = found is None or (isinstance(found, Tensor) and found.shape == value.shape[:2])
            if mask in known and mask != name and fits:
                yield Text(name, mask)
                break


@torch.no_grad()
def length_is_free(module: nn.Module, given: Mapping[str, Any], text: Text) -> bool:
    """Whether a module gives the same for a text that is filled up, whatever is masked; shown on one call."""
    try:
        plain, zeros, loud = (
            first_tensor(module(**call)) for call in (given, text.filled(given, 0.0, 1), text.filled(given, LOUD, 1))
        )
    except Exception:  # whatever a model does with a mask that it does not expect
        return False
    close = CLOSE if plain.dtype in (torch.float32, torch.float64) else CLOSE_HALF
    return difference(loud, zeros) < EXACT and difference(zeros, plain) < close


def first_tensor(value: Any) -> Tensor:
    return next(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)).detach()


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
