"""Measurements: what they compare, and that the figures add up."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.families import FAMILIES, made
from dcconvert.evaluate.measure_steps import Shape, Timed, compute_section, latency_section, memory_section, timed_row
from dcconvert.export.checks.flops import converted_gmacs
from dcconvert.export.runtimes.ort import OrtModel
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
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


def test_what_is_made_once_in_a_run_counts_once():
    """The keys and values of a text, whatever the number of steps."""
    model = rewrite(*made(FAMILIES["pixart"]), method_of("carry"), Policy("constant", 2).timetable())
    once = []
    for steps in (3, 6):
        counts = np.array([16] + [8] * (steps - 1))
        compute = compute_section(model, counts, 1 - np.arange(steps) / steps)
        run = compute["run_gmacs"]
        assert run["original"] == pytest.approx(steps * compute["original_gmacs"])
        once.append(run["converted"] - sum(step["gmacs"] for step in compute["per_step"]))
    assert once[0] > 0
    assert once[0] == pytest.approx(once[1])


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
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    counts: list[list[int]] = []

    def original() -> None:
        clock.now += 6

    def converted(kept: np.ndarray) -> Any:
        counts.append(kept.tolist())
        share = 1.0 if kept[0] == 16 else 3.0
        clock.now += 2 * share
        return SimpleNamespace(last_times=StageTimes(0.5 * share, 0.1 * share, 1.4 * share))

    row = timed_row(Timed("r", original, converted), shapes, compute, 8, 2, lambda _: None)
    assert counts == [[16] * 8, [64] * 8] * 3  # the first time to warm up
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


class Watched:
    """A runtime whose runs note how many tokens their steps kept."""

    def __init__(self, runtime: OrtModel) -> None:
        self.runtime = runtime
        self.bucket_set = runtime.bucket_set
        self.provider = runtime.provider
        self.kept: list[int] = []

    def start(self, batch: int) -> Any:
        run = self.runtime.start(batch)

        def step(inputs: Any, counts: np.ndarray) -> None:
            run.step(inputs, counts)
            assert run.last_plan is not None
            self.kept.append(int(run.last_plan.counts.max()))
            watched.last_times = run.last_times

        watched = SimpleNamespace(step=step, last_times=None)
        return watched


def test_sparse_steps_are_timed_with_few_tokens(runtime, bundle, planner, taus):
    """In mode carry the first step of a run keeps everything: it only warms up."""
    runtime.converted = watched = Watched(runtime.converted)
    compute = compute_section(bundle.model, planner.run_counts(taus), taus)
    [row] = latency_section(runtime, compute, 2, 2, in_torch=False)
    lengths = [int(name.removesuffix(" tokens")) for name in row["by_bucket_ms"]]
    assert len(lengths) > 1
    assert watched.kept[len(lengths) :] == lengths * 2


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


def test_memory_is_that_of_the_largest_step(runtime, bundle, planner, taus, original_onnx, tmp_path, monkeypatch):
    """Its plan keeps as many tokens as any step of the run, and its state goes in and out in one place."""
    probe = tmp_path / "python"  # called as: python -c PROGRAM FOLDER FILE ...
    probe.write_text(f'#!/bin/sh\ncp -r "$3" "{tmp_path}/$(basename "$4" .onnx)" && echo 1000000\n')
    probe.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(probe))
    compute = compute_section(bundle.model, planner.run_counts(taus), taus)
    rows = memory_section(runtime, compute, bundle.onnx, original_onnx, 2)
    assert [row["peak_mb"] for row in rows] == [1, 1]

    def feeds(first_file: str) -> list[Any]:
        return [np.load(path) for path in sorted((tmp_path / first_file).iterdir())]

    [original], [_, denoise] = feeds("original"), feeds("route")
    assert set(original) == {"x", "t", "y"}
    most = max(step["kept"] for step in compute["per_step"])
    assert denoise["packed_index"].shape == (2, most)
    assert {spec.name for spec in bundle.model.spec.states} <= set(denoise)
