"""Run tables for a model that nothing was fitted to: a graded time grid, and every second step a forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dcconvert.passes.ir.errors import UsageError
from dcconvert.sampling.run_table import Row, RunTable
from dcconvert.sampling.samplers import Sampler
from dcconvert.sampling.solver_rows import TRAIN_STEPS, adams_table, even_grid, graded_grid

# Computed steps from which skipped ones between them gain without a fit; with guidance, forecasts are worse (measured:
# benchmarks/fitted.py).
WORTH_SKIPPING, GUIDED_WORTH_SKIPPING = 12, 18
LEAST = 2  # steps computed before the first forecast, which needs a line
GRADED = "graded"  # Adams-Bashforth of order 2 on a graded grid
ADAMS = "adams"  # the same on an even grid
LAST = 0.3  # of the last move, where one more step is computed: forecasts are worst next to the clean image


def default_table(prediction: str, steps: int, ratio: float, guidance: float = 1.0) -> RunTable:
    """A run that costs as much as steps / ratio steps of the original, each of them computed in full.

    Its steps are fewer and unevenly spaced; if there are enough of them, every second one skips the trunk. Raises
    UsageError for a ratio that leaves less than two computed steps.
    """
    evaluations = round(steps / ratio)
    if evaluations < LEAST:
        raise UsageError(
            f"{steps} steps at {ratio:g}x leave {evaluations} computed steps, and a forecast needs {LEAST}: ask for a "
            "lower ratio or more steps"
        )
    worth_skipping = WORTH_SKIPPING if guidance == 1 else GUIDED_WORTH_SKIPPING
    full = pattern(evaluations) if evaluations >= worth_skipping else [True] * evaluations
    levels = default_levels(full)
    name = f"graded, {evaluations} of {len(full)} steps computed"
    return replace(on_levels(prediction, levels, full), guidance=guidance, name=name)


def original_run(prediction: str, steps: int, solver: str) -> Sampler | RunTable:
    """A run of the original by one of diffusers' solvers, "graded" or "adams".

    "graded" is the best there is in few steps without a fit to the model; "adams" converges fastest in many.
    """
    if solver not in (GRADED, ADAMS):
        return Sampler(prediction, steps, solver)
    levels = graded_grid(steps) if solver == GRADED else even_grid(steps)
    return replace(on_levels(prediction, levels, [True] * steps), name=solver)


def pattern(evaluations: int, skips: int = 1) -> list[bool]:
    """Which steps are computed: 2 to 4 first, then one after every `skips` skipped ones, and the last."""
    first = min(4, max(LEAST, evaluations // 4))
    if evaluations < first + 2:
        return [True] * evaluations
    return [*[True] * first, *[*[False] * skips, True] * (evaluations - 1 - first), True]


def default_levels(full: Sequence[bool]) -> np.ndarray:
    """Noise levels [steps + 1]: graded, and where steps are skipped with a computed one inside the last move."""
    short = 3 + len(full) // 15
    if all(full):
        return graded_grid(len(full), short)
    levels = graded_grid(len(full) - 1, short)
    return np.concatenate([levels[:-1], [levels[-2] * LAST], [0.0]])


def on_levels(prediction: str, levels: np.ndarray, full: list[bool], order: int = 2, corrector: int = 2) -> RunTable:
    """An Adams run over noise levels [steps + 1] of a flow, for a model of either prediction.

    A model that predicts noise is sampled as the flow that its variance-preserving diffusion is up to scale.
    """
    if prediction == "flow":
        return adams_table(levels, order, corrector, full)
    times = nearest_times(levels[:-1])
    alphas, sigmas = vp_coefficients(times)
    flow = flow_levels(times)
    scales = np.append(alphas + sigmas, 1.0)
    rows = [
        vp_row(row, int(t), float(alphas[i]), float(scales[i]), float(scales[i + 1]))
        for i, (row, t) in enumerate(zip(adams_table(flow, order, corrector, full).rows, times, strict=True))
    ]
    return RunTable(tuple(rows), prediction)


def vp_row(row: Row, t: int, alpha: float, before: float, after: float) -> Row:
    """A flow's row for a model that predicts noise; `before` and `after`: how much larger its samples are."""
    return replace(
        row,
        t=float(t),
        tau=t / TRAIN_STEPS,
        state=row.state * after / before,
        outputs=tuple(after * coefficient for coefficient in row.outputs),
        scale=before / alpha,
        shift=-1 / alpha,
    )


def vp_coefficients(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signal and noise at timesteps 0 to 999 under DiT's linear schedule of betas (arXiv 2212.09748)."""
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, TRAIN_STEPS))[times]
    return np.sqrt(kept), np.sqrt(1 - kept)


def flow_levels(times: np.ndarray) -> np.ndarray:
    """Noise levels [steps + 1] of a run through timesteps 0 to 999, as those of a flow, down to the clean image's 0."""
    alphas, sigmas = vp_coefficients(times)
    return np.append(sigmas / (alphas + sigmas), 0.0)


def levels_of(table: RunTable) -> np.ndarray:
    """Noise levels [steps + 1] of a table as those of a flow, all of them different, down to 0.

    Timesteps would not do: the last one of a noise prediction is 0 before the last move, too.
    """
    if table.prediction == "flow":
        return np.array([*(row.tau for row in table.rows), 0.0])
    return flow_levels(np.array([round(row.t) for row in table.rows]))


def nearest_times(levels: np.ndarray) -> np.ndarray:
    """The timesteps, each used once, whose noise levels as a flow's are nearest to those asked for [steps]."""
    alphas, sigmas = vp_coefficients(np.arange(TRAIN_STEPS))
    known = sigmas / (alphas + sigmas)
    times = np.abs(known[None, :] - levels[:, None]).argmin(1)
    # The highest and the lowest levels may lie closer together than timesteps.
    for i in range(1, len(times)):
        times[i] = min(times[i], times[i - 1] - 1)
    times[-1] = max(times[-1], 0)
    for i in range(len(times) - 2, -1, -1):
        times[i] = max(times[i], times[i + 1] + 1)
    if times[0] >= TRAIN_STEPS:
        raise UsageError(f"{len(levels)} sampling steps: there are {TRAIN_STEPS} timesteps")
    return times
