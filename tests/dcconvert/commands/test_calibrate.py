"""`dcconvert calibrate`: what it stores, what it shows, and what it leaves alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import dcconvert
from dcconvert.commands.calibrate import Bench, Settings, Task
from dcconvert.evaluate.schedule_search import Candidate
from dcconvert.export.bundle import read_bundle
from dcconvert.images.pixels import CAPTION
from dcconvert.passes.planning.schedule import CURVE, Policy, Timetable
from dcconvert.report.calibration import Calibration
from dcconvert.report.figures import comparison
from dcconvert.sampling.bundle_runs import run_planner
from dcconvert.sampling.samplers import Sampler, initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep
from tests.dcconvert.harness import TOKENS, contents, refusal, run_cli

pytestmark = pytest.mark.slow

STEPS, RATIO = 12, 4  # of the main job
BUDGET = STEPS / RATIO
QUICK = ("--images", 2, "--reference-steps", 8, "--threads", 1)
SHORT = 6  # steps of the short run
NARROW = ("--ratio", "1.25x", "--images", 1, "--reference-steps", 8, "--threads", 1)  # of it: hardly any choice
STAGES = ("export original", "draw the reference", "search", "compare on fresh images")
UNCHANGED = ("model.safetensors", "onnx/route.onnx", "onnx/denoise.onnx")


def change_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.unlink()
    path.write_text(json.dumps(manifest))


def digests(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def settings(folder, **given):
    asked = {"ratio": None, "solver": None, "images": 2, "reference_steps": 8, "seed": 0, "threads": 1, "batch": 0}
    return Settings(folder, command="dcconvert calibrate", **{**asked, **given})


@pytest.fixture
def fresh(main_job, tmp_path):
    return Path(shutil.copytree(main_job.folder, tmp_path / "bundle"))


def short_bundle(main_job, folder):
    """A bundle for a short run, without a report, whose figures need not be measured again."""
    shutil.copytree(main_job.folder, folder)
    change_manifest(folder, lambda manifest: manifest["sampler"].update(steps=SHORT))
    for name in ("report.json", "report.html", "samples.png", "token_maps.png"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module")
def narrowed(main_job, tmp_path_factory):
    """A short bundle after a calibration, and hard links to the files that it had before, with their digests."""
    work = tmp_path_factory.mktemp("narrowed")
    folder, linked = short_bundle(main_job, work / "bundle"), work / "linked"
    before = digests(folder)
    shutil.copytree(folder, linked, copy_function=os.link)
    run = run_cli("calibrate", folder, *NARROW)
    assert run.code == 0, run.err
    return folder, linked, before


@pytest.fixture(scope="module")
def worsened(narrowed, tmp_path_factory):
    """The same after another one for less compute, on a disk without links."""

    def no_links(*_, **__):
        raise OSError("no links here")

    folder = Path(shutil.copytree(narrowed[0], tmp_path_factory.mktemp("worsened") / "bundle"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", no_links)
        run = run_cli("calibrate", folder, *NARROW, "--ratio", "2x")
    assert run.code == 0, run.err
    return folder


@pytest.fixture(scope="module")
def calibrated(main_job, tmp_path_factory):
    """A run of the command for another solver, and the bundle as it was before."""
    folder = Path(shutil.copytree(main_job.folder, tmp_path_factory.mktemp("calibrated") / "bundle"))
    before = digests(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        run = run_cli("calibrate", folder, "--solver", "unipc", *QUICK)
    assert run.code == 0, run.err
    return folder, before, run


@pytest.fixture(scope="module")
def found(calibrated):
    return json.loads((calibrated[0] / "manifest.json").read_text())["calibration"]


# What is stored


def test_the_best_schedule_is_stored_and_used(calibrated, found):
    folder, *_ = calibrated
    best = found["candidates"][0]
    bundle = read_bundle(folder)
    sampler, planner = run_planner(bundle, None)
    assert (sampler.steps, sampler.solver) == (best["steps"], "unipc")
    assert planner.schedule.ratio == pytest.approx(best["steps"] / BUDGET)
    assert planner.schedule.dense_first == best["warm_up"]
    assert [list(knot) for knot in planner.schedule.knots] == [pytest.approx(knot) for knot in best["knots"]]
    counts = planner.run_counts(sampler.taus)
    assert sum(counts) / TOKENS == pytest.approx(best["cost"])
    assert [point["kept"] * TOKENS for point in found["curves"]["after"]] == pytest.approx(counts)
    assert dcconvert.load(folder).schedule == bundle.model.schedule
    assert max(bundle.bucket_set.lengths) == TOKENS
    assert bundle.bucket_set.batches == (1, 2)
    assert set(counts.tolist()) & set(bundle.bucket_set.lengths)


@torch.no_grad()
def test_samples_are_those_of_the_stored_schedule(calibrated, found, main_job, tmp_path):
    """The images of `sample` are those of the best candidate, as the report lists it."""
    best, model = found["candidates"][0], read_bundle(main_job.folder).model
    sampler = Sampler("flow", best["steps"], "unipc")
    knots = tuple((tau, kept) for tau, kept in best["knots"])
    schedule = Policy(CURVE, best["steps"] / BUDGET, best["warm_up"], knots=knots).timetable(sampler.taus)

    def sampled(schedule: Timetable) -> np.ndarray:
        made = model.with_schedule(schedule)
        images = sampler.run(ConvertedStep(made, made), initial_noise(0, 2, 1, 16), labels_for(2, 4))
        return np.asarray(comparison({"carry": images}, None))[CAPTION:].astype(int)

    run = run_cli("sample", calibrated[0], "-n", 2, "--runtime", "torch", "-o", tmp_path / "out.png")
    assert run.code == 0, run.err
    shown = np.asarray(Image.open(tmp_path / "out.png"))[CAPTION:].astype(int)
    assert abs(shown - sampled(schedule)).max() <= 1
    assert abs(shown - sampled(Policy("falling", 4).timetable(sampler.taus))).max() > 1


def test_it_says_so_everywhere(calibrated, found):
    folder, *_ = calibrated
    manifest = json.loads((folder / "manifest.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    steps, ratio = found["candidates"][0]["steps"], found["candidates"][0]["steps"] / BUDGET
    assert (manifest["conversion"]["schedule"], manifest["conversion"]["ratio"]) == ("curve", pytest.approx(ratio))
    assert manifest["conversion"]["knots"] == found["candidates"][0]["knots"]
    assert manifest["conversion"]["warm_up"] == found["candidates"][0]["warm_up"]
    assert report["calibration"] == found
    assert json.dumps(Calibration.from_json(found).to_json()) == json.dumps(found)
    assert report["conversion"]["sampler"] == f"unipc, {steps} steps"
    assert report["conversion"]["ratio"] == pytest.approx(ratio)
    assert report["compute"]["run_gmacs"]["steps"] == steps == len(report["compute"]["per_step"])
    bucket_set = [bucket["row_tokens"] for bucket in manifest["buckets"]["buckets"]]
    assert [bucket["row_tokens"] for bucket in report["buckets"]["buckets"]] == bucket_set
    named = {f"denoise, batch {bucket['batch']}, {bucket['row_tokens']} tokens per sample"
             for bucket in manifest["buckets"]["buckets"]}  # fmt: skip
    assert {name for name in manifest["parity"] if name.startswith("denoise")} == named
    assert {check["name"] for check in report["checks"]} == set(manifest["parity"])
    assert f"unipc, {steps} steps" in (folder / "report.html").read_text()
    names = [row["name"] for row in report["fidelity"]["images"]["rows"]]
    assert any(name.startswith("carry") and name.endswith(f"{steps} steps") for name in names)


def test_what_was_measured_is_measured_again(calibrated, main_job):
    now, before = (json.loads((f / "report.json").read_text()) for f in (calibrated[0], main_job.folder))
    assert set(before) < set(now)
    assert [row["runtime"] for row in now["latency"]] == [row["runtime"] for row in before["latency"]]
    assert now["latency"] != before["latency"]
    assert now["limits"] == before["limits"]


def test_weights_and_graphs_stay(calibrated):
    folder, before, _ = calibrated
    after = digests(folder)
    assert set(after) == set(before)
    assert {name for name in before if after[name] == before[name]} >= set(UNCHANGED)
    assert contents(folder.parent)[0] == "bundle"
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_a_link_is_no_way_back_to_the_old_bundle(narrowed):
    """Somebody else's hard links to the files that change keep the old contents."""
    folder, linked, before = narrowed
    assert digests(folder) != before
    assert digests(linked) == before
    assert (folder / "model.safetensors").samefile(linked / "model.safetensors")


def test_copies_where_there_are_no_links(worsened, narrowed):
    before, after = digests(narrowed[0]), digests(worsened)
    assert after["manifest.json"] != before["manifest.json"]
    assert all(after[name] == before[name] for name in UNCHANGED)


# What is found


def test_every_candidate_costs_the_budget(found):
    assert found["budget"] == BUDGET
    assert len(found["candidates"]) > 5
    for trial in found["candidates"]:
        assert trial["cost"] == pytest.approx(BUDGET, abs=trial["steps"] / 2 / TOKENS)
        assert trial["steps"] <= STEPS
    scores = [trial["psnr_screen"] for trial in found["candidates"]]
    assert scores == sorted(scores, reverse=True)


def test_the_table_has_the_controls_and_fresh_figures(calibrated, found):
    rows = found["rows"]
    kinds = [row["kind"] for row in rows]
    assert kinds == ["candidate"] * 5 + ["present"] + ["control"] * (len(rows) - 6)
    shown = [row for row in rows if row["kind"] != "candidate"] + rows[:1]
    assert all(row["psnr"] is not None and row["psnr_fresh"] is not None for row in shown)
    assert all(row["psnr"] != row["psnr_fresh"] for row in shown)
    candidates = [row["psnr"] for row in rows[:5]]
    assert candidates == sorted(candidates, reverse=True)
    controls = [row for row in rows if row["kind"] == "control"]
    assert {row["solver"] for row in controls} == {"unipc", "euler"}
    step = controls[0]["gmacs"] / controls[0]["steps"]
    equal = rows[0]["gmacs"] / step
    assert {row["steps"] for row in controls if row["solver"] == "unipc"} == {int(equal), int(equal) + 1}
    assert rows[5]["solver"] == "euler"
    assert rows[5]["steps"] == STEPS
    out = calibrated[2].out
    assert f"calibrated at the compute of {BUDGET:g} full steps" in out
    for words in ("candidate 1", "present schedule", "original, fewer steps", f"{rows[0]['psnr_fresh']:.2f}"):
        assert words in out


def test_the_report_shows_table_and_curves(calibrated, found):
    page = (calibrated[0] / "report.html").read_text()
    section = page[page.index("<h2>Calibration</h2>") :].split("</section>")[0]
    assert section.count("data:image/png;base64,") == 2
    assert f"{found['rows'][0]['psnr']:.2f}" in section
    assert "Candidate 1 is stored" in section


def test_a_present_schedule_that_nothing_beats_stays(narrowed, tmp_path):
    """Another search finds the schedule that is there, and nothing better."""
    folder = Path(shutil.copytree(narrowed[0], tmp_path / "bundle"))
    before, bundle = digests(folder), read_bundle(folder)
    run = run_cli("calibrate", folder, *NARROW[2:])
    assert run.code == 0, run.err
    assert "No candidate beat the present schedule" in run.out
    assert read_bundle(folder).model.schedule == bundle.model.schedule
    after = digests(folder)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json", "report.json", "report.html"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.pop("calibration")["changed"] is False
    assert manifest["sampler"] == bundle.manifest["sampler"]
    assert "it was not changed" in (folder / "report.html").read_text()


def test_another_ratio_is_stored_even_if_it_is_worse(worsened):
    """The present schedule is no rival at another compute."""
    bundle = read_bundle(worsened)
    found = bundle.manifest["calibration"]
    best, present = (next(row for row in found["rows"] if row["kind"] == kind) for kind in ("candidate", "present"))
    assert best["psnr"] < present["psnr"]
    assert found["changed"]
    assert bundle.model.schedule.ratio == pytest.approx(best["steps"] / (SHORT / 2))
    # Of the run the bundle was made for, not of the shorter one that is stored now.
    again = Task.read(settings(worsened, ratio=2))
    assert again.budget == pytest.approx(SHORT / 2)
    assert again.most == SHORT
    assert again.same_compute
    assert Task.read(settings(worsened)).budget == pytest.approx(SHORT / 2)


def test_a_bundle_without_a_report_gets_one(narrowed):
    report = json.loads((narrowed[0] / "report.json").read_text())
    assert "latency" not in report  # nothing had been measured
    assert report["model"]["tokens"] == TOKENS
    assert "<h2>Calibration</h2>" in (narrowed[0] / "report.html").read_text()


def test_the_score_is_that_of_the_images(fresh, tmp_path):
    """Keeping nearly everything is nearly the original, and a reference compared with itself is exact."""
    task = Task.read(settings(fresh))
    bench = Bench(task, tmp_path)
    images = task.images(0)
    bench.refer(images, 8, lambda _: None)
    sampler = Sampler("flow", 8)
    assert images.psnr(sampler, bench.original).min() > 100
    few, many = (Candidate(8, 1).schedule(budget, sampler.taus) for budget in (2, 7.9))
    worse, better = (images.psnr(sampler, bench.converted(schedule)).mean() for schedule in (few, many))
    assert worse < better


# What is left alone


def test_interrupted(fresh):
    before = digests(fresh.parent)
    run = run_cli("calibrate", fresh, *QUICK, interrupt_at="draw the reference")
    assert run.code == 130
    assert "interrupted; nothing was left behind" in run.err
    assert digests(fresh.parent) == before
    assert [path.name for path in fresh.parent.iterdir()] == ["bundle"]


def test_a_failed_check(main_job, tmp_path):
    """The ONNX graphs are those of other weights."""
    folder = short_bundle(main_job, tmp_path / "bundle")
    path = folder / "onnx" / "denoise.onnx"
    graph = onnx.load(path)
    weight = max(graph.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    weight.CopyFrom(onnx.numpy_helper.from_array(1.1 * onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(graph, path)
    before = digests(tmp_path)
    message = refusal(1, "calibrate", folder, *NARROW, after=STAGES)
    assert re.search(r"check 'denoise, batch \d.*' failed", message)
    assert digests(tmp_path) == before


# Errors


def test_mode_chunk(chunk_job):
    assert "is in mode chunk: calibrate is for mode carry" in refusal(2, "calibrate", chunk_job.folder)


@pytest.mark.parametrize("entry", [[], {"run_steps": "many"}])
def test_a_damaged_entry(fresh, entry):
    change_manifest(fresh, lambda manifest: manifest.update(calibration=entry))
    assert re.search(r"manifest\.json: calibration.* is .*, but must be", refusal(2, "calibrate", fresh))


def test_no_dit(fresh):
    change_manifest(fresh, lambda manifest: manifest.pop("config"))
    assert "was not made from a DiT checkpoint" in refusal(2, "calibrate", fresh)


def test_too_little_compute(fresh):
    assert "1 full steps are too few to distribute" in refusal(2, "calibrate", fresh, "--ratio", "12x")


def test_nothing_to_choose(fresh):
    assert "leaves nothing to choose" in refusal(2, "calibrate", fresh, "--ratio", 1)


def test_no_bundle(tmp_path: Path):
    assert "is not a bundle" in refusal(2, "calibrate", tmp_path)
