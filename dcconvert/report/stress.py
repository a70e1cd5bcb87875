"""How a stress test is shown: its tables, and the gallery of the worst cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from rich import box
from rich.table import Table as TerminalTable

from dcconvert.evaluate.stress_metrics import CaseFigures, Skipping, StressRow
from dcconvert.images.pixels import captioned_rows, dim_dropped, grid_image, is_latent, png_bytes, tile_scale, to_images
from dcconvert.records import Record
from dcconvert.report.tables import Column, Table, shown, words

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from dcconvert.evaluate.stress_cases import Cases
    from dcconvert.evaluate.stress_metrics import Outcome

FAILURES_FIGURE = "failures"  # its name among the figures of a report
GALLERY = 4  # worst cases of each ratio that are shown
# Error, as a share of the range, from which on the colour is brightest; in mode steps errors are much smaller.
BRIGHTEST, BRIGHTEST_STEPS = 0.5, 0.05


def finite(value: float | None, form: str) -> str:
    return shown(value, form, missing="not finite")


def age(row: StressRow) -> str:
    return f"{shown(row.detail_age_late, '.1f', missing='')} ({shown(row.mean_age_late, '.1f', missing='')})"


def gain(value: float | None, error: float | None) -> str:
    """A difference in dB, with its standard error if there is more than one case."""
    return finite(value, "+.1f") if error is None else f"{finite(value, '+.1f')} ± {error:.1f}"


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
# In mode steps, in place of the router's columns.
FULL: tuple[Column[StressRow], ...] = (
    Column("gain", lambda row: gain(row.gain, row.gain_error)),
    Column("in the detail", lambda row: gain(row.detail_gain, row.detail_gain_error)),
    Column("original in full", lambda row: finite(row.full_psnr, ".1f")),
    Column("in the detail", lambda row: finite(row.full_detail_psnr, ".1f")),
)
AGE: Column[StressRow] = Column("age of detail (of all), late", age)


@dataclass(frozen=True, kw_only=True)
class Stress(Record):
    """A stress test: what a conversion does to images full of detail, and where its router starves it.

    `skipping` is there in mode steps, which has no router.
    """

    command: str = ""
    source: str
    seed: int = 0
    start: float  # noise levels: where a case starts, and the two steps at which the router is looked at
    early: float | None
    late: float | None
    steps: int
    run_steps: int
    solver: str
    cases: int
    left_out: tuple[str, ...]
    rows: tuple[StressRow, ...]
    skipping: Skipping | None = None

    @property
    def brightest(self) -> float:
        return BRIGHTEST if self.skipping is None else BRIGHTEST_STEPS

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
        return Table.of(self.image_columns, self.rows)

    @property
    def router_table(self) -> Table:
        """What the router did."""
        return Table.of((*NAMES, *self.router_columns), self.rows)

    @property
    def table(self) -> Table:
        """Both tables side by side."""
        return Table.of((*self.image_columns, *self.router_columns), self.rows)

    @property
    def image_columns(self) -> tuple[Column[StressRow], ...]:
        return (*NAMES, *IMAGES, *(() if self.skipping is None else FULL))

    @property
    def router_columns(self) -> tuple[Column[StressRow], ...]:
        if self.skipping is not None:
            return ()
        return (*ROUTER, AGE) if self.has_ages else ROUTER

    def for_terminal(self) -> TerminalTable:
        """What the command prints."""
        title = f"Stress set: {self.cases} cases from {self.source}, starting at noise level {self.start:.2f}"
        return self.table.for_terminal(title, box=box.SIMPLE, padding=(0, 0))


def failure_figure(worst: Sequence[CaseFigures], cases: Cases, outcomes: Sequence[Outcome]) -> bytes:
    """The worst cases of each ratio, one per row, with the names of the columns on top."""
    rows: dict[str, Image.Image] = {}
    names: list[str] = []
    for outcome in outcomes:
        of_ratio = [case for case in worst if case.ratio == outcome.ratio]
        for rank, case in enumerate(of_ratio[:GALLERY], 1):
            place = cases.sources.index(case.source_index)  # no image is chosen twice
            names, pictures = zip(*tiles(place, cases, outcome).items(), strict=True)
            rows[caption_of(rank, case)] = grid_image(np.stack(pictures), len(pictures))
    return png_bytes(captioned_rows(rows, names))


def tiles(i: int, cases: Cases, outcome: Outcome) -> dict[str, np.ndarray]:
    """Pictures uint8 [H, W, 3] of one case, by the names of their columns."""
    wanted, fewer = cases.wanted, outcome.controls[max(outcome.controls)]
    shown = {"input": cases.clean, "original": wanted, "converted": outcome.images, "fewer steps": fewer}
    shown |= {"in full": outcome.in_full}
    small = {name: to_images(part[i : i + 1])[0] for name, part in shown.items() if part is not None}
    peak = float(wanted.max() - wanted.min()) if is_latent(wanted) else 2.0

    def error(images: Tensor, brightest: float) -> np.ndarray:
        return heat((images[i] - wanted[i]).abs().mean(0).numpy() / peak, brightest)

    if outcome.looks:
        small["error"] = error(outcome.images, BRIGHTEST)
    else:
        small["error"] = error(outcome.images, BRIGHTEST_STEPS)
        small["of fewer steps"] = error(fewer, BRIGHTEST_STEPS)
    scale = tile_scale(wanted.shape[-2])
    large = {name: part.repeat(scale, 0).repeat(scale, 1) for name, part in small.items()}
    kept = {f"kept at {look.tau:.2f}": dim_dropped(small["original"], look.keep[i], scale) for look in outcome.looks}
    return large | kept


def caption_of(rank: int, case: CaseFigures) -> str:
    return (
        f"{case.ratio:g}x, {rank}. {case.kind}, {case.class_name or f'class {case.class_}'}, seed {case.seed}: in the "
        f"detail {case.detail_psnr:.1f} dB, fewer steps {case.control_detail_psnr:.1f} dB"
    )


def heat(error: np.ndarray, brightest: float = BRIGHTEST) -> np.ndarray:
    """Absolute error [H, W] as a share of the range, in colours uint8 [H, W, 3]: black is 0."""
    colours = mpl.colormaps["inferno"](np.clip(error / brightest, 0, 1))
    return np.asarray(colours[..., :3] * 255, np.uint8)
