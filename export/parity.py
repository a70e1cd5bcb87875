"""Checks that a converted model does what it promises; a failed one ends the job with exit 1."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.export.buckets import Bucket
from dcconvert.passes.errors import CheckFailedError
from dcconvert.passes.model import ChunkedModel
from dcconvert.passes.plan import Plan
from dcconvert.passes.spec import SCORES_NAME

IDENTITY_TOLERANCE = 1e-5  # relative, keep-everything output against the original
ISOLATION_TOLERANCE = 1e-6  # relative, a sample's output when another one is replaced
RUNTIME_TOLERANCE = 1e-4  # torch against ONNX Runtime in fp32: relative to a value, or to the output's scale
LOUD = 1e4  # what another sample is replaced with


@dataclass(frozen=True)
class Check:
    """One line of the verification table."""

    name: str
    value: float
    tolerance: float
    detail: str

    @property
    def passed(self) -> bool:
        return bool(self.value <= self.tolerance)  # NaN does not pass

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def require(checks: list[Check]) -> None:
    """Raise CheckFailedError naming the first check that failed."""
    for check in checks:
        if not check.passed:
            raise CheckFailedError(
                f"check '{check.name}' failed: {check.value:.3g} is above {check.tolerance:.3g} ({check.detail})"
            )


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


def largest(errors: Iterable[float]) -> float:
    """The largest error; NaN if any is (Python's max would step over it)."""
    return float(np.max(list(errors)))


@torch.no_grad()
def check_identity(model: ChunkedModel, inputs: dict[str, Any]) -> Check:
    """Keep everything: the output is the original's, in a tight plan and in buckets larger than needed."""
    wanted = model.original_graph(*(inputs[name] for name in model.spec.inputs))[0]
    _, live = model.route(inputs)
    batch, tokens = len(wanted), model.spec.tokens
    planner = model.step_planner.planner
    loose = Bucket(batch, (batch + 1) * (tokens + 8), batch, tokens + 8, tokens + 8)
    tiled = Bucket(batch, batch * (tokens + 16 - tokens % 8), batch, tokens + 3, 8)
    plans = [planner.full_plan(batch, bucket) for bucket in (None, loose, tiled)]
    worst = largest(relative_error(model.denoise(inputs, live, plan)[0], wanted) for plan in plans)
    return Check("keep everything equals the original", worst, IDENTITY_TOLERANCE, f"{len(plans)} packings, torch fp32")


@torch.no_grad()
def check_isolation(model: ChunkedModel, inputs: dict[str, Any]) -> Check:
    """Replace the values of the last sample by 1e4: the other outputs stay."""
    scores, live = model.route(inputs)
    mixed = np.linspace(model.spec.tokens / 8, model.spec.tokens / 2, len(scores)).astype(np.int64)
    plan = model.step_planner.planner(scores.numpy(), np.maximum(mixed, 1))
    before = model.denoise(inputs, live, plan)[0][:-1]
    loud = {name: torch.cat([value[:-1], torch.full_like(value[-1:], LOUD)]) for name, value in live.items()}
    shouted = {name: drown_last(value) for name, value in inputs.items()}
    louder, _ = model.route(shouted)
    router = relative_error(louder[:-1], scores[:-1])
    after = model.denoise(shouted, loud, plan)[0][:-1]
    error = largest([relative_error(after, before), router])
    return Check("no sample sees another", error, ISOLATION_TOLERANCE, f"input and trunk of another set to {LOUD:g}")


def drown_last(value: Any) -> Any:
    """An input with the last sample's floats replaced by a loud value."""
    if not isinstance(value, Tensor) or not value.ndim or not value.is_floating_point():
        return value
    return torch.cat([value[:-1], torch.full_like(value[-1:], LOUD)])


@torch.no_grad()
def check_batch_invariance(model: ChunkedModel, inputs: dict[str, Any]) -> Check:
    """A sample alone gives what it gives in the batch, on the same keep mask."""
    scores, live = model.route(inputs)
    planner = model.step_planner.planner
    mixed = np.linspace(model.spec.tokens / 2, model.spec.tokens / 8, len(scores)).astype(np.int64)
    plan = planner(scores.numpy(), np.maximum(mixed, 1))
    together = model.denoise(inputs, live, plan)[0]
    errors = []
    for i in range(len(scores)):
        alone = {n: v[i : i + 1] if isinstance(v, Tensor) and v.ndim else v for n, v in inputs.items()}
        own = planner.plan(plan.keep[i : i + 1])
        single = model.denoise(alone, {n: v[i : i + 1] for n, v in live.items()}, own)[0]
        errors.append(relative_error(single[0], together[i]))
    detail = f"{len(scores)} samples, torch"
    return Check("a sample does not depend on its batch", largest(errors), IDENTITY_TOLERANCE, detail)


def check_runtime(
    model: ChunkedModel,
    folder: Path,
    inputs_of: Callable[[int], dict[str, Any]],
    buckets: tuple[Bucket, ...],
    tick: Callable[[str], None] = lambda _: None,
) -> list[Check]:
    """Torch against ONNX Runtime (CPU) on `route` for every batch size and `denoise` for every bucket.

    Compared by polygraphy. `inputs_of(batch)` gives model inputs; `tick` is told about each comparison.
    """
    routes: list[Case] = []
    denoises: list[Case] = []
    for batch in sorted({bucket.batch for bucket in buckets}):
        inputs = inputs_of(batch)
        with torch.no_grad():
            scores, live = model.route(inputs)
        feed = {name: as_array(inputs[name]) for name in model.spec.route_inputs}
        routes.append(Case(f"route, batch {batch}", feed, {SCORES_NAME: as_array(scores), **as_arrays(live)}))
        for bucket in (b for b in buckets if b.batch == batch):
            counts = np.full(batch, bucket.row_tokens)
            plan = model.step_planner.planner(scores.numpy(), counts, bucket)
            with torch.no_grad():
                outputs = model.denoise(inputs, live, plan)
            wanted = {name: as_array(v) for name, v in zip(output_names(outputs), outputs, strict=True)}
            label = f"denoise, batch {batch}, {bucket.row_tokens} tokens a sample"
            tick(label)
            denoises.append(Case(label, denoise_feed(model, inputs, live, plan), wanted))
    return [*compare(folder / "route.onnx", routes), *compare(folder / "denoise.onnx", denoises)]


@dataclass(frozen=True)
class Case:
    """One comparison: what goes into an ONNX graph and what torch says comes out."""

    label: str
    feed: dict[str, np.ndarray]
    wanted: dict[str, np.ndarray]


def denoise_feed(
    model: ChunkedModel, inputs: dict[str, Any], live: dict[str, Tensor], plan: Plan
) -> dict[str, np.ndarray]:
    given = {**inputs, **live, **plan.arrays()}
    return {name: as_array(given[name]) for name in model.spec.denoise_inputs}


def output_names(outputs: Any) -> list[str]:
    return ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]


def as_array(value: Any) -> np.ndarray:
    return np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)


def as_arrays(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: as_array(value) for name, value in values.items()}


@np.errstate(invalid="ignore")  # what is not finite fails the check; no need for warnings as well
def compare(path: Path, cases: list[Case]) -> list[Check]:
    """Run an ONNX file through polygraphy on every case and compare with torch's outputs."""
    with quiet_polygraphy():
        from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
        from polygraphy.comparator import Comparator, CompareFunc, RunResults

        runner = OnnxrtRunner(SessionFromOnnx(str(path)), name="onnxruntime")
        results = Comparator.run([runner], data_loader=[case.feed for case in cases])
        both = RunResults()
        both.add([case.wanted for case in cases], runner_name="torch")
        both.append(results[0])
        scale = scales(cases)
        absolute = {name: RUNTIME_TOLERANCE * size for name, size in scale.items()}
        function = CompareFunc.simple(atol=absolute, rtol=RUNTIME_TOLERANCE, check_error_stat="elemwise")
        accuracy = Comparator.compare_accuracy(both, compare_func=function)
        agreed = next(iter(accuracy[0].values()))
    checks = []
    for case, found, matches in zip(cases, results[0][1], agreed, strict=True):
        errors = [scaled_error(found[name], value, scale[name]) for name, value in case.wanted.items()]
        agree = all(bool(match) for match in matches.values())
        value = largest(errors) if agree else largest([*errors, 2 * RUNTIME_TOLERANCE])
        detail = "largest difference, absolute or relative, torch against ONNX Runtime CPU"
        checks.append(Check(case.label, value, RUNTIME_TOLERANCE, detail))
    return checks


def scales(cases: list[Case]) -> dict[str, float]:
    """Of every output its root mean square over all cases, at least 1: what rounding errors are in proportion to."""
    names = cases[0].wanted
    squares = {name: [np.square(case.wanted[name], dtype=np.float64).mean() for case in cases] for name in names}
    return {name: max(1.0, float(np.sqrt(np.mean(values)))) for name, values in squares.items()}


def scaled_error(found: np.ndarray, wanted: np.ndarray, scale: float) -> float:
    """Largest difference, each in units of the wanted value or of `scale`, whichever is larger."""
    return float((np.abs(found - wanted) / np.maximum(np.abs(wanted), scale)).max())


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Keep polygraphy's log out of the terminal; the result is in our own table."""
    from polygraphy.logger import G_LOGGER

    logging.getLogger("Polygraphy").setLevel(logging.CRITICAL)
    before = G_LOGGER.module_severity.get()
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    os.environ.setdefault("POLYGRAPHY_AUTOINSTALL_DEPS", "0")
    try:
        yield
    finally:
        G_LOGGER.module_severity = before
