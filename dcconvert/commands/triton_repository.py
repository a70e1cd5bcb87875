"""`dcconvert export-triton`: write a model repository for Triton."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dcconvert.export.bundle import read_bundle
from dcconvert.export.triton.repository import export_triton
from dcconvert.passes.ir.errors import UsageError


def triton_repository(
    folder: Path, out: Path, console: Console, *, name: str, device: str, max_runs: int, force: bool
) -> None:
    """Write a Triton model repository of a bundle, and say what the server needs."""
    if not name.replace("_", "").replace("-", "").isalnum():
        raise UsageError(f"--name {name}: use only letters, digits, - and _, because it is used in folder names")
    source = export_triton(read_bundle(folder), out, name, device, force, max_runs)
    console.print(
        f"Graphs: {source}\nThe server needs its onnxruntime and python backends, and dcconvert installed for the "
        f"latter.\nStart it with: tritonserver --model-repository {out}",
        highlight=False,
        soft_wrap=True,
    )
