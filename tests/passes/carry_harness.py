"""What the tests of mode carry share: converted models, steps of a run, and the slow definition of a carry step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.carry_plan import CarryPlan, carry_plan
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.planning.token_history import REACH, History
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.state import TensorState
from tests.passes.harness import (
    BATCH,
    Block,
    Call,
    TinyModel,
    diffusers_call,
    dit_call,
    first_tensor,
    pick,
    pixart_call,
    tiny_inputs,
)

TAUS = (1.0, 0.8, 0.7, 0.45, 0.3)  # unequal steps: a gap of 0.1 followed by 0.25 runs into REACH


def tiny_call() -> Call:
    return TinyModel(Block() for _ in range(3)), tiny_inputs(), {}


CALLS: dict[str, Callable[[], Call]] = {
    "tiny": tiny_call,
    "dit": dit_call,
    "diffusers": diffusers_call,
    "pixart": pixart_call,
}


@cache
def carried(name: str, **options: Any) -> tuple[DynamicModel, Call]:
    """One conversion in mode carry at 2x for all tests; weights and inputs are random but fixed."""
    torch.manual_seed(0)
    call = CALLS[name]()
    scale = 1.0 if name == "tiny" else 1000.0
    return rewrite(*call, method_of("carry", **options), Policy("constant", 2).timetable(), timestep_scale=scale), call


def at(model: DynamicModel, call: Call, tau: float | Sequence[float], seed: int = 0) -> Call:
    """The same call at another noise level (one, or one a sample), with another image."""
    module, args, kwargs = call
    image = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(seed))
    levels = torch.as_tensor(np.broadcast_to(tau, len(image)).copy()) * model.spec.timestep_scale
    if "timestep" in kwargs:
        return module, (image,), {**kwargs, "timestep": levels.round().to(kwargs["timestep"].dtype)}
    return module, (image, levels.to(args[1].dtype), *args[2:]), kwargs


def flat(model: DynamicModel, call: Call) -> dict[str, Any]:
    """The call's inputs by name."""
    return model.flat_inputs(call[1], call[2])


def plain(call: Call) -> Tensor:
    """What the original gives."""
    with torch.no_grad():
        return first_tensor(call[0](*call[1], **call[2]))


class MaskedRun:
    """Steps of a converted model with keep masks of our choice."""

    def __init__(self, model: DynamicModel, batch: int = BATCH) -> None:
        self.model = model
        self.history = History(batch, model.spec.tokens)
        self.state: TensorState = model.empty_state(batch)
        self.plan: CarryPlan | None = None

    def step(self, call: Call, keep: np.ndarray, bucket: Bucket | None = None) -> Tensor:
        inputs = flat(self.model, call)
        taus = self.model.planner.taus(inputs, len(keep))
        with torch.no_grad():
            _, live = self.model.route(inputs)
            self.plan = carry_plan(self.history, keep, taus, bucket)
            return first_tensor(self.model.denoise(inputs, live, self.plan, self.state))


def roomy(keep: np.ndarray, tile: int = 4) -> Bucket:
    """A bucket with spare tiles and slots."""
    tiled = int((-(-keep.sum(1) // tile)).sum()) * tile
    return Bucket(len(keep), tiled + 3 * tile, len(keep), keep.shape[1] + 5, tile)


class Memory:
    """The last two computed values of everything, with their noise levels."""

    def __init__(self) -> None:
        self.entries: dict[Any, list[tuple[float, Any]]] = {}

    def write(self, key: Any, tau: float, value: Any) -> None:
        known = self.entries.setdefault(key, [])
        if known and known[-1][0] == tau:
            known.pop()
        known.append((tau, value))
        del known[:-2]

    def read(self, key: Any, tau: float) -> Any:
        """On the line through both, no further than REACH times their distance beyond the newer one."""
        *older, (newer_tau, newer) = self.entries[key]
        if not older:
            return newer
        ahead = min((newer_tau - tau) / (older[0][0] - newer_tau), REACH)
        return newer + ahead * (newer - older[0][1])

    def moved(self, key: Any) -> float:
        """Distance between the two values, the missing one taken as zero."""
        values = [value for _, value in self.entries[key]]
        return float(torch.linalg.vector_norm(values[-1] - (values[0] if len(values) > 1 else 0)))


class SlowRun:
    """The definition of a carry step: one sample alone, through the original module, token by token.

    In the trunk every dropped token's keys and values are replaced by remembered ones, and where the trunk ends its
    value by the one it entered with plus its remembered update. What the module computes for it is thrown away.
    """

    def __init__(self, head: int = 0, tail: int = 0) -> None:
        self.memory = Memory()
        self.head, self.tail = head, tail
        self._attentions = -1

    def step(self, call: Call, keep: np.ndarray, tau: float) -> Tensor:
        module: Any = call[0]
        blocks = module.blocks if hasattr(module, "blocks") else module.transformer_blocks
        trunk = blocks[self.head : len(blocks) - self.tail]
        entered: list[Tensor] = []

        def enter(_: Any, args: tuple[Tensor, ...]) -> None:
            entered.append(args[0])
            self._attentions = 0

        def leave(_: Any, __: Any, result: Tensor) -> Tensor:
            self._attentions = -1
            return entered[0] + self.through_memory("update", (result - entered[0]).unsqueeze(1), keep, tau)[:, 0]

        hooks = [trunk[0].register_forward_pre_hook(enter), trunk[-1].register_forward_hook(leave)]
        with self.attention(keep, tau):
            result = plain(call)
        for hook in hooks:
            hook.remove()
        return result

    def through_memory(self, name: str, values: Tensor, keep: np.ndarray, tau: float) -> Tensor:
        """Values [1, C, N, E] with those of dropped tokens read from memory, and the others written to it."""
        values = values.clone()
        for n, kept in enumerate(keep.tolist()):
            if kept:
                self.memory.write((name, n), tau, values[:, :, n].clone())
            else:
                values[:, :, n] = self.memory.read((name, n), tau)
        return values

    @contextmanager
    def attention(self, keep: np.ndarray, tau: float) -> Iterator[None]:
        real = F.scaled_dot_product_attention

        def attend(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._attentions >= 0 and k.shape[-2] == q.shape[-2]:  # not to keys of text
                k = self.through_memory(f"key {self._attentions}", k, keep, tau)
                v = self.through_memory(f"value {self._attentions}", v, keep, tau)
                self._attentions += 1
            return real(q, k, v, *args, **kwargs)

        patched: Any = F
        patched.scaled_dot_product_attention = attend
        try:
            yield
        finally:
            patched.scaled_dot_product_attention = real


def slow_step(runs: Sequence[SlowRun], call: Call, keep: np.ndarray, taus: Sequence[float]) -> Tensor:
    """One step of every sample of a batch, each by the definition."""
    steps = zip(runs, keep, taus, strict=True)
    return torch.cat([run.step(pick(call, [i]), mask, tau) for i, (run, mask, tau) in enumerate(steps)])
