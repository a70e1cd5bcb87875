"""What changes a fingerprint, and what does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dcconvert.models.pipelines.fingerprint import fingerprint


class Adapted(nn.Linear):
    """Has the attributes of an adapter."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self._active = ["first"]
        self._disabled = False
        self.scaling = {"first": 1.0}
        self.processor: object = Calls()
        self.calls = 0


class Calls:
    pass


def changed(change: Callable[[nn.Sequential], object]) -> bool:
    module = nn.Sequential(nn.Linear(4, 4), Adapted())
    before = fingerprint(module)
    assert fingerprint(module) == before
    change(module)
    return fingerprint(module) != before


CHANGES = {
    "an adapter is chosen": lambda m: m[1]._active.append("second"),
    "adapters are disabled": lambda m: setattr(m[1], "_disabled", True),
    "a scale is set": lambda m: m[1].scaling.update(first=0.5),
    "another processor": lambda m: setattr(m[1], "processor", object()),
    "a layer is replaced": lambda m: m.__setitem__(0, nn.Linear(4, 4)),
    "a weight is replaced": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(4, 4))),
    "a weight is loaded": lambda m: m[0].load_state_dict(m[1].state_dict()),
    "a weight is cast": lambda m: m[0].half(),
    "a layer is added": lambda m: m.append(nn.ReLU()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name):
    assert changed(CHANGES[name])


def test_what_is_no_change():
    assert not changed(lambda m: m(torch.ones(1, 4)))
    assert not changed(lambda m: setattr(m[1], "calls", 1))  # it counts
    assert not changed(lambda m: m.eval())
    assert not changed(lambda m: m[0].register_forward_hook(print))
