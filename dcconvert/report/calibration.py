"""What `dcconvert calibrate` found: a table for page and terminal, and two plots."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table as TerminalTable

from dcconvert.records import Record, stated
from dcconvert.report import plots
from dcconvert.report.tables import Column, Table, shown, words


@dataclass(frozen=True, kw_only=True)
class CalibrationRow(Record):
    """A schedule, or the original with fewer steps, and the mean PSNR of its images in dB.

    `kept`: at noise levels 0, 0.5 and 1. `psnr`: on all images of the search; `psnr_screen`: on the first of them;
    `psnr_fresh`: on images that the search did not see.
    """

    kind: str  # candidate, present, control
    name: str
    solver: str
    steps: int
    warm_up: int | None = stated()
    kept: tuple[float, ...] | None = stated()
    gmacs: float  # of a run
    psnr_screen: float | None = stated()
    psnr: float | None
    psnr_fresh: float | None = stated()


COLUMNS: tuple[Column[CalibrationRow], ...] = (
    words("", lambda row: row.name),
    words("solver", lambda row: row.solver),
    Column("steps", lambda row: str(row.steps)),
    Column("warm-up", lambda row: "" if row.warm_up is None else str(row.warm_up)),
    Column("kept at noise level 0, 0.5, 1", lambda row: ", ".join(f"{level:.3f}" for level in row.kept or ())),
    Column("GMACs per image", lambda row: f"{row.gmacs:.3g}"),
    Column("PSNR, search, dB", lambda row: shown(row.psnr, ".2f", missing="")),
    Column("PSNR, fresh, dB", lambda row: shown(row.psnr_fresh, ".2f", missing="")),
)


@dataclass(frozen=True)
class KeptStep(Record):
    """Kept fraction at one step of a run."""

    tau: float
    kept: float


@dataclass(frozen=True)
class TriedSchedule(Record):
    """A schedule that was tried. `cost`: in full steps, from the rounded numbers of tokens."""

    steps: int
    warm_up: int = 1
    knots: tuple[tuple[float, float], ...] = ()
    cost: float = 0
    psnr_screen: float | None = stated()


@dataclass(frozen=True, kw_only=True)
class Calibration(Record):
    """A search for a schedule. `run_steps`: the most steps that a candidate may have."""

    command: str = ""
    budget: float
    run_steps: int = 0
    solver: str
    images: int
    screen_images: int
    reference_steps: int
    seed: int = 0
    changed: bool
    rows: tuple[CalibrationRow, ...]
    curves: dict[str, tuple[KeptStep, ...]]
    candidates: tuple[TriedSchedule, ...]

    @property
    def table(self) -> Table:
        return Table.of(COLUMNS, self.rows)

    def for_terminal(self) -> TerminalTable:
        """What the command prints."""
        title = f"calibrated at the compute of {self.budget:g} full steps, PSNR of {self.images} images"
        return self.table.for_terminal(title)

    @property
    def curves_plot(self) -> bytes:
        return plots.png(plots.kept_curves(self.curves))

    @property
    def trials_plot(self) -> bytes:
        return plots.png(plots.calibration_trials(self))
