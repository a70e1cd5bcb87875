"""Detects which calls of a model continue the previous call, for sampling loops that know nothing about runs."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.passes.runtime.run import Run, Runtime

log = logging.getLogger(__name__)

# How far a sample may have moved between two calls, relative to its norm: PACE times the noise levels passed, and
# SLACK, but never more than LIMIT. Samplers move by one to three times the noise levels;  two unrelated
# images are 1.4 apart as noise, and hardly ever closer than LIMIT as pictures.
PACE, SLACK, LIMIT = 4.0, 0.05, 0.5
WARN_AFTER = 5  # restarts in a row, although the noise fell, before a warning is logged


class FollowedRun:
    """Steps of a run that is inferred from the calls themselves.

    A sample continues that of the previous call if its noise level did not rise, all inputs except the image are equal,
    and the image changed no more than one sampler step would change it. Otherwise it starts again and is computed in
    full, which is always correct and only slower. A sample that passes is close to the stored one in noise level,
    conditioning and content. This is a heuristic: if a loop can hold a `Run`, it should.
    """

    def __init__(self, runtime: Runtime, limit: float | None = None) -> None:
        """`limit`: how far an image may move in any step, relative to its norm, if the caller is known."""
        self.runtime = runtime
        self.limit = limit
        self.run: Run | None = None
        self.last: dict[str, Any] = {}
        self._restarts = 0

    def step(self, inputs: dict[str, Any]) -> list[Any]:
        """Flat outputs of one call."""
        specs = self.runtime.planner.spec.input_specs
        batch = next(len(inputs[spec.name]) for spec in specs if spec.batched)
        planner = self.runtime.planner
        if not (planner.method.stateful or planner.watches):
            return self.runtime.start(batch).step(inputs)
        if self.run is None or self.run.batch != batch or self._elsewhere(inputs):
            self.run = self.runtime.start(batch)
        else:
            self._restart_others(inputs, batch)
        try:
            outputs = self.run.step(inputs)
        except BaseException:
            self.forget()
            raise
        self.last = {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}
        return outputs

    def forget(self) -> None:
        """Drop the run and its state; the next call starts a new one."""
        self.run, self.last = None, {}

    def _elsewhere(self, inputs: dict[str, Any]) -> bool:
        """Whether the image's device or type differs from that of the previous call."""
        now, before = (given[self.runtime.planner.spec.image] for given in (inputs, self.last))
        return bool(now.device != before.device or now.dtype != before.dtype)

    def _restart_others(self, inputs: dict[str, Any], batch: int) -> None:
        assert self.run is not None
        assert self.run.remembered is not None
        planner = self.runtime.planner
        taus = planner.taus(inputs, batch)
        passed = self.run.remembered.tau[:batch] - taus
        goes_on = passed >= -1e-6
        falling = goes_on.copy()
        for spec in planner.spec.input_specs:
            if spec.name == planner.spec.timestep:
                continue
            now, before = inputs[spec.name], self.last[spec.name]
            if not isinstance(now, Tensor):
                goes_on &= now == before
            elif now.shape != before.shape or now.device != before.device:
                goes_on &= False
            elif spec.name == planner.spec.image:
                allowed = self.limit or np.minimum(PACE * passed + SLACK, LIMIT)
                goes_on &= moved(now, before) <= allowed
            elif spec.batched:
                goes_on &= (now == before).reshape(batch, -1).all(1).cpu().numpy()
            else:
                goes_on &= bool(torch.equal(now, before))
        if not goes_on.all():
            self.run.restart(np.flatnonzero(~goes_on).tolist())
        self._restarts = self._restarts + 1 if (falling & ~goes_on).any() else 0
        if self._restarts == WARN_AFTER:
            log.warning(
                "%d calls in a row did not continue the previous one, although the noise fell: every token is "
                "computed and nothing is saved. If this is one image, step through model.start(batch) instead",
                WARN_AFTER,
            )


def moved(now: Tensor, before: Tensor) -> np.ndarray:
    """Distance between two batches of images relative to their norm, [B]."""
    change = (now - before).double().flatten(1).norm(dim=1)
    size = torch.minimum(now.double().flatten(1).norm(dim=1), before.double().flatten(1).norm(dim=1))
    return (change / size.clamp_min(1e-12)).cpu().numpy()
