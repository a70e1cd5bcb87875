"""cache-dit itself, run on a model, beside mode steps and the original's solvers at equal compute.

    pip install --no-deps cache-dit==1.5.3
    python -m benchmarks.peers                   # some minutes on two cores -> benchmarks/results/peers.json
    python -m benchmarks.peers --model cifar --guidance 4 --device cuda

cache-dit (https://github.com/vipshop/cache-dit) runs in torch on the model's own blocks. It computes the steps that a
mask names, and of the others the first block only; what the other blocks would have added is held, or forecast by
TaylorSeer of first order. Its runs have as many computed steps as the budget allows, in the pattern of mode steps, and
UniPC, the best solver that diffusers has for them. Cost counts blocks, in steps of the original.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.common import MODELS, RESULTS, in_steps, write_result
from benchmarks.torch_device import TorchDevice
from dcconvert.evaluate.tuning import FittedStep, Images, Tuner, skip_cost
from dcconvert.export.files import file_sha256
from dcconvert.export.onnx.export import export_onnx
from dcconvert.export.runtimes.ort import CPU, OrtModel
from dcconvert.images.pixels import psnr
from dcconvert.models.dit import DiT
from dcconvert.models.load import shipped_model
from dcconvert.passes.runtime.run import Runtime
from dcconvert.sampling.default_tables import default_table, pattern
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Guidance, Sampler
from dcconvert.sampling.shipped_tables import shipped_table
from dcconvert.terminal import Stages

BUDGETS = (8, 12, 25)  # computed steps
STEPS = 50  # of the original's run
FIRST = 1  # blocks that cache-dit computes in every step
TAYLOR = {"cache-dit, held": None, "cache-dit, TaylorSeer": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description="cache-dit on a model, beside mode steps.")
    parser.add_argument("--model", choices=MODELS, default="shipped")
    parser.add_argument("--device", help="of torch, for all runs; without it mode steps runs on ONNX Runtime")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--reference-steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="result file")
    args = parser.parse_args()
    import cache_dit

    stages, rows = Stages(Console(stderr=True)), []
    out = args.out or RESULTS / ("peers.json" if args.model == "shipped" else f"peers_{args.model}.json")
    settings = {**vars(args), "out": out.name, "cache_dit": cache_dit.__version__, "steps": STEPS}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for guidance in args.guidance:
            bench = Bench(Path(folder), args.model, args.device, guidance)
            with stages.stage(f"guidance {guidance:g}: draw the reference") as tick:
                images = bench.tuner.images(bench.dit.cfg, 0, args.images, args.reference_steps, lambda: tick("steps"))
            for budget in args.budgets:
                with stages.stage(f"guidance {guidance:g}, {budget} computed steps") as tick:
                    rows += [bench.row(budget, name, run, images, tick) for name, run in bench.runs(budget).items()]
                write_result("peers", settings, rows, out)
    print(f"Results: {out}")


Run = Callable[[Tensor, Tensor], tuple[Tensor, float]]  # noise and labels to images, and the cost


class Bench:
    """A model in torch, and in mode steps on ONNX Runtime or in torch on a device."""

    def __init__(self, folder: Path, name: str, device: str | None, guidance: float) -> None:
        self.name, self.device = name, device or "cpu"
        self.dit, model = in_steps(name, folder)
        self.prediction = self.dit.checkpoint_info.prediction
        cost = skip_cost(model)
        if device:
            self.dit.to(device)
            runtime: Runtime = TorchDevice(model, device)
        else:
            export_onnx(model, folder)
            runtime = OrtModel(folder, model.planner, None, CPU)
        self.runtime = f"torch {device}" if device else "ONNX Runtime CPU"
        halves, classes = Guidance(guidance).halves, self.dit.cfg.num_classes
        self.tuner = Tuner(lambda: FittedStep(model, runtime, halves), self.prediction, cost, guidance, classes)
        self.guided: dict[str, Any] = {"guidance": guidance, "null_class": classes}

    def runs(self, budget: int) -> dict[str, Run]:
        found = {f"original, {solver}": self.solver(budget, solver) for solver in ("euler", "unipc")}
        found |= {name: self.cached(budget, order) for name, order in TAYLOR.items()}
        tables: dict[str, RunTable | None] = {
            "mode steps, unfitted": replace(default_table(self.prediction, budget, 1), guidance=self.tuner.guidance)
        }
        if self.name == "shipped" and self.tuner.guidance == 1:
            tables["mode steps, tuned"] = shipped_table(file_sha256([shipped_model()]), budget)
        return found | {name: self.table(table) for name, table in tables.items() if table is not None}

    def original(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model in torch, called from the host."""
        return self.dit(*(value.to(self.device) for value in (x, t, y))).cpu()

    def solver(self, steps: int, solver: str) -> Run:
        def run(noise: Tensor, labels: Tensor) -> tuple[Tensor, float]:
            made = Sampler(self.prediction, steps, solver).run(self.original, noise, labels, **self.guided)
            return made, float(steps)

        return run

    def table(self, table: Any) -> Run:
        null_class = self.guided["null_class"]

        def run(noise: Tensor, labels: Tensor) -> tuple[Tensor, float]:
            made = table.run(self.tuner.new_step(), noise, labels, null_class=null_class)
            return made, table.cost(self.tuner.skip_cost)

        return run

    def cached(self, budget: int, order: int | None) -> Run:
        """A run of cache-dit that costs no more than the budget."""
        depth = len(self.dit.blocks)
        patterns = [pattern(computed) for computed in range(2, budget + 1)]
        costs = [sum(full) + FIRST / depth * (len(full) - sum(full)) for full in patterns]
        full = max((full for full, cost in zip(patterns, costs, strict=True) if cost <= budget), key=len)

        def run(noise: Tensor, labels: Tensor) -> tuple[Tensor, float]:
            with cache_dit_on(self.dit, full, order), counted(self.dit) as calls:
                made = Sampler(self.prediction, len(full), "unipc").run(self.original, noise, labels, **self.guided)
            assert calls[-1] == sum(full), f"{calls[-1]} steps were computed, not {sum(full)}"
            return made, sum(calls) / depth

        return run

    def row(self, budget: int, name: str, run: Run, images: Images, tick: Callable[[str], None]) -> dict[str, Any]:
        tick(name)
        start = time.perf_counter()
        made, cost = run(images.noise, images.labels)
        seconds = time.perf_counter() - start
        found = psnr(made, images.reference.samples[-1])
        return {
            "guidance": self.tuner.guidance,
            "budget": budget,
            "run": name,
            "cost": round(cost, 3),
            "psnr": round(float(found.mean()), 3),
            "psnr_error": round(float(found.std() / len(found) ** 0.5), 3),
            "seconds": round(seconds, 2),
            "runtime": self.runtime if name.startswith("mode") else f"torch {self.device}",
        }


@contextmanager
def cache_dit_on(dit: DiT, full: Sequence[bool], order: int | None) -> Any:
    """cache-dit on the blocks of a model; `full`: which steps it computes; `order`: of TaylorSeer."""
    from cache_dit import (
        BlockAdapter,
        DBCacheConfig,
        ForwardPattern,
        TaylorSeerCalibratorConfig,
        disable_cache,
        enable_cache,
    )

    adapter = BlockAdapter(transformer=dit, blocks=dit.blocks, forward_pattern=ForwardPattern.Pattern_3)
    config = DBCacheConfig(
        Fn_compute_blocks=FIRST,
        Bn_compute_blocks=0,
        max_warmup_steps=0,
        num_inference_steps=len(full),
        steps_computation_mask=[int(step) for step in full],
        steps_computation_policy="static",
    )
    calibrator = None if order is None else TaylorSeerCalibratorConfig(taylorseer_order=order)
    enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
    try:
        yield
    finally:
        disable_cache(adapter)


@contextmanager
def counted(dit: DiT) -> Any:
    """How often each block is called."""
    calls = [0] * len(dit.blocks)

    def count(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[number] += 1

        return hook

    hooks = [block.register_forward_hook(count(number)) for number, block in enumerate(dit.blocks)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


if __name__ == "__main__":
    main()
