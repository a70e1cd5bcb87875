"""The tables of the stress set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def stress_table(result: dict[str, Any], markdown: Callable[..., str]) -> str:
    """Modes carry and chunk."""
    rows = [
        [
            f"{row['bundle']}, run at {row['ratio']:g}x",
            row["kind"],
            f"{row['cost']:.1f}",
            *(f"{row[name]:.1f}" for name in ("psnr", "detail_psnr", "control_psnr", "control_detail_psnr")),
            f"{row['attention_to_detail_early']:.2f}, {row['attention_to_detail_late']:.2f}",
            f"{row['dropped_error_late']:.1f}",
            "" if row["mean_age_late"] is None else f"{row['detail_age_late']:.1f} ({row['mean_age_late']:.1f})",
        ]
        for row in result["rows"]
        if "computed" not in row
    ]
    headers = ["bundle", "detail", "cost in full steps", "PSNR, dB", "in the detail", "fewer steps", "in the detail"]
    headers += ["attention to detail, early, late", "error of dropped tokens, late", "age of detail (of all), late"]
    settings = result["settings"]
    note = (
        f"\nUp to {settings['count']} cases of each kind; {settings['steps']} steps, starting at noise level "
        f"{settings['start']:.2f}, out of {settings['run_steps']} in a whole run, with {settings['solver']}.\n"
    )
    return markdown(headers, rows) + note


def stress_steps_table(result: dict[str, Any], markdown: Callable[..., str]) -> str:
    """Mode steps: every run table, and the original on the graded grid at the same cost."""
    rows = [
        [
            f"{row['bundle']} ({row['computed']} + {row['skipped']})",
            row["kind"],
            *(f"{row[name]:.1f}" for name in ("psnr", "detail_psnr", "control_psnr", "control_detail_psnr")),
            *(f"{row[name]:+.1f} ± {row[f'{name}_error']:.1f}" for name in ("gain", "detail_gain")),
            f"{row['full_detail_psnr']:.1f}",
        ]
        for row in result["rows"]
        if "computed" in row
    ]
    settings = result["settings"]["mode_steps"]
    headers = ["run table (computed + skipped steps)", "detail", "PSNR, dB", "in the detail", "fewer steps"]
    headers += ["in the detail", "gain", "in the detail", f"original, {settings['full_steps']} steps, in the detail"]
    note = (
        f"\nUp to {settings['count']} cases of each kind, chosen from {settings['samples']} samples of the original. "
        f"PSNR is relative to {settings['reference_steps']} Adams steps; half as many reach "
        f"{settings['converged']:.1f} dB in the detail. Gain: run table minus fewer steps of the original on the "
        "graded grid at the same cost, paired, ± standard error. "
        f"The original's {settings['full_steps']} steps are with {settings['full_solver']}.\n"
    )
    return markdown(headers, rows) + note
