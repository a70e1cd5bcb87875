"""`dcconvert stress`: cases, figures, what it puts into a bundle, and what goes stale."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from dcconvert.commands.rewrite_bundle import Rescheduled, old_figures, old_report, rewritten
from dcconvert.commands.stress import Settings, looked_at, make_cases, run_at, stress_bundle
from dcconvert.evaluate.detail_kinds import KINDS, choose, on_tokens
from dcconvert.evaluate.stress_cases import BATCH, Cases, noised_run, original_step
from dcconvert.evaluate.stress_metrics import CaseFigures, judged
from dcconvert.export.bundle import read_bundle
from dcconvert.images.dataset import read_images
from dcconvert.passes.ir.errors import UsageError
from dcconvert.report.stress import Stress
from dcconvert.sampling.bundle_runs import run_planner
from dcconvert.sampling.samplers import Sampler, initial_noise, labels_for
from dcconvert.sampling.steps import silent
from dcconvert.terminal import Stages
from tests.dcconvert.harness import CONFIG, TOKENS, contents, refusal, run_cli

pytestmark = pytest.mark.slow


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
    assert 4 <= found["cases"] <= 8
    assert [case["ratio"] for case in failures] == [3] * (len(failures) // 2) + [6] * (len(failures) // 2)
    assert len(failures) == 2 * min(6, found["cases"])
    for ratio in (3, 6):
        errors = [case["detail_psnr"] for case in failures if case["ratio"] == ratio]
        assert errors == sorted(errors)
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
            assert look["kept_tokens"] < TOKENS, "the router is looked at where it drops something"
            assert (look["mean_age"] is None) == (found["rows"][0]["mean_age_late"] is None)
    dots = [case["source_index"] for case in failures if case["kind"] == "small object"]
    assert set(dots) <= set(range(4))


def test_files_hold_what_the_records_hold(stressed):
    folder, _, _ = stressed
    found, failures = read(folder, "report.json")["stress"], read(folder, "failures.json")
    assert json.dumps(Stress.from_json(found).to_json()) == json.dumps(found)
    assert json.dumps([CaseFigures.from_json(case).to_json() for case in failures]) == json.dumps(failures)


def test_the_report_shows_table_and_gallery(stressed):
    folder, run, _ = stressed
    rows = read(folder, "report.json")["stress"]["rows"]
    kinds = {row["kind"] for row in rows}
    assert {"texture", "strokes", "hair"} <= kinds <= {*KINDS}
    assert {(row["ratio"], row["kind"]) for row in rows} == {(ratio, kind) for ratio in (3, 6) for kind in kinds}
    page = (folder / "report.html").read_text()
    assert "<h2>Stress set" in page
    assert page.count("The worst cases at each ratio") == 2, "one picture: its text and its caption"
    assert page.index("<h2>Samples") < page.index("<h2>Stress set") < page.index("The worst cases at each ratio")
    assert (folder / "failures.png").is_file()
    assert all(kind in run.out for kind in kinds)
    assert "failures.json" in run.out


def test_the_bundle_is_otherwise_as_it_was(stressed):
    folder, _, job = stressed
    assert set(contents(folder)) == {*contents(job.folder), "failures.json", "failures.png"}
    for name in ("graph.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (job.folder / name).read_bytes()
    new, old = read(folder, "manifest.json"), read(job.folder, "manifest.json")
    changed = {name for name in new["files"] if new["files"][name] != old["files"].get(name)}
    assert changed == {"failures.json", "failures.png", "report.html", "report.json"}
    assert {**new, "files": old["files"]} == old
    before, after = read(job.folder, "report.json"), read(folder, "report.json")
    assert {name: value for name, value in after.items() if name != "stress"} == before
    run = run_cli("sample", folder, "-n", 1, "-o", folder.parent / "one.png")
    assert run.code == 0, run.err


def test_another_schedule_makes_it_stale(stressed, tmp_path):
    folder = Path(shutil.copytree(stressed[0], tmp_path / "bundle"))
    bundle = read_bundle(folder)
    sampler, planner = run_planner(bundle, None)
    made = Rescheduled.of(bundle, planner.at_ratio(2.0, sampler.taus).schedule, sampler, Stages(Console(quiet=True)))
    report = made.report(old_report(folder))
    assert "stress" not in report
    with rewritten(folder) as into:
        into.write_rescheduled(made.model, made.manifest(bundle.manifest), report, old_figures(folder))
    assert "failures.json" not in contents(folder)
    assert "failures.png" not in contents(folder)
    assert "Stress" not in (folder / "report.html").read_text()


def test_what_changes_no_schedule_keeps_it(stressed, tmp_path):
    """As a calibration that found nothing better; the list of cases stays beside the report."""
    folder = Path(shutil.copytree(stressed[0], tmp_path / "bundle"))
    bundle, failures = read_bundle(folder), read(folder, "failures.json")
    with rewritten(folder) as into:
        into.write_rescheduled(bundle.model, bundle.manifest, old_report(folder), old_figures(folder))
    assert read(folder, "failures.json") == failures
    assert contents(folder) == contents(stressed[0])


def test_a_second_test_replaces_the_first(stressed, data, tmp_path):
    first = stressed[0]
    folder, before = Path(shutil.copytree(first, tmp_path / "bundle")), read(first, "failures.json")
    run = run_cli("stress", folder, "--data", data, "--ratio", "2x", "--count", 1, "--threads", 1)
    assert run.code == 0, run.err
    assert {case["ratio"] for case in read(folder, "failures.json")} == {2}
    assert read(first, "failures.json") == before
    assert {row["ratio"] for row in read(folder, "report.json")["stress"]["rows"]} == {2}


# Pieces


def cases_of(bundle, count=3) -> Cases:
    x, noise = torch.tanh(initial_noise(5, count, 1, 16)), initial_noise(9, count, 1, 16)
    labels, numbers = labels_for(count, 4), list(range(count))
    part = run_planner(bundle, None)[0].tail(1)
    with torch.no_grad():
        wanted = noised_run(part, lambda: original_step(bundle), (x, noise, labels), silent)
    detail = torch.rand(count, *bundle.model.spec.grid, generator=torch.Generator().manual_seed(0))
    return Cases(part, x, labels, noise, numbers, numbers, ["hair"] * count, wanted, detail)


def planner_at(bundle, ratio):
    sampler, planner = run_planner(bundle, None)
    return planner.at_ratio(ratio, sampler.taus)


def run_through(bundle, planner, cases):
    return run_at(bundle, planner, cases, looked_at(cases.part, [planner]), silent)


@torch.no_grad()
def test_keeping_everything_is_the_original(bundle):
    cases = cases_of(bundle)
    outcome = run_through(bundle, planner_at(bundle, 1.0), cases)
    torch.testing.assert_close(outcome.images, cases.wanted, rtol=1e-3, atol=1e-3)
    for look in outcome.looks:
        assert look.keep.all()
        assert float(look.error.max()) < 1e-4
    facts = judged(cases, outcome, [])[0]
    assert facts.detail_psnr > 60
    assert facts.looks[0].attention_to_detail == pytest.approx(1)
    assert facts.looks[0].dropped_error is None


@torch.no_grad()
def test_the_error_of_a_look_is_that_of_the_step(chunk_job):
    """Mode chunk remembers nothing: the step can be made again."""
    bundle = read_bundle(chunk_job.folder)
    cases, made = cases_of(bundle), planner_at(bundle, 4.0)
    seen: dict[float, torch.Tensor] = {}
    outcome = run_through(bundle, made, cases)
    model = bundle.model.with_schedule(made.schedule)

    def watch(x, t, y):
        seen[float(t[0]) / 1000] = x
        return model(x, t, y)

    cases.run(cases.part, lambda: watch, silent)
    for look in outcome.looks:
        assert look.age is None
        x = seen[look.tau]
        t = torch.full((3,), 1000 * look.tau)
        found, wanted = model(x, t, cases.labels), bundle.model.original_graph(x, t, cases.labels)[0]
        error = (found - wanted).square().flatten(1).mean(1) / wanted.square().flatten(1).mean(1)
        torch.testing.assert_close(look.error.mean((1, 2)), error, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_kept_tokens_of_mode_carry_are_of_this_step(main_job):
    bundle = read_bundle(main_job.folder)
    for look in run_through(bundle, planner_at(bundle, 3.0), cases_of(bundle)).looks:
        assert look.age is not None
        assert ((look.age == 0) == look.keep).all()
        assert not look.keep.all()


@torch.no_grad()
def test_the_control_costs_what_the_run_costs(bundle, each_job):
    """Not what a whole run would: the part begins with dense steps of its own in mode carry."""
    cases, made = cases_of(bundle), planner_at(bundle, 3.0)
    outcome = run_through(bundle, made, cases)
    cost = sum(steps * share for steps, share in outcome.control_shares.items())
    assert cost == pytest.approx(max(1, outcome.cost))
    kept = made.run_counts(cases.part.taus)
    assert outcome.cost > kept.sum() / TOKENS  # head, tail and router are not for nothing
    steps = max(outcome.controls)
    assert isinstance(cases.part, Sampler)
    again = cases.run(cases.part.tail(0, steps), lambda: original_step(bundle), silent)
    assert torch.equal(outcome.controls[steps], again)
    assert cases.part.tail(0, steps).timesteps[0] == cases.part.timesteps[0], "from the same noise"


def test_looks_are_at_steps_that_drop_tokens(main_job):
    """At all ratios that drop any: their warm-ups differ."""
    bundle = read_bundle(main_job.folder)
    part = run_planner(bundle, None)[0].tail(3)
    planners = [planner_at(bundle, ratio) for ratio in (1.0, 1.5, 3.0, 6.0)]
    counts = {planner.schedule.ratio: planner.run_counts(part.taus) for planner in planners}
    assert (counts[1.0] == TOKENS).all()
    assert (counts[1.5] < TOKENS).sum() < (counts[6.0] < TOKENS).sum()
    early, late = looked_at(part, planners)
    assert early < late
    assert all(counts[ratio][step] < TOKENS for ratio in (1.5, 3.0, 6.0) for step in (early, late))
    assert looked_at(part, planners[:1]) == tuple(int(abs(part.taus - level).argmin()) for level in (0.6, 0.2))


@pytest.mark.parametrize("steps", [1, 2])
def test_runs_of_very_few_steps(steps, chunk_job, data, tmp_path):
    folder = Path(shutil.copytree(chunk_job.folder, tmp_path / "bundle"))
    manifest = read(folder, "manifest.json")
    manifest["sampler"]["steps"] = steps
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run = run_cli("stress", folder, "--data", data, "--ratio", 3, "--count", 1)
    assert run.code == 0, run.err
    early, late = read(folder, "failures.json")[0]["looks"]
    assert early["noise_level"] == late["noise_level"]


def test_without_data_the_original_draws_them(chunk_job, tmp_path):
    folder = Path(shutil.copytree(chunk_job.folder, tmp_path / "bundle"))
    stress_bundle(Settings(folder, None, (4.0, 16.0), 1, 7, 1, "", samples=40), Console(quiet=True))
    found = read(folder, "report.json")["stress"]
    assert found["source"] == "40 samples of the original"
    assert {row["ratio"] for row in found["rows"]} == {4, 16}
    assert "[default: 4x, 16x; in mode" in run_cli("stress", "--help").out
    assert all(case["seed"] == 7 + case["source_index"] for case in read(folder, "failures.json"))


def test_a_ratio_that_is_not_possible_is_left_out(main_job, data, tmp_path):
    folder = Path(shutil.copytree(main_job.folder, tmp_path / "bundle"))
    run = run_cli("stress", folder, "--data", data, "--ratio", 3, "--ratio", 16, "--count", 1)
    assert run.code == 0, run.err
    assert "16x was left out" in run.out
    assert [text for text in read(folder, "report.json")["stress"]["left_out"] if "16x was left out" in text]
    assert "16x was left out" in (folder / "report.html").read_text()
    assert "leave nothing" in refusal(2, "stress", folder, "--data", data, "--ratio", 16)


def test_images_without_detail(chunk_job, tmp_path):
    folder = Path(shutil.copytree(chunk_job.folder, tmp_path / "bundle"))
    images = np.full((3, 1, 16, 16), 9, np.uint8)
    np.savez(tmp_path / "plain.npz", images=images, labels=np.zeros(3, np.int64))
    before = contents(folder)
    words = ("stress", folder, "--data", tmp_path / "plain.npz")
    assert "any detail" in refusal(2, *words, after=["choose the images"])
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--data", "nowhere.npz"), "nowhere.npz does not exist"),
        (("--ratio", "0.5x"), "at least 1"),
        (("--ratio", "100x"), "less than one of the 64 tokens"),
        (("--count", 0), "0 is not in the range"),
    ],
)
def test_wrong_input(words, says, chunk_job):
    before = contents(chunk_job.folder.parent)
    assert says in refusal(2, "stress", chunk_job.folder, *words)
    assert contents(chunk_job.folder.parent) == before


def test_no_bundle(tmp_path):
    assert "is not a bundle" in refusal(2, "stress", tmp_path)


@torch.no_grad()
def test_detail_is_where_the_original_draws_it(chunk_job, data):
    """Not where the input had it; what the original does not draw at all is no case."""
    bundle = read_bundle(chunk_job.folder)
    sampler = Sampler("flow", 4)  # its last noise level is a power of two: `Draws` is exact
    settings = Settings(bundle.folder, data, (4.0,), 2, 0, 1, "")
    cases, _ = make_cases(bundle, sampler, settings, Stages(Console(quiet=True)))
    for i, kind in enumerate(cases.kinds):
        response = KINDS[kind](cases.wanted[i : i + 1].mean(1))[1]
        torch.testing.assert_close(cases.detail[i], on_tokens(response, bundle.model.spec.grid)[0])
    images = read_images(data, CONFIG).images
    drawn = images[[place for places in choose(images, 2).values() for place in places]]
    drawn[4:] = 0
    bundle.model.original_graph = Draws(drawn)  # type: ignore[assignment]
    cases, [text] = make_cases(bundle, sampler, settings, Stages(Console(quiet=True)))
    assert len(cases) == 4
    torch.testing.assert_close(cases.wanted, drawn[:4], rtol=1e-4, atol=1e-4)
    assert text.startswith("4 of 8 cases were left out")
    bundle.model.original_graph = Draws(torch.zeros_like(drawn))  # type: ignore[assignment]
    with pytest.raises(UsageError, match="draws none of the detail"):
        make_cases(bundle, sampler, settings, Stages(Console(quiet=True)))


class Draws(nn.Module):
    """A model whose every run ends at these images [B, C, H, W]: its velocity points away from them."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__()
        self.images = images

    def forward(self, x, t, y):
        return ((x - self.images) / (t / 1000).view(-1, 1, 1, 1),)


def test_cases_do_not_depend_on_each_other(bundle):
    """One case alone, and the same ones over and over in more than one batch, give what all give at once."""
    cases, made = cases_of(bundle), planner_at(bundle, 3.0)
    names = [field.name for field in fields(Cases) if field.name not in ("part", "guidance")]
    often = BATCH // len(cases) + 1
    many = {name: repeated(getattr(cases, name), often) for name in names}
    with torch.no_grad():
        together = run_through(bundle, made, cases)
        batches = run_through(bundle, made, replace(cases, **many))
        alone = run_through(bundle, made, replace(cases, **{name: getattr(cases, name)[:1] for name in names}))
    wanted = together.images.repeat(often, 1, 1, 1)
    assert BATCH < len(wanted) < 2 * BATCH
    torch.testing.assert_close(batches.images, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alone.images, together.images[:1], rtol=1e-3, atol=1e-3)
    for found, look in zip(batches.looks, together.looks, strict=True):
        assert (found.keep == np.tile(look.keep, (often, 1, 1))).all()
        torch.testing.assert_close(found.error, look.error.repeat(often, 1, 1), rtol=1e-2, atol=1e-4)


def repeated(values, times):
    """A list, or a tensor along its first axis, so many times over."""
    return torch.cat([values] * times) if isinstance(values, torch.Tensor) else values * times
