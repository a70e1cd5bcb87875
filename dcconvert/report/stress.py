"""How a stress test is shown: its tables, and the gallery of the worst cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from rich import box
from rich.table import Table as TerminalTable

from dcconvert.evaluate.stress_metrics import CaseFigures, StressRow
from dcconvert.images.pixels import captioned_rows, dim_dropped, grid_image, is_latent, png_bytes, tile_scale, to_images
from dcconvert.records import Record
from dcconvert.report.tables import Column, Table, shown, words

if TYPE_CHECKING:
    from dcconvert.evaluate.stress_cases import Cases
    from dcconvert.evaluate.stress_metrics import Outcome

FAILURES_FIGURE = "failures"  # its name among the figures of a report
GALLERY = 4  # worst cases of each ratio that are shown
BRIGHTEST = 0.5  # error, as a share of the range, from which on the colour is brightest


def finite(value: float | None, form: str) -> str:
    return shown(value, form, missing="not finite")


def age(row: StressRow) -> str:
    return f"{shown(row.detail_age_late, '.1f', missing='')} ({shown(row.mean_age_late, '.1f', missing='')})"


NAMES: tuple[Column[StressRow], ...] = (
    words("ratio", lambda row: f"{row.ratio:g}x"),
    words("detail", lambda row: row.kind),
)
IMAGES: tuple[Column[StressRow], ...] = (
    Column("cost in full steps", lambda row: f"{row.cost:.1f}"),
    Column("PSNR, dB", lambda row: finite(row.psnr, ".1f")),
    Column("in the detail", lambda row: finite(row.detail_psnr, ".1f")),
    Column("fewer steps", lambda row: finite(row.control_psnr, ".1f")),
    Column("in the detail", lambda row: finite(row.control_detail_psnr, ".1f")),
)
ROUTER: tuple[Column[StressRow], ...] = (
    Column("attention to detail: early", lambda row: finite(row.attention_to_detail_early, ".2f")),
    Column("late", lambda row: finite(row.attention_to_detail_late, ".2f")),
    Column("error of dropped, late", lambda row: shown(row.dropped_error_late, ".1f", "x", missing="")),
)
AGE: Column[StressRow] = Column("age of detail (of all), late", age)


@dataclass(frozen=True, kw_only=True)
class Stress(Record):
    """A stress test: what a conversion does to images full of detail, and where its router starves it."""

    command: str = ""
    source: str
    seed: int = 0
    start: float  # noise levels: where a case starts, and the two steps at which the router is looked at
    early: float
    late: float
    steps: int
    run_steps: int
    solver: str
    cases: int
    left_out: tuple[str, ...]
    rows: tuple[StressRow, ...]

    @property
    def has_ages(self) -> bool:
        """Whether tokens have ages: only in mode carry, which carries them over from earlier steps."""
        return any(row.mean_age_late is not None for row in self.rows)

    @property
    def controls(self) -> str:
        """Steps of the original that cost as much, for each ratio."""
        steps = {row.ratio: row.control_steps for row in self.rows}
        return "; ".join(f"{' and '.join(map(str, some))} at {ratio:g}x" for ratio, some in steps.items())

    @property
    def image_table(self) -> Table:
        """The quality of the images."""
        return Table.of((*NAMES, *IMAGES), self.rows)

    @property
    def router_table(self) -> Table:
        """What the router did."""
        return Table.of((*NAMES, *self.router_columns), self.rows)

    @property
    def table(self) -> Table:
        """Both tables side by side."""
        return Table.of((*NAMES, *IMAGES, *self.router_columns), self.rows)

    @property
    def router_columns(self) -> tuple[Column[StressRow], ...]:
        return (*ROUTER, AGE) if self.has_ages else ROUTER

    def for_terminal(self) -> TerminalTable:
        """What the command prints."""
        title = f"Stress set: {self.cases} cases from {self.source}, starting at noise level {self.start:.2f}"
        return self.table.for_terminal(title, box=box.SIMPLE, padding=(0, 0))


def failure_figure(worst: Sequence[CaseFigures], cases: Cases, outcomes: Sequence[Outcome]) -> bytes:
    """The worst cases of each ratio, one per row, with the names of the columns on top."""
    rows = {}
    for outcome in outcomes:
        of_ratio = [case for case in worst if case.ratio == outcome.ratio]
        for rank, case in enumerate(of_ratio[:GALLERY], 1):
            place = cases.sources.index(case.source_index)  # no image is chosen twice
            rows[caption_of(rank, case)] = grid_image(np.stack(tiles(place, cases, outcome)), 7)
    kept = [f"kept at {look.tau:.2f}" for look in outcomes[0].looks]
    return png_bytes(captioned_rows(rows, ("input", "original", "converted", "fewer steps", "error", *kept)))


def tiles(i: int, cases: Cases, outcome: Outcome) -> list[np.ndarray]:
    """Pictures uint8 [H, W, 3] of one case: input, original, converted, fewer steps, error, kept early and late."""
    fewer = outcome.controls[max(outcome.controls)]
    small = [to_images(part[i : i + 1])[0] for part in (cases.clean, cases.wanted, outcome.images, fewer)]
    scale = tile_scale(small[0].shape[0])
    difference = (outcome.images[i] - cases.wanted[i]).abs().mean(0).numpy()
    wanted = cases.wanted
    peak = float(wanted.max() - wanted.min()) if is_latent(wanted) else 2.0
    large = [part.repeat(scale, 0).repeat(scale, 1) for part in (*small, heat(difference / peak))]
    return large + [dim_dropped(small[1], look.keep[i], scale) for look in outcome.looks]


def caption_of(rank: int, case: CaseFigures) -> str:
    return (
        f"{case.ratio:g}x, {rank}. {case.kind}, {case.class_name or f'class {case.class_}'}, seed {case.seed}: in the "
        f"detail {case.detail_psnr:.1f} dB, fewer steps {case.control_detail_psnr:.1f} dB"
    )


def heat(error: np.ndarray) -> np.ndarray:
    """Absolute error [H, W] as a share of the range, in colours uint8 [H, W, 3]: from black to that of `BRIGHTEST`."""
    colours = mpl.colormaps["inferno"](np.clip(error / BRIGHTEST, 0, 1))
    return np.asarray(colours[..., :3] * 255, np.uint8)
