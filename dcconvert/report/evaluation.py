"""The tables and the page of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from rich import box
from rich.table import Table as TerminalTable

from dcconvert.records import BESIDE, Record, stated
from dcconvert.report import plots
from dcconvert.report.conversion import CAPTIONS
from dcconvert.report.html import render
from dcconvert.report.sections import Origin, Picture, Spread
from dcconvert.report.tables import Column, R, Table, shown, words


@dataclass(frozen=True)
class Distances(Record):
    """How far images are from real ones; None where it was not measured."""

    frechet: float | None = None
    kernel: float | None = None
    kernel_error: float | None = None
    precision: float | None = None
    recall: float | None = None


@dataclass(frozen=True)
class Quality(Distances):
    """The quality of images; None where it was not measured. `psnr_error` and so on are standard errors."""

    name: str = ""
    psnr: float | None = None
    psnr_error: float | None = None
    pair_distance: float | None = None
    pair_distance_error: float | None = None
    inception_score: float | None = None


@dataclass(frozen=True)
class Row(Quality):
    """One way of making images: the original with so many steps, or a bundle."""

    mode: str = "original"
    control: str = ""
    solver: str = ""
    steps: int = 0
    gmacs: float | None = None
    step_ms: Spread | None = None
    latency_ms: float | None = None
    images_per_second: float | None = None
    stages_ms: dict[str, float] | None = None
    kept: tuple[list[int], ...] | None = None  # tokens at every step, of each half of guidance
    peak_mb: float | None = stated()
    attention_layer_mb: float | None = None
    attention_step_mb: float | None = None
    state_mb: float | None = None
    kept_tokens: float | None = None  # mean, as the images were drawn


@dataclass(frozen=True)
class Execution(Record):
    """One way of running a batch of images that are at different steps of their runs."""

    name: str
    form: str
    computed_tokens: float
    waste: float
    step_ms: Spread
    speedup: float
    kept_tokens: float | None = None
    original_ms: Spread | None = None


@dataclass(frozen=True)
class Images(Record):
    """What the images were measured with."""

    count: int
    reference: str
    seed: int | None = None
    latents: bool | None = None
    network: str | None = None
    real: str | None = None
    real_count: int | None = None
    floor: Distances | None = None  # of real images that were held out


def spread_of(times: Spread | None) -> str:
    """Median and 90th percentile."""
    return "" if times is None else f"{shown(times.median, '.4g')} ({shown(times.p90, '.4g')})"


def with_error(value: float | None, error: float | None, form: str, scale: float = 1) -> str:
    if value is None:
        return ""
    return f"{scale * value:{form}}" + ("" if error is None else f" ± {scale * error:{form}}")


def optional(value: float | None, form: str, unit: str = "") -> str:
    return shown(value, form, unit, missing="")


COST: tuple[Column[Row], ...] = (
    words("", lambda row: row.name),
    words("same", lambda row: row.control),
    Column("GMACs", lambda row: optional(row.gmacs, ".4g")),
    Column("step, ms (p90)", lambda row: spread_of(row.step_ms)),
    Column("images/s", lambda row: optional(row.images_per_second, ".3g")),
    Column("peak MB", lambda row: optional(row.peak_mb, ".0f")),
    Column("attn MB", lambda row: optional(row.attention_step_mb, ".4g")),
    Column("state MB", lambda row: optional(row.state_mb or None, ".3g")),
)
QUALITY: tuple[Column[Quality], ...] = (
    words("", lambda row: row.name),
    Column("PSNR, dB", lambda row: with_error(row.psnr, row.psnr_error, ".2f")),
    Column("pair distance", lambda row: with_error(row.pair_distance, row.pair_distance_error, ".3f")),
    Column("FD", lambda row: optional(row.frechet, ".2f")),
    Column("KID x1000", lambda row: with_error(row.kernel, row.kernel_error, ".2f", 1e3)),
    Column("IS", lambda row: optional(row.inception_score, ".3f")),
    Column("precision", lambda row: optional(row.precision, ".2f")),
    Column("recall", lambda row: optional(row.recall, ".2f")),
)
EXECUTION: tuple[Column[Execution], ...] = (
    words("", lambda row: row.name),
    words("computed as", lambda row: row.form),
    Column("tokens", lambda row: f"{row.computed_tokens:,.0f}"),
    Column("waste", lambda row: f"{row.waste:.1%}"),
    Column("step, ms (p90)", lambda row: spread_of(row.step_ms)),
    Column("speed-up", lambda row: f"{row.speedup:.2f}x"),
)
PLOTTED = (("psnr", "PSNR, dB"), ("pair_distance", "pair distance"), ("kernel", "KID"), ("frechet", "FD"))


@dataclass(frozen=True)
class EvaluationReport(Record):
    """Everything of an evaluation that `--json` writes and page and terminal show, and the pictures on the page."""

    bundles: dict[str, str]
    batch: int
    guidance: float
    rows: tuple[Row, ...]
    execution: tuple[Execution, ...]
    runtime: str
    limits: tuple[str, ...] = ()
    lite_cfg: float | None = stated()
    images: Images | None = None
    command: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    samples: tuple[Picture, ...] = field(default=(), metadata=BESIDE)

    def with_pictures(self, figures: Mapping[str, bytes]) -> Self:
        """The same report with pictures on its page; `figures`: PNG data by name."""
        return replace(self, samples=tuple(Picture(png, CAPTIONS.get(name, name)) for name, png in figures.items()))

    @property
    def origin(self) -> Origin:
        return Origin(self.command, self.machine)

    @property
    def title(self) -> str:
        return "dcconvert evaluate: " + ", ".join(dict.fromkeys(self.bundles.values()))

    @property
    def cost_title(self) -> str:
        half = "" if self.lite_cfg is None else f", the unconditional half at {self.lite_cfg:g}x"
        guidance = "no guidance" if self.guidance == 1 else f"guidance {self.guidance:g}{half}"
        return f"Cost of a run: {self.runtime}, batch {self.batch}, {guidance}"

    @property
    def quality_title(self) -> str:
        images = self.images
        assert images is not None
        parts = [f"{images.count} images, PSNR and pair distance to {images.reference}"]
        parts += [] if images.network is None else [f"network {images.network}"]
        parts += [] if images.real_count is None else [f"{images.real_count} real images"]
        return f"Quality: {', '.join(parts)}"

    @property
    def execution_title(self) -> str:
        return f"A batch of {self.batch} images at different steps of their runs, timed in turns with the original"

    @property
    def judged(self) -> list[Row]:
        """The rows whose images were measured."""
        return [row for row in self.rows if row.psnr is not None]

    @property
    def cost_table(self) -> Table:
        return filled(COST, self.rows)

    @property
    def quality_table(self) -> Table:
        """The rows that were judged, and real images as the floor where there are any."""
        rows: list[Quality] = list(self.judged)
        if self.images and self.images.floor:
            rows.append(Quality(name=f"{self.images.count} real images, held out", **vars(self.images.floor)))
        return filled(QUALITY, rows)

    @property
    def execution_table(self) -> Table:
        return filled(EXECUTION, self.execution)

    @property
    def bundle_table(self) -> Table:
        return Table(("", "folder"), (False, False), tuple(self.bundles.items()))

    @property
    def plots(self) -> dict[str, bytes]:
        """Every measure that all judged rows have, against what they cost, by its name."""
        rows = [vars(row) for row in self.judged]
        known = [(key, label) for key, label in PLOTTED if rows and all(row[key] is not None for row in rows)]
        return {label: plots.png(plots.quality_over_cost(rows, key, label)) for key, label in known}

    def for_terminal(self) -> list[TerminalTable | str]:
        """What the command prints: cost, quality, ways of running, and what was not measured."""
        several = len(set(self.bundles.values())) > 1
        parts: list[TerminalTable | str] = []
        if several:
            parts += [f"{name}: {folder}" for name, folder in self.bundles.items()]
        parts.append(terminal(self.cost_table, self.cost_title))
        if self.quality_table:
            parts.append(terminal(self.quality_table, self.quality_title))
        parts.append(terminal(self.execution_table, self.execution_title))
        return [*parts, *self.limits]


def filled(columns: Sequence[Column[R]], rows: Sequence[R]) -> Table:
    """The table without the columns that are empty in every row."""
    first, *others = columns
    return Table.of([first, *(column for column in others if any(column.cell(row) for row in rows))], rows)


def terminal(table: Table, title: str) -> TerminalTable:
    """A name that several rows share is printed once."""
    names = [row[0] for row in table.rows]
    again = [number and name == names[number - 1] for number, name in enumerate(names)]
    rows = tuple(("", *row[1:]) if same else row for same, row in zip(again, table.rows, strict=True))
    result = replace(table, rows=rows).for_terminal(title, box=box.SIMPLE, padding=(0, 0))
    result.columns[0].min_width = 18
    return result


def evaluation_page(report: EvaluationReport) -> str:
    """One self-contained HTML page."""
    return render("evaluation.html.j2", report=report)
