"""Write the tables of the README and the docs from the committed results.

    python -m benchmarks.tables            # rewrite them
    python -m benchmarks.tables --check    # exit 1 if one is out of date

A table is between `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.coverage_table import coverage_table
from benchmarks.family_table import family_table
from benchmarks.fitted_table import fitted_rows, note, peer_rows, short_rows
from benchmarks.gpu_table import chunk_table, gpu_table, onnx_table
from benchmarks.preset_table import sparsedit_table
from benchmarks.runtimes_table import runtimes_table
from benchmarks.stress_table import stress_steps_table, stress_table

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
DOCS = ("steps", "results", "deploy", "models", "choices", "carry", "stress", "upcycle", "packing", "presets")
PAGES = ("README.md", *(f"docs/{page}.md" for page in DOCS))
MARKER = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine_note(result: dict[str, Any]) -> str:
    facts, settings = result["machine"], result.get("settings", {})
    images = settings.get("images_made_on", facts) if settings.get("device") else None
    made = f"\nImages were made on a GPU: {images['gpu']}; torch {images['torch']}.\n" if images else ""
    if images is facts:
        return made
    return made + (
        f"\nMeasured on a CPU: {facts['cpu']}, {facts['cores']} cores; torch {facts['torch']}, "
        f"ONNX Runtime {facts['onnxruntime']}.\n"
    )


def speed() -> str:
    result = read("ort_speed_cpu")
    rows = [
        [
            f"{row['model']}, {row['case']}",
            f"{row['original_ms']['median']:.0f}",
            f"{row['converted_ms']['median']:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['flop_ratio']:.2f}",
            f"{row['efficiency']:.2f}",
        ]
        for row in result["rows"]
    ]
    headers = ["batch 8, 256 px", "original, ms", "converted, ms", "speed-up", "operations ratio", "share of ideal"]
    return markdown(headers, rows) + machine_note(result)


def packing(kind: str, headers: list[str], cells: Callable[[dict[str, Any]], list[str]]) -> str:
    result = read("packing_cpu")
    return markdown(headers, [cells(row) for row in result["rows"] if row["kind"] == kind]) + machine_note(result)


def packing_data_set() -> str:
    headers = ["lengths up to 512", "slots filled", "seconds"]
    return packing("data set", headers, lambda row: [row["name"], f"{row['efficiency']:.1%}", f"{row['seconds']:.3g}"])


def packing_batch(row: dict[str, Any]) -> list[str]:
    packed = [f"{row['case']}: {row['name']}", str(row["rows"]), f"{row['efficiency']:.0%}", f"{row['pack_us']:.0f}"]
    run = "step_ms" in row
    return [*packed, f"{row['step_ms']['median']:.1f}" if run else "", f"{row['speedup']:.2f}" if run else ""]


def packing_batches() -> str:
    headers = ["batch and algorithm", "rows", "slots filled", "µs", "step, ms", "speed-up over the original"]
    return packing("batch", headers, packing_batch)


def packing_plan() -> str:
    headers = ["4x, batch 8", "route, ms", "plan, ms", "denoise, ms", "plan's share"]
    stages = ("route_ms", "plan_ms", "denoise_ms")
    return packing(
        "plan", headers, lambda row: [row["name"], *(f"{row[s]:.2f}" for s in stages), f"{row['plan_share']:.1%}"]
    )


def demo() -> str:
    result = read("demo")
    compute, latency = result["compute"], result["latency"][0]
    images = {row["name"]: row for row in result["fidelity"]["images"]["rows"] if row["psnr"] is not None}
    rows = [
        [name, f"{row['gmacs']:.1f}", f"{row['latency_ms']:.0f}", f"{row['psnr']:.1f}"] for name, row in images.items()
    ]
    reference = result["fidelity"]["images"]["reference"].removesuffix(", reference")
    headers = ["shipped model", "GMACs per image", "ms per image", f"PSNR relative to the {reference}, dB"]
    text = markdown(headers, rows)
    count = result["fidelity"]["images"]["count"]
    return (
        f"{text}\nWhole runs at batch {latency['batch']} on ONNX Runtime: {latency['speedup']:.2f} times faster for "
        f"{compute['ratio']:.2f} times fewer operations. {count} images.\n"
        f"{machine_note(result)}"
    )


def scale() -> str:
    result = read("scale_xl")
    row = result["rows"][0]
    return (
        f"{row['model']} ({row['parameters'] / 1e6:.0f} M parameters, {row['checkpoint_gb']:.1f} GB in fp32) converts, "
        f"verifies and exports in {row['seconds']:.0f} s with a peak memory of {row['peak_memory_gb']:.1f} GB, "
        f"{row['peak_memory_over_checkpoint']:.2f} times the checkpoint.\n{machine_note(result)}"
    )


def choices() -> str:
    result = read("choices")
    rows = [
        [
            f"{row['name']}, {row['steps']} steps" if row["name"] == "original" else row["name"],
            f"{row['gmacs']:.1f}",
            f"{row['one_step_error']:.3f}" if "one_step_error" in row else "",
            f"{row['psnr']:.1f}",
        ]
        for row in result["rows"]
    ]
    headers = ["", "GMACs per image", "error of one step", "PSNR of final images, dB"]
    return markdown(headers, rows) + machine_note(result)


def frontier() -> str:
    """The best carry row for every solver and budget, and the original at equal compute and at equal latency."""
    result = read("frontier")
    rows = []
    for solver in result["settings"]["solvers"]:
        mine = [row for row in result["rows"] if row["solver"] == solver]
        control = [row for row in mine if row["mode"] == "original"]
        best: dict[float, dict[str, Any]] = {}
        for row in mine:
            if row["mode"] == "carry":
                budget = round(row["share_of_base"] * 8) / 8 if row["share_of_base"] > 0.2 else 0.15
                best[budget] = max(row, best.get(budget, row), key=lambda r: r["psnr"])
        for row in best.values():
            at_compute, at_latency = (interpolated(control, key, row[key]) for key in ("gmacs", "latency_ms"))
            rows.append(
                [
                    f"{row['share_of_base']:.0%}, {solver}",
                    f"{row['steps']} steps, {row['psnr']:.1f} dB",
                    f"{at_compute:.1f} dB ({row['psnr'] - at_compute:+.1f})",
                    f"{row['latency_ms']:.0f} ms",
                    f"{at_latency:.1f} dB ({row['psnr'] - at_latency:+.1f})",
                ]
            )
    headers = ["compute, solver", "carry", "original, equal compute", "latency", "original, equal latency"]
    count = result["settings"]["images"]
    return (
        markdown(headers, rows)
        + f"\n{count} images; the original is interpolated between step counts.\n"
        + machine_note(result)
    )


def interpolated(control: Sequence[dict[str, Any]], key: str, cost: float) -> float:
    """PSNR of the original at a cost, interpolated linearly in the logarithm of the cost between the nearest step
    counts."""
    points = sorted((math.log(row[key]), row["psnr"]) for row in control)
    if not points[0][0] <= math.log(cost) <= points[-1][0]:
        raise ValueError(f"the control does not reach a {key} of {cost}: measure it with more step counts")
    return float(np.interp(math.log(cost), [point[0] for point in points], [point[1] for point in points]))


def carry_speed() -> str:
    result = read("carry_speed_cpu")
    rows = [
        [
            f"{row['model']}, {row['ratio']:g}x",
            f"{row['original_ms']['median']:.0f}",
            f"{row['converted_ms']['median']:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['flop_ratio']:.2f}",
            f"{row['efficiency']:.2f}",
            f"{row['state_share']:.0%}",
        ]
        for row in result["rows"]
    ]
    headers = ["batch 8, 256 px, mean over 50 steps", "original, ms", "carry, ms", "speed-up", "operations ratio"]
    return markdown([*headers, "share of ideal", "state's share"], rows) + machine_note(result)


def state_memory() -> str:
    rows = [
        [
            f"{row['model']}, {row['pixels']} px, batch {row['batch']}",
            f"{row['fp16_mb']:,.0f}",
            f"{row['fp32_mb']:,.0f}",
        ]
        for row in read("carry_speed_cpu")["settings"]["state_memory"]
    ]
    return markdown(["state of a run", "fp16, MB", "fp32, MB"], rows)


def carry_variants() -> str:
    result = read("carry_variants")
    names = dict.fromkeys(row["name"] for row in result["rows"] if row["name"] != "original")
    solvers = list(dict.fromkeys(row["solver"] for row in result["rows"]))
    known = {(row["name"], row["solver"]): row for row in result["rows"]}
    rows = []
    for name in names:
        found = [known[name, solver] for solver in solvers]
        shipped = [known["base: constant schedule", solver] for solver in solvers]
        cells = [
            f"{row['psnr']:.1f} ({row['psnr'] - base['psnr']:+.1f})" for row, base in zip(found, shipped, strict=True)
        ]
        rows.append([name, f"{found[0]['full_steps']:.1f}", *cells])
    for steps in sorted({row["steps"] for row in result["rows"] if row["name"] == "original"}):
        found = [r for r in result["rows"] if r["name"] == "original" and r["steps"] == steps]
        rows.append([f"original, {steps} steps", f"{steps}", *(f"{row['psnr']:.1f}" for row in found)])
    headers = ["one change to mode carry, 25 steps", "cost in full steps", *(f"{solver}, dB" for solver in solvers)]
    return markdown(headers, rows) + f"\n{result['settings']['images']} images.\n" + machine_note(result)


def calibrated() -> str:
    result = read("calibrated")
    rows = []
    for row in result["rows"]:
        name = {"candidate": "calibrated", "present": "before: constant schedule"}.get(row["kind"], row["name"])
        kept = ", ".join(f"{level:.2f}" for level in row["kept"] or ())
        cells = [f"{row['steps']}", f"{row['warm_up'] or ''}", kept, f"{row['gmacs']:.1f}", f"{row['psnr_fresh']:.1f}"]
        rows.append([f"{name}, {row['solver']}", *cells])
    headers = ["at 4x", "steps", "warm-up", "kept at noise 0, 0.5, 1", "GMACs per image", "PSNR, dB"]
    known = result["settings"]["calibrations"][0]
    note = f"\nPSNR on {known['images']} fresh images, relative to {known['reference_steps']} Euler steps.\n"
    return markdown(headers, list(map(list, dict.fromkeys(map(tuple, rows))))) + note + machine_note(result)


def guidance() -> str:
    result = read("guidance")
    scales = list(dict.fromkeys(row["guidance"] for row in result["rows"]))
    rows = []
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        found = [row for row in result["rows"] if row["name"] == name]
        rows.append([name, f"{found[0]['full_steps']:g}", *(f"{row['psnr']:.1f}" for row in found)])
    headers = ["with guidance", "cost in full steps", *(f"guidance {scale:g}, dB" for scale in scales)]
    return markdown(headers, rows) + f"\n{result['settings']['images']} images.\n" + machine_note(result)


def distance() -> str:
    result = read("distance")
    settings = result["settings"]
    rows = [
        [row["name"], f"{row['gmacs']:.1f}" if "gmacs" in row else "", f"{row['fd']:.1f}"] for row in result["rows"]
    ]
    note = f"\n{settings['images']} images of each, compared with {settings['real']} test images.\n"
    return markdown(["shipped model", "GMACs per image", "FD"], rows) + note + machine_note(result)


QUALITY: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("GMACs per image", lambda row: f"{row['gmacs']:.1f}"),
    ("ms per image", lambda row: f"{row['latency_ms']:.0f}"),
    ("PSNR, dB", lambda row: f"{row['psnr']:.1f} ± {row['psnr_error']:.1f}"),
    ("pair distance", lambda row: f"{row['pair_distance']:.2f}"),
    ("KID x1000", lambda row: f"{1e3 * row['kernel']:.1f} ± {1e3 * row['kernel_error']:.1f}"),
)
DISTANCE: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("FD", lambda row: f"{row['frechet']:.1f}"),
    ("IS", lambda row: f"{row['inception_score']:.2f}"),
    ("precision", lambda row: f"{row['precision']:.2f}"),
    ("recall", lambda row: f"{row['recall']:.2f}"),
)


def evaluated(part: str, more: Sequence[tuple[str, Callable[[dict[str, Any]], str]]] = ()) -> str:
    """A table that `benchmarks.upcycling` measured through `dcconvert evaluate`."""
    result = read(f"upcycling_{part}")
    images = result["settings"]["images"]
    columns = [*QUALITY, *more]
    rows = [[row["name"], *(show(row) for _, show in columns)] for row in result["rows"]]
    note = (
        f"\n{images['count']} images; PSNR and pair distance are relative to the {images['reference']}; network: "
        f"{images['network']}; {images['real_count']} test images."
    )
    if more:
        floor = images["floor"]
        note += (
            f" The same number of held-out real images: FD {floor['frechet']:.1f}, "
            f"precision {floor['precision']:.2f}, recall {floor['recall']:.2f}."
        )
    return markdown(["", *(heading for heading, _ in columns)], rows) + note + "\n" + machine_note(result)


def fitted(name: str) -> str:
    result = read(name)
    headers, rows = fitted_rows(result["rows"])
    return markdown(headers, rows) + note(result["settings"], result["rows"]) + machine_note(result)


def fitted_short(name: str) -> str:
    result = read(name)
    rows, settings = (
        [row for row in result["rows"] if row["guidance"] == 1],
        {**result["settings"], "guided_budgets": []},
    )
    headers, cells = short_rows(rows, settings["steps"])
    return markdown(headers, cells) + note(settings, rows) + machine_note(result)


def peers(name: str) -> str:
    result = read(name)
    settings = result["settings"]
    headers, rows = peer_rows(result["rows"])
    note = (
        f"\nPSNR in dB on {settings['images']} images, ± standard error, relative to a run of "
        f"{settings['reference_steps']} Adams steps; in parentheses, the cost in steps of the original. cache-dit "
        f"{settings['cache_dit']} computes the first block in every step.\n"
    )
    return markdown(headers, rows) + note + machine_note(result)


def on_gpu(name: str, table: Callable[..., str], folder: Path = RESULTS) -> str:
    """A table of a result that only a machine with a GPU can make; one line while there is none."""
    result = folder / f"{name}.json"
    if not result.is_file():
        return f"{name}.json: not measured yet.\n"
    return table(json.loads(result.read_text()), markdown)


TABLES: dict[str, Callable[[], str]] = {
    "fitted": partial(fitted, "fitted"),
    "fitted_cifar": partial(fitted, "fitted_cifar"),
    "fitted_eps": partial(fitted, "fitted_eps"),
    "fitted_guided": partial(fitted, "fitted_guided"),
    "fitted_short": partial(fitted_short, "fitted"),
    "fitted_short_cifar": partial(fitted_short, "fitted_cifar"),
    "peers": partial(peers, "peers"),
    "peers_cifar": partial(peers, "peers_cifar"),
    "speed": speed,
    "demo": demo,
    "scale": scale,
    "choices": choices,
    "frontier": frontier,
    "carry_speed": carry_speed,
    "gpu": partial(on_gpu, "gpu", gpu_table),
    "gpu_chunk": partial(on_gpu, "gpu_chunk", chunk_table),
    "gpu_onnxruntime": partial(on_gpu, "gpu_onnxruntime", onnx_table),
    "runtimes": lambda: runtimes_table(read("runtimes"), markdown) + machine_note(read("runtimes")),
    "state_memory": state_memory,
    "carry_variants": carry_variants,
    "calibrated": calibrated,
    "guidance": guidance,
    "distance": distance,
    "upcycling_routers": lambda: evaluated("routers"),
    "upcycling_budgets": lambda: evaluated("budgets"),
    "upcycling_distance": lambda: evaluated("distance", DISTANCE),
    "upcycling_presets": lambda: evaluated("presets", DISTANCE),
    "sparsedit_cost": lambda: sparsedit_table(read("sparsedit_cost"), markdown),
    "stress": lambda: stress_table(read("stress"), markdown) + machine_note(read("stress")),
    "stress_steps": lambda: (
        stress_steps_table(read("stress"), markdown) + machine_note(read("stress")["settings"]["mode_steps"])
    ),
    "packing_data_set": packing_data_set,
    "packing_batches": packing_batches,
    "packing_plan": packing_plan,
    "coverage": lambda: coverage_table(read("coverage"), markdown),
    "families": lambda: family_table(read("families_cpu"), markdown) + machine_note(read("families_cpu")),
}


def rewritten(text: str) -> str:
    """A page with every table regenerated."""
    return MARKER.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables of the README and docs from committed results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    args = parser.parse_args()
    for page in PAGES:
        path = ROOT / page
        before = path.read_text()
        after = rewritten(before)
        if args.check and before != after:
            sys.exit(f"{page} is out of date: run python -m benchmarks.tables")
        if before != after:
            path.write_text(after)


if __name__ == "__main__":
    main()
