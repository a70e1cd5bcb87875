"""What `dcconvert calibrate` found, as a result file, taken from the manifests of calibrated bundles.

dcconvert demo -o euler && dcconvert calibrate euler
dcconvert demo -o unipc && dcconvert calibrate unipc --solver unipc
python -m benchmarks.calibrated euler unipc
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common import write_result
from dcconvert.export.files import MANIFEST, read_json

LEFT_OUT = ("command", "rows", "curves", "candidates")  # local paths, and what the rows already contain


def main() -> None:
    parser = argparse.ArgumentParser(description="Collect what calibrations found.")
    parser.add_argument("bundles", nargs="+", type=Path)
    args = parser.parse_args()
    found = [read_json(bundle / MANIFEST)["calibration"] for bundle in args.bundles]
    settings = [{name: entry[name] for name in entry if name not in LEFT_OUT} for entry in found]
    rows = [
        {"asked": entry["solver"], "budget": entry["budget"], "candidates": len(entry["candidates"]), **row}
        for entry in found
        for row in entry["rows"]
        if row["psnr_fresh"] is not None
    ]
    print(f"Results: {write_result('calibrated', {'calibrations': settings}, rows)}")


if __name__ == "__main__":
    main()
