"""Put another schedule into a bundle: updates graph, manifest, buckets and report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcconvert.environment import machine
from dcconvert.evaluate.conversion_metrics import LATENCY_RUNS, Effort, Subject, measure
from dcconvert.evaluate.measure_steps import compute_section
from dcconvert.export.buckets import BucketSet, choose_buckets
from dcconvert.export.bundle import GRAPH, Bundle
from dcconvert.export.checks.parity import Check, check_runtime, require
from dcconvert.export.disk.json_text import part_of_folder, plain_file
from dcconvert.export.files import MANIFEST, PNG, new_folder, read_json, write_json
from dcconvert.models.dit import DiTConfig
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.schedule import LEVELS, Timetable
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.serialise.graph_json import model_to_dict
from dcconvert.report.conversion import FIGURES, page, without_nan, write_report
from dcconvert.report.figures import sample_figure, token_map_figure
from dcconvert.report.stress import FAILURES_FIGURE
from dcconvert.sampling.samplers import Sampler
from dcconvert.terminal import Stages

REPORT = "report.json"
FAILURES = "failures.json"  # the worst cases of a stress test
MOST_FIGURE = 256 << 20  # bytes
RUNTIME_CHECKS = ("route,", "denoise,")  # names of checks that depend on the buckets begin like this


@dataclass(frozen=True)
class Rescheduled:
    """A bundle's model under a fitted schedule for one sampler, with buckets for it that passed their checks."""

    model: DynamicModel
    sampler: Sampler
    bucket_set: BucketSet
    checks: list[Check]

    @classmethod
    def of(cls, bundle: Bundle, schedule: Timetable, sampler: Sampler, stages: Stages) -> Rescheduled:
        """Raises CheckFailedError if ONNX Runtime and torch disagree in the new buckets."""
        most, model = most_buckets(bundle), bundle.model.with_schedule(schedule)
        if not schedule.data_dependent:
            model = model.with_schedule(model.planner.levelled(sampler.taus, most))
        counts = model.planner.bucket_counts(sampler.taus)
        bucket_set = choose_buckets(bundle.bucket_set.batches, counts, model.spec.tokens, most - 1)
        with stages.stage("compare with ONNX Runtime") as tick:
            checks = check_runtime(model, bundle.onnx, model.spec.example, bucket_set.buckets, tick)
            require(checks)
        return cls(model, sampler, bucket_set, checks)

    @property
    def planner(self) -> StepPlanner:
        return self.model.planner

    def conversion(self) -> dict[str, Any]:
        """What a manifest says about the schedule."""
        schedule = self.planner.schedule
        return {
            "ratio": schedule.ratio,
            "schedule": schedule.kind,
            "knots": [list(knot) for knot in schedule.knots],
            "warm_up": schedule.policy.warm_up,
        }

    def manifest(self, before: dict[str, Any]) -> dict[str, Any]:
        """A bundle's manifest with everything that the schedule changes."""
        parity = {name: value for name, value in before.get("parity", {}).items() if not of_runtime(name)}
        return {
            **before,
            "conversion": {**before["conversion"], **self.conversion()},
            "sampler": {**before["sampler"], "steps": self.sampler.steps, "solver": self.sampler.solver},
            "buckets": self.bucket_set.to_dict(),
            "parity": parity | {check.name: check.value for check in self.checks},
        }

    def report(self, before: dict[str, Any]) -> dict[str, Any]:
        """A bundle's report with everything that the schedule changes, except measurements."""
        schedule, tokens = self.planner.schedule, self.model.spec.tokens
        knots = ", ".join(f"{min(1, kept):.3g} at noise level {tau:g}" for tau, kept in schedule.knots)
        facts = {
            "ratio": schedule.ratio,
            "mode": self.model.method.mode,
            "schedule": f"{schedule.kind}: {knots}" if knots else schedule.kind,
            "warm_up_steps": schedule.dense_first,
            "refresh_every": schedule.policy.refresh,
            "sampler": f"{self.sampler.solver}, {self.sampler.steps} steps",
            "kept_tokens_mean": tokens * schedule.expected,
        }
        checks = [check for check in before.get("checks", []) if not of_runtime(check["name"])]
        before = {name: value for name, value in before.items() if name != "stress"}  # it was another schedule's
        return {
            **before,
            "model": {"tokens": tokens, **before.get("model", {})},
            "conversion": {**before.get("conversion", {}), **facts},
            "checks": [*checks, *(check.as_dict() for check in self.checks)],
            "buckets": {
                "buckets": [dict(vars(bucket)) for bucket in self.bucket_set.buckets],
                "expected_waste": self.bucket_set.expected_waste,
            },
            "compute": compute_section(self.model, self.planner.run_counts(self.sampler.taus), self.sampler.taus),
            "machine": machine(),
        }

    def measure(
        self,
        bundle: Bundle,
        report: dict[str, Any],
        config: DiTConfig,
        scratch: Path,
        stages: Stages,
        *,
        reference_steps: int,
        threads: int,
        seed: int = 0,
    ) -> dict[str, bytes] | None:
        """Measure latency, memory and images again; returns the figures, or None if the report had no measurements."""
        if "latency" not in report:
            return None
        images = report.get("fidelity", {}).get("images", {}).get("count", 0)
        effort = Effort(max(self.bucket_set.batches), LATENCY_RUNS, images, reference_steps, threads, seed)
        for stale in ("latency", "memory", "fidelity"):
            report.pop(stale, None)
        subject = Subject(self.model, self.planner, self.bucket_set, bundle.onnx, self.sampler, self.sampler, config)
        measured = measure(subject, effort, scratch, report["compute"], stages)
        report |= measured.added_to(report)
        result = measured.fidelity
        report["limits"] = list(dict.fromkeys(report.get("limits", [])))
        return {} if result is None else {"samples": sample_figure(result), "token_maps": token_map_figure(result)}


def most_buckets(bundle: Bundle) -> int:
    """How many buckets a batch size may have; UsageError if the manifest's value is not a number of at least 2."""
    most = bundle.manifest.get("most_buckets", LEVELS)
    if not isinstance(most, int) or most < 2:
        raise UsageError(f"{bundle.folder}: most_buckets in the manifest is not a number of at least 2; convert again")
    return most


def of_runtime(check: str) -> bool:
    """Whether a check, by its name, compared ONNX Runtime with torch in some bucket."""
    return check.startswith(RUNTIME_CHECKS)


def old_report(folder: Path) -> dict[str, Any]:
    """The report of a bundle; empty for a bundle that was written from Python without a report."""
    if not (folder / REPORT).exists():
        return {}
    found = read_json(part_of_folder(folder, REPORT))
    if not isinstance(found, dict):
        raise UsageError(f"cannot read {folder / REPORT}: it is not a JSON object; remove it, or convert again")
    return found


def check_report(folder: Path) -> None:
    """UsageError for a bundle whose report cannot be shown: what is in it would go into the next one."""
    try:
        page(old_report(folder), {})
    except UsageError:
        raise
    except Exception as error:  # values of any type in places of any kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UsageError(f"{folder / REPORT} cannot be shown ({reason}): remove it, or convert again") from error


def old_figures(folder: Path) -> dict[str, bytes]:
    """The figures of a bundle's report, PNG data by name. UsageError for one that is no PNG file of the bundle."""
    found = {}
    for name in FIGURES:
        if not (folder / f"{name}.png").exists():
            continue
        path = part_of_folder(folder, f"{name}.png")
        if plain_file(path) > MOST_FIGURE or not (data := path.read_bytes()).startswith(PNG.heads):
            raise UsageError(f"{path} is not a figure of a report: remove it")
        found[name] = data
    return found


class Rewrite:
    """A bundle that is being replaced by a changed copy of itself: what is not written anew or dropped stays."""

    def __init__(self, work: Path, dropped: set[str]) -> None:
        self.work, self.dropped = work, dropped

    def write_report(self, report: dict[str, Any], figures: dict[str, bytes]) -> None:
        """Write the report; without a stress test in it, the picture and the list of its cases are dropped."""
        if "stress" not in report:
            self.dropped |= {FAILURES, f"{FAILURES_FIGURE}.png"}
            figures = {name: data for name, data in figures.items() if name != FAILURES_FIGURE}
        self.dropped |= {f"{name}.png" for name in FIGURES}
        write_report(self.work, report, figures)

    def write_rescheduled(
        self, model: DynamicModel, manifest: dict[str, Any], report: dict[str, Any], figures: dict[str, bytes]
    ) -> None:
        """Write all that a schedule changes: graph, manifest and report."""
        write_json(model_to_dict(model), self.work / GRAPH)
        write_json(without_nan(manifest), self.work / MANIFEST)
        self.write_report(report, figures)


@contextmanager
def rewritten(folder: Path) -> Iterator[Rewrite]:
    """Change a bundle in place, completely or not at all. Open it before the work: it says at once if the bundle cannot
    be written, or is being written by another run.
    """
    dropped: set[str] = set()
    check_report(folder)
    with new_folder(folder, force=True, update=True, without=dropped) as work:
        yield Rewrite(work, dropped)
