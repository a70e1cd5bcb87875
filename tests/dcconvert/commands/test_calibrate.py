"""`dcconvert calibrate`: what it stores, what it shows, and what it leaves alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

import dcconvert
from dcconvert.commands import rewrite_bundle as reschedule
from dcconvert.commands.calibrate import Bench, Finalist, Settings, Task
from dcconvert.evaluate import conversion_metrics as measure
from dcconvert.evaluate.schedule_search import Candidate, Trial
from dcconvert.export.bundle import read_bundle
from dcconvert.export.checks.parity import Check
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.sampling import steps
from dcconvert.sampling.bundle_runs import run_planner
from dcconvert.sampling.samplers import Sampler
from tests.dcconvert.harness import TOKENS, contents, refusal, run_cli

STEPS, RATIO = 12, 4  # of the main job
BUDGET = STEPS / RATIO
QUICK = ("--images", 2, "--reference-steps", 8, "--threads", 1)
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


@pytest.fixture
def exported(monkeypatch, original_onnx):
    """The original need not be exported again."""
    for module in (steps, measure):
        monkeypatch.setattr(module, "export_original", lambda model, path, inputs: shutil.copy(original_onnx, path))


def found_by_search(monkeypatch, score):
    """Replace the search by one that finds a single candidate."""
    candidate = Candidate(8, 2, (0.2, 0.6, 1.0))

    def search(bench, task, images, tick):
        taus = bench.sampler(candidate.steps, task.solver).taus
        schedule = candidate.schedule(task.budget, taus)
        return [Trial(candidate, schedule, tuple(schedule.run_counts(taus, TOKENS).tolist()), score)]

    def finalists(bench, task, trials, images, tick):
        return [Finalist(trial, bench.sampler(trial.candidate.steps, task.solver), trial.score) for trial in trials]

    monkeypatch.setattr(Bench, "search", search)
    monkeypatch.setattr(Bench, "finalists", finalists)


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


def test_samples_are_those_of_the_stored_schedule(calibrated, found, tmp_path, monkeypatch):
    folder, *_ = calibrated
    kept: list[int] = []
    plan = StepPlanner.carry

    def watch(self, history, scores, counts, *more):
        kept.append(int(counts[0]))
        return plan(self, history, scores, counts, *more)

    monkeypatch.setattr(StepPlanner, "carry", watch)
    run = run_cli("sample", folder, "-n", 2, "-o", tmp_path / "out.png")
    assert run.code == 0, run.err
    assert kept == [round(point["kept"] * TOKENS) for point in found["curves"]["after"]]


def test_it_says_so_everywhere(calibrated, found):
    folder, *_ = calibrated
    manifest = json.loads((folder / "manifest.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    steps, ratio = found["candidates"][0]["steps"], found["candidates"][0]["steps"] / BUDGET
    assert (manifest["conversion"]["schedule"], manifest["conversion"]["ratio"]) == ("curve", pytest.approx(ratio))
    assert manifest["conversion"]["knots"] == found["candidates"][0]["knots"]
    assert manifest["conversion"]["warm_up"] == found["candidates"][0]["warm_up"]
    assert report["calibration"] == found
    assert report["conversion"]["sampler"] == f"unipc, {steps} steps"
    assert report["conversion"]["ratio"] == pytest.approx(ratio)
    assert report["compute"]["run_gmacs"]["steps"] == steps == len(report["compute"]["per_step"])
    bucket_set = [bucket["row_tokens"] for bucket in manifest["buckets"]["buckets"]]
    assert [bucket["row_tokens"] for bucket in report["buckets"]["buckets"]] == bucket_set
    named = {f"denoise, batch {bucket['batch']}, {bucket['row_tokens']} tokens a sample"
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


def test_a_link_is_no_way_back_to_the_old_bundle(exported, fresh, monkeypatch, tmp_path):
    """Somebody else's hard links to the files that change keep the old contents."""
    before = digests(fresh)
    linked = tmp_path / "linked"
    shutil.copytree(fresh, linked, copy_function=os.link)
    found_by_search(monkeypatch, 99.0)
    assert run_cli("calibrate", fresh, *QUICK).code == 0
    assert digests(linked) == before
    assert (fresh / "model.safetensors").samefile(linked / "model.safetensors")


def test_copies_where_there_are_no_links(exported, fresh, monkeypatch):
    def no_links(*_):
        raise OSError("no links here")

    before = digests(fresh)
    monkeypatch.setattr(os, "link", no_links)
    found_by_search(monkeypatch, -1.0)
    assert run_cli("calibrate", fresh, *QUICK).code == 0
    after = digests(fresh)
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


def test_a_present_schedule_that_nothing_beats_stays(exported, fresh, monkeypatch):
    before, schedule = digests(fresh), read_bundle(fresh).model.schedule
    found_by_search(monkeypatch, -1.0)
    run = run_cli("calibrate", fresh, *QUICK)
    assert run.code == 0, run.err
    assert "No candidate beat the present schedule" in run.out
    assert read_bundle(fresh).model.schedule == schedule
    after = digests(fresh)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json", "report.json", "report.html"}
    manifest = json.loads((fresh / "manifest.json").read_text())
    assert manifest.pop("calibration")["changed"] is False
    assert manifest["sampler"]["steps"] == STEPS
    assert "it was not changed" in (fresh / "report.html").read_text()


def test_another_ratio_is_stored_even_if_it_is_worse(exported, fresh, monkeypatch):
    """The present schedule is no rival at another compute."""
    found_by_search(monkeypatch, -1.0)
    assert run_cli("calibrate", fresh, "--ratio", "5x", *QUICK).code == 0
    bundle = read_bundle(fresh)
    assert bundle.model.schedule.ratio == pytest.approx(8 / (STEPS / 5))
    # Of the run the bundle was made for, not of the shorter one that is stored now.
    again = Task.read(settings(fresh, ratio=5))
    assert again.budget == pytest.approx(STEPS / 5)
    assert again.most == STEPS
    assert again.same_compute
    assert Task.read(settings(fresh)).budget == pytest.approx(STEPS / 5)


def test_a_bundle_without_a_report_gets_one(exported, fresh, monkeypatch):
    for name in ("report.json", "report.html", "samples.png", "token_maps.png"):
        (fresh / name).unlink()
    found_by_search(monkeypatch, 99.0)
    run = run_cli("calibrate", fresh, *QUICK)
    assert run.code == 0, run.err
    report = json.loads((fresh / "report.json").read_text())
    assert "latency" not in report  # nothing had been measured
    assert report["model"]["tokens"] == TOKENS
    assert "<h2>Calibration</h2>" in (fresh / "report.html").read_text()


def test_the_score_is_that_of_the_images(exported, fresh, tmp_path):
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


def test_interrupted(exported, fresh, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = digests(fresh.parent)
    monkeypatch.setattr(Bench, "search", interrupt)
    run = run_cli("calibrate", fresh, *QUICK)
    assert run.code == 130
    assert "interrupted; nothing was left behind" in run.err
    assert digests(fresh.parent) == before
    assert [path.name for path in fresh.parent.iterdir()] == ["bundle"]


def test_a_failed_check(exported, fresh, monkeypatch):
    before = digests(fresh.parent)
    found_by_search(monkeypatch, 99.0)
    monkeypatch.setattr(reschedule, "check_runtime", lambda *_: [Check("denoise, batch 1", 1.0, 1e-4, "made up")])
    message = refusal(1, "calibrate", fresh, *QUICK, after=STAGES)
    assert "check 'denoise, batch 1' failed" in message
    assert digests(fresh.parent) == before


# Errors


def test_mode_chunk(chunk_job):
    assert "is in mode chunk: calibrate is for mode carry" in refusal(2, "calibrate", chunk_job.folder)


@pytest.mark.parametrize("entry", [[], {"run_steps": "many"}])
def test_a_damaged_entry(fresh, entry):
    change_manifest(fresh, lambda manifest: manifest.update(calibration=entry))
    assert "has a damaged calibration entry" in refusal(2, "calibrate", fresh)


def test_no_dit(fresh):
    change_manifest(fresh, lambda manifest: manifest.pop("config"))
    assert "was not made from a DiT checkpoint" in refusal(2, "calibrate", fresh)


def test_too_little_compute(fresh):
    assert "1 full steps are too few to distribute" in refusal(2, "calibrate", fresh, "--ratio", "12x")


def test_nothing_to_choose(fresh):
    assert "leaves nothing to choose" in refusal(2, "calibrate", fresh, "--ratio", 1)


def test_no_bundle(tmp_path: Path):
    assert "is not a bundle" in refusal(2, "calibrate", tmp_path)
