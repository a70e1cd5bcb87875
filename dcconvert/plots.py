"""The plots of a report, each as PNG data."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers; markers and dashes say the same without colour.
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#666666"
WIDTH = 7.0  # inches
NOISE_LEVEL = "noise level (1 = noise, 0 = clean)"


def velocity_error(curve: Sequence[dict[str, float]]) -> bytes:
    """Relative error of one step over the noise level."""
    figure, (axes,) = new_figure(2.6)
    axes.plot([e["tau"] for e in curve], [e["error"] for e in curve], marker=".", color=BLUE)
    axes.set(xlabel=NOISE_LEVEL, ylabel="relative error of one step")
    axes.set_ylim(bottom=0)
    axes.invert_xaxis()
    return png(figure)


def spending(steps: Sequence[dict[str, float]], tokens: int | None, gmacs: float | None) -> bytes:
    """Kept tokens and GMACs of every step of a run, below those of the original."""
    figure, panels = new_figure(4.0, 2)
    taus = [step["tau"] for step in steps]
    for axes, name, label, original in zip(
        panels, ("kept", "gmacs"), ("kept tokens", "GMACs a step"), (tokens, gmacs), strict=True
    ):
        axes.plot(taus, [step[name] for step in steps], marker=".", color=BLUE, label="converted")
        if original:
            axes.axhline(original, color=GREY, linestyle="--", label="original")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    panels[0].legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    panels[-1].set_xlabel(NOISE_LEVEL)
    panels[-1].invert_xaxis()  # both: the axis is shared
    return png(figure)


def psnr_over_gmacs(rows: Sequence[dict[str, Any]]) -> bytes:
    """Fidelity against compute: the control (original, fewer steps) as a curve, converted models as points."""
    figure, (axes,) = new_figure(3.2)
    control = sorted((row for row in rows if not is_converted(row)), key=lambda row: row["gmacs"])
    for name, points, style, colour in (
        ("original, fewer steps (control)", control, "o--", ORANGE),
        ("converted", list(filter(is_converted, rows)), "s", BLUE),
    ):
        if points:
            gmacs, psnr = zip(*((row["gmacs"], row["psnr"]) for row in points), strict=True)
            axes.plot(gmacs, psnr, style, color=colour, label=name)
        for row in points:
            place = (row["gmacs"], row["psnr"])
            axes.annotate(f"{row['steps']} steps", place, (7, -4), textcoords="offset points", fontsize=8, va="top")
    axes.set(xlabel="GMACs an image (whole run)", ylabel="PSNR, dB")
    axes.margins(x=0.15, y=0.2)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return png(figure)


def latency_bars(rows: Sequence[dict[str, Any]]) -> bytes:
    """Step latency, one panel a runtime: original, converted, and what the saved operations alone would give."""
    figure, panels = new_figure(0.7 + 1.15 * len(rows), len(rows), shared=False)
    for axes, row in zip(panels, rows, strict=True):
        for place, (name, colour) in enumerate((("original", GREY), ("converted", BLUE))):
            times = row[f"{name}_ms"]
            middle = times["median"]
            spread = [[max(0, middle - times["p10"])], [max(0, times["p90"] - middle)]]
            axes.barh(place, middle, 0.7, color=colour, xerr=spread, error_kw={"ecolor": "black", "capsize": 3})
        alone = row["original_ms"]["median"] / row["flop_ratio"]
        axes.plot([alone, alone], [0.55, 1.45], color=ORANGE, linestyle="--", linewidth=2, label="by operations alone")
        axes.set_yticks([0, 1], ["original", "converted"])
        axes.set_title(f"{row['runtime']}, batch {row['batch']}", loc="left", fontsize=9)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
    panels[0].legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, fontsize=9)
    panels[-1].set_xlabel("one step, ms (median; whiskers: 10th to 90th percentile)")
    return png(figure)


def is_converted(row: dict[str, Any]) -> bool:
    """Whether a fidelity row is of the converted model; the others are of the original."""
    return str(row["name"]).startswith("converted")


def new_figure(height: float, panels: int = 1, *, shared: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with panels below each other; `height` in inches."""
    figure = Figure(figsize=(WIDTH, height), dpi=150, layout="constrained")
    grid = figure.subplots(panels, squeeze=False, sharex=shared)
    for axes in grid[:, 0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, list(grid[:, 0])


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
