"""The plots of a report, and how one becomes a picture."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from dcconvert.report.calibration import Calibration, KeptStep
    from dcconvert.report.sections import LatencyRow, Spread, StepCost, StepError, TrainingPoint

# Okabe and Ito's palette, told apart by colour-blind readers; markers and dashes say the same without colour.
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#666666"
WIDTH = 7.0  # inches
NOISE_LEVEL = "noise level (1 = noise, 0 = clean)"


def velocity_error(curve: Sequence[StepError]) -> Figure:
    """Relative error of one step over the noise level."""
    figure, (axes,) = new_figure(2.6)
    axes.plot([point.tau for point in curve], numbers(point.error for point in curve), marker=".", color=BLUE)
    axes.set(xlabel=NOISE_LEVEL, ylabel="relative error of one step")
    axes.set_ylim(bottom=0)
    axes.invert_xaxis()
    return figure


def spending(steps: Sequence[StepCost], tokens: int | None, gmacs: float | None) -> Figure:
    """Kept tokens and GMACs of every step of a run, below those of the original."""
    figure, panels = new_figure(4.0, 2)
    taus = [step.tau for step in steps]
    for axes, name, label, original in zip(
        panels, ("kept", "gmacs"), ("kept tokens", "GMACs per step"), (tokens, gmacs), strict=True
    ):
        axes.plot(taus, [getattr(step, name) for step in steps], marker=".", color=BLUE, label="converted")
        if original:
            axes.axhline(original, color=GREY, linestyle="--", label="original")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    panels[0].legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    panels[-1].set_xlabel(NOISE_LEVEL)
    panels[-1].invert_xaxis()  # both: the axis is shared
    return figure


def upcycling_curve(log: Sequence[TrainingPoint]) -> Figure:
    """Fidelity and training loss over the samples that were seen."""
    figure, (above, below) = new_figure(4.0, 2)
    above.plot([row.samples for row in log], numbers(row.psnr for row in log), marker="o", color=BLUE)
    above.set_ylabel("PSNR, dB")
    known = [row for row in log if row.output is not None]
    below.plot([row.samples for row in known], numbers(row.output for row in known), marker="o", color=ORANGE)
    below.set(xlabel="training samples", ylabel="relative squared error\nof one step")
    below.set_ylim(bottom=0)
    return figure


def quality_over_cost(rows: Sequence[Mapping[str, Any]], key: str = "psnr", label: str = "PSNR, dB") -> Figure:
    """Quality against compute and latency: the control (original, fewer steps) as curves, converted as points."""
    costs = [("gmacs", "GMACs per image (whole run)"), ("latency_ms", "ms per image (whole run)")]
    costs = [cost for cost in costs if all(row[cost[0]] is not None for row in rows)]
    figure, panels = new_figure(2.9 * len(costs), len(costs), shared=False)
    controls = [row for row in rows if row["mode"] == "original"]
    for axes, (cost, cost_label) in zip(panels, costs, strict=True):
        for number, solver in enumerate(dict.fromkeys(row["solver"] for row in controls)):
            control = sorted((row for row in controls if row["solver"] == solver), key=lambda row: row[cost])
            name = "original, labelled with its steps (control)" + (f", {solver}" if number else "")
            places = [row[cost] for row in control], [row[key] for row in control]
            axes.plot(*places, "o--", color=(ORANGE, GREY)[number % 2], label=name)
            for row in control:
                annotate(axes, (row[cost], row[key]), str(row["steps"]), (2, -7))
        for row in (row for row in rows if row["mode"] != "original"):
            axes.plot(row[cost], row[key], "s", color=BLUE if row["mode"] == "carry" else GREY)
            annotate(axes, (row[cost], row[key]), row["name"], (7, 12))
        axes.set(xlabel=cost_label, ylabel=label)
        axes.margins(x=0.15, y=0.2)
        axes.set_xlim(left=0)
    panels[0].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def annotate(axes: Axes, place: tuple[float, float], text: str, offset: tuple[int, int]) -> None:
    axes.annotate(text, place, offset, textcoords="offset points", fontsize=8, va="top")


def frontier(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Fidelity against compute and against latency: the original with fewer steps, and the upper edge of `carry`.

    Rows as `benchmarks.frontier` writes them; one colour per solver, dashes for the original.
    """
    figure, panels = new_figure(7.0, 2, shared=False)
    colours = dict(zip(dict.fromkeys(row["solver"] for row in rows), (BLUE, ORANGE, GREY), strict=False))
    for axes, key, label in zip(
        panels, ("gmacs", "latency_ms"), ("GMACs per image", "ms per image, ONNX Runtime CPU"), strict=True
    ):
        for solver, colour in colours.items():
            for mode, style in (("original", "o--"), ("carry", "s-")):
                points = [(r[key], r["psnr"]) for r in rows if r["mode"] == mode and r["solver"] == solver]
                line = sorted(points) if mode == "original" else upper_edge(points)
                if line:
                    axes.plot(*zip(*line, strict=True), style, color=colour, label=f"{mode}, {solver}", markersize=4)
        axes.set(xlabel=label, ylabel="PSNR, dB", xscale="log")
    panels[0].legend(frameon=False, ncols=2, loc="lower right")
    return figure


def upper_edge(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, value) that no point of the same or a lower cost surpasses, by rising cost."""
    edge: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not edge or value > edge[-1][1]:
            edge.append((cost, value))
    return edge


def kept_curves(curves: Mapping[str, Sequence[KeptStep]]) -> Figure:
    """Kept fraction at every step of a run, before calibration and, where that changed anything, after it."""
    figure, (axes,) = new_figure(3.0)
    for name, style, colour in (("before", "o--", GREY), ("after", "s-", BLUE)):
        if points := curves.get(name):
            label = f"{name}, {len(points)} steps"
            taus, kept = zip(*((point.tau, point.kept) for point in points), strict=True)
            axes.plot(taus, kept, style, color=colour, label=label, markersize=4)
    axes.set(xlabel=NOISE_LEVEL, ylabel="kept fraction of the tokens")
    axes.set_ylim(0, 1.05)
    axes.invert_xaxis()
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def calibration_trials(found: Calibration) -> Figure:
    """PSNR of every candidate over its number of steps, and of the present schedule and the original."""
    figure, (axes,) = new_figure(3.2)
    tried = [trial for trial in found.candidates if trial.psnr_screen is not None]
    points = [[getattr(trial, name) for trial in tried] for name in ("steps", "psnr_screen")]
    axes.plot(*points, "s", color=BLUE, label="candidates", markersize=4, alpha=0.6)
    for row in found.rows:
        if row.psnr_screen is None or row.kind == "candidate":
            continue
        if row.kind == "present":
            axes.plot(row.steps, row.psnr_screen, "o", color=GREY, label=f"{row.name}, {row.solver}")
        elif row.solver == found.solver:
            axes.plot(row.steps, row.psnr_screen, "^", color=ORANGE)
            name = f"original, {row.steps} steps"
            axes.annotate(name, (row.steps, row.psnr_screen), (7, -4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="sampling steps", ylabel="PSNR, dB")
    axes.margins(x=0.1, y=0.15)
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def latency_bars(rows: Sequence[LatencyRow]) -> Figure:
    """Step latency, one panel per runtime: original, converted, and what the saved operations alone would give."""
    figure, panels = new_figure(0.7 + 1.15 * len(rows), len(rows), shared=False)
    for axes, row in zip(panels, rows, strict=True):
        for place, (name, colour) in enumerate((("original", GREY), ("converted", BLUE))):
            times: Spread = getattr(row, f"{name}_ms")
            assert times.known is not None
            low, middle, high = times.known
            spread = [[max(0, middle - low)], [max(0, high - middle)]]
            axes.barh(place, middle, 0.7, color=colour, xerr=spread, error_kw={"ecolor": "black", "capsize": 3})
        assert row.original_ms.median is not None
        assert row.flop_ratio is not None
        alone = row.original_ms.median / row.flop_ratio
        axes.plot([alone, alone], [0.55, 1.45], color=ORANGE, linestyle="--", linewidth=2, label="by operations alone")
        axes.set_yticks([0, 1], ["original", "converted"])
        axes.set_title(f"{row.runtime}, batch {row.batch}", loc="left", fontsize=9)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
    panels[0].legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, fontsize=9)
    panels[-1].set_xlabel("one step, ms (median; whiskers: 10th to 90th percentile)")
    return figure


def new_figure(height: float, panels: int = 1, *, shared: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with panels below each other; `height` in inches."""
    figure = Figure(figsize=(WIDTH, height), dpi=150, layout="constrained")
    grid = figure.subplots(panels, squeeze=False, sharex=shared)
    for axes in grid[:, 0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, list(grid[:, 0])


def numbers(values: Iterable[float | None]) -> np.ndarray:
    """Values for an axis; None becomes NaN, which leaves a gap."""
    return np.array(list(values), float)


def png(figure: Figure) -> bytes:
    """A plot as PNG data."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
