"""Measurements: what they compare, and that the figures add up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dcconvert.evaluate import measure_steps as evaluate
from dcconvert.evaluate.measure_steps import Shape, Timed, compute_section, latency_section, memory_section, timed_row
from dcconvert.export.checks import latency
from dcconvert.export.checks.flops import converted_gmacs
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.run import StageTimes
from dcconvert.sampling.samplers import Sampler, initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep, OrtPair, arrays_of
from tests.dcconvert.harness import TOKENS

TAUS = {"carry": Sampler("flow", 12).taus, "chunk": Sampler("flow", 4, "dpm++").taus}


@pytest.fixture
def taus(mode):
    """The steps of the main job's run."""
    return TAUS[mode]


@pytest.fixture
def everything(bundle, original_onnx):
    """A runtime that keeps all tokens: the original, in the end."""
    planner = StepPlanner(bundle.model.spec, bundle.model.method, Policy("constant", 1).timetable())
    return OrtPair.open(bundle.model, planner, bundle.bucket_set, bundle.onnx, original_onnx.parent, threads=1)


def call(batch=2, level=600.0, seed=0):
    x = initial_noise(seed, batch, 1, 16)
    return x, torch.full((batch,), level), labels_for(batch, 4)


def in_torch(runtime):
    """The model of a runtime under the same schedule."""
    return runtime.model.with_schedule(runtime.converted.planner.schedule)


# Steps


def kept_by(step: ConvertedStep) -> np.ndarray:
    """Keep mask [B, N] of the step that was made last."""
    assert step.run is not None
    assert step.run.last_plan is not None
    return step.run.last_plan.keep


@torch.no_grad()
def test_steps_of_every_runtime_agree(runtime, bundle):
    on_ort, on_torch = ConvertedStep(bundle.model, runtime.converted), ConvertedStep(bundle.model, in_torch(runtime))
    for number, level in enumerate((1000.0, 800.0, 300.0)):
        x, t, y = call(level=level, seed=10 * number)
        wanted = bundle.model.original(x, t, y)
        torch.testing.assert_close(runtime.original_step(x, t, y), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(on_ort(x, t, y), on_torch(x, t, y), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(kept_by(on_ort), kept_by(on_torch))
    assert runtime.name == "ONNX Runtime CPU"


def test_the_planner_of_a_run_decides(everything):
    x, t, y = call()
    wanted = everything.original_step(x, t, y)
    step = ConvertedStep(everything.model, everything.converted)
    torch.testing.assert_close(step(x, t, y), wanted, rtol=1e-4, atol=1e-4)
    assert kept_by(step).all()


@pytest.mark.parametrize("where", ["ort", "torch"])
def test_a_second_sampling_run_remembers_nothing_of_the_first(where, runtime, taus):
    """Each of two runs, one after the other, gives what it gives alone."""
    backend = runtime.converted if where == "ort" else in_torch(runtime)
    sampler = Sampler("flow", len(taus))

    def draw(seed, step):
        return sampler.run(step, initial_noise(seed, 2, 1, 16), labels_for(2, 4))

    with torch.no_grad():
        first, second = (draw(seed, ConvertedStep(runtime.model, backend)) for seed in (0, 7))
        again = draw(0, ConvertedStep(runtime.model, backend))
        torch.testing.assert_close(again, first, rtol=0, atol=0)
        alone = draw(7, ConvertedStep(runtime.model, backend))
    torch.testing.assert_close(alone, second, rtol=0, atol=0)
    assert not torch.allclose(first, second)


def test_a_used_step_is_of_no_use_for_another_image(main_job):
    """Noise that rises is another image: in mode carry that is an error, not a bad picture."""
    step = ConvertedStep(main_job.model, main_job.model)
    step(*call(level=600.0))
    with pytest.raises(UsageError, match="noise level of sample 0 rose"):
        step(*call(level=1000.0))


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
def test_guidance_agrees_in_torch_and_onnx_runtime(groups, bundle, runtime, taus):
    """A batch of 2B; with two groups both halves of a pair compute the same tokens (mode carry)."""
    runtime.converted.bucket_set = None  # made for batches of 2
    sampler = Sampler("flow", len(taus))
    images, keeps = [], []
    for backend in (runtime.converted, in_torch(runtime)):
        step = ConvertedStep(bundle.model, backend, groups)
        kept: list[np.ndarray] = []

        def watched(*values: Any, step=step, kept=kept) -> Any:
            output = step(*values)
            kept.append(kept_by(step))
            return output

        noise, labels = initial_noise(3, 2, 1, 16), labels_for(2, 4)
        images.append(sampler.run(watched, noise, labels, guidance=2.0, null_class=4))
        keeps.append(kept)
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(keeps[0], keeps[1])
    assert keeps[0][0].shape == (4, TOKENS)
    shared = [bool((keep[:2] == keep[2:]).all()) for keep in keeps[0]]
    assert all(shared) == (groups == 2 or bundle.model.method.router == "pool")  # which keeps the same everywhere


def test_arrays_go_by_the_names_of_the_model(bundle):
    x, t, y = call()
    found = arrays_of(bundle.model, x, t, y)
    assert list(found) == ["x", "t", "y"]
    np.testing.assert_array_equal(found["y"], y.numpy())


# Compute


def test_compute_adds_up(bundle, planner, taus, mode):
    compute = compute_section(bundle.model, planner.run_counts(taus), taus)
    steps, run = compute["per_step"], compute["run_gmacs"]
    assert [step["tau"] for step in steps] == pytest.approx(taus.tolist())
    assert np.mean([step["kept"] for step in steps]) == pytest.approx(16, abs=0.5)
    kept = [step["kept"] for step in steps]
    assert kept == sorted(kept, reverse=True)  # falling
    assert kept[0] > kept[-1]
    assert (kept[0] == TOKENS) == (mode == "carry")
    for step in steps:
        assert step["gmacs"] == pytest.approx(converted_gmacs(bundle.model, bundle.model.spec.example(3), step["kept"]))
    total = sum(step["gmacs"] for step in steps)
    original = len(steps) * compute["original_gmacs"]
    wanted = {"original": original, "converted": pytest.approx(total), "steps": len(steps)}
    assert run == {**wanted, "original_steps": len(steps)}
    assert compute["ratio"] == pytest.approx(run["original"] / run["converted"])
    assert 1 < compute["ratio"] < 4


def test_a_run_of_fewer_steps_stands_for_the_originals(bundle, planner, taus):
    counts = planner.run_counts(taus)
    same, longer = (compute_section(bundle.model, counts, taus, steps) for steps in (None, 2 * len(taus)))
    assert longer["run_gmacs"]["original"] == 2 * same["run_gmacs"]["original"]
    assert longer["run_gmacs"]["converted"] == same["run_gmacs"]["converted"]
    assert longer["ratio"] == pytest.approx(2 * same["ratio"])


def test_what_is_made_once_in_a_run_counts_once(bundle, planner, taus, monkeypatch):
    before = compute_section(bundle.model, planner.run_counts(taus), taus)["run_gmacs"]
    monkeypatch.setattr(evaluate, "prepare_gmacs", lambda model, inputs: 0.5)
    after = compute_section(bundle.model, planner.run_counts(taus), taus)["run_gmacs"]
    assert after["converted"] == pytest.approx(before["converted"] + 0.5)
    assert after["original"] == before["original"]


def test_compute_of_everything_is_hardly_more_than_the_original(everything, taus):
    compute = compute_section(everything.model, everything.converted.planner.run_counts(taus), taus)
    assert {step["kept"] for step in compute["per_step"]} == {TOKENS}
    assert compute["ratio"] == pytest.approx(1, rel=0.05)


# Latency and memory


def test_a_row_weights_buckets_by_their_steps(monkeypatch):
    """Three steps of four at 2 s, one at 6 s: 3 s on average."""
    few, many = Bucket(8, 128, 8, 16, 16), Bucket(8, 512, 8, 64, 64)
    compute: dict[str, Any] = {"ratio": 5.0, "per_step": [{"kept": 16}] * 3 + [{"kept": 64}]}
    compute["run_gmacs"] = {"steps": 4, "original_steps": 4}
    shapes = [Shape("16 tokens", few, np.full(8, 16), 0.75), Shape("64 tokens", many, np.full(8, 64), 0.25)]
    times = {"original": [6.0, 6.0], "16 tokens": [2.0, 2.0], "64 tokens": [6.0, 6.0]}
    counts: list[list[int]] = []

    def converted(kept: np.ndarray) -> Any:
        counts.append(kept.tolist())
        share = 1.0 if kept[0] == 16 else 3.0
        return SimpleNamespace(last_times=StageTimes(0.5 * share, 0.1 * share, 1.4 * share))

    def once(candidates: dict[str, Any], runs: int, tick: Any) -> dict[str, list[float]]:
        for candidate in candidates.values():
            candidate()
        assert list(candidates) == list(times)
        return times

    monkeypatch.setattr(evaluate, "interleaved", once)
    timed = Timed("r", lambda: None, converted)
    row = timed_row(timed, shapes, compute, 8, 2, lambda _: None)
    assert counts == [[16] * 8, [64] * 8]
    assert row["speedup"] == pytest.approx(2)
    assert row["flop_ratio"] == pytest.approx(5)
    assert row["efficiency"] == pytest.approx(0.4)
    assert row["original_ms"]["median"] == 6000
    assert row["converted_ms"]["median"] == 3000
    assert {name: figures["median"] for name, figures in row["by_bucket_ms"].items()} == {
        "16 tokens": 2000,
        "64 tokens": 6000,
    }
    assert row["stages_ms"] == {"route": 750.0, "plan": 150.0, "denoise": 2100.0}
    assert (row["runtime"], row["batch"]) == ("r", 8)


def test_every_bucket_of_the_run_is_timed(runtime, bundle, planner, taus):
    compute = compute_section(bundle.model, planner.run_counts(taus), taus)
    ticks: list[str] = []
    on_ort, on_torch = latency_section(runtime, compute, 2, 3, tick=ticks.append)
    assert (on_ort["runtime"], on_torch["runtime"]) == ("ONNX Runtime CPU", "torch CPU, eager")
    used = {bundle.bucket_set.choose(2, step["kept"]).row_tokens for step in compute["per_step"]}
    assert len(used) > 1
    for row in (on_ort, on_torch):
        assert set(row["by_bucket_ms"]) == {f"{tokens} tokens" for tokens in used}
        assert row["original_ms"]["runs"] == row["converted_ms"]["runs"] == 3
        assert row["speedup"] > 0
        assert row["flop_ratio"] == pytest.approx(compute["ratio"])
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["flop_ratio"])
        assert set(row["stages_ms"]) == {"route", "plan", "denoise"}
        assert sum(row["stages_ms"].values()) == pytest.approx(row["converted_ms"]["median"], rel=0.9)
    assert {bucket["row_tokens"] for bucket in on_ort["buckets"]} == used
    assert set(ticks) == {"ONNX Runtime CPU", "torch CPU, eager"}


def test_sparse_steps_are_timed_with_few_tokens(runtime, bundle, planner, taus, monkeypatch):
    """In mode carry the first step of a run keeps everything: it only warms up."""
    kept: list[tuple[str, int]] = []
    measured = latency.interleaved

    def watch(candidates: dict[str, Any], runs: int, **more: Any) -> Any:
        def watched(name: str, candidate: Any) -> Any:
            def call() -> None:
                candidate()
                if name != "original":
                    kept.append((name, int(runs_of[-1].last_plan.counts.max())))

            return call

        return measured({n: watched(n, c) for n, c in candidates.items()}, runs, **more)

    runs_of: list[Any] = []
    start = type(runtime.converted).start

    def remember(model: Any, batch: int) -> Any:
        runs_of.append(start(model, batch))
        return runs_of[-1]

    monkeypatch.setattr(type(runtime.converted), "start", remember)
    monkeypatch.setattr(evaluate, "interleaved", watch)
    latency_section(runtime, compute_section(bundle.model, planner.run_counts(taus), taus), 2, 2, in_torch=False)
    names = {name for name, _ in kept}
    assert len(names) > 1
    last = dict(kept)  # the last turn of each
    assert {f"{count} tokens" for count in last.values()} == names
    assert all(name == f"{count} tokens" for name, count in kept[len(names) :])


def test_latency_without_torch(runtime, bundle, planner, taus):
    compute = compute_section(bundle.model, planner.run_counts(taus), taus)
    assert len(latency_section(runtime, compute, 1, 1, in_torch=False)) == 1


def test_latency_needs_buckets(runtime, bundle, planner, taus):
    runtime.converted.bucket_set = None
    with pytest.raises(ValueError, match="bucket set"):
        latency_section(runtime, compute_section(bundle.model, planner.run_counts(taus), taus), 2, 1)


def test_memory_is_that_of_fresh_processes(runtime, bundle, planner, taus, original_onnx):
    compute = compute_section(bundle.model, planner.run_counts(taus), taus)
    rows = memory_section(runtime, compute, bundle.onnx, original_onnx, 2)
    assert [row["model"] for row in rows] == ["original", "converted"]
    assert {row["runtime"] for row in rows} == {"ONNX Runtime CPU, batch 2"}
    assert all(10 < row["peak_mb"] < 2000 for row in rows)


def test_memory_is_that_of_the_largest_step(runtime, bundle, planner, taus, original_onnx, monkeypatch):
    """Its plan keeps as many tokens as any step of the run, and its state goes in and out in one place."""
    feeds: list[Any] = []

    def look(files: Any, given: Any, folder: Any) -> float:
        feeds.append(given)
        return 1.0

    monkeypatch.setattr(evaluate, "peak_memory", look)
    compute = compute_section(bundle.model, planner.run_counts(taus), taus)
    memory_section(runtime, compute, bundle.onnx, original_onnx, 2)
    [original], [_, denoise] = feeds
    assert set(original) == {"x", "t", "y"}
    most = max(step["kept"] for step in compute["per_step"])
    assert denoise["packed_index"].shape == (2, most)
    assert {spec.name for spec in bundle.model.spec.states} <= set(denoise)
