"""The stress set in both modes: `dcconvert stress` on the bundles that `benchmarks.upcycling` made.

    python -m benchmarks.upcycling --data runs/fashion-mnist --work runs/upcycling
    python -m benchmarks.stress --work runs/upcycling      # a few minutes

Writes results/stress.json, and the gallery of mode carry to docs/failures.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import write_result
from benchmarks.upcycling import BUNDLES, dcconvert, folder_of

NAMES = ("carry 4x", "chunk 4x, pool")
COUNT = 8  # cases of each kind


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the stress set in both modes.")
    parser.add_argument("--work", type=Path, required=True, help="the bundle folder of benchmarks.upcycling")
    args = parser.parse_args()
    made = {made.name: made for made in BUNDLES}
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {"count": COUNT, "data": "Fashion-MNIST test images"}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(shutil.copytree(folder_of(made[name], args.work), Path(tmp) / "bundle"))
            dcconvert("stress", str(folder), "--data", str(args.work / "test.npz"), "--count", str(COUNT))
            found = json.loads((folder / "report.json").read_text())["stress"]
            if name == NAMES[0]:
                shutil.copy(folder / "failures.png", Path(__file__).parent.parent / "docs" / "failures.png")
        levels = {key: found[key] for key in ("early", "late")}
        rows += [{"bundle": name, **levels, **row} for row in found["rows"]]
        settings |= {key: found[key] for key in ("start", "steps", "run_steps", "solver", "seed")}
    print(f"Results: {write_result('stress', settings, rows)}")


if __name__ == "__main__":
    main()
