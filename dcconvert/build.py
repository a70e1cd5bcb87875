"""`dcconvert build`: what GPU runtimes need of a bundle: engines with a profile for every bucket, graphs in fp16."""

from __future__ import annotations

import importlib
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dcconvert.export.bundle import Bundle, read_bundle
from dcconvert.export.engine_worker import RTX
from dcconvert.export.engines import (
    ENGINES,
    INDEX,
    MODULES,
    Device,
    Engine,
    Shapes,
    build_engine,
    io_bytes,
    onnx_parts,
    plan_engines,
    read_index,
    words,
    write_index,
)
from dcconvert.export.flavours import FLAVOURS, Flavour, write_flavour
from dcconvert.export.packed_attention import refusal, with_packed_attention
from dcconvert.passes.errors import StoppedError, UsageError
from dcconvert.passes.layout import Bucket
from dcconvert.passes.model import DynamicModel
from dcconvert.progress import Stages

TENSORRT = "tensorrt"
BACKENDS = (TENSORRT, RTX)
EXTRAS = {TENSORRT: "gpu", RTX: "rtx"}
MEGABYTE = 1e6


@dataclass(frozen=True)
class Settings:
    """What a build was asked for; the options of the command line."""

    bundle: Path
    target: str = "trt"
    backend: str | None = None
    precision: str = "fp16"
    attention: str = "auto"
    compute_capability: str = ""
    per_bucket: bool = False
    ranges: bool = False
    dry_run: bool = False


def build_bundle(settings: Settings, console: Console) -> Path:
    """Build what is not built yet; returns the folder where it is.

    Every engine is there whole or not at all and noted at once, so that a build that was stopped goes on where it was.
    UsageError without a backend, or for a graph that it does not take; CheckFailedError if an exported graph is wrong.
    """
    stages = Stages(Console(stderr=True))
    bundle = read_bundle(settings.bundle)
    if settings.target != "trt":
        graphs = exported(bundle, FLAVOURS[settings.target], stages)
        console.print(escape(f"Graphs: {graphs}"), highlight=False, soft_wrap=True)
        return graphs
    device = find_device(settings.backend, settings.compute_capability)
    flavour = choose_flavour(bundle.model, settings, device, stages)
    graphs = exported(bundle, flavour, stages)
    wanted = plan_engines(
        graphs,
        bundle.ladder.buckets,
        flavour.precision,
        device,
        per_bucket=settings.per_bucket,
        ranges=settings.ranges,
    )
    folder = bundle.folder / ENGINES / device.folder
    if settings.dry_run:
        console.print(plan_table(wanted, device, folder))
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    entries = build_missing(wanted, folder, device, settings.ranges, stages)
    console.print(engine_table(entries, device))
    console.print(escape(f"Engines: {folder}"), highlight=False, soft_wrap=True)
    return folder


def choose_flavour(model: DynamicModel, settings: Settings, device: Device, stages: Stages) -> Flavour:
    """The flavour that the settings ask for; with attention "auto" the packed one if the backend builds it.

    UsageError for attention "packed" where there is none.
    """
    ending = "" if settings.precision == "fp16" else f"-{settings.precision}"
    masks, packed = (FLAVOURS[f"{name}{ending}"] for name in ("trt", "trt-packed"))
    if settings.attention == "masks":
        return masks
    try:
        with stages.stage("packed attention") as tick:
            tick(f"does {device.backend} build it?")
            reason = refusal(with_packed_attention(model), settings.precision, device)
    except UsageError as error:
        reason = str(error)
    if reason and settings.attention == "packed":
        raise UsageError(reason)
    if reason:
        stages.note(escape(f"attention with masks, because {reason.split('.  ')[0]}"))
    return masks if reason else packed


def find_device(backend: str | None, capability: str = "") -> Device:
    """The backend to build with, and what for: the GPU of this machine, or what TensorRT-RTX builds ahead of time.

    UsageError if there is none, or not the one asked for.
    """
    gpu = this_gpu()
    missing = []
    for name in [backend] if backend else BACKENDS:
        try:
            version = str(importlib.import_module(MODULES[name]).__version__)
        except (ImportError, OSError, AttributeError) as error:
            missing.append(f"{name}: {' '.join(str(error).split())}")
            continue
        if name == RTX:
            return Device(RTX, version, capability)
        if gpu is None:
            missing.append(f"{name}: there is no GPU, and its engines are for the GPU they are built on")
            continue
        if capability:
            raise UsageError("--compute-capability is of tensorrt-rtx: TensorRT builds for the GPU of this machine")
        return Device(TENSORRT, version, gpu[1], gpu[0])
    hints = " or ".join(f"pip install 'dcconvert[{EXTRAS[name]}]'" for name in ([backend] if backend else BACKENDS))
    raise UsageError(f"no backend to build engines with ({'; '.join(missing)}): {hints}")


def this_gpu() -> tuple[str, str] | None:
    """Name and compute capability of the first NVIDIA GPU, as its driver says; None without one."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    name, _, capability = said.splitlines()[0].rpartition(",")
    return name.strip(), capability.strip()


def exported(bundle: Bundle, flavour: Flavour, stages: Stages) -> Path:
    """The graphs of a bundle in a flavour, written and checked if they are not there yet."""
    folder = bundle.onnx / flavour.name
    if not folder.is_dir():
        with (
            stages.stage(f"export {flavour.name}") as tick,
            tempfile.TemporaryDirectory(dir=bundle.onnx, prefix=".flavour-") as work,
        ):
            write_flavour(flavour, bundle.model, Path(work), bundle.ladder.buckets, tick)
            (Path(work) / flavour.name).rename(folder)
    return folder


def build_missing(
    wanted: list[Engine], folder: Path, device: Device, ranges: bool, stages: Stages
) -> list[dict[str, Any]]:
    """Build engines that are not there, take away those that are of no use any more; what the index says of all."""
    before = {}
    if (folder / INDEX).is_file():
        with suppress(UsageError):  # of a damaged one nothing is known: everything is built again
            before = {e["file"]: e for e in read_index(folder)["engines"] if (folder / e["file"]).is_file()}
    entries = [before[engine.file] for engine in wanted if engine.file in before]
    left = [engine for engine in wanted if engine.file not in before]
    for number, engine in enumerate(left, len(entries) + 1):
        what = words(engine.buckets[0]) if len(engine.buckets) == 1 else f"{len(engine.buckets)} buckets"
        title = f"engine {number} of {len(wanted)}: {engine.graph}, {what}"
        try:
            with stages.stage(title) as tick:
                entries.append(build_engine(engine, folder, lambda _, tick=tick: tick("building")))  # type: ignore[misc]
        except KeyboardInterrupt:
            raise StoppedError(
                f"interrupted: {len(entries)} of {len(wanted)} engines are finished; the same command goes on there"
            ) from None
        # What the index still knows is valid; what is of no use goes when the last one is there.
        unfinished = [entry for name, entry in before.items() if name not in {e["file"] for e in entries}]
        write_index(folder, device, ranges, [*entries, *unfinished])
    if not left:
        stages.note(f"all {len(wanted)} engines are there already")
    order = {engine.file: number for number, engine in enumerate(wanted)}
    entries.sort(key=lambda entry: order[entry["file"]])
    write_index(folder, device, ranges, entries)
    for old in folder.glob("*.engine"):
        if old.name not in order:
            old.unlink()
    return entries


def plan_table(wanted: list[Engine], device: Device, folder: Path) -> Table:
    """What a build would make, and the memory that can be told beforehand."""
    weights = {engine.onnx: sum(part.stat().st_size for part in onnx_parts(engine.onnx)) for engine in wanted}
    total = sum(weights[engine.onnx] for engine in wanted)
    table = Table(
        title=f"{len(wanted)} engines for {device.folder}, {wanted[0].precision}",
        caption=f"Weights {total / MEGABYTE:.0f} MB in all, buffers as in the table for the bucket in use; what the "
        f"builder adds for activations is not known beforehand. Nothing was built. Folder: {folder}",
    )
    for name in ("engine", "profile", "batch", "tokens a sample", "packed tokens", "weights, MB", "inputs, MB"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for number, engine in enumerate(wanted, 1):
        for i, (bucket, shapes) in enumerate(zip(engine.buckets, engine.profiles, strict=True)):
            table.add_row(
                f"{number} {engine.graph}" if i == 0 else "",
                str(i),
                str(bucket.batch),
                lengths(shapes, bucket),
                str(bucket.tokens),
                f"{weights[engine.onnx] / MEGABYTE:.1f}" if i == 0 else "",
                f"{io_bytes(engine.onnx, shapes) / MEGABYTE:.2f}",
            )
    return table


def lengths(shapes: Shapes, bucket: Bucket) -> str:
    """Tokens a sample that a profile takes."""
    low = shapes["grid_index"][0][-1] if "grid_index" in shapes else bucket.row_tokens
    return f"{low} to {bucket.row_tokens}" if low < bucket.row_tokens else str(low)


def engine_table(entries: list[dict[str, Any]], device: Device) -> Table:
    table = Table(title=f"Engines, {device.folder}")
    for name in ("graph", "precision", "profiles", "layers", "MB", "built in, s", "file"):
        table.add_column(name, justify="left" if name in ("graph", "precision", "file") else "right")
    for entry in entries:
        table.add_row(
            entry["graph"],
            entry["precision"],
            str(len(entry["buckets"])),
            str(entry["layers"]),
            f"{entry['bytes'] / MEGABYTE:.1f}",
            f"{entry['seconds']:.1f}",
            entry["file"],
        )
    return table
