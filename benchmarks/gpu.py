"""Parity, latency and memory on a GPU, original against converted, in one script that needs no network.

    python -m benchmarks.gpu                          # all parts, at most 9 minutes -> benchmarks/results/gpu.json
    python -m benchmarks.gpu --parts latency --minutes 5 --convert-on device --out gpu.json
    python -m benchmarks.gpu --tiny --out tiny.json   # a trial with three blocks, on a CPU too

Torch, numpy and safetensors are all that torch's parts need. What another part misses is the reason it gives for being
skipped. Cases run in the order of their worth, in a process of their own that is stopped when time is up and started
anew when a case broke it; the file is written after each of them. Times are medians of calls in turns, each waited for;
weights are random. A step is route, plan on the host and denoise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, write_result
from benchmarks.gpu_backend import RUNTIMES
from benchmarks.gpu_cases import FORMS, Case, Models, attention_forms, latency, parity
from benchmarks.gpu_steps import ceilings, step_latency, step_parity

PARTS = ("ceilings", "step parity", "steps", "parity", "latency", "attention", "onnxruntime", "tensorrt")
FIRST, LAST = 1, 2  # priorities of the cases of one part: those that the table shows, and the rest
BROKEN = 75  # exit status of a process whose CUDA context is of no use after an error
CUDA_ERRORS = ("CUDA error", "CUDA failure")  # as torch and ONNX Runtime call them
OUT_OF_TIME = "out of time"
WITH_HOST = "CUDA graph, images from the host"


@dataclass(frozen=True)
class Job:
    """One case: what it is called in the file, how to measure it, and the seconds it needs."""

    part: str
    facts: dict[str, Any]
    measure: Callable[[], dict[str, Any]]
    needs: float = 5.0
    priority: int = FIRST
    makes: Callable[[], float] = float

    @property
    def place(self) -> tuple[Any, ...]:
        """Cases of one place follow each other, because they share converted models."""
        shared = self.part in ("steps", "latency")
        return (self.facts["model"], self.facts["pixels"], self.facts["dtype"]) if shared else (self.part,)


@dataclass
class Record:
    """The file, written whole after every case."""

    path: Path
    settings: dict[str, Any]
    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)

    def do(self, job: Job) -> bool:
        """Measure a case, or note why not: no time left, something missing, or what went wrong.

        False if this process can measure nothing more.
        """
        start, row = time.monotonic(), {}
        try:
            if start + job.needs + job.makes() > self.deadline:
                raise TimeoutError(OUT_OF_TIME)
            row = job.measure()
        except Exception as error:  # an unknown machine: the other cases must still run
            row = {"skipped": reason(error)}
        self.add(job, row, time.monotonic() - start)
        return not any(words in row.get("skipped", "") for words in CUDA_ERRORS)

    def add(self, job: Job, row: dict[str, Any], seconds: float = 0.0) -> None:
        self.rows.append({"part": job.part, **job.facts, **row, "seconds": round(seconds, 1)})
        self.write()
        print(shown(self.rows[-1]), flush=True)

    def write(self) -> None:
        write_result("gpu", self.settings, self.rows, self.path)

    def read(self) -> None:
        """What another process has written."""
        found = json.loads(self.path.read_text())
        self.rows, self.settings = found["rows"], found["settings"]


def reason(error: Exception) -> str:
    """One line that says why a case was skipped."""
    line = " ".join(str(error).split())[:300]
    if isinstance(error, TimeoutError):
        return line
    if isinstance(error, ImportError):
        return f"not installed: {line}"
    return f"{type(error).__name__}: {line}"


def shown(row: dict[str, Any]) -> str:
    facts = ", ".join(str(v) for k, v in row.items() if k in ("part", "model", "pixels", "batch", "form", "dtype"))
    facts += "".join(f", {row[k]}" for k in ("ratio", "runtime", "case") if k in row)
    if "skipped" in row:
        return f"{facts}: skipped, {row['skipped']}"
    keys = ("speedup", "flop_ratio", "full_speed", "runs", "all_kept_error", "precisions", "error", "gb_per_s")
    return f"{facts}: " + ", ".join(f"{key} {row[key]}" for key in keys if key in row)


# Jobs


@dataclass(frozen=True)
class Plan:
    """Sizes of a run: the published ones, or tiny ones."""

    device: torch.device
    tiny: bool
    runs: int

    @property
    def small(self) -> str:
        return "S" if self.tiny else "B"

    @property
    def pixels(self) -> int:
        return 64 if self.tiny else 256

    @property
    def depth(self) -> int:
        return 3 if self.tiny else 0


def ceiling_jobs(plan: Plan, models: Models) -> Iterator[Job]:
    yield Job("ceilings", {}, partial(ceilings, plan.device, plan.runs), needs=3)


def step_parity_jobs(plan: Plan, models: Models) -> Iterator[Job]:
    facts = {"model": f"DiT-{plan.small}/2", "pixels": plan.pixels}
    yield Job("step parity", facts, partial(step_parity, models, plan.small, plan.pixels), needs=15)


def parity_jobs(plan: Plan, models: Models) -> Iterator[Job]:
    for form in models.forms:
        facts = {"model": f"DiT-{plan.small}/2", "pixels": plan.pixels, "form": form}
        yield Job("parity", facts, partial(parity, models, plan.small, plan.pixels, form), needs=15)


def step_jobs(plan: Plan, models: Models) -> Iterator[Job]:
    """Full and skip steps of both models at both sizes, as CUDA graphs; then eager and compiled."""

    def job(size: str, pixels: int, dtype: str, batch: int, runtime: str, rank: int) -> Job:
        case = Case(size, pixels, "steps")
        facts = {"model": case.model, "pixels": pixels, "batch": batch, "dtype": dtype, "runtime": runtime}
        measure = partial(step_latency, models, case, dtype, batch, (2, 4, 8), runtime, plan.runs)
        return Job("steps", facts, measure, runtime_needs(size, runtime), rank, partial(models.seconds, case, dtype))

    if plan.tiny:
        yield job("S", plan.pixels, "bf16", 2, RUNTIMES[plan.device.type == "cuda"], FIRST)
        return
    for size, pixels in MODELS:
        yield from (job(size, pixels, "bf16", batch, "CUDA graph", FIRST) for batch in (8, 1, 32))
    yield from (job(size, 256, "bf16", 8, "eager", LAST) for size in ("XL", "B"))
    yield job("B", 256, "fp16", 8, "CUDA graph", LAST)
    yield from (job(size, 256, "bf16", 8, "compiled, CUDA graph", LAST) for size in ("B", "XL"))


MODELS = (("XL", 256), ("B", 256), ("XL", 512), ("B", 512))


def runtime_needs(size: str, runtime: str) -> float:
    """Seconds that a case takes when its model is there."""
    return (150.0 if size == "XL" else 70.0) if "compiled" in runtime else 8.0


def latency_jobs(plan: Plan, models: Models) -> Iterator[Job]:
    """The most telling first: 4x in bf16 as CUDA graphs; then eager and compiled, other ratios and precision."""

    def job(size: str, pixels: int, form: str, dtype: str, batch: int, ratio: float, runtime: str, rank: int) -> Job:
        case = Case(size, pixels, form)
        facts = {"model": case.model, "pixels": pixels, "batch": batch, "form": form, "ratio": ratio}
        args = (models, case, dtype, batch, ratio, runtime, plan.runs)
        facts |= {"dtype": dtype, "runtime": runtime}
        needs = runtime_needs(size, runtime)
        return Job("latency", facts, partial(latency, *args), needs, rank, partial(models.seconds, case, dtype))

    forms = models.forms
    if plan.tiny:
        for form in forms:
            for runtime in RUNTIMES[:1] if plan.device.type == "cpu" else RUNTIMES:
                yield job("S", plan.pixels, form, "bf16", 2, 4, runtime, FIRST)
        return
    for size, pixels in MODELS:
        for batch in (8, 1, 32):
            yield from (job(size, pixels, form, "bf16", batch, 4, "CUDA graph", FIRST) for form in forms)
    for size in ("XL", "B"):
        yield from (job(size, 256, form, "bf16", 8, 4, "eager", LAST) for form in forms)
        yield from (job(size, 256, form, "bf16", 8, ratio, "CUDA graph", LAST) for ratio in (2, 16) for form in forms)
    yield from (job("B", 256, form, "fp16", 8, 4, "CUDA graph", LAST) for form in forms)
    yield from (job("B", 256, form, "bf16", 8, 4, "compiled, CUDA graph", LAST) for form in forms)


def attention_jobs(plan: Plan, models: Models) -> Iterator[Job]:
    cases = {
        "8 x 64 of 256": ([64] * 8, 256),
        "mixed, 8 x 32 or 96 of 256": ([32, 96] * 4, 256),
        "32 x 64 of 256": ([64] * 32, 256),
        "8 x 256 of 1024": ([256] * 8, 1024),
        "one long, 7 short of 1024": ([1024] + [64] * 7, 1024),
    }
    if plan.tiny:
        cases = {"3 x 4 of 16": ([4] * 3, 16), "mixed": ([8, 1, 4], 16)}
    for size in (plan.small,) if plan.tiny else ("XL", "B"):
        for name, (counts, tokens) in cases.items():
            args = (size, counts, tokens, "bf16", plan.device, plan.runs)
            facts = {"model": f"DiT-{size}/2", "case": name, "dtype": "bf16"}
            yield Job("attention", facts, partial(attention_forms, *args), needs=3)


@dataclass
class Exports:
    """Converted models with their ONNX files, each made by the first job that wants it."""

    plan: Plan
    known: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.plan.device.type == "cuda"

    def get(self, form: str) -> Any:
        from benchmarks.gpu_runtimes import Exported

        if form not in self.known:
            self.known[form] = Exported(self.plan.small, self.plan.pixels, form, self.plan.depth)
        return self.known[form]

    def seconds(self, form: str) -> float:
        """What making and exporting a model is likely to take, if it was not done yet."""
        return 0.0 if self.plan.tiny or form in self.known else 50.0


def onnx_jobs(plan: Plan, models: Models) -> Iterator[Job]:
    """All modes on ONNX Runtime, first what asks least of it; two modes on TensorRT."""
    exports, batch, ratio = Exports(plan), 2 if plan.tiny else 8, 4
    facts = {"model": f"DiT-{plan.small}/2", "pixels": plan.pixels, "dtype": "fp16"}
    captured = [(size, RUNTIMES[1]) for size in (batch, 1) if exports.on_gpu]
    for size, runtime in [(batch, RUNTIMES[0]), *captured, (batch, WITH_HOST)]:
        case = {**facts, "batch": size, "form": "steps", "runtime": runtime}
        measure = partial(steps_on_onnx_runtime, exports, size, runtime)
        yield Job("onnxruntime", case, measure, 10, makes=partial(exports.seconds, "steps"))
    facts |= {"batch": batch, "ratio": ratio}
    for part, function, needs in (("onnxruntime", on_onnx_runtime, 10.0), ("tensorrt", on_tensorrt, 40.0)):
        for form in ("carry", "chunk"):
            measure, makes = partial(function, exports, form, batch, ratio), partial(exports.seconds, form)
            yield Job(part, {**facts, "form": form}, measure, needs, makes=makes)


def steps_on_onnx_runtime(exports: Exports, batch: int, runtime: str) -> dict[str, Any]:
    from benchmarks.gpu_runtimes import onnx_runs, onnx_steps

    check_provider(exports.on_gpu)
    plan, exported, ratios = exports.plan, exports.get("steps"), (2, 4, 8)
    if runtime == WITH_HOST:
        return onnx_runs(exported, batch, ratios, exports.on_gpu, plan.runs)
    return onnx_steps(exported, batch, ratios, plan.device, runtime == RUNTIMES[1], plan.runs)


def on_onnx_runtime(exports: Exports, form: str, batch: int, ratio: float) -> dict[str, Any]:
    from benchmarks.gpu_runtimes import onnx_runtime

    check_provider(exports.on_gpu)
    return onnx_runtime(exports.get(form), batch, ratio, exports.on_gpu, exports.plan.runs)


def on_tensorrt(exports: Exports, form: str, batch: int, ratio: float) -> dict[str, Any]:
    from benchmarks.gpu_runtimes import tensorrt, tensorrt_module

    tensorrt_module()
    if not exports.on_gpu:
        raise RuntimeError("engines run on a GPU, and there is none")
    return tensorrt(exports.get(form), batch, ratio, exports.plan.runs)


def check_provider(on_gpu: bool) -> None:
    """ImportError before the work of an export if this machine's ONNX Runtime could not run it."""
    import onnxruntime

    from dcconvert.export.runtimes.ort import load_libraries

    if on_gpu and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ImportError(f"onnxruntime {onnxruntime.__version__} has no CUDAExecutionProvider")
    if on_gpu and (missing := load_libraries()):
        raise ImportError(missing)


JOBS: dict[str, Callable[[Plan, Models], Iterator[Job]]] = {
    "ceilings": ceiling_jobs,
    "step parity": step_parity_jobs,
    "steps": step_jobs,
    "parity": parity_jobs,
    "latency": latency_jobs,
    "attention": attention_jobs,
    "onnxruntime": onnx_jobs,
    "tensorrt": onnx_jobs,
}


def jobs(parts: tuple[str, ...], plan: Plan, models: Models) -> list[Job]:
    """The cases of these parts, those of the first rank before all others, and of one model and size together."""
    makers = dict.fromkeys(JOBS[part] for part in PARTS if part in parts)
    found = [job for maker in makers for job in maker(plan, models) if job.part in parts]
    places = list(dict.fromkeys(job.place for job in found))
    return sorted(found, key=lambda job: (job.priority, places.index(job.place)))


def parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Parity, latency and memory on a GPU, original against converted.")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS), help="of converted models")
    parser.add_argument("--minutes", type=float, default=9.0, help="when it ends, whatever is under way")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument(
        "--tiny", action="store_true", help="models of three blocks, 64 px, batch 2 (always so on a CPU)"
    )
    parser.add_argument(
        "--convert-on",
        default="cpu",
        choices=["cpu", "device"],
        help="where models are converted; the device is faster",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--worker", action="store_true", help="measure what --out does not have yet, in this process")
    args = parser.parse_args(words)
    args.tiny = args.tiny or not torch.cuda.is_available()
    if args.tiny and args.out == RESULTS / "gpu.json":
        parser.error("there is no GPU, or --tiny was asked for: name the file of such a trial with --out")
    return args


def prepared(args: argparse.Namespace) -> tuple[Record, list[Job]]:
    """The file of a run, and its cases."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = Plan(device, args.tiny, args.runs)
    settings = {"device": device.type, "tiny": args.tiny, "runs": args.runs, "minutes": args.minutes}
    settings["forms"] = args.forms
    settings["convert_on"] = args.convert_on
    made_on = device if args.convert_on == "device" else torch.device("cpu")
    models = Models(device, (4,) if args.tiny else (2, 4, 16), made_on, plan.depth, forms=args.forms)
    record = Record(args.out, settings, time.monotonic() + 60 * args.minutes)
    return record, jobs(tuple(args.parts), plan, models)


def work(args: argparse.Namespace) -> int:
    """Measure the cases that the file does not have yet; BROKEN if one of them left this process of no use."""
    torch.backends.cudnn.allow_tf32 = False  # or float32 would mean something else in convolutions than in linears
    return measure(*prepared(args))


def measure(record: Record, wanted: list[Job]) -> int:
    """What `work` returns, of these cases."""
    record.read()
    for job in wanted[len(record.rows) :]:
        if not record.do(job):
            return BROKEN
    return 0


def supervise(record: Record, wanted: list[Job], start: Callable[[float], subprocess.Popen[bytes]]) -> None:
    """Have all cases measured by processes that `start` makes, told the minutes that are left; none outlives the last.

    A case in which a process dies, or time is up, is noted as such.
    """
    record.write()
    while len(record.rows) < len(wanted):
        left, before = record.deadline - time.monotonic(), len(record.rows)
        if left <= 0:
            for job in wanted[before:]:
                record.add(job, {"skipped": OUT_OF_TIME})
            return
        worker = start(left / 60)
        try:
            status = f"died with status {worker.wait(timeout=left)}"
        except subprocess.TimeoutExpired:
            status = "was stopped, because time was up"
        finally:
            worker.kill()
            worker.wait()
        record.read()
        measured = len(record.rows)
        if measured < len(wanted) and (worker.returncode != BROKEN or measured == before):
            record.add(wanted[measured], {"skipped": f"its process {status}"})


def main(words: list[str] | None = None) -> None:
    args = parsed(words)
    if args.worker:
        sys.exit(work(args))
    record, wanted = prepared(args)
    command = [sys.executable, "-m", "benchmarks.gpu", *(sys.argv[1:] if words is None else words), "--worker"]
    supervise(record, wanted, lambda minutes: subprocess.Popen([*command, "--minutes", str(minutes)]))
    print(f"Results: {args.out}")


if __name__ == "__main__":
    main()
