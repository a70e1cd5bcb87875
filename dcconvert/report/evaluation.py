"""The tables and the page of an evaluation."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from dcconvert.report import plots
from dcconvert.report.conversion import CAPTIONS, limits_section, origin_section
from dcconvert.report.html import Number, document, picture, section, table

# A column: heading, key of the row (it is left out where no row has it), and how a row is shown there.
Column = tuple[str, str, Callable[[dict[str, Any]], str]]


def plain(key: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "" if row.get(key) is None else f"{row[key]:{form}}"


def spread_of(key: str) -> Callable[[dict[str, Any]], str]:
    """Median and 90th percentile."""
    return lambda row: f"{row[key]['median']:.4g} ({row[key]['p90']:.4g})"


def with_error(key: str, error: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "" if row.get(key) is None else f"{row[key]:{form}} ± {row[error]:{form}}"


COST: tuple[Column, ...] = (
    ("same", "control", lambda row: str(row["control"])),
    ("GMACs", "gmacs", plain("gmacs", ".4g")),
    ("step, ms (p90)", "step_ms", spread_of("step_ms")),
    ("images/s", "images_per_second", plain("images_per_second", ".3g")),
    ("peak MB", "peak_mb", plain("peak_mb", ".0f")),
    ("attn MB", "attention_step_mb", plain("attention_step_mb", ".4g")),
    ("state MB", "state_mb", lambda row: f"{row['state_mb']:.3g}" if row["state_mb"] else ""),
)
QUALITY: tuple[Column, ...] = (
    ("PSNR, dB", "psnr", with_error("psnr", "psnr_error", ".2f")),
    ("pair distance", "pair_distance", with_error("pair_distance", "pair_distance_error", ".3f")),
    ("FD", "frechet", plain("frechet", ".2f")),
    ("KID x1000", "kernel", lambda row: f"{1e3 * row['kernel']:.2f} ± {1e3 * row['kernel_error']:.2f}"),
    ("IS", "inception_score", plain("inception_score", ".3f")),
    ("precision", "precision", plain("precision", ".2f")),
    ("recall", "recall", plain("recall", ".2f")),
)
EXECUTION: tuple[Column, ...] = (
    ("computed as", "form", lambda row: str(row["form"])),
    ("tokens", "computed_tokens", plain("computed_tokens", ",.0f")),
    ("waste", "waste", plain("waste", ".1%")),
    ("step, ms (p90)", "step_ms", spread_of("step_ms")),
    ("speed-up", "speedup", lambda row: f"{row['speedup']:.2f}x"),
)


WORDS = ("control", "form")  # columns that hold no numbers


def present(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> list[Column]:
    return [column for column in columns if any(row.get(column[1]) for row in rows)]


def cells(row: dict[str, Any], columns: Sequence[Column]) -> list[str]:
    return ["" if row.get(key) is None else show(row) for _, key, show in columns]


def quality_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that were judged, and real images as the floor where there are any."""
    rows = [row for row in report["rows"] if "psnr" in row]
    images = report.get("images", {})
    floor = [{"name": f"{images['count']} real images, held out", **images["floor"]}] if "floor" in images else []
    return [*rows, *floor]


def cost_title(report: dict[str, Any]) -> str:
    half = "" if report["lite_cfg"] is None else f", the unconditional half at {report['lite_cfg']:g}x"
    guidance = "no guidance" if report["guidance"] == 1 else f"guidance {report['guidance']:g}{half}"
    return f"Cost of a run: {report['runtime']}, batch {report['batch']}, {guidance}"


def quality_title(report: dict[str, Any]) -> str:
    images = report["images"]
    parts = [f"{images['count']} images, PSNR and pair distance to {images['reference']}"]
    parts += [f"network {images['network']}"] if "network" in images else []
    parts += [f"{images['real_count']} real images"] if "real_count" in images else []
    return f"Quality: {', '.join(parts)}"


def execution_title(report: dict[str, Any]) -> str:
    return f"A batch of {report['batch']} images at different steps of their runs, the original's step in turns with it"


def terminal_tables(report: dict[str, Any]) -> list[Any]:
    """What the command prints: cost, quality, ways of running, and what was not measured."""
    bundles = report["bundles"] if len(set(report["bundles"].values())) > 1 else {}
    parts: list[Any] = [f"{name}: {escape(folder)}" for name, folder in bundles.items()]
    parts.append(rich_table(cost_title(report), COST, report["rows"]))
    if rows := quality_rows(report):
        parts.append(rich_table(quality_title(report), QUALITY, rows))
    parts.append(rich_table(execution_title(report), EXECUTION, report["execution"]))
    return [*parts, *report["limits"]]


def rich_table(title: str, columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> Table:
    shown = present(columns, rows)
    result = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 0))
    result.add_column("", min_width=18)
    for heading, key, _ in shown:
        result.add_column(heading, justify="left" if key in WORDS else "right")
    last = ""
    for row in rows:
        name = str(row["name"])
        result.add_row("" if name == last else name, *cells(row, shown))
        last = name
    return result


def evaluation_page(report: dict[str, Any], figures: dict[str, bytes]) -> str:
    """One self-contained HTML page."""
    title = "dcconvert evaluate: " + ", ".join(dict.fromkeys(report["bundles"].values()))
    rows, judged = report["rows"], quality_rows(report)
    sections = [
        section("Quality", *quality_parts(report, judged)) if judged else "",
        section(
            "Bundles",
            table(["", "folder"], report["bundles"].items()) if len(report["bundles"]) > 1 else "",
        ),
        section("Cost", f"<p>{html.escape(cost_title(report))}.</p>", html_table(COST, rows)),
        section(
            "Ways of running a mixed batch",
            f"<p>{html.escape(execution_title(report))}.</p>",
            html_table(EXECUTION, report["execution"]),
        ),
        section("Samples", *(picture(data, CAPTIONS.get(name, name), True) for name, data in figures.items())),
        limits_section(report),
        origin_section(report),
    ]
    return document(title, sections)


def quality_parts(report: dict[str, Any], judged: Sequence[dict[str, Any]]) -> list[str]:
    rows = [row for row in report["rows"] if row.get("psnr") is not None]
    note = f"<p>{html.escape(quality_title(report))}. The original with fewer steps is what anybody can have.</p>"
    measures = [("psnr", "PSNR, dB"), ("pair_distance", "pair distance"), ("kernel", "KID"), ("frechet", "FD")]
    drawn = [
        picture(plots.quality_over_cost(rows, key, label), f"{label} against compute and against measured latency.")
        for key, label in measures
        if rows and all(row.get(key) is not None for row in rows)
    ]
    return [note, html_table(QUALITY, judged), *drawn]


def html_table(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
    shown = present(columns, rows)
    kinds = [str if key in WORDS else Number for _, key, _ in shown]
    lines = [
        [str(row["name"]), *(kind(text) for kind, text in zip(kinds, cells(row, shown), strict=True))] for row in rows
    ]
    return table(["", *(heading for heading, _, _ in shown)], lines)
