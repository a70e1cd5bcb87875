"""Time and peak memory of converting and exporting a large checkpoint.

    python -m benchmarks.scale                # DiT-XL/2 at 256 px, 675 M parameters, random weights

The checkpoint is made in a temporary folder and converted by the command line in a separate process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import save_file

from benchmarks.common import random_dit, write_result

# Runs the command line, then prints the high-water mark of its resident memory in bytes.
CHILD = """
import sys
from dcconvert.cli import main
main(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of a large conversion.")
    parser.add_argument("--size", default="XL", choices=["S", "B", "L", "XL"])
    parser.add_argument("--pixels", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        checkpoint, bundle = Path(tmp) / "model.safetensors", Path(tmp) / "bundle"
        dit = random_dit(args.size, 2, args.pixels)
        parameters = sum(p.numel() for p in dit.parameters())
        save_file({name: tensor.contiguous() for name, tensor in dit.state_dict().items()}, str(checkpoint))
        del dit
        arguments = [str(checkpoint), "--ratio", "4x", "-o", str(bundle), "--no-measure"]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
        peak = int(done.stdout.split()[-1])
        size = checkpoint.stat().st_size
        row = {
            "model": f"DiT-{args.size}/2",
            "parameters": parameters,
            "checkpoint_gb": round(size / 1e9, 3),
            "bundle_gb": round(sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file()) / 1e9, 3),
            "seconds": round(seconds, 1),
            "peak_memory_gb": round(peak / 1e9, 3),
            "peak_memory_over_checkpoint": round(peak / size, 2),
        }
    path = write_result(f"scale_{args.size.lower()}", vars(args), [row])
    print(row, f"\nResults: {path}")


if __name__ == "__main__":
    main()
