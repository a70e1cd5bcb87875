"""The main job: a checkpoint becomes a verified, exported and measured bundle."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dcconvert.api import Converted, convert, export_onnx, machine, manifest, sampling_facts
from dcconvert.checkpoint import Checkpoint, LoadedDiT, load_checkpoint
from dcconvert.evaluate import Fidelity, Runtime, compute_section, fidelity, latency_section, memory_section
from dcconvert.export.buckets import Ladder, ladder
from dcconvert.export.bundle import MANIFEST, ONNX, new_folder, write_json, write_model
from dcconvert.export.onnx_export import export_original
from dcconvert.export.parity import (
    Check,
    check_batch_invariance,
    check_identity,
    check_isolation,
    check_runtime,
    require,
)
from dcconvert.figures import chunk_map_figure, sample_figure
from dcconvert.passes.infra import Options
from dcconvert.passes.model import StepPlanner
from dcconvert.progress import Stages
from dcconvert.report import write_report
from dcconvert.sampling import Sampler, initial_noise, labels_for

LATENCY_RUNS = 9
ASSUMED = (
    "The checkpoint does not say what it predicts; noise (eps) was assumed, as in DiT. For a flow model, such as SiT, "
    "samples and fidelity are meaningless: convert again with --prediction flow."
)
IMAGE_BUDGET_S = 240.0  # above this estimate, images are left to `dcconvert evaluate`


@dataclass(frozen=True)
class Settings:
    """What a conversion was asked for; the options of the command line."""

    checkpoint: Path
    out: Path
    ratio: float
    schedule: str
    options: Options
    batches: tuple[int, ...]
    steps: int
    images: int
    reference_steps: int
    command: str
    heads: int | None = None
    image_size: int | None = None
    prediction: str | None = None
    threads: int = 0
    measure: bool = True
    force: bool = False
    dump_graphs: Path | None = None


def run_job(settings: Settings, stages: Stages) -> dict[str, Any]:
    """Convert, verify, export, measure and report; returns the report. Nothing is left behind on failure.

    Raises CheckFailedError when a check fails, UsageError and UnsupportedModelError for bad input.
    """
    with new_folder(settings.out, settings.force) as work:
        with stages.stage("read checkpoint"):
            dit = load_checkpoint(
                settings.checkpoint,
                heads=settings.heads,
                image_size=settings.image_size,
                prediction=settings.prediction,
            )
        info = dit.checkpoint_info
        with stages.stage("rewrite"):
            model = convert(
                dit,
                settings.ratio,
                schedule=settings.schedule,
                options=settings.options,
                dump_graphs=settings.dump_graphs,
            )
        taus = Sampler(info.prediction, settings.steps).taus
        planner = StepPlanner(model.spec, model.options, model.schedule.centred(taus))
        counts = planner.schedule.counts(taus, model.spec.tokens)
        rungs = ladder(settings.batches, counts, model.spec.tokens)
        report = describe(settings, dit, model, rungs)
        with stages.stage("verify in torch"):
            checks = check_torch(model)
        with stages.stage("export ONNX"):
            write_model(model, work)
            export_onnx(model, work / ONNX)
        with stages.stage("compare with ONNX Runtime") as tick:
            checks += check_runtime(model, work / ONNX, model.spec.example, rungs.buckets, tick)
            require(checks)
        report["checks"] = [check.as_dict() for check in checks]
        with stages.stage("count operations"):
            report["compute"] = compute_section(model, planner, taus)
        figures: dict[str, bytes] = {}
        if settings.measure:
            figures = measure(settings, info, model, planner, rungs, work, report, stages)
        else:
            report["limits"].append("Latency, memory and fidelity were not measured (--no-measure).")
        write_report(work, report, figures)
        facts = {"command": settings.command, "source": report["source"], **sampling_facts(dit, settings.steps)}
        parity = {check.name: check.value for check in checks}
        write_json(manifest(model, rungs, **facts, parity=parity), work / MANIFEST)
    return report


def check_torch(model: Converted) -> list[Check]:
    """The promises that torch alone can show; raises CheckFailedError if one is broken."""
    inputs = model.spec.example(2)
    checks = [check(model, inputs) for check in (check_identity, check_isolation, check_batch_invariance)]
    require(checks)
    return checks


def describe(settings: Settings, dit: LoadedDiT, model: Converted, rungs: Ladder) -> dict[str, Any]:
    """The parts of the report that need no measurement."""
    info, spec, options = dit.checkpoint_info, model.spec, model.options
    assumed = " (assumed: --prediction says otherwise)" if info.prediction_assumed else ""
    kind = f"DiT checkpoint{f' ({info.source})' if info.source else ''}, predicts {info.prediction}{assumed}"
    return {
        "command": settings.command,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "source": {"path": settings.checkpoint.name, "sha256": info.sha256, "kind": kind},
        "model": {
            "grid": list(spec.grid),
            "tokens": spec.tokens,
            "width": spec.width,
            "depth": spec.depth,
            "parameters": sum(p.numel() for p in dit.parameters()),
        },
        "conversion": {
            "ratio": model.schedule.ratio,
            "mode": "chunk",
            "schedule": model.schedule.kind,
            "router": options.router,
            "head_blocks": options.head_blocks,
            "tail_blocks": options.tail_blocks,
            "packing": options.packing,
            "seed": options.seed,
            "kept_tokens_mean": spec.tokens / model.schedule.ratio,
            "passes": [record.as_dict() for record in model.records],
        },
        "buckets": {
            "rungs": [dict(vars(bucket)) for bucket in rungs.buckets],
            "expected_waste": rungs.expected_waste,
        },
        "limits": [
            *([ASSUMED] if info.prediction_assumed else []),
            "Mode chunk drops tokens without training: its images are worse than those of the original with fewer "
            "steps at equal compute. It is the starting point for upcycling, not a finished model.",
        ],
        "machine": machine(),
    }


def measure(
    settings: Settings,
    info: Checkpoint,
    model: Converted,
    planner: StepPlanner,
    rungs: Ladder,
    work: Path,
    report: dict[str, Any],
    stages: Stages,
) -> dict[str, bytes]:
    """Fill in latency, memory and fidelity; returns the figures."""
    scratch = Path(tempfile.mkdtemp(prefix=".original-", dir=work))  # on the disk that was chosen for large files
    try:
        with stages.stage("export original"):
            export_original(model, scratch / "original.onnx", model.spec.example(3))
        runtime = Runtime.open(model, planner, rungs, work / ONNX, scratch, settings.threads)
        batch = max(settings.batches)
        with stages.stage("measure latency") as tick:
            rows = latency_section(runtime, report["compute"], batch, LATENCY_RUNS, tick=tick)
        report["latency"] = rows
        with stages.stage("measure memory"):
            report["memory"] = memory_section(runtime, report["compute"], work / ONNX, scratch / "original.onnx", batch)
        needed = image_seconds(settings, rows[0])
        if settings.images < 1:
            report["limits"].append("Fidelity was not measured (--images 0).")
            return {}
        if needed > IMAGE_BUDGET_S:
            report["limits"].append(
                f"Fidelity was not measured: {settings.images} images would take about {needed / 60:.0f} minutes on "
                "this machine; run 'dcconvert evaluate' on the bundle with --images to do it."
            )
            return {}
        with stages.stage("compare images") as tick:
            result = image_fidelity(settings, info, model, runtime, report["compute"], tick)
        report["fidelity"] = result.section()
        return {"samples": sample_figure(result.images), "chunk_maps": chunk_map_figure(result)}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def image_seconds(settings: Settings, latency: dict[str, Any]) -> float:
    """About how long the fidelity runs will take, from the measured step latency."""
    passes = settings.reference_steps + 3 * settings.steps
    return passes * settings.images / latency["batch"] * latency["original_ms"]["median"] / 1e3


def image_fidelity(
    settings: Settings, info: Checkpoint, model: Converted, runtime: Runtime, compute: dict[str, Any], tick: Any
) -> Fidelity:
    config = info.config
    noise = initial_noise(settings.options.seed, settings.images, config.in_channels, config.image_size)
    labels = labels_for(settings.images, config.num_classes)
    return fidelity(runtime, info.prediction, noise, labels, compute, settings.reference_steps, tick)


def set_threads(threads: int) -> None:
    """Threads for torch; 0 leaves it to torch."""
    if threads:
        torch.set_num_threads(threads)
