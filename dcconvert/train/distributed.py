"""Several processes that train together: each on its part of every batch, with averaged gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dcconvert.passes.ir.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator


class Distributed:
    """What `accelerate launch` or `torchrun` started, or this process alone; on the CPU without an accelerator."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.accelerator = accelerator
        self.size = 1 if accelerator is None else int(accelerator.num_processes)
        self.rank = 0 if accelerator is None else int(accelerator.process_index)
        self.device = torch.device("cpu") if accelerator is None else accelerator.device

    @classmethod
    def start(cls) -> Distributed:
        """Join the processes that were started together; the device is theirs to choose."""
        from accelerate import Accelerator  # a second's import

        return cls(Accelerator())

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def check(self, batch: int) -> None:
        """UsageError for a batch that the processes cannot share evenly."""
        if batch % self.size or batch // self.size < 1:
            raise UsageError(
                f"a batch of {batch} cannot be shared by {self.size} processes: choose a multiple of {self.size}"
            )

    def share(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """This process's samples of a batch of tensors by name, on its device."""
        return {name: value[self.rank :: self.size].to(self.device) for name, value in values.items()}

    def average_gradients(self, parts: Iterable[Tensor]) -> None:
        """Give every process the mean of all gradients; a part that got none counts as zero."""
        if self.accelerator is None or self.size == 1:
            return
        for part in parts:
            part.grad = self.accelerator.reduce(torch.zeros_like(part) if part.grad is None else part.grad, "mean")

    def all_agree(self, fact: bool) -> bool:
        """Whether the fact holds in every process."""
        if self.accelerator is None or self.size == 1:
            return fact
        votes = self.accelerator.reduce(torch.tensor(float(fact), device=self.device), "sum")
        return int(votes) == self.size

    def wait(self) -> None:
        """Until every process is here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
