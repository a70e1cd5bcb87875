"""Sampling loops on diffusers' schedulers, for any step function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.sampling.solver_rows import TRAIN_STEPS

SOLVERS = ("euler", "dpm++", "unipc")

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance; `ratio`: of the unconditional half's own schedule (Lite-CFG, arXiv 2603.06351).

    UsageError for a ratio without guidance.
    """

    scale: float = 1.0
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and self.halves == 1:
            raise UsageError(
                "--lite-cfg is the ratio of guidance's unconditional half: give --guidance other than 1 too"
            )

    @property
    def halves(self) -> int:
        return 1 if self.scale == 1 else 2


class Sampler:
    """A deterministic sampling run of `steps` evaluations, each at a lower noise level than the one before.

    `prediction` "flow": the model sees t = 1000 sigma and predicts noise - data (rectified flow, arXiv 2209.03003).
    "eps": it predicts noise under DiT's linear schedule of betas (arXiv 2212.09748), learned variances are ignored.
    `solver` "euler": first order; for "eps" that is DDIM (arXiv 2010.02502), trailing spacing. "dpm++": DPM-Solver++ 2M
    (arXiv 2211.01095). "unipc": UniPC of order 2 (arXiv 2302.04867). Both look at earlier steps instead of evaluating
    the model twice.
    """

    def __init__(self, prediction: str, steps: int, solver: str = "euler") -> None:
        if steps < 1:
            raise UsageError(f"{steps} sampling steps: at least 1 is needed")
        if prediction not in ("eps", "flow"):
            raise UsageError(f"unknown prediction '{prediction}': choose eps or flow")
        if solver not in SOLVERS:
            raise UsageError(f"unknown solver '{solver}': choose one of {', '.join(SOLVERS)}")
        if steps > TRAIN_STEPS and (prediction, solver) != ("flow", "euler"):
            raise UsageError(f"{steps} sampling steps: there are {TRAIN_STEPS} timesteps, except for Euler on a flow")
        self.prediction = prediction
        self.steps = steps
        self.solver = solver
        self.scheduler = flow_scheduler(steps, solver) if prediction == "flow" else eps_scheduler(steps, solver)

    @property
    def timesteps(self) -> np.ndarray:
        """What the model sees as t at each step, float [steps], falling."""
        return self.scheduler.timesteps.double().numpy()

    @property
    def taus(self) -> np.ndarray:
        """Noise level in [0, 1] at each step."""
        return self.timesteps / TRAIN_STEPS

    def run_counts(self, planner: StepPlanner) -> np.ndarray:
        """Kept tokens a sample at every step, by the planner's schedule."""
        return planner.run_counts(self.taus)

    def times(self, levels: Tensor) -> Tensor:
        """What the model sees as t at noise levels (0, 1], float of their shape."""
        if self.prediction == "flow":
            return levels * TRAIN_STEPS
        return (levels * TRAIN_STEPS).round().clamp(1, TRAIN_STEPS) - 1

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Data [B, C, H, W] at the noise of timesteps t [B], as the model saw it in training."""
        shape = (-1, *[1] * (clean.ndim - 1))
        if self.prediction == "flow":
            sigma = (t / TRAIN_STEPS).view(shape)
            return (1 - sigma) * clean + sigma * noise
        kept = self.scheduler.alphas_cumprod.to(clean)[t.long()].view(shape)
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise

    def tail(self, first: int, steps: int | None = None) -> Sampler:
        """This run from step `first` on: all that is left of it, or `steps` of its noise levels, evenly chosen.

        Its `run` takes data at the noise of its first timestep (`add_noise`), as in SDEdit (arXiv 2108.01073).
        ValueError if there are not so many steps left.
        """
        left = self.steps - first
        steps = left if steps is None else steps
        if not 1 <= steps <= left:
            raise ValueError(f"{steps} steps of the {left} that are left of a run")
        part, scheduler = copy.copy(self), copy.deepcopy(self.scheduler)
        chosen = [first + number * left // steps for number in range(steps)]
        scheduler.timesteps = scheduler.timesteps[chosen]
        scheduler.sigmas = torch.cat([scheduler.sigmas[chosen], scheduler.sigmas[-1:]])
        scheduler.num_inference_steps = part.steps = steps
        part.scheduler = scheduler
        return part

    def run(
        self,
        step: Step,
        noise: Tensor,
        labels: Tensor,
        *,
        guidance: float = 1.0,
        null_class: int | None = None,
        on_step: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """Take noise [B, C, H, W] to samples of the same shape.

        `step(x, t, y)` is the model. With `guidance` other than 1 the conditional and unconditional halves run
        in one batch of 2B, y = `null_class` for the second (classifier-free guidance, arXiv 2207.12598).
        """
        if guidance != 1 and null_class is None:
            raise UsageError("guidance needs a model with an unconditional class")
        scheduler = copy.deepcopy(self.scheduler)  # it counts the steps it has made
        x = noise
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(self._predict(step, x, float(t), labels, guidance, null_class), t, x).prev_sample
            on_step(i)
        return x

    def run_batches(
        self, new_step: Callable[[], Step], noise: Tensor, labels: Tensor, batch: int, **options: Any
    ) -> Tensor:
        """`run` on `batch` samples at a time, each batch with a step function of its own; options as `run` has them."""
        pairs = zip(noise.split(batch), labels.split(batch), strict=True)
        return torch.cat([self.run(new_step(), x, y, **options) for x, y in pairs])

    @staticmethod
    def _predict(step: Step, x: Tensor, t: float, y: Tensor, guidance: float, null_class: int | None) -> Tensor:
        channels, batch = x.shape[1], len(x)
        if guidance == 1 or null_class is None:
            return step(x, torch.full((batch,), t, device=x.device), y)[:, :channels]
        levels = torch.full((2 * batch,), t, device=x.device)
        both = step(torch.cat([x, x]), levels, torch.cat([y, torch.full_like(y, null_class)]))
        conditional, unconditional = both[:, :channels].chunk(2)
        return unconditional + guidance * (conditional - unconditional)


def flow_scheduler(steps: int, solver: str) -> Any:
    """diffusers' scheduler for a model that predicts noise - data."""
    # Here, because it takes seconds and the command line wants nothing but the names of the solvers.
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    if solver == "euler":
        euler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS, shift=1.0)
        euler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
        return euler
    kind: Any = DPMSolverMultistepScheduler if solver == "dpm++" else UniPCMultistepScheduler
    scheduler = kind(
        num_train_timesteps=TRAIN_STEPS, use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2
    )
    scheduler.set_timesteps(steps)
    return scheduler


def eps_scheduler(steps: int, solver: str) -> Any:
    """diffusers' scheduler for a model that predicts noise, with DiT's betas and trailing spacing."""
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    scheduler: Any
    betas: dict[str, Any] = {
        "num_train_timesteps": TRAIN_STEPS,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
    }
    if solver == "unipc":
        # Even spacing: this class takes no timesteps, and its own trailing ones are one too many at 61 steps.
        scheduler = UniPCMultistepScheduler(
            **betas, solver_order=2, timestep_spacing="linspace", final_sigmas_type="zero"
        )
        scheduler.set_timesteps(steps)
        return scheduler
    # Of first order this is DDIM. DDIMScheduler itself misses the next timestep where 1000 / steps is no integer.
    scheduler = DPMSolverMultistepScheduler(
        **betas, solver_order=1 if solver == "euler" else 2, final_sigmas_type="zero"
    )
    # Trailing spacing, written out: the library's range of floats is one too long at 61 steps, 103 and others.
    scheduler.set_timesteps(timesteps=[round(TRAIN_STEPS * (1 - i / steps)) - 1 for i in range(steps)])
    return scheduler


def initial_noise(seed: int, count: int, channels: int, size: int) -> Tensor:
    """Normal noise [count, channels, size, size]; sample i has the generator seed + i, whatever its batch."""
    parts = [torch.randn(channels, size, size, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
    return torch.stack(parts)


def labels_for(count: int, classes: int) -> Tensor:
    """Labels int64 [count] that go through the classes in turn."""
    return torch.arange(count) % classes
