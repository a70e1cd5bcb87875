"""`dcconvert stress`: cases, figures, what it puts into a bundle, and what goes stale."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from dcconvert.commands import run_planner
from dcconvert.detail import KINDS
from dcconvert.export.bundle import new_folder, read_bundle
from dcconvert.progress import Stages
from dcconvert.reschedule import Rescheduled, old_figures, old_report, write_rescheduled
from dcconvert.sampling import SOLVERS, Sampler, initial_noise, labels_for
from dcconvert.stress import (
    Cases,
    detail_psnr,
    judged,
    original_step,
    partial_run,
    run_at,
    start_of,
)
from tests.dcconvert.harness import TOKENS, contents, refusal, run_cli


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twelve noisy images with labels: detail everywhere."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 16, 16), dtype=np.uint8)
    images[:4] = 0
    images[np.arange(4), 0, 3 + np.arange(4), 4] = 255  # a dot on plain ground
    np.savez(path, images=images, labels=np.arange(12) % 4)
    return path


@pytest.fixture(params=["carry", "chunk"], scope="module")
def stressed(request, main_job, chunk_job, data, tmp_path_factory):
    """A bundle that went through the stress set at two ratios, and what was printed."""
    job = {"carry": main_job, "chunk": chunk_job}[request.param]
    folder = Path(shutil.copytree(job.folder, tmp_path_factory.mktemp("stressed") / "bundle"))
    run = run_cli("stress", folder, "--data", data, "--ratio", "3x", "--ratio", "6x", "--count", 2, "--threads", 1)
    assert run.code == 0, run.err
    return folder, run, job


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_failures_are_listed_with_everything_to_find_them(stressed):
    folder, _, _ = stressed
    failures, found = read(folder, "failures.json"), read(folder, "report.json")["stress"]
    assert found["cases"] == 8
    assert len(failures) == 12  # of sixteen runs
    assert [case["detail_psnr"] for case in failures] == sorted(case["detail_psnr"] for case in failures)
    for case in failures:
        assert case["kind"] in KINDS
        assert case["ratio"] in (3, 6)
        assert case["seed"] == case["source_index"]
        assert case["class"] == case["source_index"] % 4
        assert case["class_name"] == ["bag", "boot", "coat", "shirt"][case["class"]]
        early, late = case["looks"]
        assert early["noise_level"] > late["noise_level"]
        for look in (early, late):
            assert look["timestep"] == pytest.approx(1000 * look["noise_level"], abs=1)
            assert len(look["kept"]) == look["kept_tokens"] <= TOKENS
            assert 0 <= look["detail_kept"] <= 1
            share = look["kept_tokens"] / TOKENS
            assert look["attention_to_detail"] == pytest.approx(look["detail_kept"] / share)
    dots = [case["source_index"] for case in failures if case["kind"] == "small object"]
    assert set(dots) <= set(range(4))


def test_the_report_shows_table_and_gallery(stressed):
    folder, run, _ = stressed
    rows = read(folder, "report.json")["stress"]["rows"]
    assert {(row["ratio"], row["kind"]) for row in rows} == {(ratio, kind) for ratio in (3, 6) for kind in KINDS}
    page = (folder / "report.html").read_text()
    assert "Stress set" in page
    assert "Worst cases of the stress set" in page
    assert (folder / "failures.png").is_file()
    assert all(kind.split()[0] in run.out for kind in KINDS)
    assert "failures.json" in run.out


def test_the_bundle_is_otherwise_as_it_was(stressed):
    folder, _, job = stressed
    assert set(contents(folder)) == {*contents(job.folder), "failures.json", "failures.png"}
    for name in ("graph.json", "manifest.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (job.folder / name).read_bytes()
    before, after = read(job.folder, "report.json"), read(folder, "report.json")
    assert {name: value for name, value in after.items() if name not in ("stress", "limits")} == {
        name: value for name, value in before.items() if name != "limits"
    }
    run = run_cli("sample", folder, "-n", 1, "-o", folder.parent / "one.png")
    assert run.code == 0, run.err


def test_another_schedule_makes_it_stale(stressed, tmp_path):
    folder = Path(shutil.copytree(stressed[0], tmp_path / "bundle"))
    bundle = read_bundle(folder)
    sampler, planner = run_planner(bundle, None)
    made = Rescheduled.of(bundle, planner.at_ratio(2.0, sampler.taus).schedule, sampler, Stages(Console(quiet=True)))
    report = made.report(old_report(folder))
    assert "stress" not in report
    with new_folder(folder, force=True) as work:
        write_rescheduled(bundle, made.model, made.manifest(bundle.manifest), report, old_figures(folder), work)
    assert "failures.json" not in contents(folder)
    assert "failures.png" not in contents(folder)
    assert "Worst cases" not in (folder / "report.html").read_text()


# Pieces


def cases_of(bundle, count=3):
    x = torch.tanh(initial_noise(5, count, 1, 16))
    detail = torch.rand(count, *bundle.model.spec.grid, generator=torch.Generator().manual_seed(0))
    numbers = list(range(count))
    return Cases(x, labels_for(count, 4), initial_noise(9, count, 1, 16), numbers, numbers, ["hair"] * count, detail)


@torch.no_grad()
def test_keeping_everything_is_the_original(bundle):
    sampler, planner = run_planner(bundle, None)
    cases = cases_of(bundle)
    wanted = partial_run(sampler, cases, original_step(bundle), lambda: None)
    outcome = run_at(bundle, sampler, planner.at_ratio(1.0, sampler.taus), cases, lambda: None)
    torch.testing.assert_close(outcome.images, wanted, rtol=1e-3, atol=1e-3)
    for look in outcome.looks:
        assert look.keep.all()
        assert float(look.error.max()) < 1e-4
    facts = judged(bundle, sampler, cases, outcome, wanted)[0]
    assert facts["detail_psnr"] > 60
    assert facts["looks"][0]["attention_to_detail"] == pytest.approx(1)
    assert facts["looks"][0]["dropped_error"] is None


@torch.no_grad()
def test_the_error_of_a_look_is_that_of_the_step(chunk_job):
    """Mode chunk remembers nothing: the step can be made again."""
    bundle = read_bundle(chunk_job.folder)
    sampler, planner = run_planner(bundle, None)
    cases, made = cases_of(bundle), planner.at_ratio(4.0, sampler.taus)
    seen: dict[float, torch.Tensor] = {}
    outcome = run_at(bundle, sampler, made, cases, lambda: None)
    model = bundle.model.with_schedule(made.schedule)

    def watch(x, t, y):
        seen[float(t[0]) / 1000] = x
        return model(x, t, y)

    partial_run(sampler, cases, watch, lambda: None)
    for look in outcome.looks:
        x = seen[look.tau]
        t = torch.full((3,), 1000 * look.tau)
        found, wanted = model(x, t, cases.labels), bundle.model.original_graph(x, t, cases.labels)[0]
        error = (found - wanted).square().flatten(1).mean(1) / wanted.square().flatten(1).mean(1)
        torch.testing.assert_close(look.error.mean((1, 2)), error, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction", ["flow", "eps"])
def test_a_run_may_start_in_its_middle(prediction, solver):
    """From data noised to that level, a model that knows the data gives them back; it sees only the later steps."""
    sampler, clean = Sampler(prediction, 10, solver), torch.rand(2, 1, 4, 4) * 2 - 1
    noise = torch.randn_like(clean)
    first = start_of(sampler)
    seen = []

    def knows(x, t, y):
        seen.append(float(t[0]))
        if prediction == "flow":
            return (x - clean) / (t / 1000).view(-1, 1, 1, 1)
        kept = sampler.scheduler.alphas_cumprod[t.long()].view(-1, 1, 1, 1)
        return (x - kept.sqrt() * clean) / (1 - kept).sqrt()

    x = sampler.add_noise(clean, noise, torch.full((2,), float(sampler.timesteps[first])))
    found = sampler.run(knows, x, torch.zeros(2, dtype=torch.int64), start=first)
    assert seen == pytest.approx(sampler.timesteps[first:].tolist())
    torch.testing.assert_close(found, clean, rtol=0, atol=2e-2)


def test_detail_psnr_weighs_by_detail():
    """An error of 0.2 in the one token that holds all detail is 20 dB, and elsewhere nothing."""
    wanted = torch.zeros(2, 1, 8, 8)
    found = wanted.clone()
    found[0, :, :2, :2] = 0.2
    found[1, :, 4:, 4:] = 0.2
    detail = torch.zeros(2, 4, 4)
    detail[:, 0, 0] = 3.0
    first, second = detail_psnr(found, wanted, detail).tolist()
    assert first == pytest.approx(10 * np.log10(4 / 0.04), abs=1e-3)
    assert second > 100


def test_detail_psnr_is_psnr_where_detail_is_everywhere():
    for channels in (1, 4):
        wanted = torch.randn(2, channels, 8, 8).clamp(-1, 1)
        found = (wanted + 0.1 * torch.randn_like(wanted)).clamp(-1, 1)
        from dcconvert.images import psnr

        torch.testing.assert_close(detail_psnr(found, wanted, torch.ones(2, 4, 4)), psnr(found, wanted))


def test_without_data_the_original_draws_them(chunk_job, tmp_path, monkeypatch):
    from dcconvert import stress

    monkeypatch.setattr(stress, "SAMPLES", 40)
    folder = Path(shutil.copytree(chunk_job.folder, tmp_path / "bundle"))
    run = run_cli("stress", folder, "--count", 1, "--seed", 7)
    assert run.code == 0, run.err
    found = read(folder, "report.json")["stress"]
    assert found["source"] == "40 samples of the original"
    assert {row["ratio"] for row in found["rows"]} == {4, 16}
    assert all(case["seed"] == 7 + case["source_index"] for case in read(folder, "failures.json"))


def test_a_ratio_that_is_not_possible_is_left_out(main_job, data, tmp_path):
    folder = Path(shutil.copytree(main_job.folder, tmp_path / "bundle"))
    run = run_cli("stress", folder, "--data", data, "--ratio", 3, "--ratio", 16, "--count", 1)
    assert run.code == 0, run.err
    assert "Stress at 16x was left out" in run.out
    assert [text for text in read(folder, "report.json")["limits"] if "Stress at 16x" in text]
    assert "leave nothing" in refusal(2, "stress", folder, "--data", data, "--ratio", 16)


def test_images_without_detail(chunk_job, tmp_path):
    folder = Path(shutil.copytree(chunk_job.folder, tmp_path / "bundle"))
    images = np.full((3, 1, 16, 16), 9, np.uint8)
    np.savez(tmp_path / "plain.npz", images=images, labels=np.zeros(3, np.int64))
    before = contents(folder)
    assert "any detail" in refusal(2, "stress", folder, "--data", tmp_path / "plain.npz")
    assert contents(folder) == before


def test_cases_do_not_depend_on_each_other(bundle):
    """One case alone gives what it gives among others."""
    sampler, planner = run_planner(bundle, None)
    cases, made = cases_of(bundle), planner.at_ratio(3.0, sampler.taus)
    with torch.no_grad():
        together = run_at(bundle, sampler, made, cases, lambda: None).images[:1]
        fields = {name: getattr(cases, name)[:1] for name in ("clean", "labels", "noise", "detail")}
        lists = {name: getattr(cases, name)[:1] for name in ("seeds", "sources", "kinds")}
        alone = run_at(bundle, sampler, made, replace(cases, **fields, **lists), lambda: None).images
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3)
