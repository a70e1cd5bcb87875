"""Mode steps from the command line: the table that a bundle holds, and what `tune` makes of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dcconvert
from dcconvert.commands import sample
from dcconvert.commands.evaluate import guidance_notes
from dcconvert.evaluate.comparison import Candidate
from dcconvert.evaluate.tuning import PRESENT, Images, Trial, Tuner
from dcconvert.export.bundle import read_bundle
from dcconvert.sampling.bundle_runs import RUN, bundle_run
from dcconvert.sampling.default_tables import default_table
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Guidance, initial_noise, labels_for
from tests.dcconvert.harness import TOKENS, refusal, run_cli

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(steps_job, tmp_path) -> Path:
    return Path(shutil.copytree(steps_job.folder, tmp_path / "bundle"))


def table_of(folder: Path) -> RunTable:
    return RunTable.from_dict(json.loads((folder / RUN).read_text()))


def test_a_bundle_holds_the_table_of_its_run(steps_job):
    table = table_of(steps_job.folder)
    assert table.evaluations == round(50 / 4)
    assert table.steps > table.evaluations
    report = steps_job.report
    assert report["conversion"]["mode"] == "steps"
    assert report["compute"]["run_gmacs"]["original_steps"] == 50
    assert report["compute"]["run_gmacs"]["steps"] == table.steps
    kept = [step["kept"] > 0 for step in report["compute"]["per_step"]]
    assert kept == [row.full for row in table.rows]
    assert all(check["passed"] for check in report["checks"])
    names = [row["name"] for row in report["fidelity"]["images"]["rows"]]
    assert any("graded" in name for name in names)
    assert any("unipc" in name for name in names)


def test_its_compute_is_that_of_its_computed_steps(steps_job):
    compute, table = steps_job.report["compute"], table_of(steps_job.folder)
    skipped = min(step["gmacs"] for step in compute["per_step"])
    wanted = compute["original_gmacs"] * table.evaluations + skipped * (table.steps - table.evaluations)
    assert compute["run_gmacs"]["converted"] == pytest.approx(wanted, rel=0.02)  # the update costs a subtraction


def test_the_run_of_a_bundle(steps_job):
    bundle = read_bundle(steps_job.folder)
    run, _ = bundle_run(bundle)
    assert run == table_of(steps_job.folder)
    other, _ = bundle_run(bundle, 100)
    assert isinstance(other, RunTable)
    assert other.evaluations == 25
    guided, _ = bundle_run(bundle, guidance=4.0)
    assert isinstance(guided, RunTable)
    assert (guided.guidance, guided.evaluations, guided.updates) == (4.0, 12, 0)  # forecasts lose there
    solver, planner = bundle_run(bundle, 20, "unipc")
    assert (solver.steps, solver.solver) == (20, "unipc")
    assert 0 in planner.run_counts(solver.taus)


def test_sample_says_when_guidance_changes_the_run(folder, tmp_path):
    run = run_cli("sample", folder, "-n", 1, "--guidance", 4, "-o", tmp_path / "out.png")
    assert run.code == 0, run.err
    assert "is not used; the run is the default table for guidance 4: 12 of 12 steps are computed" in run.err
    run = run_cli("sample", folder, "-n", 1, "--steps", 50, "-o", tmp_path / "out.png")
    assert "is not used" not in run.err  # these are its steps
    run = run_cli("sample", folder, "-n", 1, "--steps", 20, "-o", tmp_path / "out.png")
    assert "is not used" in run.err


def test_a_table_of_the_users_is_kept_for_another_guidance(folder):
    before = table_of(folder)
    own = replace(before, rows=(replace(before.rows[0], noise=0.25), *before.rows[1:]))
    (folder / RUN).write_text(json.dumps(own.to_dict()))
    run, _ = bundle_run(read_bundle(folder), guidance=4.0)
    assert run == own


def test_samples_are_drawn_by_the_table(folder, tmp_path):
    run = run_cli("sample", folder, "-n", 2, "--compare", "-o", tmp_path / "out.png")
    assert run.code == 0, run.err
    assert (tmp_path / "out.png").is_file()


def test_a_table_that_computes_every_step_is_run_as_it_says(folder, monkeypatch, tmp_path):
    """The schedule, which would skip some of them, has no say."""
    table = default_table("flow", 50, 10.0)
    assert all(row.full for row in table.rows)
    (folder / RUN).write_text(json.dumps(table.to_dict()))
    drawn: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(sample, "save_comparison", lambda images, *_: drawn.update(images))
    run = run_cli("sample", folder, "-n", 2, "--runtime", "torch", "-o", tmp_path / "out.png")
    assert run.code == 0, run.err
    bundle = read_bundle(folder)
    noise, labels = initial_noise(0, 2, 1, 16), labels_for(2, 4)
    step = Candidate.of(bundle).new_step(bundle.model)
    with torch.no_grad():
        wanted = table.run(lambda x, t, y: bundle.model.original_graph(x, t, y)[0], noise, labels)
        evaluated = table.run(step, noise, labels)
    assert all((kept == TOKENS).all() for kept in step.kept)
    for images in (*drawn.values(), evaluated):
        torch.testing.assert_close(images, wanted, rtol=1e-3, atol=1e-3)


def test_tune_stores_what_was_best_on_images_it_did_not_see(folder):
    before = table_of(folder)
    run = run_cli("tune", folder, "--images", 4, "--fresh", 3, "--reference-steps", 24, "--threads", 1)
    assert run.code == 0, run.err
    after, report = table_of(folder), json.loads((folder / "report.json").read_text())
    found = report["tuning"]
    assert after != before
    assert after.name == found["chosen"]
    figures = [row["psnr"] for row in found["rows"]]
    assert figures == sorted(figures, reverse=True)
    best = next(row for row in found["rows"] if row["name"] == found["chosen"])
    assert best["psnr"] == max(row["psnr"] for row in found["rows"] if not row["name"].startswith("original"))
    names = {row["name"] for row in found["rows"]}
    assert {"all steps computed, fitted", "1 skipped after each, fitted", "original, unipc", "original, euler"} <= names
    by_name = {row["name"]: row for row in found["rows"]}
    fit, plain = by_name["all steps computed, fitted"], by_name["all steps computed"]
    assert fit["psnr"] > plain["psnr"]
    assert "Chosen:" in run.out
    assert "Tuning" in (folder / "report.html").read_text()


def test_tune_keeps_the_present_table_if_nothing_is_better(folder, monkeypatch):
    before = (folder / RUN).read_bytes()

    def only_worse(self: Tuner, budget: float, seen: Images, fresh: Images, tick: Any) -> list[Trial]:
        return [self.trial("worse", default_table("flow", 2, 1), fresh, tick)]

    monkeypatch.setattr(Tuner, "trials", only_worse)
    run = run_cli("tune", folder, "--images", 2, "--fresh", 2, "--reference-steps", 24)
    assert run.code == 0, run.err
    assert RunTable.from_dict(json.loads(before)) == table_of(folder)
    assert json.loads((folder / "report.json").read_text())["tuning"]["chosen"] == PRESENT


def test_a_table_is_comparable_at_its_guidance_and_cost():
    tuner, table = Tuner(lambda: pytest.fail("not needed"), "flow", 0.001), default_table("flow", 12, 1)
    assert tuner.comparable(table, 12)
    assert not tuner.comparable(table, 11)
    assert not tuner.comparable(replace(table, guidance=4.0), 12)
    assert not tuner.comparable(replace(table, prediction="eps"), 12)


def test_tune_for_another_budget_and_guidance(folder):
    words = ("--ratio", "10x", "--guidance", 2, "--images", 2, "--fresh", 2, "--reference-steps", 12, "--polish", 1)
    run = run_cli("tune", folder, *words)
    assert run.code == 0, run.err
    table = table_of(folder)
    assert table.evaluations <= 5
    assert table.guidance == 2
    rows = json.loads((folder / "report.json").read_text())["tuning"]["rows"]
    polished = {row["name"] for row in rows if row["name"].endswith("polished")}
    assert "all steps computed, polished" in polished
    assert len(polished) == 2


def test_tune_refuses_other_modes_and_too_small_budgets(main_job, folder):
    run = run_cli("tune", main_job.folder)
    assert run.code == 2
    assert "is in mode carry, which has no run table" in run.err
    run = run_cli("tune", folder, "--ratio", "40x", "--images", 2, "--fresh", 2, "--reference-steps", 8)
    assert run.code == 2
    assert "a budget of 1.25 steps of the original" in run.err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}'])
def test_a_damaged_table_is_one_line(text, folder, tmp_path):
    (folder / RUN).write_text(text)
    run = run_cli("sample", folder, "-n", 1, "-o", tmp_path / "out.png")
    assert run.code == 2
    assert len(run.err.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["calibrate", "upcycle"])
def test_commands_of_other_modes_say_so(command, folder):
    run = run_cli(command, folder)
    assert run.code == 2
    assert "mode" in run.err
    assert "Traceback" not in run.err


def test_a_bundle_is_evaluated_beside_the_best_of_fewer_steps(steps_job, main_job, tmp_path):
    words = ("--images", 5, "--reference-steps", 12, "--batch", 2, "--json", tmp_path / "found.json")
    run = run_cli("evaluate", steps_job.folder, *words)
    assert run.code == 0, run.err
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    mine = next(row for row in rows if row["mode"] == "steps")
    assert mine["steps"] == table_of(steps_job.folder).steps
    assert mine["state_mb"] > 0
    solvers = {row["solver"] for row in rows if "time" in row["control"]}
    assert {"euler", "unipc", "graded"} <= solvers


def test_a_triton_repository_has_both_graphs(folder, tmp_path):
    run = run_cli("export-triton", folder, "-o", tmp_path / "triton", "--name", "dit")
    assert run.code == 0, run.err
    assert {path.name for path in (tmp_path / "triton").iterdir() if path.is_dir()} == {"dit", "dit_full", "dit_skip"}


def test_lite_cfg_is_not_there_for_mode_steps_yet(folder):
    said = refusal(2, "sample", folder, "--guidance", 2, "--lite-cfg", 8)
    assert "leave out --lite-cfg" in said


TINY = ("--images", 2, "--fresh", 2, "--reference-steps", 12, "--threads", 1)


def test_a_latency_is_a_budget(folder):
    """A run of all steps computed takes no longer, by the times that were measured."""
    run = run_cli("tune", folder, "--latency", 15, "--batch", 2, *TINY)
    assert run.code == 0, run.err
    found = json.loads((folder / "report.json").read_text())["tuning"]
    assert found["latency"] == 15
    assert found["batch"] == 2
    assert found["budget"] == pytest.approx(15 / found["times_ms"]["computed"]["median"])
    plain = next(row for row in found["rows"] if row["name"] == "1 skipped after each")
    assert plain["latency_ms"] <= 15 + 1e-6
    assert (
        plain["latency_ms"] + found["times_ms"]["computed"]["median"] > 15 - 2 * found["times_ms"]["skipped"]["median"]
    )
    assert "a whole run of 2 images" in run.out.replace("\n", " ")


def test_a_quality_is_reached_at_the_least_cost_and_confirmed(folder):
    run = run_cli("tune", folder, "--psnr", 1, *TINY)
    assert run.code == 0, run.err
    found = json.loads((folder / "report.json").read_text())["tuning"]
    assert found["budget"] == 2  # the least there is
    assert found["confirmed_psnr"] > 1
    assert "2 further images" in run.out.replace("\n", " ")


def test_goals_that_cannot_be_reached_are_one_line(folder):
    before = table_of(folder)
    assert "give one of them" in refusal(2, "tune", folder, "--psnr", 30, "--ratio", "4x", *TINY)
    assert "a run needs at least 2; ask for" in refusal(
        2, "tune", folder, "--latency", 0.001, *TINY, after=("measure steps",)
    )
    assert table_of(folder) == before


def test_a_bundle_that_is_loaded_and_saved_keeps_its_table(folder, tmp_path):
    """Or gets the default one, where nothing was fitted: programs in other languages need it."""
    fitted = replace(table_of(folder), fitted=True, guidance=2.0, name="mine")
    (folder / RUN).write_text(json.dumps(fitted.to_dict()))
    dcconvert.load(folder).save(tmp_path / "again")
    assert table_of(tmp_path / "again") == fitted
    (folder / RUN).unlink()
    dcconvert.load(folder).save(tmp_path / "default")
    assert table_of(tmp_path / "default") == bundle_run(read_bundle(folder))[0]


def test_a_table_that_was_fitted_for_another_guidance_is_used_with_a_note(folder, tmp_path):
    (folder / RUN).write_text(json.dumps(replace(table_of(folder), fitted=True).to_dict()))
    run = run_cli("sample", folder, "-n", 1, "--guidance", 3, "-o", tmp_path / "out.png")
    assert run.code == 0, run.err
    assert "was fitted for guidance 1 and is used with 3" in run.err
    run = run_cli("sample", folder, "-n", 1, "-o", tmp_path / "out.png")
    assert "was fitted" not in run.err
    bundle = read_bundle(folder)
    candidate = Candidate.of(bundle, guidance=Guidance(3.0))
    [note] = guidance_notes([candidate])
    assert f"'dcconvert tune {folder} --guidance 3'" in note
    assert not guidance_notes([Candidate.of(bundle)])


def written(table: RunTable, folder: Path) -> Path:
    """A folder with this run table."""
    folder.mkdir()
    (folder / RUN).write_text(json.dumps(table.to_dict()))
    return folder


def test_a_table_of_another_bundle_is_judged_and_taken_over(folder, tmp_path):
    """The default for fewer steps, which is as good as itself."""
    table = replace(default_table("flow", 6, 1), fitted=True, name="fitted elsewhere")
    run = run_cli("tune", folder, "--table", written(table, tmp_path / "other"), *TINY)
    assert run.code == 0, run.err
    assert table_of(folder) == table
    found = json.loads((folder / "report.json").read_text())["tuning"]
    names = {row["name"] for row in found["rows"]}
    assert names == {"the given table", "the unfitted default", "original, graded grid", "original, unipc"}
    assert {row["computed"] for row in found["rows"]} == {6}
    assert (found["chosen"], found["given"], found["budget"], found["images"]) == ("the given table", "other", 6, 0)
    assert (found["gain"], found["gain_error"]) == (0, 0)
    said = run.out.replace("\n", " ")
    assert "the table is that of other" in said
    assert "The fits saw" not in said
    assert "No run with skipped steps was better" not in said
    page = (folder / "report.html").read_text()
    assert "the unfitted default" in page


def test_a_table_that_is_worse_than_the_default_is_shown_and_changes_nothing(folder, tmp_path):
    plain = default_table("flow", 6, 1)
    worse = replace(plain, rows=tuple(replace(row, outputs=tuple(v / 2 for v in row.outputs)) for row in plain.rows))
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    run = run_cli("tune", folder, "--table", written(worse, tmp_path / "other") / RUN, *TINY)
    assert run.code == 1
    assert "dB worse than the unfitted default of as many computed steps; nothing was changed" in run.err
    assert "the given table" in run.out
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_table_that_was_not_fitted_serves_any_guidance(folder, tmp_path):
    table = default_table("flow", 4, 1)
    run = run_cli("tune", folder, "--guidance", 3, "--table", written(table, tmp_path / "other"), *TINY)
    assert run.code == 0, run.err
    assert table_of(folder) == replace(table, guidance=3.0)


def changed_rows(table: RunTable, **changes: object) -> RunTable:
    first, second, last = table.rows[0], table.rows[1], replace(table.rows[-1], **changes)  # type: ignore[arg-type]
    return replace(table, rows=(first, second, last))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            replace(default_table("flow", 6, 1), prediction="eps"),
            "a model that predicts eps, and this one predicts flow",
        ),
        (RunTable(default_table("flow", 2, 1).rows[:1]), "computes one step: it needs 2"),
        (changed_rows(default_table("flow", 3, 1), weights=(1.0, 0.0, 0.0, 0.0)), "the last 4 updates, and this model"),
        (replace(default_table("flow", 6, 1), fitted=True, guidance=4.0), "for guidance 4: tune with --guidance 4"),
    ],
)
def test_a_table_that_a_bundle_cannot_run_is_one_line(table, said, folder, tmp_path):
    assert said in refusal(2, "tune", folder, "--table", written(table, tmp_path / "other"), *TINY)


def test_what_is_no_table_is_one_line(folder, main_job, tmp_path):
    assert "is not there: give a bundle in mode steps" in refusal(2, "tune", folder, "--table", main_job.folder, *TINY)
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    assert str(damaged) in refusal(2, "tune", folder, "--table", damaged, *TINY)
    damaged.write_text("[]")
    assert "the whole is [], but must be an object" in refusal(2, "tune", folder, "--table", damaged, *TINY)


@pytest.mark.parametrize("goal", [("--ratio", "4x"), ("--latency", 20), ("--psnr", 30), ("--polish", 1)])
def test_a_table_comes_with_its_own_steps(goal, folder):
    assert "with its own steps: leave out" in refusal(2, "tune", folder, "--table", folder, *goal, *TINY)
