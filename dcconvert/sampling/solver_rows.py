"""Rows of a run table for known solvers: diffusers' schedulers, and Adams methods on any time grid of a flow."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dcconvert.sampling.run_table import Row, RunTable

TRAIN_STEPS = 1000  # timesteps run from 0 (clean) to 1000 (noise) in every published DiT and SiT
NEGLIGIBLE = 1e-9  # of a coefficient: below what float32 adds up to


def scheduler_rows(scheduler: Any) -> tuple[Row, ...]:
    """The rows of a diffusers scheduler whose timesteps are set, if it is linear in the sample and the outputs.

    Its `step` is run on unit vectors: the sample starts as the first, the output of step i is number i + 1, and what
    comes out are the coefficients of the run.
    """
    times = scheduler.timesteps.double().tolist()
    scheduler = copy.deepcopy(scheduler)  # it counts the steps it has made
    basis = torch.eye(len(times) + 1, dtype=torch.float64)
    sample, made = basis[:1], [basis[0].numpy()]
    for i, t in enumerate(scheduler.timesteps):
        sample = scheduler.step(basis[i + 1 : i + 2], t, sample).prev_sample.double()
        made.append(sample[0].numpy())
    return tuple(step_row(t, i, made) for i, t in enumerate(times))


def step_row(t: float, number: int, made: Sequence[np.ndarray]) -> Row:
    """The row from one sample to the next; samples are given by their coefficients of the noise and all outputs."""
    before, after = made[number], made[number + 1]
    state = after[0] / before[0] if abs(before[0]) > NEGLIGIBLE else 0.0
    rest = after - state * before
    outputs = rest[number + 1 : 0 : -1]
    used = np.flatnonzero(np.abs(outputs) > NEGLIGIBLE * np.abs(outputs).max())
    return Row(t, t / TRAIN_STEPS, tuple(outputs[: used[-1] + 1].tolist()), float(state))


def even_grid(steps: int) -> np.ndarray:
    """Noise levels [steps + 1] from 1 to 0, evenly spaced."""
    return np.linspace(1.0, 0.0, steps + 1)


def graded_grid(steps: int, short: int = 4, factor: float = 0.5) -> np.ndarray:
    """Noise levels [steps + 1] from 1 to 0 whose first steps are shorter than the others.

    Errors made early are amplified by all later steps.
    """
    lengths = np.ones(steps)
    lengths[: min(short, steps - 1)] = factor
    return 1 - np.concatenate([[0.0], np.cumsum(lengths)]) / lengths.sum()


def adams_table(levels: np.ndarray, order: int = 2, corrector: int = 0, full: Sequence[bool] = ()) -> RunTable:
    """Adams-Bashforth of some order on a flow, over noise levels [steps + 1] from 1 down to 0.

    `corrector`: the order of an Adams-Moulton correction of each move, made when the next output is known (0: none).
    `full`: which steps are computed in full (default: all); the others forecast the trunk's update by a straight line
    in the noise level through the two last ones.
    """
    steps = len(levels) - 1
    full = list(full) or [True] * steps
    rows = []
    for i in range(steps):
        outputs = np.zeros(i + 1)  # of v_i, v_{i-1}, ...
        known = levels[i::-1]
        use = min(order, i + 1)
        outputs[:use] += integral_weights(known[:use], levels[i], levels[i + 1])
        if corrector and i:
            used, better = min(order, i), min(corrector, i + 1)
            outputs[1 : 1 + used] -= integral_weights(known[1 : 1 + used], levels[i - 1], levels[i])
            outputs[:better] += integral_weights(known[:better], levels[i - 1], levels[i])
        last = np.flatnonzero(outputs)[-1]
        weights = () if full[i] else line_weights(levels[i], [levels[k] for k in range(i - 1, -1, -1) if full[k]])
        level = float(levels[i])
        rows.append(Row(level * TRAIN_STEPS, level, tuple(outputs[: last + 1].tolist()), weights=weights))
    return RunTable(tuple(rows))


def integral_weights(points: np.ndarray, start: float, end: float) -> np.ndarray:
    """Weights [n] that integrate a polynomial, given by its values at `points` [n], from `start` to `end` exactly."""
    scale = abs(end - start)
    places = (points - start) / scale
    stop = (end - start) / scale
    powers = np.arange(len(points))
    return scale * np.linalg.solve(places[None, :] ** powers[:, None], stop ** (powers + 1) / (powers + 1))


def line_weights(level: float, computed: Sequence[float]) -> tuple[float, ...]:
    """Weights of the last updates, newest first, on a straight line in the noise level."""
    if len(computed) == 1:
        return (1.0,)
    ahead = float((computed[0] - level) / (computed[1] - computed[0]))
    return (1 + ahead, -ahead)
