"""Measurements: what they compare, and that the figures add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dcconvert.evaluate import (
    Fidelity,
    Runtime,
    compute_section,
    fidelity,
    latency_row,
    latency_section,
    memory_section,
    torch_step,
)
from dcconvert.passes.model import StepPlanner
from dcconvert.passes.schedule import Schedule
from dcconvert.sampling import Sampler, initial_noise, labels_for
from tests.dcconvert.harness import TOKENS

TAUS = Sampler("flow", 4).taus


@pytest.fixture
def planner(bundle):
    """The run of the main job: 4 falling steps, 16 tokens on average."""
    return StepPlanner(bundle.model.spec, bundle.model.options, bundle.model.schedule.centred(TAUS))


@pytest.fixture
def everything(bundle, original_onnx):
    """A runtime that keeps all tokens: the original, in the end."""
    planner = StepPlanner(bundle.model.spec, bundle.model.options, Schedule("constant", 1))
    return Runtime.open(bundle.model, planner, bundle.ladder, bundle.onnx, original_onnx.parent, threads=1)


def call(batch=2):
    x = initial_noise(0, batch, 1, 16)
    return x, torch.full((batch,), 600.0), labels_for(batch, 4)


# Steps


@torch.no_grad()
def test_steps_of_every_runtime_agree(runtime, bundle):
    x, t, y = call()
    wanted = bundle.model.original(x, t, y)
    torch.testing.assert_close(runtime.original_step(x, t, y), wanted, rtol=1e-4, atol=1e-4)
    wanted = bundle.model(x, t, y)
    torch.testing.assert_close(runtime.converted_step(x, t, y), wanted, rtol=1e-4, atol=1e-4)
    [found] = torch_step(bundle.model, bundle.model.step_planner, {"x": x, "t": t, "y": y})
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert runtime.name == "ONNX Runtime CPU"


def test_the_planner_of_a_run_decides(everything):
    x, t, y = call()
    wanted = everything.original_step(x, t, y)
    torch.testing.assert_close(everything.converted_step(x, t, y), wanted, rtol=1e-4, atol=1e-4)
    assert everything.converted.last_plan.keep.all()


# Compute


def test_compute_adds_up(bundle, planner):
    compute = compute_section(bundle.model, planner, TAUS)
    steps, run = compute["per_step"], compute["run_gmacs"]
    assert [step["tau"] for step in steps] == [1, 0.75, 0.5, 0.25]
    assert np.mean([step["kept"] for step in steps]) == pytest.approx(16, abs=0.5)
    kept = [step["kept"] for step in steps]
    assert kept == sorted(kept, reverse=True)  # falling
    assert kept[0] > kept[-1]
    gmacs = [step["gmacs"] for step in steps]
    assert gmacs == sorted(gmacs, reverse=True)
    assert run == {"original": 4 * compute["original_gmacs"], "converted": pytest.approx(sum(gmacs)), "steps": 4}
    assert compute["ratio"] == pytest.approx(run["original"] / run["converted"])
    assert 1 < compute["ratio"] < 3  # one of three blocks is the trunk


def test_compute_of_everything_is_hardly_more_than_the_original(everything):
    compute = compute_section(everything.model, everything.converted.planner, TAUS)
    assert {step["kept"] for step in compute["per_step"]} == {TOKENS}
    assert compute["ratio"] == pytest.approx(1, rel=0.05)


# Latency and memory


def test_a_row_weights_buckets_by_their_steps():
    """Three steps of four at 2 s, one at 6 s: 3 s on average."""
    times = {"original": [6.0, 6.0], "few": [2.0, 2.0], "many": [6.0, 6.0]}
    compute = {"original_gmacs": 10.0}
    row = latency_row("r", 8, times, {"few": 0.75, "many": 0.25}, {"few": 1.0, "many": 5.0}, compute)
    assert row["speedup"] == pytest.approx(2)
    assert row["flop_ratio"] == pytest.approx(5)
    assert row["efficiency"] == pytest.approx(0.4)
    assert row["original_ms"]["median"] == 6000
    assert row["converted_ms"]["median"] == 3000
    assert {name: figures["median"] for name, figures in row["by_bucket_ms"].items()} == {"few": 2000, "many": 6000}
    assert (row["runtime"], row["batch"]) == ("r", 8)


def test_every_bucket_of_the_run_is_timed(runtime, bundle, planner):
    compute = compute_section(bundle.model, planner, TAUS)
    ticks: list[str] = []
    runtime.converted.planner = planner
    on_ort, on_torch = latency_section(runtime, compute, 2, 3, tick=ticks.append)
    assert (on_ort["runtime"], on_torch["runtime"]) == ("ONNX Runtime CPU", "torch CPU, eager")
    used = {bundle.ladder.choose(2, step["kept"]).row_tokens for step in compute["per_step"]}
    assert len(used) > 1
    for row in (on_ort, on_torch):
        assert set(row["by_bucket_ms"]) == {f"{tokens} tokens" for tokens in used}
        assert row["original_ms"]["runs"] == row["converted_ms"]["runs"] == 3
        assert row["speedup"] > 0
        assert row["flop_ratio"] == pytest.approx(compute["ratio"])
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["flop_ratio"])
    assert {bucket["row_tokens"] for bucket in on_ort["buckets"]} == used
    assert set(on_ort["stages_ms"]) == {"route", "plan", "denoise"}
    assert "stages_ms" not in on_torch
    assert set(ticks) == {"ONNX Runtime", "torch"}


def test_latency_without_torch(runtime, bundle, planner):
    compute = compute_section(bundle.model, planner, TAUS)
    assert len(latency_section(runtime, compute, 1, 1, in_torch=False)) == 1


def test_latency_needs_buckets(runtime, bundle, planner):
    runtime.converted.ladder = None
    with pytest.raises(ValueError, match="ladder"):
        latency_section(runtime, compute_section(bundle.model, planner, TAUS), 2, 1)


def test_memory_is_that_of_fresh_processes(runtime, bundle, planner, original_onnx):
    compute = compute_section(bundle.model, planner, TAUS)
    rows = memory_section(runtime, compute, bundle.onnx, original_onnx, 2)
    assert [row["model"] for row in rows] == ["original", "converted"]
    assert {row["runtime"] for row in rows} == {"ONNX Runtime CPU, batch 2"}
    assert all(10 < row["peak_mb"] < 2000 for row in rows)


# Fidelity


def measured(runtime: Runtime, count=3, reference_steps=6) -> Fidelity:
    compute = compute_section(runtime.model, runtime.converted.planner, TAUS)
    return fidelity(runtime, "flow", initial_noise(0, count, 1, 16), labels_for(count, 4), compute, reference_steps)


def test_images_of_a_model_that_keeps_everything_are_the_originals(everything):
    result = measured(everything)
    assert all(point["error"] < 1e-4 for point in result.velocity_error)
    torch.testing.assert_close(result.images[result.converted], result.images[result.original], rtol=1e-3, atol=1e-3)
    assert all(mask.all() for mask in result.keep)
    assert set(result.images) == {"original, 6 steps", "original, 4 steps", "converted, 4 steps"}  # no fewer steps


def test_images_of_the_original_are_those_of_plain_sampling(runtime, bundle, planner):
    runtime.converted.planner = planner
    result = measured(runtime)
    with torch.no_grad():
        wanted = Sampler("flow", 6).run(bundle.model.original, initial_noise(0, 3, 1, 16), labels_for(3, 4))
    assert result.reference == "original, 6 steps"
    torch.testing.assert_close(result.images[result.reference], wanted, rtol=1e-3, atol=1e-3)


def test_fidelity_has_the_control_at_equal_compute(runtime, bundle, planner):
    runtime.converted.planner = planner
    compute = compute_section(bundle.model, planner, TAUS)
    result = measured(runtime)
    rows = {row["name"]: row for row in result.rows}
    assert list(rows) == list(result.images)
    equal = round(4 / compute["ratio"])
    assert set(rows) == {"original, 6 steps", "original, 4 steps", f"original, {equal} steps", "converted, 4 steps"}
    assert rows["original, 6 steps"]["psnr"] is None
    assert rows["original, 4 steps"]["psnr"] > rows["converted, 4 steps"]["psnr"] > 0
    assert rows[f"original, {equal} steps"]["gmacs"] == pytest.approx(equal * compute["original_gmacs"])
    assert rows["converted, 4 steps"]["gmacs"] == compute["run_gmacs"]["converted"]
    assert rows["original, 6 steps"]["steps"] == 6


def test_fidelity_remembers_what_was_kept(runtime, bundle, planner):
    runtime.converted.planner = planner
    result = measured(runtime)
    counts = planner.schedule.counts(TAUS, TOKENS)
    assert [mask.shape for mask in result.keep] == [(2, 8, 8)] * 4  # three images in parts of the ladder's two
    assert [mask.sum(axis=(1, 2)).tolist() for mask in result.keep] == [[count, count] for count in counts]
    assert [len(seen) for seen in result.mid] == [2] * 4
    torch.testing.assert_close(result.mid[0], initial_noise(0, 2, 1, 16))
    assert all(len(images) == 3 for images in result.images.values())


def test_errors_of_single_steps(runtime, planner):
    runtime.converted.planner = planner
    result = measured(runtime, count=2)
    assert [point["tau"] for point in result.velocity_error] == pytest.approx(TAUS.tolist())
    x, y = initial_noise(0, 2, 1, 16), labels_for(2, 4)
    t = torch.full((2,), 1000.0)
    wanted, found = runtime.original_step(x, t, y), runtime.converted_step(x, t, y)
    assert result.velocity_error[0]["error"] == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-4)


def test_the_section_of_a_report(runtime, planner):
    runtime.converted.planner = planner
    result = measured(runtime, count=2)
    section = result.section()
    assert section["velocity_error"] == result.velocity_error
    facts = {"reference": "original, 6 steps", "count": 2, "latents": False, "rows": result.rows}
    assert section["images"] == facts


def test_a_reference_as_long_as_the_run(runtime, planner):
    runtime.converted.planner = planner
    result = measured(runtime, count=2, reference_steps=4)
    assert [row["psnr"] is None for row in result.rows] == [row["name"] == "original, 4 steps" for row in result.rows]
    assert result.section()["images"]["count"] == 2
