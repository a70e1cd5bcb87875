"""The main job: a checkpoint becomes a verified, exported and measured bundle."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from dcconvert.api import Converted, convert, manifest, sampling_facts
from dcconvert.environment import machine
from dcconvert.evaluate.conversion_metrics import LATENCY_RUNS, Effort, Subject, measure
from dcconvert.evaluate.measure_steps import compute_section
from dcconvert.export.buckets import BucketSet, choose_buckets
from dcconvert.export.bundle import ONNX, write_model
from dcconvert.export.checks.parity import Check, require
from dcconvert.export.checks.written import check_promises, check_written
from dcconvert.export.files import MANIFEST, new_folder, usable_folder, write_json
from dcconvert.export.onnx.export import export_onnx
from dcconvert.models.key_tables import Size
from dcconvert.models.load import Source, open_source
from dcconvert.passes.methods.method import Method
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.report.conversion import write_report
from dcconvert.report.figures import sample_figure, token_map_figure
from dcconvert.report.notes import state_note
from dcconvert.sampling.bundle_runs import run_of, write_table
from dcconvert.sampling.fitting import fitted
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import SOLVERS, Sampler
from dcconvert.terminal import Stages

ASSUMED = (
    "The checkpoint does not say what it predicts; noise (eps) was assumed, as in DiT. For a flow model, such as SiT, "
    "samples and fidelity are meaningless: convert again with --prediction flow."
)
UNSETTLED = (
    "Each step decides how many tokens it keeps, and without a sampler this was not fitted to the ratio: check "
    "how many tokens a run really keeps."
)
IMAGE_BUDGET_S = 240.0  # above this estimate, images are left to `dcconvert evaluate`


@dataclass(frozen=True)
class Settings:
    """The settings of a conversion: the options of the command line."""

    checkpoint: Path
    out: Path
    ratio: float
    schedule: str | Policy | None
    warm_up: int
    refresh: int
    buckets: int
    method: Method
    batches: tuple[int, ...]
    steps: int
    solver: str
    images: int
    reference_steps: int
    command: str
    heads: int | None = None
    image_size: Size | None = None
    prediction: str | None = None
    null_class: bool | None = None
    weights: str | None = None
    threads: int = 0
    refine_grid: bool = False
    measure: bool = True
    force: bool = False
    dump_graphs: Path | None = None


def run_job(settings: Settings, stages: Stages) -> dict[str, Any]:
    """Convert, verify, export, measure and report; returns the report. Leaves nothing behind on failure.

    Raises CheckFailedError when a check fails, UsageError and UnsupportedModelError for bad input.
    """
    if settings.dump_graphs:
        usable_folder(settings.dump_graphs)
    with new_folder(settings.out, settings.force, inputs=[settings.checkpoint]) as work:
        with stages.stage("read checkpoint"):
            facts_given = (settings.heads, settings.image_size, settings.prediction, settings.null_class)
            source = open_source(settings.checkpoint, *facts_given, settings.weights)
        for note in source.notes:
            stages.note(escape(note))
        method = settings.method.with_prediction(source.prediction)
        with stages.stage("rewrite"):
            model = convert(
                source.module,
                settings.ratio,
                example_inputs=source.example,
                schedule=settings.schedule,
                steps=settings.steps,
                warm_up=settings.warm_up,
                refresh=settings.refresh,
                options=method,
                refine_grid=settings.refine_grid,
                timestep_scale=source.timestep_scale,
                grid=source.grid,
                fit=False,  # below, with the sampler of the bundle
                dump_graphs=settings.dump_graphs,
            )
        sampler = Sampler(source.prediction, settings.steps, settings.solver)
        taus = sampler.taus
        model = model.with_schedule(model.planner.levelled(taus, settings.buckets))
        if model.schedule.data_dependent and source.config is not None:
            with stages.stage("fit to the ratio on runs of the model") as tick:
                model = fitted(model, sampler, source.config, tick)
        planner = StepPlanner(model.spec, model.method, model.schedule.fitted(taus))
        run = run_of(model, sampler, settings.ratio, source.sha256) if source.config is not None else sampler
        counts = planner.bucket_counts(taus)
        bucket_set = choose_buckets(settings.batches, counts, model.spec.tokens, settings.buckets - 1)
        report = describe(settings, source, model, planner, run, bucket_set)
        if isinstance(run, RunTable) and settings.solver != SOLVERS[0]:
            stages.note(f"Mode steps samples with its run table; {settings.solver} is used for the original only.")
        if model.method.stateful:
            stages.note(state_note(model.spec.state_bytes, settings.batches))
        with stages.stage("verify in torch"):
            checks = check_torch(model)
        with stages.stage("export ONNX"):
            write_model(model, work)
            export_onnx(model, work / ONNX)
            write_table(run, work)
        with stages.stage("compare with ONNX Runtime") as tick:
            checks += check_written(model, work / ONNX, model.spec.example, bucket_set.buckets, tick)
            require(checks)
        report["checks"] = [check.as_dict() for check in checks]
        with stages.stage("count operations"):
            report["compute"] = compute_section(model, run.run_counts(planner), run.taus, settings.steps)
        figures: dict[str, bytes] = {}
        if settings.measure:
            subject = Subject(model, planner, bucket_set, work / ONNX, run, sampler, source.config, source.dit)
            figures = measured_figures(subject, settings, work, report, stages)
        else:
            report["limits"].append("Latency, memory and fidelity were not measured (--no-measure).")
        write_report(work, report, figures)
        facts = {
            "command": settings.command,
            "source": report["source"],
            "steps": settings.steps,
            "most_buckets": settings.buckets,
            **sampling_facts(source.module, settings.steps, settings.solver),
        }
        parity = {check.name: check.value for check in checks}
        write_json(manifest(model, bucket_set, **facts, parity=parity), work / MANIFEST)
    return report


def limits_of(source: Source, model: Converted) -> list[str]:
    """Limits of a conversion that the report shows before its figures."""
    found = [ASSUMED] if source.assumed else []
    found += model.method.limits
    if model.schedule.data_dependent and source.config is None:
        found.append(UNSETTLED)
    return found


def state_facts(model: Converted, batch: int) -> dict[str, Any]:
    """The size of a run's state, in MB per sample and per full batch."""
    if not model.method.stateful:
        return {}
    megabytes = model.spec.state_bytes / 1e6
    return {
        "state_dtype": next(dtype for _, dtype in model.spec.state_shapes(1).values()),
        "state_mb_a_sample": megabytes,
        f"state_mb_batch_{batch}": megabytes * batch,
    }


def check_torch(model: Converted) -> list[Check]:
    """The checks that need only torch; raises CheckFailedError if one fails."""
    checks = check_promises(model, model.spec.example(2))
    require(checks)
    return checks


def describe(
    settings: Settings,
    source: Source,
    model: Converted,
    planner: StepPlanner,
    run: Sampler | RunTable,
    bucket_set: BucketSet,
) -> dict[str, Any]:
    """The parts of the report that need no measurement."""
    spec, method = model.spec, model.method
    weights = {"weights": dict(source.weights)} if source.weights else {}
    return {
        "command": settings.command,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "source": {"path": settings.checkpoint.name, "sha256": source.sha256, "kind": source.kind, **weights},
        "model": {
            "grid": list(spec.grid),
            "tokens": spec.tokens,
            "width": spec.width,
            "depth": spec.depth,
            "parameters": sum(p.numel() for p in source.module.parameters()),
        },
        "conversion": {
            "ratio": model.schedule.ratio,
            "mode": method.mode,
            "schedule": model.schedule.kind,
            "warm_up_steps": planner.schedule.dense_first,
            "refresh_every": planner.schedule.policy.refresh,
            "sampler": f"{run.solver}, {run.steps} steps",
            "router": method.router,
            "head_blocks": method.head_blocks,
            "tail_blocks": method.tail_blocks,
            "packing": method.row_packing,
            "seed": method.seed,
            "kept_tokens_mean": kept_mean(model, planner, run, settings.steps),
            **state_facts(model, max(settings.batches)),
            "passes": [record.as_dict() for record in model.records],
        },
        "buckets": {
            "buckets": [dict(vars(bucket)) for bucket in bucket_set.buckets],
            "expected_waste": bucket_set.expected_waste,
        },
        "limits": limits_of(source, model),
        "machine": machine(),
    }


def kept_mean(model: Converted, planner: StepPlanner, run: Sampler | RunTable, steps: int) -> float:
    """Mean number of tokens computed per step of the original's run that this run replaces."""
    if isinstance(run, RunTable):
        return float(run.run_counts(planner).sum() / steps)
    return model.spec.tokens * model.schedule.expected


def measured_figures(
    subject: Subject, settings: Settings, work: Path, report: dict[str, Any], stages: Stages
) -> dict[str, bytes]:
    """Add the measurements to the report; returns the figures."""
    effort = Effort(
        batch=max(settings.batches),
        runs=LATENCY_RUNS,
        images=settings.images,
        reference_steps=settings.reference_steps,
        threads=settings.threads,
        seed=settings.method.seed,
        image_budget_s=IMAGE_BUDGET_S,
    )
    scratch = Path(tempfile.mkdtemp(prefix=".original-", dir=work))  # on the disk that was chosen for large files
    try:
        measured = measure(subject, effort, scratch, report["compute"], stages)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report |= measured.added_to(report)
    result = measured.fidelity
    return {} if result is None else {"samples": sample_figure(result), "token_maps": token_map_figure(result)}
