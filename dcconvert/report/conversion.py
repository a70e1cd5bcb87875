"""The report of a conversion: report.json for machines, one self-contained report.html for people."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from dcconvert.report import plots
from dcconvert.report.html import Markup, Number, document, milliseconds, number, picture, section, shown, table
from dcconvert.report.stress import FAILURES_FIGURE, stress_section

# Names of facts that need a unit or more words than their key.
FACTS = {
    "grid": "token grid",
    "gmacs": "GMACs a step and sample",
    "kept_tokens_mean": "kept tokens a sample, mean",
    "memory_gb": "memory, GB",
}

CAPTIONS = {
    "samples": "Final images, same seeds and classes in the same place.",
    "token_maps": "Chunk maps, a sample a row: what the model saw at some steps of a run. Tokens that are tinted blue "
    "were not computed at that step, the others were; on the right the final images.",
}
FIGURES = (*CAPTIONS, FAILURES_FIGURE)  # what may lie beside a report, by the names of the files


def write_report(folder: Path, report: dict[str, Any], figures: dict[str, bytes]) -> None:
    """Write report.json, report.html and the figures (PNG data by name) into `folder`."""
    (folder / "report.json").write_text(report_json(report))
    (folder / "report.html").write_text(page(without_nan(report), figures), encoding="utf-8")
    for name, png in figures.items():
        (folder / f"{name}.png").write_bytes(png)


def report_json(report: dict[str, Any]) -> str:
    """The report as JSON text."""
    return json.dumps(without_nan(report), indent=1, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """JSON has no NaN: not a finite number becomes null."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(report: dict[str, Any], figures: dict[str, bytes]) -> str:
    conversion = report.get("conversion", {})
    title = f"dcconvert: {report.get('source', {}).get('path', 'model')} at {conversion.get('ratio', 1):g}x"
    sections = [
        cards(report),
        samples_section(figures),
        checks_section(report),
        latency_section(report),
        compute_section(report),
        fidelity_section(report),
        calibration_section(report),
        upcycling_section(report),
        stress_section(report, figures.get(FAILURES_FIGURE)),
        memory_section(report),
        buckets_section(report),
        passes_section(report),
        limits_section(report),
        origin_section(report),
    ]
    return document(title, sections)


def cards(report: dict[str, Any]) -> str:
    model, conversion = report.get("model", {}), report.get("conversion", {})
    items = [(f"{model.get('tokens', 0)} → {conversion.get('kept_tokens_mean', 0):.0f}", "tokens in the trunk (mean)")]
    for row in report.get("latency", [])[:1]:
        items.append((shown(row["speedup"], ".2f", "x"), f"faster step, {row['runtime']}, batch {row['batch']}"))
        items.append((shown(row["flop_ratio"], ".2f", "x"), "fewer operations"))
    checks = report.get("checks", [])
    if checks:
        items.append((f"{sum(c['passed'] for c in checks)} of {len(checks)}", "checks passed"))
    inner = "".join(f'<div class="card"><b>{html.escape(big)}</b>{html.escape(small)}</div>' for big, small in items)
    return f'<div class="cards">{inner}</div>'


def samples_section(figures: dict[str, bytes]) -> str:
    shown_here = {name: data for name, data in figures.items() if name != FAILURES_FIGURE}
    return section("Samples", *(picture(data, CAPTIONS.get(name, name), True) for name, data in shown_here.items()))


def checks_section(report: dict[str, Any]) -> str:
    rows = []
    for check in report.get("checks", []):
        badge = Markup('<span class="pass">passed</span>' if check["passed"] else '<span class="fail">failed</span>')
        value = number(check["value"], missing="not finite")
        rows.append([badge, check["name"], value, number(check["tolerance"]), check["detail"]])
    return section("Checks", table(["", "check", "value", "tolerance", "how"], rows))


def latency_section(report: dict[str, Any]) -> str:
    rows = [
        [
            row["runtime"],
            number(row["batch"], 0),
            milliseconds(row["original_ms"]),
            milliseconds(row["converted_ms"]),
            Number(shown(row["speedup"], ".2f", "x")),
            Number(shown(row["flop_ratio"], ".2f", "x")),
            Number(shown(row["efficiency"], ".0%")),
            ", ".join(f"{stage} {shown(value, '.1f')}" for stage, value in row.get("stages_ms", {}).items()),
        ]
        for row in report.get("latency", [])
    ]
    headers = ["runtime", "batch", "original, ms", "converted, ms", "speed-up", "FLOP ratio", "reached", "stages, ms"]
    note = (
        "<p>One step, original and converted taking turns in one run: median (10th to 90th percentile). Reached: "
        "the speed-up as a share of the ratio of operations, which it would be if time went by operations alone.</p>"
    )
    drawn = [row for row in report.get("latency", []) if row["flop_ratio"] and all_measured(row)]
    caption = "Latency of one step. Dashed: the original's, divided by the ratio of operations."
    plot = picture(plots.latency_bars(drawn), caption) if drawn else ""
    return section("Latency", note, table(headers, rows), plot) if rows else ""


def all_measured(row: dict[str, Any]) -> bool:
    times = (row[f"{model}_ms"] for model in ("original", "converted"))
    return all(part[key] is not None for part in times for key in ("median", "p10", "p90"))


def compute_section(report: dict[str, Any]) -> str:
    compute = report.get("compute")
    if not compute:
        return ""
    run = compute["run_gmacs"]
    rows = [
        ["original, one step a sample", number(compute["original_gmacs"])],
        [f"original, {run['steps']} steps a sample", number(run["original"])],
        [f"converted, {run['steps']} steps a sample", number(run["converted"])],
    ]
    note = (
        f"<p>{shown(compute['ratio'], '.2f')} times fewer operations over a run. "
        "GMACs: billions of multiply-accumulates, which the DiT paper calls Gflops.</p>"
    )
    plot = ""
    if steps := compute.get("per_step"):
        drawn = plots.spending(steps, report.get("model", {}).get("tokens"), compute["original_gmacs"])
        warm_up = report.get("conversion", {}).get("warm_up_steps")
        dense = f" The first {warm_up} compute every token: the warm-up." if warm_up else ""
        caption = f"Kept tokens and GMACs of one sample over a sampling run; every marker is a step.{dense}"
        plot = picture(drawn, caption)
    return section("Compute", note, table(["", "GMACs"], rows), plot)


def fidelity_section(report: dict[str, Any]) -> str:
    result = report.get("fidelity")
    if not result:
        return ""
    parts = images_parts(result["images"]) if "images" in result else []
    if curve := [point for point in result.get("velocity_error", []) if point["error"] is not None]:
        caption = "Error of one step on the original's own trajectory: ||converted - original|| / ||original||."
        parts.append(picture(plots.velocity_error(curve), caption))
    trained = "" if report.get("upcycling") else ", without training"
    return section(f"Fidelity to the original{trained}", *parts)


def images_parts(images: dict[str, Any]) -> list[str]:
    """What the final images lost, beside the control: the original with fewer steps."""
    kind = "latents" if images.get("latents") else "images"
    note = (
        f"<p>PSNR of {images['count']} final {kind} against {html.escape(images['reference'])}, same seeds, mean over "
        "the samples. The original with fewer steps is what anybody can have without converting anything.</p>"
    )
    compared = [row for row in images["rows"] if row["name"] != images["reference"]]
    rows = [
        [
            row["name"],
            number(row["steps"], 0),
            number(row["gmacs"]),
            number(row["latency_ms"]),
            number(row["psnr"], 3, missing="not finite"),
        ]
        for row in compared
    ]
    drawn = [row for row in compared if row["psnr"] is not None]
    caption = (
        "Fidelity against compute and against measured latency, whole runs. A converted model below the dashed line "
        "loses to fewer steps of the original."
    )
    plot = picture(plots.quality_over_cost(drawn), caption) if drawn else ""
    return [note, table(["", "steps", "GMACs an image", "ms an image", "PSNR, dB"], rows), plot]


CALIBRATION_COLUMNS = (
    "",
    "solver",
    "steps",
    "warm-up",
    "kept at noise level 0, 0.5, 1",
    "GMACs an image",
    "PSNR, search, dB",
    "PSNR, fresh, dB",
)


def calibration_rows(found: dict[str, Any]) -> list[list[Number | str]]:
    """What `dcconvert calibrate` compared, cells as `CALIBRATION_COLUMNS` names them."""
    rows: list[list[Number | str]] = []
    for row in found["rows"]:
        kept = ", ".join(f"{level:.3f}" for level in row["kept"]) if row["kept"] else ""
        warm_up = "" if row["warm_up"] is None else str(row["warm_up"])
        figures = [Number(shown(row[name], ".2f") if row[name] is not None else "") for name in ("psnr", "psnr_fresh")]
        cells = [Number(row["steps"]), Number(warm_up), Number(kept), Number(f"{row['gmacs']:.3g}"), *figures]
        rows.append([row["name"], row["solver"], *cells])
    return rows


def calibration_section(report: dict[str, Any]) -> str:
    found = report.get("calibration")
    if not found:
        return ""
    outcome = (
        "Candidate 1 is stored." if found["changed"] else "No candidate beat the present schedule: it was not changed."
    )
    note = (
        f"<p>{len(found['candidates'])} schedules that cost as much as {found['budget']:.4g} steps of the original, "
        f"compared by the PSNR of {found['screen_images']} final images against the original with "
        f"{found['reference_steps']} Euler steps, without guidance, and the best of them by that of {found['images']}. "
        f"{outcome} Fresh: as many images that the search did not see. The original "
        "with fewer steps is what anybody can have at this compute without converting anything.</p>"
    )
    curves = "Kept fraction over a sampling run; every marker is a step."
    trials = f"Every schedule that was tried, by its number of steps; PSNR of {found['screen_images']} images."
    return section(
        "Calibration",
        note,
        table(CALIBRATION_COLUMNS, calibration_rows(found)),
        picture(plots.kept_curves(found["curves"]), curves),
        picture(plots.calibration_trials(found), trials),
    )


def upcycling_section(report: dict[str, Any]) -> str:
    found = report.get("upcycling")
    if not found:
        return ""
    log = found["log"]
    first, last = log[0], log[-1]
    source = "its own sampling runs"
    if found["data_samples"]:
        source = f"{found['data_samples']} images ({html.escape(found['data'])})"
    note = (
        f"<p>Trained ({html.escape(', '.join(found['train']))}) on {last['samples']} samples of {source} "
        f"in {last['seconds'] / 60:.1f} minutes, the original as the teacher. PSNR of "
        f"{found['images']} final images to those of the original at the same number of steps: "
        f"{first['psnr']:.2f} dB before, {last['psnr']:.2f} dB after.</p>"
    )
    if found.get("earlier"):
        note += f"<p>It had been trained before, {len(found['earlier'])} times: see manifest.json.</p>"
    caption = (
        "Above: averaged weights, on noise that training did not see. Below: mean over the steps since the last point."
    )
    return section("Upcycling", note, picture(plots.upcycling_curve(log), caption))


def memory_section(report: dict[str, Any]) -> str:
    rows = [[row["runtime"], row["model"], number(row["peak_mb"], 0)] for row in report.get("memory", [])]
    note = "<p>Peak resident memory of a fresh process that loads the model and runs one step.</p>"
    return section("Memory", note, table(["runtime", "model", "peak, MB"], rows)) if rows else ""


def buckets_section(report: dict[str, Any]) -> str:
    buckets = report.get("buckets")
    if not buckets:
        return ""
    names = ("batch", "tokens", "rows", "row_tokens", "tile")
    rows = [[number(bucket.get(name), 0, missing="") for name in names] for bucket in buckets["rungs"]]
    waste = f"{shown(buckets['expected_waste'], '.1%')} of the kept tokens"
    note = f"<p>Static shapes of the exported model. Expected padding: {waste}.</p>"
    return section("Buckets", note, table(["batch", "packed tokens", "rows", "tokens a row", "tile"], rows))


def passes_section(report: dict[str, Any]) -> str:
    rows = [
        [
            item["name"],
            number(item["matches"], 0),
            f"{item['nodes_before']} → {item['nodes_after']}",
            number(item["seconds"]),
            "; ".join(item["notes"]),
        ]
        for item in report.get("conversion", {}).get("passes", [])
    ]
    return section("Passes", table(["pass", "matches", "nodes", "seconds", "notes"], rows))


def limits_section(report: dict[str, Any]) -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in report.get("limits", []))
    return section("Limits", f"<ul>{items}</ul>") if items else ""


def origin_section(report: dict[str, Any]) -> str:
    facts = {**report.get("source", {}), **report.get("model", {}), "created": report.get("created")}
    facts |= {k: v for k, v in report.get("conversion", {}).items() if k != "passes"} | report.get("machine", {})
    known = {name: fact(value) for name, value in facts.items() if value is not None}
    rows = [[FACTS.get(name, name.replace("_", " ")), text] for name, text in known.items()]
    command = f"<p><code>{html.escape(report.get('command', ''))}</code></p>"
    return section("How this was made", command, table(["", ""], rows))


def fact(value: Any) -> str:
    """A value of the last table: sizes as 16 x 16, large counts with separators."""
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def terminal_table(report: dict[str, Any]) -> Table:
    """The short version: original against converted."""
    conversion = report.get("conversion", {})
    title = f"{conversion.get('mode', 'chunk')} at {conversion.get('ratio', 1):g}x"
    result = Table(title=title, title_justify="left")
    for column in ("", "original", "converted", "ratio"):
        result.add_column(column, justify="left" if not column else "right")
    kept, tokens = conversion.get("kept_tokens_mean", 0), report.get("model", {}).get("tokens", 0)
    result.add_row("tokens in the trunk, mean", f"{tokens}", f"{kept:.0f}", f"{tokens / kept:.2f}x" if kept else "")
    compute = report.get("compute")
    if compute:
        run = compute["run_gmacs"]
        name = f"GMACs an image, {run['steps']} steps"
        before, after = (shown(run[model], ".2f") for model in ("original", "converted"))
        result.add_row(name, before, after, shown(compute["ratio"], ".2f", "x"))
    for row in report.get("latency", []):
        name = f"step, {row['runtime']}, batch {row['batch']}"
        before, after = (shown(row[key]["median"], ".1f", " ms") for key in ("original_ms", "converted_ms"))
        reached = f"{shown(row['efficiency'], '.0%')} of {shown(row['flop_ratio'], '.2f', 'x')}"
        result.add_row(name, before, after, f"{shown(row['speedup'], '.2f', 'x')} ({reached})")
    memory = {row["model"]: row["peak_mb"] for row in report.get("memory", []) if row["peak_mb"]}
    if len(memory) == 2:
        before, after = memory["original"], memory["converted"]
        result.add_row("peak memory", f"{before:.0f} MB", f"{after:.0f} MB", f"{before / after:.2f}x")
    images = report.get("fidelity", {}).get("images", {})
    for row in images.get("rows", []):
        if row["name"] != images["reference"]:
            psnr = "not finite" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
            cells = (psnr, "") if row["mode"] == "original" else ("", psnr)
            cost = [f"{row['gmacs']:.1f} GMACs"]
            cost += [] if row["latency_ms"] is None else [f"{row['latency_ms']:.0f} ms"]
            result.add_row(f"PSNR, {row['name']}", *cells, ", ".join(cost))
    if "buckets" in report:
        waste = shown(report["buckets"]["expected_waste"], ".1%")
        result.add_row("padding in the buckets, expected", "", waste, "")
    checks = report.get("checks", [])
    if checks:
        result.add_row("checks passed", "", f"{sum(c['passed'] for c in checks)} of {len(checks)}", "")
    return result
