"""Engines of a bundle: which there are to be, under which keys, and building them in a process of their own.

A folder `engines/<device>/` holds the engines of one backend, version and kind of GPU, and `engines.json` that says
what each was built from. A process of its own keeps the builder's crashes, memory and log out of ours, and can be
stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dcconvert.export.bundle import write_whole
from dcconvert.passes.errors import CheckFailedError, UsageError
from dcconvert.passes.layout import Bucket

ENGINES = "engines"
INDEX = "engines.json"
TIMING_CACHE = "timing.cache"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # of the backends
GRAPHS = ("route", "prepare", "denoise")
POLL_SECONDS = 0.2

Shapes = dict[str, tuple[list[int], list[int], list[int]]]  # smallest, best and largest shape of every input


@dataclass(frozen=True)
class Device:
    """What engines are built for. `capability`: such as "8.9", or "" for whatever the backend builds by default."""

    backend: str
    version: str
    capability: str = ""
    gpu: str = ""

    @property
    def folder(self) -> str:
        words = (
            self.backend,
            self.version,
            self.gpu,
            f"sm{self.capability.replace('.', '')}" if self.capability else "",
        )
        return "-".join(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-") for word in words if word)


@dataclass(frozen=True)
class Engine:
    """One engine: a graph, and the profiles it is built for, one a bucket."""

    graph: str
    onnx: Path
    onnx_sha256: str
    buckets: tuple[Bucket, ...]
    profiles: tuple[Shapes, ...]
    precision: str
    device: Device

    @property
    def key(self) -> str:
        """Changes with anything that makes another engine necessary."""
        facts = [self.onnx_sha256, self.profiles, self.precision, asdict(self.device)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def file(self) -> str:
        return f"{self.graph}-{self.key}.engine"

    def as_dict(self) -> dict[str, Any]:
        """For the index."""
        return {
            "file": self.file,
            "graph": self.graph,
            "flavour": self.onnx.parent.name,
            "onnx_sha256": self.onnx_sha256,
            "precision": self.precision,
            "buckets": [asdict(bucket) for bucket in self.buckets],
        }


def plan_engines(
    folder: Path, buckets: Sequence[Bucket], precision: str, device: Device, *, per_bucket: bool, ranges: bool
) -> list[Engine]:
    """The engines for a folder of ONNX files.

    One engine a graph with a profile for every bucket, which share its weights; with `per_bucket` an engine for each.
    Profiles have one exact shape; with `ranges` all shapes between one bucket and the next smaller of its batch size.
    """
    result = []
    for graph in GRAPHS:
        path = folder / f"{graph}.onnx"
        if not path.is_file():
            continue
        inputs, sha256 = input_shapes(path), file_hash(path)
        wanted = list(buckets) if graph == "denoise" else full_buckets(buckets)
        smallest = [lower_bound(bucket, buckets) if ranges else bucket for bucket in wanted]
        pairs = [(b, profile(inputs, b, low)) for b, low in zip(wanted, smallest, strict=True)]
        groups = [[pair] for pair in pairs] if per_bucket else [pairs]
        result += [
            Engine(
                graph,
                path,
                sha256,
                tuple(bucket for bucket, _ in group),
                tuple(shapes for _, shapes in group),
                precision,
                device,
            )
            for group in groups
        ]
    return result


def full_buckets(buckets: Sequence[Bucket]) -> list[Bucket]:
    """The largest bucket of each batch size: route and prepare know no other difference."""
    return [max((b for b in buckets if b.batch == batch), key=lambda b: b.tokens) for batch in batches(buckets)]


def batches(buckets: Sequence[Bucket]) -> list[int]:
    return sorted({bucket.batch for bucket in buckets})


def lower_bound(bucket: Bucket, buckets: Sequence[Bucket]) -> Bucket:
    """The smallest shape that a bucket with a range takes: just above the next smaller bucket of its batch size."""
    below = [b.row_tokens for b in buckets if b.batch == bucket.batch and b.row_tokens < bucket.row_tokens]
    length = max(below, default=0) + 1
    return Bucket(bucket.batch, bucket.batch * length, bucket.rows, length, length)


def graph_inputs(path: Path) -> Any:
    """The inputs of an ONNX file; UsageError if it cannot be read."""
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False).graph.input
    except Exception as error:  # the parser's own, and the system's
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot read {path}: {reason}; remove {path.parent} and build again") from error


def input_shapes(path: Path) -> dict[str, list[int | str]]:
    """Sizes of the inputs of an ONNX file: numbers, or the names of symbolic axes."""
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph_inputs(path)
    }


def io_bytes(path: Path, shapes: Shapes) -> int:
    """Bytes of all inputs of an ONNX file at the largest shapes of a profile."""
    from onnx.helper import tensor_dtype_to_np_dtype

    return sum(
        math.prod(shapes[value.name][2]) * tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
        for value in graph_inputs(path)
    )


def profile(inputs: Mapping[str, Sequence[int | str]], bucket: Bucket, smallest: Bucket) -> Shapes:
    """Smallest, best and largest shape of every input in a bucket."""
    sizes = (axis_sizes(smallest), axis_sizes(bucket), axis_sizes(bucket))
    low, best, high = (
        {name: [axes[size] if isinstance(size, str) else size for size in shape] for name, shape in inputs.items()}
        for axes in sizes
    )
    return {name: (low[name], best[name], high[name]) for name in inputs}


def axis_sizes(bucket: Bucket) -> dict[str, int]:
    """What a bucket says of the symbolic axes of the graphs (see PLAN_AXES)."""
    return {
        "batch": bucket.batch,
        "tiles": bucket.tokens // bucket.tile,
        "tile_tokens": bucket.tile,
        "rows": bucket.rows,
        "row_tokens": bucket.row_tokens,
        "segments": bucket.batch + bucket.tokens // bucket.tile + 1,
    }


def file_hash(path: Path) -> str:
    """sha256 of an ONNX file and of the external data beside it."""
    digest = hashlib.sha256()
    for part in onnx_parts(path):
        with part.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def onnx_parts(path: Path) -> list[Path]:
    """An ONNX file, and its external data where it has any."""
    return [part for part in (path, path.with_name(f"{path.name}.data")) if part.is_file()]


def read_index(folder: Path) -> dict[str, Any]:
    """What `engines.json` in a folder says; UsageError if it is missing or damaged."""
    path = folder / INDEX
    try:
        found = json.loads(path.read_text())
        known = all(isinstance(entry[name], str) for entry in found["engines"] for name in ("file", "flavour"))
        if known and found["device"]["backend"]:
            return dict(found)
    except FileNotFoundError as error:
        raise UsageError(f"{folder} has no engines: make them with 'dcconvert build'") from error
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UsageError(f"cannot read {path}: build the engines again with 'dcconvert build'")


def write_index(folder: Path, device: Device, ranges: bool, engines: Sequence[dict[str, Any]]) -> None:
    data = {"device": asdict(device), "ranges": ranges, "engines": list(engines)}
    write_whole(folder / INDEX, (json.dumps(data, indent=1) + "\n").encode())


def build_engine(engine: Engine, folder: Path, tick: Callable[[float], None] = lambda _: None) -> dict[str, Any]:
    """Build one engine into a folder, whole or not at all; what the index says of it. `tick` is told the seconds.

    UsageError with node, op and bucket for a graph that the backend does not take, or a backend that fails.
    CheckFailedError if it would leave out an input of the graph.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as work:
        result, log, target = (Path(work) / name for name in ("result.json", "log.txt", "engine"))
        request = {
            "backend": engine.device.backend,
            "capability": engine.device.capability,
            "onnx": str(engine.onnx.resolve()),
            "profiles": engine.profiles,
            "engine": str(target),
            "timing_cache": str(folder / TIMING_CACHE),
            "result": str(result),
        }
        start = time.perf_counter()
        run_worker(request, log, lambda: tick(time.perf_counter() - start))
        seconds = time.perf_counter() - start
        found: dict[str, Any] = (
            json.loads(result.read_text()) if result.is_file() else {"error": f"its process died: {last_line(log)}"}
        )
        if "error" in found:
            where = f", {words(engine.buckets[found['profile']])}" if "profile" in found else ""
            said = found["error"] or builder_error(log)
            raise UsageError(f"{engine.device.backend} cannot build {engine.graph}{where}: {said}")
        if found["unused"]:
            raise CheckFailedError(
                f"{engine.device.backend} {engine.device.version} leaves out input {', '.join(found['unused'])} of "
                f"{engine.onnx.name}: the engine would be wrong; please report it"
            )
        size = target.stat().st_size
        os.replace(target, folder / engine.file)
    return {**engine.as_dict(), "bytes": size, "seconds": round(seconds, 1), "layers": found["layers"]}


def run_worker(request: dict[str, Any], log: Path, tick: Callable[[], None]) -> None:
    """Run the worker to its end; an interrupt ends it at once."""
    command = [sys.executable, "-m", "dcconvert.export.engine_worker"]
    with log.open("wb") as out:
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out)
        try:
            assert worker.stdin is not None
            with suppress(BrokenPipeError), worker.stdin:  # it may have died already
                worker.stdin.write(json.dumps(request).encode())
            while worker.poll() is None:
                tick()
                time.sleep(POLL_SECONDS)
        finally:
            worker.kill()
            worker.wait()


def builder_error(log: Path) -> str:
    """The last error in the builder's log."""
    errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("[E]")]
    return errors[-1].removeprefix("[E]").strip() if errors else last_line(log)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "without a word")


def words(bucket: Bucket) -> str:
    return f"bucket of batch {bucket.batch}, {bucket.row_tokens} tokens a sample"
