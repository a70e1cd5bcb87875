"""The sections of a conversion's report, read from report.json; each knows its table and its plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dcconvert.records import Record, Rows
from dcconvert.report import plots
from dcconvert.report.tables import Column, Table, number, shown, words

Fact = str | int | float | bool | list[int] | None

# Names of facts that need a unit or more words than their key.
FACTS = {
    "grid": "token grid",
    "gmacs": "GMACs per step and sample",
    "kept_tokens_mean": "kept tokens per sample, mean",
    "memory_gb": "memory, GB",
}


@dataclass(frozen=True)
class Picture:
    """PNG data and the caption below it."""

    png: bytes
    caption: str


@dataclass(frozen=True)
class Source(Record):
    """Where the model came from."""

    path: str = "model"


@dataclass(frozen=True)
class Model(Record):
    """The model that was converted."""

    tokens: int | None = None


@dataclass(frozen=True)
class PassRecord(Record):
    """What one pass did to the graph."""

    name: str
    matches: int
    nodes_before: int
    nodes_after: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversion(Record):
    """What was asked for, and the passes that did it."""

    ratio: float = 1
    mode: str = "chunk"
    kept_tokens_mean: float = 0
    warm_up_steps: int | None = None
    passes: tuple[PassRecord, ...] = ()

    @property
    def table(self) -> Table:
        return Table.of(PASSES, self.passes)


PASSES: tuple[Column[PassRecord], ...] = (
    words("pass", lambda row: row.name),
    Column("matches", lambda row: number(row.matches, 0)),
    words("nodes", lambda row: f"{row.nodes_before} → {row.nodes_after}"),
    Column("seconds", lambda row: number(row.seconds)),
    words("notes", lambda row: "; ".join(row.notes)),
)


@dataclass(frozen=True)
class Check(Record):
    """One promise that was verified."""

    name: str
    value: float | None
    tolerance: float
    detail: str
    passed: bool


CHECKS: tuple[Column[Check], ...] = (
    words("", lambda check: check.passed),
    words("check", lambda check: check.name),
    Column("value", lambda check: number(check.value, missing="not finite")),
    Column("tolerance", lambda check: number(check.tolerance)),
    words("how", lambda check: check.detail),
)


@dataclass(frozen=True)
class Checks(Rows):
    """The verification table."""

    rows: tuple[Check, ...] = ()

    @property
    def score(self) -> str:
        return f"{sum(check.passed for check in self.rows)} of {len(self.rows)}"

    @property
    def table(self) -> Table:
        return Table.of(CHECKS, self.rows)


@dataclass(frozen=True)
class Spread(Record):
    """Milliseconds: median, 10th and 90th percentile, of so many runs."""

    median: float | None
    p10: float | None
    p90: float | None
    runs: int | None = None

    @property
    def known(self) -> tuple[float, float, float] | None:
        """All three from low to high; None if one is missing."""
        if self.p10 is None or self.median is None or self.p90 is None:
            return None
        return self.p10, self.median, self.p90

    def __str__(self) -> str:
        middle, low, high = (shown(value, ".1f") for value in (self.median, self.p10, self.p90))
        return middle if self.median is None else f"{middle} ({low} to {high})"


@dataclass(frozen=True)
class LatencyRow(Record):
    """One step of original and converted in one runtime."""

    runtime: str
    batch: int
    original_ms: Spread
    converted_ms: Spread
    speedup: float | None
    flop_ratio: float | None
    efficiency: float | None
    stages_ms: dict[str, float | None] | None = None

    @property
    def stages(self) -> str:
        return ", ".join(f"{stage} {shown(value, '.1f')}" for stage, value in (self.stages_ms or {}).items())

    @property
    def drawable(self) -> bool:
        return bool(self.flop_ratio and self.original_ms.known and self.converted_ms.known)


LATENCY: tuple[Column[LatencyRow], ...] = (
    words("runtime", lambda row: row.runtime),
    Column("batch", lambda row: number(row.batch, 0)),
    Column("original, ms", lambda row: str(row.original_ms)),
    Column("converted, ms", lambda row: str(row.converted_ms)),
    Column("speed-up", lambda row: shown(row.speedup, ".2f", "x")),
    Column("FLOP ratio", lambda row: shown(row.flop_ratio, ".2f", "x")),
    Column("reached", lambda row: shown(row.efficiency, ".0%")),
    words("stages, ms", lambda row: row.stages),
)


@dataclass(frozen=True)
class Latency(Rows):
    """Steps of original and converted, timed in turns."""

    rows: tuple[LatencyRow, ...] = ()

    @property
    def table(self) -> Table:
        return Table.of(LATENCY, self.rows)

    @property
    def plot(self) -> bytes | None:
        drawn = [row for row in self.rows if row.drawable]
        return plots.png(plots.latency_bars(drawn)) if drawn else None


@dataclass(frozen=True)
class StepCost(Record):
    """One step of a run: its noise level, and what it computes."""

    tau: float
    kept: int
    gmacs: float | None


@dataclass(frozen=True)
class RunCost(Record):
    """GMACs of a whole run of one sample."""

    original: float | None
    converted: float | None
    steps: int
    original_steps: int | None = None  # of the original's run, where the converted one has other steps

    @property
    def before(self) -> int:
        return self.original_steps or self.steps


@dataclass(frozen=True)
class Compute(Record):
    """Operations of original and converted."""

    original_gmacs: float | None
    run_gmacs: RunCost
    ratio: float | None
    per_step: tuple[StepCost, ...] = ()

    @property
    def table(self) -> Table:
        run = self.run_gmacs
        rows = (
            ("original, one step, per sample", self.original_gmacs),
            (f"original, {run.before} steps, per sample", run.original),
            (f"converted, {run.steps} steps, per sample", run.converted),
        )
        return Table(("", "GMACs"), (False, True), tuple((name, number(gmacs)) for name, gmacs in rows))

    def plot(self, tokens: int | None) -> bytes | None:
        """What every step spends, beside a model of so many tokens."""
        return plots.png(plots.spending(self.per_step, tokens, self.original_gmacs)) if self.per_step else None


@dataclass(frozen=True)
class MemoryRow(Record):
    """Peak memory of one model in one runtime."""

    runtime: str
    model: str
    peak_mb: float | None


MEMORY: tuple[Column[MemoryRow], ...] = (
    words("runtime", lambda row: row.runtime),
    words("model", lambda row: row.model),
    Column("peak, MB", lambda row: number(row.peak_mb, 0)),
)


@dataclass(frozen=True)
class Memory(Rows):
    """Peak memory of original and converted."""

    rows: tuple[MemoryRow, ...] = ()

    @property
    def peaks(self) -> tuple[float, float] | None:
        """Of original and converted, where both were measured."""
        found = {row.model: row.peak_mb for row in self.rows if row.peak_mb}
        return (found["original"], found["converted"]) if len(found) == 2 else None

    @property
    def table(self) -> Table:
        return Table.of(MEMORY, self.rows)


@dataclass(frozen=True)
class ImageRow(Record):
    """One way of making the images: what it costs, and how close it comes to the reference."""

    name: str
    mode: str
    steps: int
    gmacs: float
    latency_ms: float | None
    psnr: float | None
    solver: str = ""

    @property
    def cost(self) -> str:
        gmacs = f"{self.gmacs:.1f} GMACs"
        return gmacs if self.latency_ms is None else f"{gmacs}, {self.latency_ms:.0f} ms"


IMAGES: tuple[Column[ImageRow], ...] = (
    words("", lambda row: row.name),
    Column("steps", lambda row: number(row.steps, 0)),
    Column("GMACs per image", lambda row: number(row.gmacs)),
    Column("ms per image", lambda row: number(row.latency_ms)),
    Column("PSNR, dB", lambda row: number(row.psnr, missing="not finite")),
)


@dataclass(frozen=True)
class Images(Record):
    """What the final images lost, beside the control: the original with fewer steps."""

    reference: str
    count: int
    rows: tuple[ImageRow, ...]
    latents: bool = False

    @property
    def compared(self) -> list[ImageRow]:
        return [row for row in self.rows if row.name != self.reference]

    @property
    def table(self) -> Table:
        return Table.of(IMAGES, self.compared)

    @property
    def plot(self) -> bytes | None:
        drawn = [vars(row) for row in self.compared if row.psnr is not None]
        return plots.png(plots.quality_over_cost(drawn)) if drawn else None


@dataclass(frozen=True)
class StepError(Record):
    """Relative error of one step at a noise level."""

    tau: float
    error: float | None


@dataclass(frozen=True)
class Fidelity(Record):
    """Final images, and the error of single steps."""

    images: Images | None = None
    velocity_error: tuple[StepError, ...] = ()

    @property
    def error_plot(self) -> bytes | None:
        curve = [point for point in self.velocity_error if point.error is not None]
        return plots.png(plots.velocity_error(curve)) if curve else None


@dataclass(frozen=True)
class TrainingPoint(Record):
    """A point of a training run: samples and seconds so far, PSNR of final images, loss since the last point."""

    samples: int
    seconds: float
    psnr: float | None
    output: float | None = None


@dataclass(frozen=True)
class Upcycling(Record):
    """What `dcconvert upcycle` did."""

    train: tuple[str, ...]
    images: int
    log: tuple[TrainingPoint, ...]
    data: str | None = None
    data_samples: int = 0
    earlier: tuple[Mapping[str, Any], ...] = ()

    @property
    def first(self) -> TrainingPoint:
        return self.log[0]

    @property
    def last(self) -> TrainingPoint:
        return self.log[-1]

    @property
    def plot(self) -> bytes:
        return plots.png(plots.upcycling_curve(self.log))


@dataclass(frozen=True)
class Bucket(Record):
    """A static shape of the exported model."""

    batch: int | None = None
    tokens: int | None = None
    rows: int | None = None
    row_tokens: int | None = None
    tile: int | None = None


BUCKETS: tuple[Column[Bucket], ...] = (
    Column("batch", lambda bucket: number(bucket.batch, 0, missing="")),
    Column("packed tokens", lambda bucket: number(bucket.tokens, 0, missing="")),
    Column("rows", lambda bucket: number(bucket.rows, 0, missing="")),
    Column("tokens per row", lambda bucket: number(bucket.row_tokens, 0, missing="")),
    Column("tile", lambda bucket: number(bucket.tile, 0, missing="")),
)


@dataclass(frozen=True)
class Buckets(Record):
    """The static shapes of the exported model, and how much of them is padding."""

    renamed: ClassVar[dict[str, str]] = {"rungs": "buckets"}

    buckets: tuple[Bucket, ...]
    expected_waste: float | None

    @property
    def table(self) -> Table:
        return Table.of(BUCKETS, self.buckets)


@dataclass(frozen=True)
class Origin:
    """How a report was made: the command, and every fact about source, model, settings and machine."""

    command: str = ""
    facts: Mapping[str, Fact] = field(default_factory=dict)

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Origin:
        """All facts that report.json holds, whether other sections use them or not."""
        facts = {**report.get("source", {}), **report.get("model", {}), "created": report.get("created")}
        facts |= {name: value for name, value in report.get("conversion", {}).items() if name != "passes"}
        return cls(report.get("command", ""), facts | report.get("machine", {}))

    @property
    def table(self) -> Table:
        known = {name: value for name, value in self.facts.items() if value is not None}
        rows = tuple((FACTS.get(name, name.replace("_", " ")), fact(value)) for name, value in known.items())
        return Table(("", ""), (False, False), rows)


def fact(value: Fact) -> str:
    """A value of the last table: sizes as 16 x 16, large counts with separators."""
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
