"""The state of a run's samples, in a runtime's own memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dcconvert.passes.ir.spec import ModelSpec, state_output


class State(ABC):
    """The state of a run, by name (`ModelSpec.state_shapes`).

    Mode carry: every carried value [P, B, C, N, E], and the distance [B, N] between the last two updates of a token.
    Mode steps: the trunk's last updates [B, N, D]. Mode chunk: nothing.
    """

    in_place: ClassVar[bool] = False  # whether steps write to existing buffers instead of making their own

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.distance: np.ndarray | None = None

    @property
    def into(self) -> dict[str, Any]:
        """Buffers that the next step must write its state to, by output name; empty if the step makes its own."""
        return {}

    def advance(self, made: Mapping[str, Any], distance: np.ndarray | None) -> None:
        """Store the state that a step returned."""
        self.values = {name: made[state_output(name)] for name in self.values}
        self.distance = distance

    @abstractmethod
    def clear(self, samples: Sequence[int]) -> None:
        """Set every carried value of these samples to zero."""

    @abstractmethod
    def rows(self, name: str, samples: np.ndarray) -> Any:
        """An update [b, N, D] of some samples only."""

    @abstractmethod
    def put(self, name: str, samples: np.ndarray, made: Any, rows: np.ndarray) -> None:
        """Store the updates of some samples, which are these rows of a call's result [b, N, D]."""


class TensorState(State):
    """A state of torch tensors."""

    values: dict[str, Tensor]

    def clear(self, samples: Sequence[int]) -> None:
        index = torch.as_tensor(list(samples))
        self.values = {name: value.index_fill(1, index.to(value.device), 0) for name, value in self.values.items()}

    def rows(self, name: str, samples: np.ndarray) -> Tensor:
        return self.values[name][self._index(samples, name)]

    def put(self, name: str, samples: np.ndarray, made: Tensor, rows: np.ndarray) -> None:
        found = made[self._index(rows, name)]
        self.values[name] = self.values[name].index_copy(0, self._index(samples, name), found)

    def _index(self, samples: np.ndarray, name: str) -> Tensor:
        return torch.as_tensor(samples, device=self.values[name].device)

    def detach(self) -> None:
        """Detach the state from the gradients of the steps that computed it."""
        self.values = {name: value.detach() for name, value in self.values.items()}


def zeros(spec: ModelSpec, batch: int, device: torch.device | str = "cpu") -> TensorState:
    """The state of `batch` samples before their first step."""
    shapes = spec.state_shapes(batch).items()
    return TensorState({n: torch.zeros(s, dtype=getattr(torch, dtype), device=device) for n, (s, dtype) in shapes})
