"""The published methods: a table of SparseDiT's operations, and a plot of all presets at the same cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dcconvert.report.plots import BLUE, GREY, ORANGE, new_figure, png


def sparsedit_table(result: dict[str, Any], markdown: Callable[..., str]) -> str:
    """Our operations compared with the paper's."""
    rows = [
        [
            f"{row['latent'] * 8} px, r {row['r_min']:.2f} to {row['r_max']:.2f}",
            f"{row['mean_tokens']:.0f} of {row['tokens']}",
            f"{row['gmacs']:.1f}",
            f"{row['fewest']['gmacs']:.1f} to {row['most']['gmacs']:.1f}",
            f"{row['published']:.1f}",
            f"{100 * row['difference']:+.1f} %",
            f"{100 * (row['most']['gmacs'] / row['published'] - 1):+.1f} %",
        ]
        for row in result["rows"]
    ]
    headers = [
        "DiT-XL/2",
        "mean tokens",
        "mean GMACs",
        "GMACs per step",
        "paper",
        "mean vs. paper",
        "largest step vs. paper",
    ]
    return markdown(headers, rows)


def preset_plot(rows: Sequence[dict[str, Any]]) -> bytes:
    """PSNR of every method at the same cost: hollow before training, filled after it; a dashed line for the original.

    Rows as `benchmarks.upcycling` writes them.
    """
    untrained = {row["name"].split(",")[0]: row for row in rows if "untrained" in row["name"]}
    trained = [row for row in rows if row["mode"] != "original" and "untrained" not in row["name"]]
    trained.sort(key=lambda row: row["psnr"])
    control = min((row for row in rows if row["mode"] == "original"), key=lambda row: row["gmacs"])
    figure, (axes,) = new_figure(3.2, 1)
    for place, row in enumerate(trained):
        colour = BLUE if row["mode"] == "carry" else GREY
        before = untrained.get(row["name"].split(",")[0])
        if before:
            axes.plot([before["psnr"], row["psnr"]], [place, place], "-", color=colour, linewidth=1)
            axes.plot(before["psnr"], place, "o", color=colour, fillstyle="none")
        axes.plot(row["psnr"], place, "o", color=colour)
    axes.axvline(control["psnr"], color=ORANGE, linestyle="--", linewidth=1)
    axes.annotate(
        f"original, {control['steps']} steps", (control["psnr"], 0), (3, -2), textcoords="offset points", fontsize=8
    )
    names = [row["name"] + (" (needs no training)" if row["mode"] == "carry" else "") for row in trained]
    axes.set_yticks(range(len(trained)), names)
    axes.set(xlabel=f"PSNR, dB, at about {control['gmacs']:.1f} GMACs an image")
    return png(figure)
