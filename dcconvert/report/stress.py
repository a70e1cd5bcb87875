"""How a stress test is shown: a table, and the gallery of the worst cases."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from rich import box
from rich.table import Table

from dcconvert.images.pixels import captioned_rows, dim_dropped, grid_image, is_latent, png_bytes, tile_scale, to_images
from dcconvert.report.html import Number, picture, section, table

if TYPE_CHECKING:
    from dcconvert.evaluate.stress_cases import Cases
    from dcconvert.evaluate.stress_metrics import Outcome

FAILURES_FIGURE = "failures"  # its name among the figures of a report
GALLERY = 4  # worst cases of each ratio that are shown
FULL = 0.5  # error as a share of the range that is drawn as bright as can be

COLUMNS = (
    "ratio",
    "detail",
    "cost in full steps",
    "PSNR, dB",
    "in the detail",
    "fewer steps",
    "in the detail",
    "attention to detail: early",
    "late",
    "error of dropped, late",
)
ROUTER = 7  # columns before it are about the images, the others about what the router did
AGE = "age of detail (of all), late"


def columns_of(found: dict[str, Any]) -> tuple[str, ...]:
    """Headings; those of mode carry have one more."""
    return (*COLUMNS, AGE) if has_ages(found) else COLUMNS


def has_ages(found: dict[str, Any]) -> bool:
    return any(row["mean_age_late"] is not None for row in found["rows"])


def stress_rows(found: dict[str, Any]) -> list[list[str]]:
    """Cells as `columns_of` names them."""
    rows = []
    for row in found["rows"]:
        cells = [
            f"{row['ratio']:g}x",
            row["kind"],
            f"{row['cost']:.1f}",
            *(figure(row[name], ".1f") for name in ("psnr", "detail_psnr", "control_psnr", "control_detail_psnr")),
            *(figure(row[f"attention_to_detail_{when}"], ".2f") for when in ("early", "late")),
            "" if row["dropped_error_late"] is None else f"{row['dropped_error_late']:.1f}x",
        ]
        if has_ages(found):
            cells.append(f"{row['detail_age_late']:.1f} ({row['mean_age_late']:.1f})")
        rows.append(cells)
    return rows


def figure(value: float | None, form: str) -> str:
    return "not finite" if value is None else f"{value:{form}}"


def title_of(found: dict[str, Any]) -> str:
    return f"Stress set: {found['cases']} cases from {found['source']}, from noise level {found['start']:.2f} on"


def stress_table(found: dict[str, Any]) -> Table:
    """What the command prints."""
    result = Table(title=title_of(found), title_justify="left", box=box.SIMPLE, padding=(0, 0))
    for number, heading in enumerate(columns_of(found)):
        result.add_column(heading, justify="left" if number < 2 else "right")
    for row in stress_rows(found):
        result.add_row(*row)
    return result


def stress_section(report: dict[str, Any], gallery: bytes | None) -> str:
    """The part of a report's page."""
    found = report.get("stress")
    if not found:
        return ""
    left_out = "".join(f" {text}." for text in found["left_out"])
    steps = {row["ratio"]: row["control_steps"] for row in found["rows"]}
    controls = "; ".join(f"{' and '.join(map(str, some))} at {ratio:g}x" for ratio, some in steps.items())
    cases = (
        f"<p>{found['cases']} images with most of each kind of detail, chosen from {html.escape(found['source'])}, "
        f"noised to level {found['start']:.2f} and sampled from there in {found['steps']} steps, by the original and "
        f"by the converted model ({found['solver']}, {found['run_steps']} steps in a whole run)."
        f"{html.escape(left_out)}</p>"
    )
    images = (
        "<p>PSNR: to the original's image from the same noise; in the detail: every token's error weighs as much as "
        "the detail that the original's image has there. Fewer steps: what the original reaches at the same cost "
        f"without any conversion, interpolated between whole numbers of steps ({controls}).</p>"
    )
    router = (
        "<p>Attention to detail: share "
        "of the detail that lies in computed tokens over the share of tokens that are computed; 1 is chance, below 1 "
        f"detail is starved. Early and late: the steps at noise level {found['early']:.2f} and {found['late']:.2f}. "
        "Error of dropped: error of one step in tokens that were not computed over that in computed ones."
        f"{' Age: steps since a token was computed.' if has_ages(found) else ''}</p>"
    )
    rows = [[*row[:2], *(Number(value) for value in row[2:])] for row in stress_rows(found)]
    caption = (
        "The worst cases at each ratio, by the PSNR in the detail. Error: of the converted image to the original's, "
        f"black none, bright from {FULL:.0%} of the range on. The last two: the original's image, tokens that the step "
        "did not compute tinted blue. failures.json lists these cases and more, with the seeds to run them again."
    )
    headings = columns_of(found)
    tables = [
        table([headings[place] for place in places], [[row[place] for place in places] for row in rows])
        for places in (range(ROUTER), (0, 1, *range(ROUTER, len(headings))))
    ]
    parts = [picture(gallery, caption, True)] if gallery else []
    return section("Stress set", cases, images, tables[0], router, tables[1], *parts)


def failure_figure(worst: Sequence[dict[str, Any]], cases: Cases, outcomes: Sequence[Outcome]) -> bytes:
    """The worst cases of each ratio, a row each, in columns that are named on top."""
    rows = {}
    for outcome in outcomes:
        of_ratio = [facts for facts in worst if facts["ratio"] == outcome.ratio]
        for rank, facts in enumerate(of_ratio[:GALLERY], 1):
            rows[caption_of(rank, facts)] = grid_image(np.stack(tiles(facts["case"], cases, outcome)), 7)
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


def caption_of(rank: int, facts: dict[str, Any]) -> str:
    name = facts["class_name"] or f"class {facts['class']}"
    return (
        f"{facts['ratio']:g}x, {rank}. {facts['kind']}, {name}, seed {facts['seed']}: in the detail "
        f"{facts['detail_psnr']:.1f} dB, fewer steps {facts['control_detail_psnr']:.1f} dB"
    )


def heat(error: np.ndarray) -> np.ndarray:
    """Absolute error [H, W] as a share of the range, in colours uint8 [H, W, 3]: black none, bright `FULL` or more."""
    colours = mpl.colormaps["inferno"](np.clip(error / FULL, 0, 1))
    return np.asarray(colours[..., :3] * 255, np.uint8)
