"""Checks of a converted model; a failed check ends the job with exit code 1."""

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

from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.spec import SCORES_NAME
from dcconvert.passes.planning.carry_plan import CarryPlan, carry_plan
from dcconvert.passes.planning.chunk_plan import Plan
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.nearest_kept import Mask
from dcconvert.passes.planning.token_history import History
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.state import TensorState

IDENTITY_TOLERANCE = 1e-5  # relative, output with everything kept against the original's
HALF_STATE_TOLERANCE = 1e-2  # the same if keys and values pass through a state in fp16
ISOLATION_TOLERANCE = 1e-6  # relative, a sample's output when another one is replaced
OTHER_MATCHES = "other_matches"  # of token merging
RUNTIME_TOLERANCE = 1e-4  # torch against ONNX Runtime in fp32: relative to a value, or to the output's scale
IDENTITY = "keep everything equals the original"
ISOLATION = "no sample sees another"
INVARIANCE = "a sample does not depend on its batch"
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
    """The largest error; NaN if any is NaN (Python's max would ignore it)."""
    return float(np.max(list(errors)))


def keeps_original(model: DynamicModel) -> bool:
    """Whether a model with everything kept must equal the original."""
    return model.method.keeps_original


@torch.no_grad()
def check_identity(model: DynamicModel, inputs: dict[str, Any]) -> Check:
    """Keep everything: the output must equal the original's, in a tight plan and in buckets larger than needed."""
    wanted = model.original_graph(*(inputs[name] for name in model.spec.inputs))[0]
    _, live = model.route(inputs)
    batch, tokens = len(wanted), model.spec.tokens
    loose = Bucket(batch, (batch + 1) * (tokens + 8), batch, tokens + 8, tokens + 8)
    tiled = Bucket(batch, batch * (tokens + 16 - tokens % 8), batch, tokens + 3, 8)
    plans = [model.planner.full_plan(batch, bucket) for bucket in (None, loose, tiled)]
    worst = largest(relative_error(model.denoise(inputs, live, plan)[0], wanted) for plan in plans)
    tolerance = allowed(model, IDENTITY_TOLERANCE)
    return Check(IDENTITY, worst, tolerance, f"{len(plans)} packings, torch fp32")


def allowed(model: DynamicModel, tolerance: float) -> float:
    """The tolerance for fp32, or for values that pass through a state in half precision."""
    return max(tolerance, HALF_STATE_TOLERANCE) if model.method.remembered_as == "fp16" else tolerance


def second_step(model: DynamicModel, inputs: dict[str, Any]) -> tuple[np.ndarray, dict[str, Tensor], TensorState]:
    """Scores, live values and (mode carry) the state of samples after one step that kept everything."""
    scores, live = model.route(inputs)
    state = model.empty_state(len(scores))
    if model.spec.states:
        model.denoise(inputs, live, model.planner.full_plan(len(scores)), state)
    return scores.numpy(), live, state


def mixed_plan(model: DynamicModel, scores: np.ndarray, counts: np.ndarray) -> Plan | CarryPlan:
    """A plan in which samples keep different numbers of tokens; in mode carry, for a second step."""
    keep = model.planner.planner.select(scores, np.maximum(counts, 1))
    return plan_second(model, keep)


def plan_second(model: DynamicModel, keep: Mask, bucket: Bucket | None = None) -> Plan | CarryPlan:
    if not model.spec.states:
        return model.planner.of_mask(keep, bucket)
    history = History(*keep.shape)
    carry_plan(history, np.ones_like(keep), np.full(len(keep), 1.0))
    return carry_plan(history, keep, np.full(len(keep), 0.9), bucket)


@torch.no_grad()
def check_isolation(model: DynamicModel, inputs: dict[str, Any]) -> Check:
    """Replace the values of the last sample, including its state, by 1e4: the other outputs must not change."""
    scores, live, state = second_step(model, inputs)
    mixed = np.linspace(model.spec.tokens / 8, model.spec.tokens / 2, len(scores)).astype(np.int64)
    plan = mixed_plan(model, scores, mixed)
    loud = {name: torch.cat([value[:-1], torch.full_like(value[-1:], LOUD)]) for name, value in live.items()}
    loud_state = TensorState({n: with_loud_sample(t) for n, t in state.values.items()})
    before = model.denoise(inputs, live, plan, state)[0][:-1]
    batched = batched_inputs(model)
    shouted = {name: drown_last(value) if name in batched else value for name, value in inputs.items()}
    louder, _ = model.route(shouted)
    router = relative_error(louder[:-1], torch.from_numpy(scores[:-1]))
    after = model.denoise(shouted, loud, plan, loud_state)[0][:-1]
    error = largest([relative_error(after, before), router])
    return Check(ISOLATION, error, ISOLATION_TOLERANCE, f"input and trunk of another set to {LOUD:g}")


def with_loud_sample(state: Tensor) -> Tensor:
    """A state [P, B, C, N, E] with loud values for the last sample."""
    return torch.cat([state[:, :-1], torch.full_like(state[:, -1:], LOUD)], dim=1)


def batched_inputs(model: DynamicModel) -> set[str]:
    """Names of the inputs that have a value for every sample."""
    return {spec.name for spec in model.spec.input_specs if spec.batched}


def drown_last(value: Any) -> Any:
    """An input with the last sample's floats replaced by a loud value."""
    if not value.is_floating_point():
        return value
    return torch.cat([value[:-1], torch.full_like(value[-1:], LOUD)])


@torch.no_grad()
def check_batch_invariance(model: DynamicModel, inputs: dict[str, Any]) -> Check:
    """A sample alone must give the same result as in the batch, with the same keep mask and state."""
    scores, live, state = second_step(model, inputs)
    mixed = np.linspace(model.spec.tokens / 2, model.spec.tokens / 8, len(scores)).astype(np.int64)
    plan = mixed_plan(model, scores, mixed)
    alone_states = [TensorState({n: t[:, i : i + 1] for n, t in state.values.items()}) for i in range(len(scores))]
    together = model.denoise(inputs, live, plan, state)[0]
    errors, batched = [], batched_inputs(model)
    for i, own_state in enumerate(alone_states):
        alone = {n: v[i : i + 1] if n in batched else v for n, v in inputs.items()}
        own = plan_second(model, plan.keep[i : i + 1])
        single = model.denoise(alone, {n: v[i : i + 1] for n, v in live.items()}, own, own_state)[0]
        errors.append(relative_error(single[0], together[i]))
    detail = f"{len(scores)} samples, torch"
    return Check(INVARIANCE, largest(errors), allowed(model, IDENTITY_TOLERANCE), detail)


def check_runtime(
    model: DynamicModel,
    folder: Path,
    inputs_of: Callable[[int], dict[str, Any]],
    buckets: tuple[Bucket, ...],
    tick: Callable[[str], None] = lambda _: None,
    tolerance: float = RUNTIME_TOLERANCE,
) -> list[Check]:
    """Torch against ONNX Runtime (CPU) on `route` for every batch size and `denoise` for every bucket.

    Polygraphy compares the outputs, including new states. `inputs_of(batch)` gives model inputs; `tick` is called for
    each comparison; `tolerance` is that of the model's precision.
    """
    prepares: list[Case] = []
    routes: list[Case] = []
    denoises: list[Case] = []
    for batch in sorted({bucket.batch for bucket in buckets}):
        inputs = inputs_of(batch)
        with torch.no_grad():
            scores, live, state = second_step(model, inputs)
        feed = as_arrays(model.feed("route", inputs))
        routes.append(Case(f"route, batch {batch}", feed, {SCORES_NAME: scores, **as_arrays(live)}))
        if model.spec.constants:
            taken, made = model.feed("prepare", inputs), model.prepare(inputs)
            prepares.append(Case(f"prepare, batch {batch}", as_arrays(taken), as_arrays(made)))
        for bucket in (b for b in buckets if b.batch == batch):
            label = f"denoise, batch {batch}, {bucket.row_tokens} tokens per sample"
            tick(label)
            keep = model.planner.planner.select(scores, uneven(batch, bucket.row_tokens))
            plan = plan_second(model, keep, bucket)
            denoises.append(denoise_case(label, model, inputs, live, plan, state))
    prepared = compare(folder / "prepare.onnx", prepares, tolerance) if prepares else []
    routed = compare(folder / "route.onnx", routes, tolerance)
    return [*prepared, *routed, *compare(folder / "denoise.onnx", denoises, allowed(model, tolerance))]


def uneven(batch: int, most: int) -> np.ndarray:
    """Kept tokens [B], mostly fewer than the bucket has, so that a runtime must ignore padding."""
    least = max(1, most // 2)
    return np.linspace(most, least, batch).astype(np.int64) if batch > 1 else np.array([max(1, most - 1)])


def denoise_case(
    label: str,
    model: DynamicModel,
    inputs: dict[str, Any],
    live: dict[str, Tensor],
    plan: Any,
    state: TensorState,
) -> Case:
    """The inputs of `denoise` for one plan, and torch's outputs."""
    feed = model.feed("denoise", inputs, live, plan, state)
    with torch.no_grad():
        made = model.call("denoise", feed)
    return Case(label, as_arrays(feed), as_arrays(made))


@dataclass(frozen=True)
class Case:
    """One comparison: the inputs of an ONNX graph and torch's outputs."""

    label: str
    feed: dict[str, np.ndarray]
    wanted: dict[str, np.ndarray]


def as_array(value: Any) -> np.ndarray:
    return np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)


def as_arrays(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: as_array(value) for name, value in values.items()}


@np.errstate(invalid="ignore")  # non-finite values fail the check; warnings are not needed as well
def compare(path: Path, cases: list[Case], tolerance: float = RUNTIME_TOLERANCE) -> list[Check]:
    """Run an ONNX file through polygraphy on every case and compare with torch's outputs."""
    with quiet_polygraphy():
        from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
        from polygraphy.comparator import Comparator, CompareFunc, RunResults

        runner = OnnxrtRunner(SessionFromOnnx(str(path)), name="onnxruntime")
        results = Comparator.run([runner], data_loader=[case.feed for case in cases])
        pairs = [as_numbers(dict(values), case.wanted) for values, case in zip(results[0][1], cases, strict=True)]
        found, wanted = [own for own, _ in pairs], [torchs for _, torchs in pairs]
        both = RunResults()
        both.add(wanted, runner_name="torch")
        both.add(found, runner_name="onnxruntime")
        scale = scales(wanted)
        absolute = {name: tolerance * size for name, size in scale.items()}
        function = CompareFunc.simple(atol=absolute, rtol=tolerance, check_error_stat="elemwise")
        accuracy = Comparator.compare_accuracy(both, compare_func=function)
        agreed = next(iter(accuracy[0].values()))
    checks = []
    for case, own, torchs, matches in zip(cases, found, wanted, agreed, strict=True):
        errors = [scaled_error(own[name], value, scale[name]) for name, value in torchs.items()]
        agree = all(bool(match) for match in matches.values())
        value = largest(errors) if agree else largest([*errors, 2 * tolerance])
        detail = "largest difference, absolute or relative, torch against ONNX Runtime CPU"
        checks.append(Check(case.label, value, tolerance, detail))
    return checks


Arrays = dict[str, np.ndarray]


def as_numbers(found: Arrays, wanted: Arrays) -> tuple[Arrays, Arrays]:
    """Outputs of two runtimes in a form that can be compared as numbers.

    Token merging has scores [B, N, 2]. The second is the index of the most similar token, where rounding decides
    between nearly equal ones: it is replaced by the share of the tokens that are matched differently. The first, how
    badly they are matched, is compared like any output, so a different match must be as good.
    """
    if wanted.get(SCORES_NAME, np.empty(0)).ndim < 3:
        return found, wanted
    (badly, owner), (torchs, wanted_owner) = (
        np.ascontiguousarray(np.moveaxis(side[SCORES_NAME], -1, 0)) for side in (found, wanted)
    )
    others = np.atleast_1d((owner != wanted_owner).mean(dtype=np.float32))
    found = {**found, SCORES_NAME: badly, OTHER_MATCHES: others}
    return found, {**wanted, SCORES_NAME: torchs, OTHER_MATCHES: np.zeros_like(others)}


def scales(cases: list[Arrays]) -> dict[str, float]:
    """The root mean square of every output over all cases, at least 1: rounding errors are proportional to it."""
    squares = {name: [np.square(case[name], dtype=np.float64).mean() for case in cases] for name in cases[0]}
    return {name: max(1.0, float(np.sqrt(np.mean(values)))) for name, values in squares.items()}


def scaled_error(found: np.ndarray, wanted: np.ndarray, scale: float) -> float:
    """Largest difference, each in units of the wanted value or of `scale`, whichever is larger."""
    return float((np.abs(found - wanted) / np.maximum(np.abs(wanted), scale)).max())


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Keep polygraphy's log, and ONNX Runtime's warnings, out of the terminal; the result is in our own table."""
    import onnxruntime
    from polygraphy.logger import G_LOGGER

    logging.getLogger("Polygraphy").setLevel(logging.CRITICAL)
    before = G_LOGGER.module_severity.get()
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    onnxruntime.set_default_logger_severity(3)
    os.environ.setdefault("POLYGRAPHY_AUTOINSTALL_DEPS", "0")
    try:
        yield
    finally:
        G_LOGGER.module_severity = before
        onnxruntime.set_default_logger_severity(2)
