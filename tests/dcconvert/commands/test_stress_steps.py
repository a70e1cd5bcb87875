"""`dcconvert stress` in mode steps: every case is noise, and the run table is compared with fewer steps."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from dcconvert.commands.stress import Settings, stress_bundle
from dcconvert.evaluate.detail_kinds import KINDS
from dcconvert.evaluate.stress_cases import original_step
from dcconvert.evaluate.stress_metrics import CaseFigures
from dcconvert.export.bundle import read_bundle
from dcconvert.images.pixels import GAP, TILE, psnr
from dcconvert.report.stress import Stress
from dcconvert.sampling.bundle_runs import bundle_run
from dcconvert.sampling.default_tables import original_run
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Sampler, initial_noise
from dcconvert.sampling.steps import ConvertedStep
from tests.dcconvert.harness import contents, refusal, run_cli

pytestmark = pytest.mark.slow


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def skipping(steps_job, tmp_path_factory):
    """A bundle in mode steps that went through the stress set, what was printed, and what it was before."""
    folder = Path(shutil.copytree(steps_job.folder, tmp_path_factory.mktemp("skipping") / "bundle"))
    said = io.StringIO()
    console = Console(file=said, width=200)
    stress_bundle(Settings(folder, None, (), 2, 3, 1, "dcconvert stress", samples=24), console)
    return folder, said.getvalue(), steps_job


def test_mode_steps_is_compared_with_the_original_in_fewer_steps(skipping):
    folder, said, job = skipping
    found, failures = read(folder, "report.json")["stress"], read(folder, "failures.json")
    table = RunTable.from_dict(read(folder, "run.json"))
    facts = found["skipping"]
    assert (facts["computed"], facts["skipped"]) == (table.evaluations, table.steps - table.evaluations) == (12, 8)
    assert (facts["full_steps"], facts["full_solver"], facts["fitted"]) == (50, "euler", False)
    assert found["source"] == "24 samples of the original"
    assert found["early"] is found["late"] is None
    kinds = [row["kind"] for row in found["rows"]]
    assert kinds == [*(kind for kind in KINDS if kind in kinds), "all"]
    assert found["rows"][-1]["cases"] == found["cases"] == sum(row["cases"] for row in found["rows"][:-1])
    for row in found["rows"]:
        assert row["ratio"] == 4
        assert 12 < row["cost"] < 13
        assert row["control_steps"] == [12, 13]
        assert row["gain"] == pytest.approx(row["psnr"] - row["control_psnr"], abs=1e-4)
        assert row["detail_gain_error"] > 0
        assert row["attention_to_detail_late"] is row["dropped_error_late"] is None, "there is no choice of tokens"
    for case in failures:
        assert case["looks"] == []
        assert case["seed"] == 3 + case["source_index"]
    assert "gain" in said
    assert "attention" not in said
    assert set(contents(folder)) == {*contents(job.folder), "failures.json", "failures.png"}


def test_files_and_page_of_mode_steps(skipping):
    folder = skipping[0]
    found, failures = read(folder, "report.json")["stress"], read(folder, "failures.json")
    assert json.dumps(Stress.from_json(found).to_json()) == json.dumps(found)
    assert json.dumps([CaseFigures.from_json(case).to_json() for case in failures]) == json.dumps(failures)
    text = (folder / "report.html").read_text()
    assert "no figures for the choice of" in text
    assert "12 steps are computed and 8 are skipped" in text
    assert "“Attention to detail”" not in text
    assert "12 and 13 at 4x" in text
    columns = 6  # original, converted, fewer steps, both errors, and in full
    assert Image.open(folder / "failures.png").width == columns * (TILE + GAP) - GAP


def test_a_case_of_mode_steps_is_what_its_seed_draws(skipping):
    """In whole runs of the stored table, and of the original on the graded grid."""
    folder = skipping[0]
    case, bundle = read(folder, "failures.json")[0], read_bundle(folder)
    table = bundle_run(bundle)[0]
    noise, labels = initial_noise(case["seed"], 1, 1, 16), torch.tensor([case["class"]])

    def original(run):
        return run.run(original_step(bundle), noise, labels)

    with torch.no_grad():
        found = table.run(ConvertedStep(bundle.model, bundle.model, by_table=True), noise, labels)
        wanted = original(original_run("flow", 200, "adams"))
        graded, full = original(original_run("flow", 12, "graded")), original(Sampler("flow", 50))
    assert float(psnr(found, wanted)) == pytest.approx(case["psnr"], abs=0.05)
    assert float(psnr(graded, wanted)) == pytest.approx(case["control_psnr"], abs=0.3)  # 13 steps have some weight
    assert float(psnr(full, wanted)) == pytest.approx(case["full_psnr"], abs=0.05)


def test_a_table_of_mode_steps_that_skips_nothing(steps_job, tmp_path):
    """This one is the control itself."""
    folder = Path(shutil.copytree(steps_job.folder, tmp_path / "bundle"))
    table = original_run("flow", 5, "graded")
    assert isinstance(table, RunTable)
    table = replace(table, guidance=2.0)
    (folder / "run.json").write_text(json.dumps(table.to_dict()))
    stress_bundle(Settings(folder, None, (), 1, 0, 1, "", samples=8), Console(quiet=True))
    found = read(folder, "report.json")["stress"]
    assert found["skipping"]["skipped"] == 0
    assert {row["ratio"] for row in found["rows"]} == {10}
    for row in found["rows"]:
        assert row["cost"] == 5
        assert row["gain"] == pytest.approx(0, abs=0.05)
    text = (folder / "report.html").read_text()
    assert "the original's graph with the numbers of the table" in text
    assert "All runs have guidance 2." in text


def test_options_that_mode_steps_has_no_use_for(steps_job, tmp_path):
    data = tmp_path / "images.npz"
    data.touch()
    assert "leave out --data" in refusal(2, "stress", steps_job.folder, "--data", data)
    assert "leave out --ratio" in refusal(2, "stress", steps_job.folder, "--ratio", "4x")


def test_tuning_removes_the_stress_test_of_the_old_table(skipping, tmp_path):
    folder = Path(shutil.copytree(skipping[0], tmp_path / "bundle"))
    words = ("--images", 2, "--fresh", 2, "--reference-steps", 8, "--threads", 1)
    run = run_cli("tune", folder, "--ratio", "10x", *words)
    assert run.code == 0, run.err
    assert "stress" not in read(folder, "report.json")
    assert not {"failures.json", "failures.png"} & {*contents(folder)}
    assert "<h2>Stress" not in (folder / "report.html").read_text()
