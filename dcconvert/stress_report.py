"""How a stress test is shown: tables, and the gallery of the worst cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from rich import box
from rich.table import Table
from torch import Tensor

from dcconvert.html_parts import Number, section, shown, table
from dcconvert.images import captioned_rows, dim_dropped, grid_image, png_bytes, to_images

if TYPE_CHECKING:
    from dcconvert.stress import Cases, Outcome

GALLERY = 8  # worst cases shown
SIDE = 96  # pixels that small images are magnified to

COLUMNS = (
    "ratio",
    "detail",
    "PSNR",
    "in the detail",
    "fewer steps",
    "in the detail",
    "attention to detail, early",
    "late",
    "error of dropped, late",
)


def stress_rows(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            f"{row['ratio']:g}x",
            row["kind"],
            f"{row['psnr']:.1f}",
            f"{row['detail_psnr']:.1f}",
            f"{row['control_psnr']:.1f} ({row['control_steps']:.0f})",
            f"{row['control_detail_psnr']:.1f}",
            shown(row["attention_to_detail_early"], ".2f"),
            shown(row["attention_to_detail_late"], ".2f"),
            "" if row["dropped_error_late"] is None else f"{row['dropped_error_late']:.1f}x",
        ]
        for row in found["rows"]
    ]


def stress_tables(found: dict[str, Any]) -> list[Table]:
    """What the command prints."""
    title = f"Stress set: {found['cases']} cases from {found['source']}, from noise level {found['start']:.2f} on"
    result = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 0))
    for number, heading in enumerate(COLUMNS):
        result.add_column(heading, justify="left" if number < 2 else "right")
    for row in stress_rows(found):
        result.add_row(*row)
    return [result]


def stress_section(report: dict[str, Any]) -> str:
    """The part of a report's page; the gallery is among its figures."""
    found = report.get("stress")
    if not found:
        return ""
    note = (
        f"<p>{found['cases']} images with most of each kind of detail, chosen from {found['source']}, noised to level "
        f"{found['start']:.2f} and sampled from there by the original and by the converted model "
        f"({found['solver']}, {found['steps']} steps in a whole run). PSNR in dB to the original's images; "
        "in the detail: errors weighted by where the detail is. Fewer steps: the original with the number of steps "
        "that costs as much. Attention to detail: share of the detail that lies in computed tokens over the share of "
        "tokens that are computed; 1 is chance, below 1 detail is starved. The worst cases are in failures.json.</p>"
    )
    rows = [[*row[:2], *(Number(value) for value in row[2:])] for row in stress_rows(found)]
    return section("Stress set", note, table(COLUMNS, rows))


def failure_figure(worst: Sequence[dict[str, Any]], cases: Cases, wanted: Tensor, outcomes: Sequence[Outcome]) -> bytes:
    """The worst cases, a row each: input, original, converted, fewer steps, error, computed tokens early and late."""
    by_ratio = {outcome.ratio: outcome for outcome in outcomes}
    rows = {}
    for rank, facts in enumerate(worst[:GALLERY], 1):
        i, outcome = facts["case"], by_ratio[facts["ratio"]]
        samples = [part[i : i + 1] for part in (cases.clean, wanted, outcome.images, outcome.control)]
        pictures = [to_images(sample)[0] for sample in samples]
        scale = max(1, SIDE // pictures[0].shape[0])
        large = [picture.repeat(scale, 0).repeat(scale, 1) for picture in pictures]
        error = (outcome.images[i] - wanted[i]).abs().mean(0).numpy()
        large.append(heat(error).repeat(scale, 0).repeat(scale, 1))
        large += [dim_dropped(pictures[1], look.keep[i], scale) for look in outcome.looks]
        name = facts["class_name"] or f"class {facts['class']}"
        caption = (
            f"{rank}. {facts['kind']}, {name}, {facts['ratio']:g}x, seed {facts['seed']}: in the detail "
            f"{facts['detail_psnr']:.1f} dB, original with {facts['control_steps']} steps "
            f"{facts['control_detail_psnr']:.1f} dB"
        )
        rows[caption] = grid_image(np.stack(large), len(large))
    return png_bytes(captioned_rows(rows))


def heat(error: np.ndarray) -> np.ndarray:
    """Absolute error [H, W] of pixels in [-1, 1] as colours uint8 [H, W, 3]: black none, light half the range."""
    colours = mpl.colormaps["inferno"](np.clip(error, 0, 1))
    return np.asarray(colours[..., :3] * 255, np.uint8)
