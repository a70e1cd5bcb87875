"""`dcconvert evaluate`: bundles beside their original, and beside what the original gives with fewer steps."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dcconvert.environment import machine, set_threads
from dcconvert.evaluate.comparison import (
    Candidate,
    Comparison,
    MemoryUse,
    check_same_original,
    comparison_rows,
    named_apart,
)
from dcconvert.evaluate.comparison import Execution as Executed
from dcconvert.evaluate.comparison import Row as Measured
from dcconvert.evaluate.image_quality import Described, Drawn, Judge, Judgement, Wanted
from dcconvert.export.bundle import read_bundle
from dcconvert.export.checks.latency import spread
from dcconvert.export.files import HTML, JSON, usable_folder, writable, write_whole
from dcconvert.images.pixels import png_bytes
from dcconvert.models.dit import DiTConfig
from dcconvert.passes.ir.errors import UsageError
from dcconvert.report.conversion import report_json
from dcconvert.report.evaluation import Distances, EvaluationReport, Execution, Images, Row, evaluation_page
from dcconvert.report.figures import comparison
from dcconvert.report.sections import Spread
from dcconvert.sampling.bundle_runs import replaced_note
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Guidance
from dcconvert.terminal import Stages, terminal

SHOWN = 16  # images of each row on the page


@dataclass(frozen=True)
class Settings:
    """What an evaluation was asked for; the options of the command line."""

    bundles: tuple[Path, ...]
    command: str
    wanted: Wanted
    guidance: Guidance
    batch: int = 0
    runs: int = 15
    ratios: tuple[float, ...] = ()
    steps: int | None = None
    solver: str | None = None
    threads: int = 0
    json_path: Path | None = None
    html: Path | None = None
    npz: Path | None = None


def evaluate_bundles(settings: Settings, console: Console) -> EvaluationReport:
    """Measure, print the tables, and write what was asked for; returns the figures.

    UsageError for bundles of different originals, data or networks that cannot be used, and files that cannot be
    written: before anything is measured.
    """
    set_threads(settings.threads)
    for path, form in ((settings.json_path, JSON), (settings.html, HTML)):
        if path:
            writable(path, form)
    if settings.npz:
        usable_folder(settings.npz)
    candidates, config = open_candidates(settings)
    stages = Stages(terminal(stderr=True))
    parts = (settings.wanted, config, settings.guidance, settings.threads, stages)
    judge = Judge(*parts) if settings.wanted.images else None
    batch = settings.batch or max(candidates[0].bundle.bucket_set.batches)
    with tempfile.TemporaryDirectory(prefix="dcconvert-") as scratch:
        with stages.stage("open sessions"):
            comparison = Comparison(candidates, batch, Path(scratch), settings.threads)
        with stages.stage("measure latency") as tick:
            rows = comparison_rows(comparison, settings.runs, tick)
        with stages.stage("measure ways of running a mixed batch") as tick:
            executions = comparison.executions(settings.runs, tick)
        with stages.stage("measure memory") as tick:
            memory = comparison.memory(tick)
        found = None if judge is None else judge.judge(rows, comparison, stages)
    limits = ["Nothing of the images was measured (--images 0)."] if judge is None else judge.limits
    report = EvaluationReport(
        bundles={candidate.name: str(candidate.bundle.folder) for candidate in candidates},
        batch=batch,
        guidance=settings.guidance.scale,
        rows=tuple(row_of(row, batch, memory, found) for row in rows),
        execution=tuple(execution_of(way) for way in executions),
        runtime=comparison.original.name,
        limits=(*limits, *guidance_notes(candidates)),
        lite_cfg=settings.guidance.ratio,
        images=None if found is None else images_of(found, settings.wanted),
        command=settings.command,
        machine=machine(),
    )
    for table in report.for_terminal():
        console.print(table)
    write_results(settings, report, judge, console)
    return report


def guidance_notes(candidates: Sequence[Candidate]) -> list[str]:
    """One for each run table that was made for another guidance scale, or that is not used."""
    tables = [(one.sampler, one) for one in candidates if isinstance(one.sampler, RunTable)]
    notes = [table.guidance_note(one.guidance.scale, one.bundle.folder) for table, one in tables]
    notes += [replaced_note(one.bundle, one.sampler) for one in candidates]
    return [note for note in notes if note]


def row_of(row: Measured, batch: int, memory: dict[str, MemoryUse], found: Judgement | None) -> Row:
    """A row of the report: what it costs for a batch of so many images, and what its images are worth."""
    drawn = found.drawn[row.name] if found else Drawn()
    described = found.described.get(row.name, Described()) if found else Described()
    return Row(
        name=row.name,
        mode=row.mode,
        control=row.control,
        solver=row.sampler.solver,
        steps=row.sampler.steps,
        step_ms=Spread.from_json(spread(row.step_seconds)),
        latency_ms=row.run_ms / batch,
        images_per_second=batch / row.run_ms * 1e3,
        stages_ms=row.stages_ms,
        kept=row.kept,
        **vars(memory["original" if row.mode == "original" else row.name]),
        gmacs=row.gmacs if drawn.gmacs is None else drawn.gmacs,
        psnr=drawn.psnr,
        psnr_error=drawn.psnr_error,
        kept_tokens=drawn.kept_tokens,
        pair_distance=described.pair_distance,
        pair_distance_error=described.pair_distance_error,
        inception_score=described.inception_score,
        **(vars(described.distances) if described.distances else {}),
    )


def execution_of(way: Executed) -> Execution:
    return Execution(
        way.name,
        way.form,
        way.computed_tokens,
        way.waste,
        Spread.from_json(spread(way.seconds)),
        way.speedup,
        way.kept_tokens,
        Spread.from_json(spread(way.original_seconds)),
    )


def images_of(found: Judgement, wanted: Wanted) -> Images:
    """What the images were measured with."""
    return Images(
        count=wanted.images,
        reference=found.reference,
        seed=wanted.seed,
        latents=found.latents,
        network=found.network,
        real=str(wanted.real) if found.floor else None,
        real_count=found.real_count,
        floor=Distances(**vars(found.floor)) if found.floor else None,
    )


def open_candidates(settings: Settings) -> tuple[list[Candidate], DiTConfig]:
    """The bundles in their runs, and the architecture of the original; UsageError if they do not go together."""
    if len(set(settings.bundles)) < len(settings.bundles):
        raise UsageError("the same bundle was given twice: name each once")
    bundles = [read_bundle(path) for path in settings.bundles]
    config = check_same_original(bundles)
    guidance = settings.guidance
    if guidance.halves == 2 and not config.null_class:
        raise UsageError("the model has no unconditional class: evaluate it without --guidance")
    candidates = [
        Candidate.of(bundle, settings.steps, settings.solver, guidance, ratio)
        for bundle in bundles
        for ratio in settings.ratios or (None,)
    ]
    return named_apart(candidates), config


def write_results(settings: Settings, report: EvaluationReport, judge: Judge | None, console: Console) -> None:
    """The files that were asked for, and where they are."""
    made = []
    if settings.json_path:
        write_whole(settings.json_path, report_json(report.to_json()).encode(), JSON)
        made.append(f"Figures: {settings.json_path}")
    if settings.html:
        figures = {}
        if judge is not None:
            some = {name: images[:SHOWN] for name, images in judge.images.items()}
            figures["samples"] = png_bytes(comparison(some, settings.wanted.vae))
        write_whole(settings.html, evaluation_page(report.with_pictures(figures)).encode(), HTML)
        made.append(f"Page: {settings.html}")
    if settings.npz and judge is not None:
        judge.write_npz(settings.npz)
        made.append(f"Images for the ADM suite: {settings.npz}")
    for line in made:
        console.print(line, highlight=False, soft_wrap=True)
