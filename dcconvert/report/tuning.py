"""What `dcconvert tune` found: a table for page and terminal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.table import Table as TerminalTable

from dcconvert.records import Record
from dcconvert.report.tables import Column, Table, shown, words


@dataclass(frozen=True)
class TuningRow(Record):
    """A run of about the budget, and the PSNR of images that it was not fitted to."""

    name: str
    steps: int
    computed: int
    gmacs: float
    psnr: float | None
    psnr_error: float | None
    fitted: bool = False
    latency_ms: float | None = None


COLUMNS: tuple[Column[TuningRow], ...] = (
    words("run", lambda row: row.name),
    Column("steps", lambda row: str(row.steps)),
    Column("computed", lambda row: str(row.computed)),
    Column("GMACs per image", lambda row: f"{row.gmacs:.3g}"),
    Column("ms", lambda row: shown(row.latency_ms, ".1f", missing="")),
    Column("PSNR, dB", lambda row: shown(row.psnr, ".2f", missing="not finite")),
    Column("standard error", lambda row: shown(row.psnr_error, ".2f", missing="")),
)


@dataclass(frozen=True)
class Tuning(Record):
    """Runs of one budget, best first."""

    rows: tuple[TuningRow, ...]
    budget: float
    chosen: str
    images: int
    fresh: int
    reference_steps: int
    guidance: float = 1.0
    converged: bool = True
    converged_db: float | None = None
    polish: int = 0
    latency: float | None = None
    given: str | None = None  # where the table comes from, if it was not fitted to this model
    gain: float | None = None  # of a given table over the default or the present one, in dB
    gain_error: float | None = None
    wanted_psnr: float | None = None
    confirmed_psnr: float | None = None
    batch: int = 1
    times_ms: dict[str, Any] = field(default_factory=dict)  # of a step of each kind, `spread`
    seed: int = 0
    command: str = ""
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> Table:
        return Table.of(COLUMNS, self.rows)

    @property
    def origin(self) -> str:
        """Where the numbers of the chosen table come from."""
        if self.given is None:
            return f"The fits saw {self.images} other images."
        gain = f"{shown(self.gain, '+.2f')} ± {shown(self.gain_error, '.2f')} dB"
        return (
            f"Nothing was fitted here: the table is that of {self.given}. Compared image by image with the unfitted "
            f"default of as many computed steps, or with the bundle's present table if that is better, it gains {gain}."
        )

    @property
    def notes(self) -> list[str]:
        """What a reader has to know about the figures."""
        found = [
            f"PSNR of {self.fresh} images that nothing was fitted to, against the original with {self.reference_steps} "
            f"steps (Adams-Bashforth); half as many steps are {shown(self.converged_db, '.1f')} dB from that. "
            f"{self.origin} Chosen: {self.chosen}."
        ]
        if any(row.latency_ms is not None for row in self.rows):
            found.append(
                f"Milliseconds are those of a whole run of {self.batch} {'image' if self.batch == 1 else 'images'} on "
                "ONNX Runtime on this machine, from the measured times of its steps."
            )
        if self.wanted_psnr is not None:
            found.append(
                f"The budget is the smallest at which a run reached {self.wanted_psnr:g} dB on these images. On "
                f"{self.fresh} further images it has {shown(self.confirmed_psnr, '.1f')} dB."
            )
        if not self.converged:
            found.append("The reference has not converged: give more --reference-steps.")
        best = next(row for row in self.rows if row.name == self.chosen)
        if best.steps == best.computed and self.given is None:
            found.append(
                "No run with skipped steps was better than the original's own graph with as many operations, so the "
                "chosen run computes every step."
            )
        return found

    def for_terminal(self) -> TerminalTable:
        title = f"budget: {self.budget:.3g} steps of the original, guidance {self.guidance:g}"
        return self.table.for_terminal(title)
