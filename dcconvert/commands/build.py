"""`dcconvert build`: makes what GPU runtimes need: engines with a profile for every bucket, or graphs in fp16."""

from __future__ import annotations

import importlib
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dcconvert.export.bundle import Bundle, adding_to, read_bundle
from dcconvert.export.disk.onnx_files import onnx_parts
from dcconvert.export.disk.targets import remove
from dcconvert.export.engines.build import (
    ENGINES,
    MODULES,
    Engine,
    Shapes,
    build_engine,
    io_bytes,
    plan_engines,
    words,
)
from dcconvert.export.engines.index import INDEX, Built, Device, Index, read_index, write_index
from dcconvert.export.engines.worker import RTX
from dcconvert.export.files import put_in_place
from dcconvert.export.onnx.packed_attention import refusal, with_packed_attention
from dcconvert.export.variants import VARIANTS, Variant, write_variant
from dcconvert.passes.ir.errors import CheckFailedError, StoppedError, UsageError
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.terminal import Stages, terminal

TENSORRT = "tensorrt"
BACKENDS = (TENSORRT, RTX)
EXTRAS = {TENSORRT: "gpu", RTX: "rtx"}
MEGABYTE = 1e6


@dataclass(frozen=True)
class Settings:
    """The settings of a build: the options of the command line."""

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
    """Build what is not built yet; returns the folder of the result.

    Every engine is written completely or not at all and recorded at once, so a stopped build can be resumed. Raises
    UsageError without a backend, or for a graph that it rejects, and CheckFailedError if an exported graph is wrong.
    """
    stages = Stages(terminal(stderr=True))
    bundle = read_bundle(settings.bundle)
    if settings.target != "trt":
        refuse_others(settings)
        with adding_to(bundle.folder):
            graphs = exported(bundle, VARIANTS[settings.target], stages, bundle.onnx)
        console.print(f"Graphs: {graphs}", highlight=False, soft_wrap=True)
        return graphs
    device = find_device(settings.backend, settings.compute_capability)
    variant = choose_variant(bundle.model, settings, device, stages)
    if settings.dry_run:
        with tempfile.TemporaryDirectory() as work:
            wanted = engines_for(bundle, variant, device, settings, stages, Path(work))
            console.print(plan_table(wanted, device, bundle))
        return bundle.folder / ENGINES / device.folder
    with adding_to(bundle.folder):
        try:
            entries = build_engines(bundle, variant, device, settings, stages)
        except (UsageError, CheckFailedError) as error:
            if not variant.packed or settings.attention == "packed":
                raise
            stages.note(f"attention with masks, because {error}")
            entries = build_engines(bundle, variant_of(settings, "trt"), device, settings, stages)
    console.print(engine_table(entries, device))
    folder = bundle.folder / ENGINES / device.folder
    console.print(f"Engines: {folder}", highlight=False, soft_wrap=True)
    return folder


def refuse_others(settings: Settings) -> None:
    """Raises UsageError for engine options if only graphs are requested."""
    usual = Settings(settings.bundle, settings.target)
    for item in fields(settings):
        if getattr(settings, item.name) != getattr(usual, item.name):
            option = item.name.replace("_", "-")
            raise UsageError(f"--{option} applies only to --runtime trt: leave it out for --runtime {settings.target}")


def build_engines(
    bundle: Bundle, variant: Variant, device: Device, settings: Settings, stages: Stages
) -> tuple[Built, ...]:
    wanted = engines_for(bundle, variant, device, settings, stages, bundle.onnx)
    folder = bundle.folder / ENGINES / device.folder
    folder.mkdir(parents=True, exist_ok=True)
    remove_old(folder, ".building-*")
    return build_missing(wanted, folder, device, settings.ranges, stages)


def engines_for(
    bundle: Bundle, variant: Variant, device: Device, settings: Settings, stages: Stages, place: Path
) -> list[Engine]:
    """The engines of a bundle for a variant; its graphs are written to `place` if the bundle has none."""
    return plan_engines(
        exported(bundle, variant, stages, place),
        bundle.model.spec.graphs,
        bundle.bucket_set.buckets,
        variant.precision,
        device,
        per_bucket=settings.per_bucket,
        ranges=settings.ranges,
    )


def variant_of(settings: Settings, name: str) -> Variant:
    return VARIANTS[name if settings.precision == "fp16" else f"{name}-{settings.precision}"]


def choose_variant(model: DynamicModel, settings: Settings, device: Device, stages: Stages) -> Variant:
    """The variant for the settings; with attention "auto", the packed one if the backend can build it.

    Raises UsageError for attention "packed" if it is not available.
    """
    masks, packed = variant_of(settings, "trt"), variant_of(settings, "trt-packed")
    if settings.attention == "masks" or (settings.attention == "auto" and model.spec.updates):  # nothing is packed
        return masks
    try:
        with stages.stage("packed attention") as tick:
            tick(f"test if {device.backend} builds it")
            reason = refusal(with_packed_attention(model), settings.precision, device)
    except (UsageError, CheckFailedError) as error:
        reason = str(error)
    if reason and settings.attention == "packed":
        raise UsageError(reason)
    if reason:
        stages.note(f"attention with masks, because {reason.split('.  ')[0]}")
    return masks if reason else packed


def find_device(backend: str | None, capability: str = "") -> Device:
    """The backend to build with, and what for: the GPU of this machine, or what TensorRT-RTX builds ahead of time.

    Raises UsageError if there is none, or not the requested one.
    """
    gpu = this_gpu()
    missing = []
    for name in [backend] if backend else BACKENDS:
        try:
            module = importlib.import_module(MODULES[name])
            version = str(module.__version__)
        except (ImportError, OSError, AttributeError) as error:
            missing.append(f"{name}: {' '.join(str(error).split())}")
            continue
        if name == RTX:
            known = known_capabilities(module)
            wanted = normal_capability(capability, known) if capability else ""
            if not wanted and gpu is not None and known and gpu[1] not in known:
                missing.append(
                    f"{name}: the GPU here has compute capability {gpu[1]}, but it builds for {', '.join(known)} (for "
                    "another machine, choose one with --compute-capability)"
                )
                continue
            return Device(RTX, version, wanted)
        if gpu is None:
            missing.append(f"{name}: there is no GPU here, and it builds only for the GPU of the machine")
            continue
        if capability:
            raise UsageError(
                "--compute-capability applies only to tensorrt-rtx: TensorRT builds for the GPU of this machine"
            )
        return Device(TENSORRT, version, gpu[1], gpu[0])
    hints = " or ".join(f"pip install 'dcconvert[{EXTRAS[name]}]'" for name in ([backend] if backend else BACKENDS))
    raise UsageError(f"no backend can build engines ({'; '.join(missing)}): {hints}")


def known_capabilities(module: Any) -> list[str]:
    """The compute capabilities that TensorRT-RTX builds for, such as "8.9"."""
    names = getattr(getattr(module, "ComputeCapability", None), "__members__", ())
    numbers = sorted(int(name[2:]) for name in names if name.startswith("SM") and name[2:].isdecimal())
    return [f"{number // 10}.{number % 10}" for number in numbers]


def normal_capability(text: str, known: Sequence[str]) -> str:
    """A compute capability in the form of `known`, from "8.9" or "89"; UsageError if it is not in `known`."""
    found = text if "." in text else f"{text[:-1]}.{text[-1:]}"
    if known and found not in known:
        raise UsageError(f"{RTX} does not support compute capability {text}: choose one of {', '.join(known)}")
    return found


def this_gpu() -> tuple[str, str] | None:
    """Name and compute capability of the GPU that torch uses, else of the driver's first; None without one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    name, _, capability = said.partition("\n")[0].rpartition(",")
    return (name.strip(), capability.strip()) if name else None


def exported(bundle: Bundle, variant: Variant, stages: Stages, place: Path) -> Path:
    """The graphs of a bundle in a variant; written into `place` and checked if the bundle does not have them all."""
    folder = bundle.onnx / variant.name
    if all((folder / f"{graph}.onnx").is_file() for graph in bundle.model.spec.graphs):
        return folder
    remove_old(place, ".variant-*")
    with (
        stages.stage(f"export {variant.name}") as tick,
        tempfile.TemporaryDirectory(dir=place, prefix=".variant-") as work,
    ):
        write_variant(variant, bundle.model, Path(work), bundle.bucket_set.buckets, tick)
        put_in_place(Path(work) / variant.name, place / variant.name)
    return place / variant.name


def remove_old(folder: Path, pattern: str) -> None:
    """Remove leftovers of killed builds. No other build is running: the bundle is locked."""
    for path in folder.glob(pattern):
        remove(path)


def build_missing(
    wanted: list[Engine], folder: Path, device: Device, ranges: bool, stages: Stages
) -> tuple[Built, ...]:
    """Build engines that are missing or damaged, and remove those that are no longer needed.

    Until all are built, engines of an earlier build with other options stay in use.
    """
    before = Index(device, ranges)
    if (folder / INDEX).is_file():
        with suppress(UsageError):  # of a damaged one nothing is known: everything is built again
            before = read_index(folder)
    names = [engine.file for engine in wanted]
    intact = {entry.file: entry for entry in (*before.engines, *before.unfinished) if entry.intact(folder)}
    serving = tuple(entry for entry in before.engines if entry.file in intact)
    others = any(entry.file not in names for entry in serving)
    done = {name: intact[name] for name in names if name in intact}
    left = [engine for engine in wanted if engine.file not in done]
    for engine in left:
        what = words(engine.buckets[0]) if len(engine.buckets) == 1 else f"{len(engine.buckets)} buckets"
        title = f"engine {len(done) + 1} of {len(wanted)}: {engine.graph}, {what}"
        try:
            with stages.stage(title) as tick:
                done[engine.file] = build_engine(engine, folder, lambda _, tick=tick: tick("building"))  # type: ignore[misc]
        except KeyboardInterrupt:
            raise StoppedError(
                f"interrupted: {len(done)} of {len(wanted)} engines are finished; run the same command to resume"
            ) from None
        entries = tuple(done[name] for name in names if name in done)
        if others:
            write_index(folder, replace(before, engines=serving, unfinished=entries))
        else:
            write_index(folder, Index(device, ranges, entries))
    if not left:
        stages.note(f"all {len(wanted)} engines exist already")
    entries = tuple(done[name] for name in names)
    write_index(folder, Index(device, ranges, entries))
    for old in folder.glob("*.engine"):
        if old.name not in names:
            old.unlink()
    return entries


def plan_table(wanted: list[Engine], device: Device, bundle: Bundle) -> Table:
    """The engines that a build would make, and the memory that can be predicted."""
    weights = {engine.onnx: sum(part.stat().st_size for part in onnx_parts(engine.onnx)) for engine in wanted}
    total = sum(weights[engine.onnx] for engine in wanted)
    copies = sum(weights[engine.onnx] * len(engine.buckets) for engine in wanted)
    folder = bundle.folder / ENGINES / device.folder
    table = Table(
        title=f"{len(wanted)} engines for {device.folder}, {wanted[0].precision}",
        caption=f"Weights: {total / MEGABYTE:.0f} MB in total; engines store a part of them for every profile, up to "
        f"{copies / MEGABYTE:.0f} MB. The table shows the buffers for inputs, outputs and state, for every bucket that "
        f"is used; the memory for activations is known only after building. Nothing was built. Folder: {folder}",
    )
    for name in ("engine", "profile", "batch", "tokens per sample", "packed tokens", "weights, MB", "buffers, MB"):
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
                f"{io_bytes(engine.onnx, bucket) / MEGABYTE:.2f}",
            )
    return table


def lengths(shapes: Shapes, bucket: Bucket) -> str:
    """Tokens per sample that a profile accepts."""
    low = shapes["grid_index"][0][-1] if "grid_index" in shapes else bucket.row_tokens
    return f"{low} to {bucket.row_tokens}" if low < bucket.row_tokens else str(low)


def engine_table(entries: Sequence[Built], device: Device) -> Table:
    table = Table(title=f"Engines, {device.folder}")
    for name in ("graph", "precision", "profiles", "layers", "MB", "built in, s", "file"):
        table.add_column(name, justify="left" if name in ("graph", "precision", "file") else "right")
    for entry in entries:
        table.add_row(
            entry.graph,
            entry.precision,
            str(len(entry.buckets)),
            str(entry.layers),
            f"{entry.bytes / MEGABYTE:.1f}",
            f"{entry.seconds:.1f}",
            entry.file,
        )
    return table
