"""The tables about run tables: final images at equal compute, with and without fitting, and with the original's
solvers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dcconvert.sampling.default_tables import WORTH_SKIPPING

COLUMNS = {
    "skipped after each, polished": "skipped steps, polished",
    "all steps computed, polished": "original, polished",
    "1 skipped after each, fitted": "every second step skipped, fitted",
    "2 skipped after each, fitted": "two of three skipped, fitted",
    "all steps computed, fitted": "original, fitted",
    "1 skipped after each": "every second step skipped",
    "all steps computed": "original, graded grid",
    "original, unipc": "original, UniPC",
    "original, euler": "original, Euler",
}
LEAST_SHOWN = 8  # computed steps, in the short table: images of fewer are poor
SHORT = ("original, tuned", "all steps computed", "original, unipc", "original, euler")


def of_budget(rows: Sequence[dict[str, Any]], guidance: float, budget: float) -> dict[str, dict[str, Any]]:
    """The runs of one budget by name. One run table with skipped steps is polished: the one with one or two skipped
    steps after each computed one."""
    found = {row["run"]: row for row in rows if (row["guidance"], row["budget"]) == (guidance, budget)}
    for name in [name for name in found if name.endswith("skipped after each, polished")]:
        found["skipped after each, polished"] = found[name]
    tuned = [row for name, row in found.items() if name.startswith("all") and row["fitted"]]
    found["original, tuned"] = max(tuned, key=lambda row: row["psnr"])
    return found


def cell(row: dict[str, Any] | None, error: bool, best: float) -> str:
    if row is None:
        return ""
    text = f"{row['psnr']:.1f}" + (f" ± {row['psnr_error']:.1f}" if error else "")
    return f"**{text}**" if row["psnr"] == best else text


def fitted_rows(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the long table: every kind of run, with standard errors."""
    headers = ["guidance, computed steps", *COLUMNS.values()]
    found = []
    for guidance, budget in sorted({(row["guidance"], row["budget"]) for row in rows}):
        here = of_budget(rows, guidance, budget)
        best = max(row["psnr"] for row in here.values())
        found.append([f"{guidance:g}, {int(budget)}", *(cell(here.get(name), True, best) for name in COLUMNS)])
    return headers, found


def short_rows(rows: Sequence[dict[str, Any]], steps: int) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the short table, guidance 1: with `tune`, without it, and the original."""
    headers = ["compute", "speed-up", "`tune --polish 2`", "not fitted", *(COLUMNS.get(name, name) for name in SHORT)]
    found = []
    for budget in sorted({row["budget"] for row in rows if row["budget"] >= LEAST_SHOWN}):
        here = of_budget(rows, 1.0, budget)
        tuned = max((row for row in here.values() if not row["run"].startswith("original")), key=lambda r: r["psnr"])
        plain = here["1 skipped after each"] if budget >= WORTH_SKIPPING else here["all steps computed"]
        found.append(
            [
                f"{budget / steps:.0%}",
                f"{tuned['speedup']:.1f}x",
                cell(tuned, True, tuned["psnr"]),
                *(cell(row, False, tuned["psnr"]) for row in (plain, *(here[name] for name in SHORT))),
            ]
        )
    return headers, found


def peer_rows(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the table of peers: a row for each guidance and budget, a column for each kind of run."""
    names = list(dict.fromkeys(row["run"] for row in rows))
    found = []
    for guidance, budget in sorted({(row["guidance"], row["budget"]) for row in rows}):
        here = {row["run"]: row for row in rows if (row["guidance"], row["budget"]) == (guidance, budget)}
        best = max(row["psnr"] for row in here.values())
        cells = [f"{cell(here[n], True, best)} ({here[n]['cost']:.1f})" if n in here else "" for n in names]
        found.append([f"{guidance:g}, {budget}", *cells])
    return ["guidance, computed steps", *names], found


def note(settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The note below a table, which says what the figures are."""
    converged = min(row["reference_converged_db"] for row in rows)
    polished = any("polished" in row["run"] for row in rows)
    rounds = f"up to {settings['polish_up_to']:g} computed steps were also polished (rounds: {settings['polish']})"
    cheaper = any(row["budget"] == 8 and row["computed"] == 7 for row in rows)
    less = " At 6, 8 and 25, tables that skip steps compute one step less." if cheaper else ""
    wanted = {(1.0, budget) for budget in settings["budgets"]}
    wanted |= {(settings["guidance"], budget) for budget in settings["guided_budgets"]}
    missing = sorted(wanted - {(row["guidance"], row["budget"]) for row in rows})
    cut = ", ".join(f"{int(budget)} at guidance {guidance:g}" for guidance, budget in missing)
    return (
        f"\nPSNR in dB on {settings['fresh']} images that nothing was fitted to, ± standard error, relative to a run "
        f"of {settings['reference_steps']} Adams steps; half as many steps reach at least {converged:.0f} dB. The fits "
        f"used {settings['images']} other images{f'; at guidance 1, tables with {rounds}' if polished else ''}."
        f"{less}{f' Not measured, because time ran out: {cut}.' if cut else ''}\n"
    )
