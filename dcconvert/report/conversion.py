"""The report of a conversion: report.json for machines, one self-contained report.html for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from rich.table import Table as TerminalTable

from dcconvert.records import Record
from dcconvert.report.calibration import Calibration
from dcconvert.report.html import render
from dcconvert.report.sections import (
    Buckets,
    Checks,
    Compute,
    Conversion,
    Fidelity,
    Latency,
    Memory,
    Model,
    Origin,
    Picture,
    Source,
    Upcycling,
)
from dcconvert.report.stress import FAILURES_FIGURE, Stress
from dcconvert.report.tables import shown
from dcconvert.report.tuning import Tuning

CAPTIONS = {
    "samples": "Final images. Images in the same place have the same seed and class.",
    "token_maps": "Chunk maps, one sample per row: what the model saw at some steps of a run. Tokens that are tinted "
    "blue were not computed at that step, the others were. The final images are on the right.",
}
FIGURES = (*CAPTIONS, FAILURES_FIGURE)  # what may lie beside a report, by the names of the files


@dataclass(frozen=True)
class Card:
    """One of the large figures at the top of the page."""

    figure: str
    text: str


@dataclass(frozen=True)
class ConversionReport(Record):
    """All that the page of a conversion shows: report.json, section by section, and the pictures beside it.

    A section that was not measured is None, or has no rows.
    """

    source: Source = field(default_factory=Source)
    model: Model = field(default_factory=Model)
    conversion: Conversion = field(default_factory=Conversion)
    checks: Checks = field(default_factory=Checks)
    latency: Latency = field(default_factory=Latency)
    compute: Compute | None = None
    fidelity: Fidelity | None = None
    calibration: Calibration | None = None
    tuning: Tuning | None = None
    upcycling: Upcycling | None = None
    stress: Stress | None = None
    memory: Memory = field(default_factory=Memory)
    buckets: Buckets | None = None
    limits: tuple[str, ...] = ()
    origin: Origin = field(default_factory=Origin)
    samples: tuple[Picture, ...] = ()
    gallery: bytes | None = None  # the worst cases of the stress test

    @classmethod
    def from_json(cls, data: Any, figures: Mapping[str, bytes] | None = None) -> Self:
        """`data`: what report.json holds. `figures`: PNG data by name."""
        pictures = {name: png for name, png in (figures or {}).items() if name != FAILURES_FIGURE}
        return replace(
            super().from_json(data),
            origin=Origin.of(data),
            samples=tuple(Picture(png, CAPTIONS.get(name, name)) for name, png in pictures.items()),
            gallery=(figures or {}).get(FAILURES_FIGURE),
        )

    @property
    def title(self) -> str:
        return f"dcconvert: {self.source.path} at {self.conversion.ratio:g}x"

    @property
    def cards(self) -> list[Card]:
        """The report in brief."""
        kept = f"{self.model.tokens or 0} → {self.conversion.kept_tokens_mean:.0f}"
        found = [Card(kept, "tokens in the trunk (mean)")]
        for row in self.latency.rows[:1]:
            found.append(Card(shown(row.speedup, ".2f", "x"), f"speed-up of a run, {row.runtime}, batch {row.batch}"))
            found.append(Card(shown(row.flop_ratio, ".2f", "x"), "fewer operations"))
        return [*found, Card(self.checks.score, "checks passed")] if self.checks else found


def write_report(folder: Path, report: dict[str, Any], figures: dict[str, bytes]) -> None:
    """Write report.json, report.html and the figures (PNG data by name) into `folder`."""
    (folder / "report.json").write_text(report_json(report))
    (folder / "report.html").write_text(page(without_nan(report), figures), encoding="utf-8")
    for name, png in figures.items():
        (folder / f"{name}.png").write_bytes(png)


def report_json(report: dict[str, Any]) -> str:
    """The report as JSON text."""
    return json.dumps(without_nan(report), indent=1, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(report: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """One self-contained HTML page."""
    return render("conversion.html.j2", report=ConversionReport.from_json(report, figures))


def terminal_table(data: Mapping[str, Any]) -> TerminalTable:
    """The short version: original against converted."""
    report = ConversionReport.from_json(data)
    conversion, tokens = report.conversion, report.model.tokens or 0
    title = f"{conversion.mode} at {conversion.ratio:g}x"
    result = TerminalTable(title=title, title_justify="left")
    for column in ("", "original", "converted", "ratio"):
        result.add_column(column, justify="left" if not column else "right")
    kept = conversion.kept_tokens_mean
    result.add_row("tokens in the trunk, mean", f"{tokens}", f"{kept:.0f}", f"{tokens / kept:.2f}x" if kept else "")
    if compute := report.compute:
        run = compute.run_gmacs
        gmacs = (shown(run.original, ".2f"), shown(run.converted, ".2f"), shown(compute.ratio, ".2f", "x"))
        same = run.before == run.steps
        result.add_row(f"GMACs per image, {run.steps} steps" if same else "GMACs per image", *gmacs)
        if not same:
            result.add_row("steps of a run", f"{run.before}", f"{run.steps}", "")
    for row in report.latency.rows:
        times = (shown(spread.median, ".1f", " ms") for spread in (row.original_ms, row.converted_ms))
        reached = f"{shown(row.efficiency, '.0%')} of {shown(row.flop_ratio, '.2f', 'x')}"
        faster = f"{shown(row.speedup, '.2f', 'x')} ({reached})"
        result.add_row(f"step, mean, {row.runtime}, batch {row.batch}", *times, faster)
    if peaks := report.memory.peaks:
        before, after = peaks
        result.add_row("peak memory", f"{before:.0f} MB", f"{after:.0f} MB", f"{before / after:.2f}x")
    images = report.fidelity.images if report.fidelity else None
    for image in images.compared if images else ():
        psnr = "not finite" if image.psnr is None else f"{image.psnr:.1f} dB"
        cells = (psnr, "") if image.mode == "original" else ("", psnr)
        result.add_row(f"PSNR, {image.name}", *cells, image.cost)
    if report.buckets:
        result.add_row("padding in the buckets, expected", "", shown(report.buckets.expected_waste, ".1%"), "")
    if report.checks:
        result.add_row("checks passed", "", report.checks.score, "")
    return result
