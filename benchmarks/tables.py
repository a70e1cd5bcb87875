"""Write the tables of the README and the docs from the committed results.

    python -m benchmarks.tables            # rewrite them
    python -m benchmarks.tables --check    # exit 1 if one is out of date

A table stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = ("README.md", "docs/choices.md")
MARKER = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine_note(result: dict[str, Any]) -> str:
    facts = result["machine"]
    return (
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
    headers = ["batch 8, 256 px", "original, ms", "converted, ms", "times faster", "fewer operations", "share reached"]
    return markdown(headers, rows) + machine_note(result)


def demo() -> str:
    result = read("demo")
    compute, latency = result["compute"], result["latency"][0]
    images = {row["name"]: row for row in result["fidelity"]["images"]["rows"] if row["psnr"] is not None}
    rows = [[name, f"{row['gmacs']:.1f}", f"{row['psnr']:.1f}"] for name, row in images.items()]
    text = markdown(["shipped model, 4x", "GMACs an image", "PSNR to the original with 200 steps, dB"], rows)
    before, after = latency["original_ms"]["median"], latency["converted_ms"]["median"]
    count = result["fidelity"]["images"]["count"]
    return (
        f"{text}\nOne step at batch {latency['batch']} on ONNX Runtime: {before:.1f} ms before, {after:.1f} ms after, "
        f"{latency['speedup']:.2f} times faster for {compute['ratio']:.2f} times fewer operations. {count} images.\n"
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
    headers = ["", "GMACs an image", "error of one step", "PSNR of final images, dB"]
    return markdown(headers, rows) + machine_note(result)


TABLES: dict[str, Callable[[], str]] = {"speed": speed, "demo": demo, "scale": scale, "choices": choices}


def rewritten(text: str) -> str:
    """A page with every table made anew."""
    return MARKER.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of the README and docs from committed results.")
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
