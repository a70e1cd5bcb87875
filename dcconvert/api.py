"""The Python API: convert a module, save and load the result."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dcconvert.checkpoint import LoadedDiT
from dcconvert.dit import DiT
from dcconvert.export.buckets import Ladder, ladder
from dcconvert.export.bundle import FORMAT_VERSION, MANIFEST, ONNX, new_folder, read_bundle, write_json, write_model
from dcconvert.export.lowerings import OPSET
from dcconvert.export.onnx_export import export_denoise, export_route
from dcconvert.passes.errors import UsageError
from dcconvert.passes.infra import Options
from dcconvert.passes.model import ChunkedModel
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.plan import Bucket
from dcconvert.passes.schedule import Schedule, parse_ratio

EXAMPLE_BATCH = 3  # sizes above one and unlike any other size, so that export cannot mistake the axis
DEFAULT_BATCHES = (1, 8)
DEFAULT_STEPS = 50


class Converted(ChunkedModel):
    """A ChunkedModel that can be written as a bundle.

    `facts` go into the bundle's manifest; of a DiT from a checkpoint they say how to sample it.
    """

    facts: dict[str, Any]

    @classmethod
    def of(cls, model: ChunkedModel, facts: dict[str, Any]) -> Converted:
        parts = (model.route_graph, model.denoise_graph, model.original_graph, model.spec, model.options)
        made = cls(*parts, model.schedule, model.records)
        made.facts = facts
        return made

    def with_schedule(self, schedule: Schedule) -> Converted:
        return self.of(super().with_schedule(schedule), self.facts)

    def ladder(self, batches: Sequence[int] = DEFAULT_BATCHES, steps: int = DEFAULT_STEPS) -> Ladder:
        """Buckets for batch sizes and a sampling run of `steps` evenly spaced noise levels."""
        taus = 1 - np.arange(steps) / steps
        counts = self.schedule.centred(taus).counts(taus, self.spec.tokens)
        return ladder(batches, counts, self.spec.tokens)

    def save(self, folder: str | Path, batches: Sequence[int] = DEFAULT_BATCHES, force: bool = False) -> Path:
        """Write a bundle: weights, graphs, ONNX files, manifest. UsageError if the folder exists already."""
        target = Path(folder)
        with new_folder(target, force) as work:
            rungs = self.ladder(batches)
            write_model(self, work)
            export_onnx(self, work / ONNX)
            write_json(manifest(self, rungs, **self.facts), work / MANIFEST)
        return target


def convert(
    module: nn.Module,
    ratio: float | str = 4,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    schedule: str = "constant",
    options: Options | None = None,
    timestep: str | None = None,
    timestep_scale: float = 1000.0,
    dump_graphs: Path | None = None,
) -> Converted:
    """Rewrite a diffusion transformer into a dynamic-chunking one with the same call signature.

    Args:
        module: a `dcconvert.DiT`, or any module that `torch.export` captures, has a patchify convolution and
            repeating blocks with attention. It is put in eval mode and shares its weights with the result.
        ratio: tokens divided by kept tokens, on average over a run: 4, "4x", "2.5x"; 1 keeps everything.
        example_inputs: one call's inputs, positional (a sequence) or by name (a mapping), with a batch of at
            least 2. May be left out for a `dcconvert.DiT`.
        schedule: kept fraction over time: constant, rising or falling (toward clean images).
        options: head and tail blocks, router, packing, seed.
        timestep: the input that holds the timestep, where its name does not tell.
        timestep_scale: its value at pure noise.
        dump_graphs: folder that receives the readable graph after each pass.

    Raises:
        UsageError: bad ratio, options or example inputs.
        UnsupportedModelError: the model holds something no pass or rule supports; the message names it.
    """
    if example_inputs is None:
        if not isinstance(module, DiT):
            raise UsageError(f"example_inputs are needed to capture a {type(module).__name__}: give one call's inputs")
        example_inputs = dit_inputs(module, EXAMPLE_BATCH)
    args: Sequence[Any] = () if isinstance(example_inputs, Mapping) else example_inputs
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    model = rewrite(
        module,
        args,
        kwargs,
        options or Options(),
        Schedule(schedule, parse_ratio(ratio)),
        timestep=timestep,
        timestep_scale=timestep_scale,
        dump=dump_graphs,
    )
    return Converted.of(model, sampling_facts(module, DEFAULT_STEPS))


def sampling_facts(module: nn.Module, steps: int) -> dict[str, Any]:
    """What a manifest says about sampling: for a DiT that came from a checkpoint, nothing for other modules."""
    if not isinstance(module, LoadedDiT):
        return {}
    info = module.checkpoint_info
    sampler = {"prediction": info.prediction, "steps": steps, "class_names": info.class_names}
    return {"sampler": sampler, "config": module.cfg.as_dict()}


def load(folder: str | Path) -> Converted:
    """Read a bundle back as a torch module."""
    bundle = read_bundle(Path(folder))
    facts: dict[str, Any] = {name: bundle.manifest[name] for name in ("sampler", "config") if name in bundle.manifest}
    return Converted.of(bundle.model, facts)


def dit_inputs(model: DiT, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random (x, t, y) for a DiT."""
    cfg, generator = model.cfg, torch.Generator().manual_seed(seed)
    x = torch.randn(batch, cfg.in_channels, cfg.image_size, cfg.image_size, generator=generator)
    t = torch.rand(batch, generator=generator) * 1000
    return x, t, torch.arange(batch) % cfg.num_classes


def export_onnx(model: ChunkedModel, folder: Path) -> None:
    """Write `route.onnx` and `denoise.onnx`."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = model.spec.example(EXAMPLE_BATCH)
    export_route(model, folder / "route.onnx", inputs)
    with torch.no_grad():
        scores, live = model.route(inputs)
    tokens = model.spec.tokens
    row, tile = max(2, tokens // 2 - 1), max(2, tokens // 4 - 1)
    # Five tiles of a length unlike any other size, so that export keeps the symbolic axes apart.
    tiles = EXAMPLE_BATCH * -(-row // tile) + 1
    bucket = Bucket(EXAMPLE_BATCH, tiles * tile, EXAMPLE_BATCH, row, tile)
    keep = model.step_planner.planner.select(scores.numpy(), np.full(EXAMPLE_BATCH, max(1, row - 2)))
    export_denoise(model, folder / "denoise.onnx", inputs, live, model.step_planner.planner.plan(keep, bucket))


def manifest(model: ChunkedModel, rungs: Ladder, **more: Any) -> dict[str, Any]:
    """What a bundle says about itself; `more` is added at the top level."""
    return {
        "format_version": FORMAT_VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "conversion": {
            "mode": "chunk",
            "ratio": model.schedule.ratio,
            "schedule": model.schedule.kind,
            **asdict(model.options),
            "passes": [record.as_dict() for record in model.records],
        },
        "grid": list(model.spec.grid),
        "tokens": model.spec.tokens,
        "ladder": rungs.to_dict(),
        "opset": OPSET,
        "machine": machine(),
        **more,
    }


def machine() -> dict[str, Any]:
    """Processor, memory and versions, for manifests, reports and benchmark files."""
    import onnx
    import psutil

    facts = {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=True),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "numpy": np.__version__,
    }
    try:
        import onnxruntime

        facts["onnxruntime"] = onnxruntime.__version__
    except ImportError:
        facts["onnxruntime"] = None
    return facts


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
