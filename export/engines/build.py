"""Engines of a bundle: which ones are needed, their keys, and building them in a separate process.

A folder `engines/<device>/` contains the engines for one backend, version and kind of GPU, and an index. The separate
process isolates the builder's crashes, memory and log, and can be stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dcconvert.export.disk.onnx_files import checked_onnx, onnx_parts
from dcconvert.export.engines.index import Built, Device
from dcconvert.export.files import file_sha256
from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.planning.layout import Bucket

ENGINES = "engines"
TIMING_CACHE = "timing.cache"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # of each backend
TICK_SECONDS = 0.2

Shapes = dict[str, tuple[list[int], list[int], list[int]]]  # smallest, best and largest shape of every input


@dataclass(frozen=True)
class Engine:
    """One engine: a graph, and the profiles it is built for, one per bucket."""

    graph: str
    onnx: Path
    onnx_sha256: str
    buckets: tuple[Bucket, ...]
    profiles: tuple[Shapes, ...]
    precision: str
    device: Device

    @property
    def key(self) -> str:
        """A key that changes with anything that requires another engine."""
        facts = [self.onnx_sha256, self.profiles, self.precision, asdict(self.device)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def file(self) -> str:
        return f"{self.graph}-{self.key}.engine"

    def built(self, path: Path, seconds: float, layers: int) -> Built:
        """Its index entry, once it is at `path`."""
        return Built(
            file=self.file,
            graph=self.graph,
            variant=self.onnx.parent.name,
            onnx_sha256=self.onnx_sha256,
            precision=self.precision,
            buckets=self.buckets,
            bytes=path.stat().st_size,
            sha256=file_sha256([path]),
            seconds=round(seconds, 1),
            layers=layers,
        )


def plan_engines(
    folder: Path,
    graphs: Sequence[str],
    buckets: Sequence[Bucket],
    precision: str,
    device: Device,
    *,
    per_bucket: bool = False,
    ranges: bool = False,
) -> list[Engine]:
    """The engines for these graphs, ONNX files in a folder; raises UsageError for one that cannot be read.

    There is one engine per graph with a profile for every bucket, which share its weights; with `per_bucket`, there is
    one engine for each bucket. Profiles have one exact shape; with `ranges`, they cover all shapes between one bucket
    and the next smaller one of its batch size.
    """
    result = []
    for graph in graphs:
        path = folder / f"{graph}.onnx"
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
    """The largest bucket of each batch size; for route and prepare, only the batch size matters."""
    return [max((b for b in buckets if b.batch == batch), key=lambda b: b.tokens) for batch in batches(buckets)]


def batches(buckets: Sequence[Bucket]) -> list[int]:
    return sorted({bucket.batch for bucket in buckets})


def lower_bound(bucket: Bucket, buckets: Sequence[Bucket]) -> Bucket:
    """The smallest shape that a bucket with a range takes: just above the next smaller bucket of its batch size."""
    below = [b.row_tokens for b in buckets if b.batch == bucket.batch and b.row_tokens < bucket.row_tokens]
    length = max(below, default=0) + 1
    return Bucket(bucket.batch, bucket.batch * length, bucket.rows, length, length)


def read_graph(path: Path, again: str = "remove its folder and build again") -> Any:
    """The graph in an ONNX file, without its weights; UsageError, with what to do, if it cannot be used."""
    return checked_onnx(path, again).graph


def input_shapes(path: Path) -> dict[str, list[int | str]]:
    """Sizes of the inputs of an ONNX file: numbers, or the names of symbolic axes."""
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in read_graph(path).input
    }


def io_bytes(path: Path, bucket: Bucket) -> int:
    """Bytes of all inputs and outputs of an ONNX file in a bucket."""
    from onnx.helper import tensor_dtype_to_np_dtype

    graph, axes = read_graph(path), axis_sizes(bucket)
    return sum(
        math.prod(axes.get(dim.dim_param, dim.dim_value) for dim in kind.shape.dim)
        * tensor_dtype_to_np_dtype(kind.elem_type).itemsize
        for kind in (value.type.tensor_type for value in (*graph.input, *graph.output))
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
    """The sizes of the graphs' symbolic axes in a bucket (see `passes.ir.plan_inputs`)."""
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
    return file_sha256(onnx_parts(path))


def build_engine(engine: Engine, folder: Path, tick: Callable[[float], None] = lambda _: None) -> Built:
    """Build one engine in a folder, completely or not at all; returns its index entry. `tick` gets the seconds.

    Raises UsageError naming node, op and bucket if the backend rejects the graph or fails, and CheckFailedError if the
    engine would ignore an input of the graph.
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
                f"{engine.device.backend} {engine.device.version} ignores input {', '.join(found['unused'])} of "
                f"{engine.onnx.name}: the engine would be wrong; please report it"
            )
        made = engine.built(target, seconds, found["layers"])
        os.replace(target, folder / engine.file)
    return made


def run_worker(request: dict[str, Any], log: Path, tick: Callable[[], None]) -> None:
    """Run the worker to its end; an interrupt ends it at once."""
    command = [sys.executable, "-m", "dcconvert.export.engines.worker"]
    with log.open("wb") as out:
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out)
        try:
            assert worker.stdin is not None
            with suppress(BrokenPipeError), worker.stdin:  # it may have died already
                worker.stdin.write(json.dumps(request).encode())
            running = True
            while running:
                tick()
                with suppress(subprocess.TimeoutExpired):
                    worker.wait(TICK_SECONDS)
                    running = False
        finally:
            worker.kill()
            worker.wait()


def builder_error(log: Path) -> str:
    """The last error in the builder's log."""
    errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("[E]")]
    return errors[-1].removeprefix("[E]").strip() if errors else last_line(log)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def words(bucket: Bucket) -> str:
    return f"bucket of batch {bucket.batch}, {bucket.row_tokens} tokens per sample"
