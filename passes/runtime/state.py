"""What the samples of a run remember (mode carry), in a runtime's own memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.passes.ir.spec import state_output


class State(ABC):
    """Every carried value [P, B, C, N, E], by name; and the distance [B, N] between the two last updates of a token.

    Without carried values (mode chunk) it is empty, and nothing happens to it.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.distance: np.ndarray | None = None

    @property
    def into(self) -> dict[str, Any]:
        """Buffers that the next step has to write its state to, by the name of the output; none if it makes its own."""
        return {}

    def advance(self, made: Mapping[str, Any], distance: np.ndarray | None) -> None:
        """Go on from what a step made."""
        self.values = {name: made[state_output(name)] for name in self.values}
        self.distance = distance

    @abstractmethod
    def clear(self, samples: Sequence[int]) -> None:
        """Set everything these samples remember to zero."""


class TensorState(State):
    """A state of torch tensors."""

    values: dict[str, Tensor]

    def clear(self, samples: Sequence[int]) -> None:
        index = torch.as_tensor(list(samples))
        self.values = {name: value.index_fill(1, index.to(value.device), 0) for name, value in self.values.items()}

    def detach(self) -> None:
        """Cut what is remembered off from the gradients of the steps that computed it."""
        self.values = {name: value.detach() for name, value in self.values.items()}
