"""`dcconvert evaluate`: bundles beside their original, and what is refused."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcconvert.evaluate.comparison import Candidate, Comparison, control_steps, named_apart
from dcconvert.evaluate.image_quality import Wanted
from dcconvert.export.bundle import read_bundle
from dcconvert.export.checks.flops import attention_memory, converted_attention, original_attention
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.layout import MIXED_TILE
from dcconvert.report.evaluation import EvaluationReport, evaluation_page
from dcconvert.sampling.samplers import Guidance, initial_noise, labels_for
from tests.dcconvert.harness import TOKENS, contents, refusal, run_cli, write_network

pytestmark = pytest.mark.slow

QUICK = ("--runs", 1, "--images", 5, "--batch", 2, "--reference-steps", 14, "--threads", 1)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("network") / "tiny.onnx")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Fourteen pictures without labels."""
    path = tmp_path_factory.mktemp("real") / "real.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (14, 1, 16, 16), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def evaluated(main_job, chunk_job, network, real, tmp_path_factory):
    """Both modes side by side, everything asked for: what was printed, and the folder of what was written."""
    out = tmp_path_factory.mktemp("evaluated")
    files = ("--json", out / "f.json", "--html", out / "f.html", "--npz", out / "npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        words = (*QUICK, "--real", real, "--features", network, *files)
        run = run_cli("evaluate", main_job.folder, chunk_job.folder, *words)
    assert run.code == 0, run.err
    return run, out


@pytest.fixture(scope="module")
def figures(evaluated) -> dict[str, Any]:
    found = json.loads((evaluated[1] / "f.json").read_text())
    assert isinstance(found, dict)
    return found


def rows_of(figures, mode):
    return [row for row in figures["rows"] if row["mode"] == mode]


def test_every_row_has_its_cost(figures):
    originals, [carry], [chunk] = (rows_of(figures, mode) for mode in ("original", "carry", "chunk"))
    assert (carry["name"], chunk["name"]) == ("#1 carry 4x, 12 steps, euler", "#2 chunk 4x, 4 steps, dpm++")
    one_step = originals[0]["gmacs"] / originals[0]["steps"]
    for row in originals:
        assert row["gmacs"] == pytest.approx(one_step * row["steps"])
        assert row["step_ms"] == originals[0]["step_ms"]  # one measurement, in turns with the converted
    assert {(row["solver"], row["steps"]) for row in originals} >= {("euler", 12), ("euler", 6), ("dpm++", 4)}
    for row in figures["rows"]:
        assert row["images_per_second"] == pytest.approx(1e3 / row["latency_ms"])
        rounding = 0.0005 * row["steps"] / 2  # the step's milliseconds are written with three places
        assert row["latency_ms"] == pytest.approx(row["step_ms"]["median"] * row["steps"] / 2, abs=rounding + 1e-9)
        assert row["peak_mb"] > 10
        assert (row["state_mb"] > 0) == (row["mode"] == "carry")
    assert carry["attention_step_mb"] < originals[0]["attention_step_mb"]
    assert carry["attention_layer_mb"] == pytest.approx(originals[0]["attention_layer_mb"])  # the first step


def test_every_row_has_its_control(figures):
    for row in (*rows_of(figures, "carry"), *rows_of(figures, "chunk")):
        tag = row["name"].split()[0]
        originals = [o for o in rows_of(figures, "original") if row["solver"] == o["solver"]]
        [same] = [o for o in originals if f"GMACs {tag}" in o["control"]]
        assert abs(same["gmacs"] - row["gmacs"]) <= 0.51 * same["gmacs"] / same["steps"]
        [timed] = [o for o in originals if f"time {tag}" in o["control"]]
        assert abs(timed["latency_ms"] - row["latency_ms"]) <= 0.51 * timed["latency_ms"] / timed["steps"] + 1e-3


def test_the_best_solvers_stand_beside_each_row_at_equal_time(figures):
    for row in (*rows_of(figures, "carry"), *rows_of(figures, "chunk")):
        tag = row["name"].split()[0]
        timed = [o for o in rows_of(figures, "original") if f"time {tag}" in o["control"]]
        assert {"unipc", "graded", row["solver"]} == {o["solver"] for o in timed}
        assert len({o["steps"] for o in timed}) == 1


def test_every_row_is_judged(figures):
    names = ("psnr", "psnr_error", "pair_distance", "frechet", "kernel", "inception_score", "precision", "recall")
    assert all(np.isfinite(row[name]) for row in figures["rows"] for name in names)
    # The reference is the original's, so the rows nearest to it are too. (How many steps they have follows from
    # measured latencies, and near the reference more of them are not always nearer.)
    originals = rows_of(figures, "original")
    euler = [row for row in originals if row["solver"] == "euler"]
    fewest, most = (pick(euler, key=lambda row: row["steps"]) for pick in (min, max))
    best = max(figures["rows"], key=lambda row: row["psnr"])
    assert best in originals
    assert fewest["psnr"] < most["psnr"]
    assert best["pair_distance"] < min(row["pair_distance"] for row in figures["rows"] if row not in originals)
    images = figures["images"]
    assert (images["count"], images["network"], images["real_count"]) == (5, "tiny", 9)
    assert set(images["floor"]) == {"frechet", "kernel", "kernel_error", "precision", "recall"}
    assert figures["limits"] == []


def test_a_mixed_batch_is_run_in_every_way(figures):
    found = {(row["name"].split()[1], row["form"]): row for row in figures["execution"]}
    assert len(found) == 8
    for mode in ("carry", "chunk"):
        computed = {form: row["computed_tokens"] for (name, form), row in found.items() if name == mode}
        assert computed["padded to the grid"] == 2 * TOKENS
        assert computed["padded"] <= computed["bucketed"] <= computed["padded to the grid"]
        assert computed["packed"] < computed["padded"] + 2 * MIXED_TILE
        for (name, _), row in found.items():
            if name == mode:
                assert row["waste"] == pytest.approx(row["computed_tokens"] / row["kept_tokens"] - 1)
                assert row["speedup"] > 0


def test_the_terminal_shows_it_all(evaluated, main_job):
    text = evaluated[0].out
    assert f"#1 carry 4x, 12 steps, euler: {main_job.folder}" in text
    for words in ("Cost of a run: ONNX Runtime CPU, batch 2", "#1 carry 4x, 12 steps", "5 real images, held out"):
        assert words in text
    for heading in ("GMACs", "images/s", "attn MB", "state MB", "PSNR, dB", "pair distance", "FD", "KID", "recall"):
        assert heading in text
    for form in ("padded to the grid", "bucketed", "packed"):
        assert text.count(form) == 2


def test_the_page_stands_alone(evaluated):
    page = (evaluated[1] / "f.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("data:image/png") == 5  # four plots and the samples
    assert "http" not in page.replace("http-equiv", "")
    assert "#2 chunk 4x" in page


def test_images_for_the_adm_suite(evaluated, figures):
    files = sorted((evaluated[1] / "npz").iterdir())
    assert len(files) == len(figures["rows"]) + 1  # and the reference
    assert any("carry" in file.name for file in files)
    for file in files:
        found = np.load(file, allow_pickle=False)
        assert found.files == ["arr_0", "arr_1"]
        assert (found["arr_0"].shape, found["arr_0"].dtype) == ((5, 16, 16, 3), np.uint8)
        assert found["arr_1"].tolist() == [0, 1, 2, 3, 0]


def test_a_second_run_finds_the_same_images(main_job, network, tmp_path):
    words = (*QUICK, "--features", network)
    for name, more in (("a", ()), ("b", ()), ("c", ("--seed", 9))):
        run = run_cli("evaluate", main_job.folder, *words, *more, "--json", tmp_path / name)
        assert run.code == 0, run.err
    psnr = {n: json.loads((tmp_path / n).read_text())["rows"][-1]["psnr"] for n in "abc"}
    assert psnr["a"] == psnr["b"] != psnr["c"]
    assert "Distances to real images were not measured" in run.out


def test_guidance_with_less_for_the_unconditional_half(each_job, mode, tmp_path):
    """Lite-CFG costs less than guidance with both halves at the bundle's ratio, and gives other images."""
    words = ("--runs", 1, "--images", 5, "--batch", 2, "--reference-steps", 3, "--guidance", 2, "--features", "none")
    found = {}
    for name, more in (("plain", ()), ("same", ("--lite-cfg", "4x")), ("lite", ("--lite-cfg", "5x"))):
        run = run_cli("evaluate", each_job.folder, *words, *more, "--json", tmp_path / name)
        assert run.code == 0, run.err
        found[name] = json.loads((tmp_path / name).read_text())
    plain, same, lite = (found[name]["rows"][-1] for name in ("plain", "same", "lite"))
    assert plain["gmacs"] == pytest.approx(same["gmacs"])
    assert lite["gmacs"] < plain["gmacs"]
    assert plain["psnr"] == pytest.approx(same["psnr"], abs=1e-3) != lite["psnr"]
    assert sum(lite["kept"][1]) < sum(lite["kept"][0])
    step = {name: rows[0]["gmacs"] / rows[0]["steps"] for name, rows in ((n, found[n]["rows"]) for n in found)}
    assert step["plain"] == pytest.approx(step["lite"])
    computed = {n: next(r for r in found[n]["execution"] if r["form"] == "packed")["computed_tokens"] for n in found}
    assert computed["lite"] < computed["plain"]
    assert "the unconditional half at 5x" in " ".join(run.out.split())


def test_one_bundle_at_several_ratios(chunk_job, tmp_path):
    words = ("--runs", 1, "--images", 0, "--batch", 2, "--ratio", "2x", "--ratio", 8, "--json", tmp_path / "f.json")
    run = run_cli("evaluate", chunk_job.folder, *words)
    assert run.code == 0, run.err
    two, eight = json.loads((tmp_path / "f.json").read_text())["rows"][-2:]
    assert (two["name"], eight["name"]) == ("#1 chunk 2x, 4 steps", "#2 chunk 8x, 4 steps")
    assert np.mean(two["kept"]) == pytest.approx(32, abs=0.5)
    assert np.mean(eight["kept"]) == pytest.approx(8, abs=0.5)
    assert eight["gmacs"] < two["gmacs"]


def test_time_and_memory_only(main_job, tmp_path):
    words = ("--runs", 1, "--images", 0, "--batch", 2, "--json", tmp_path / "f.json")
    run = run_cli("evaluate", main_job.folder, *words)
    assert run.code == 0, run.err
    assert "psnr" not in json.loads((tmp_path / "f.json").read_text())["rows"][0]
    assert "--images 0" in run.out


# Pieces


@pytest.mark.parametrize(
    ("speedup", "ratio", "wanted"),
    [
        (2.0, 3.0, {50: "", 38: "", 25: "time", 17: "GMACs"}),
        (2.5, 2.5, {50: "", 38: "", 25: "", 20: "time and GMACs"}),
        (0.5, 1.0, {50: "GMACs", 38: "", 25: "", 100: "time"}),
        (1e-9, 1e9, {50: "", 38: "", 25: "", 1000: "time", 1: "GMACs"}),
    ],
)
def test_controls_of_a_run(speedup, ratio, wanted):
    assert control_steps(50, speedup, ratio) == wanted


def candidate(job, **options):
    return Candidate.of(read_bundle(job.folder), **options)


def test_names_say_what_differs(main_job, chunk_job):
    [alone] = named_apart([candidate(main_job)])
    assert alone.name == "carry 4x, 12 steps"
    names = [e.name for e in named_apart([candidate(main_job), candidate(chunk_job, solver="euler")])]
    assert names == ["#1 carry 4x, 12 steps", "#2 chunk 4x, 4 steps"]


def test_a_staggered_batch_is_spread_over_the_run(main_job, original_onnx):
    one = candidate(main_job)
    comparison = Comparison([one], 4, original_onnx.parent, 1)
    run = one.halves[0]
    counts = comparison.staggered(one)
    assert counts[0].tolist() == run[[0, 3, 6, 9]].tolist()
    assert counts[-1].tolist() == run[[2, 5, 8, 11]].tolist()
    assert counts.mean() == pytest.approx(run.mean(), rel=0.2)


@torch.no_grad()
def test_bucketed_lite_guidance_gives_what_torch_gives(each_job, mode, original_onnx):
    """In the pairs' buckets on ONNX Runtime, and without shapes in torch."""
    one = candidate(each_job, guidance=Guidance(2.0, 5.0))
    comparison = Comparison([one], 2, original_onnx.parent, 1)
    x, y = initial_noise(0, 2, 1, 16), labels_for(2, 4)
    model = one.bundle.model.with_schedule(one.planner.schedule)
    images = []
    for step in (one.new_step(comparison.runtimes[one.name].converted), one.new_step(model)):
        images.append(one.sampler.run(step, x, y, guidance=2.0, null_class=4))
        assert step.run is not None
        assert step.run.last_plan is not None
        assert step.run.last_plan.counts.tolist() == [half[-1] for half in one.halves for _ in range(2)]
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)


def test_attention_memory_is_that_of_its_arrays(bundle):
    """A layer: scores, and queries, keys, values and result, in float32."""
    model = bundle.model

    def layer(queries, keys):
        return 4 * 3 * 2 * (queries * keys + 2 * 16 * (queries + keys))  # batch 3, 2 heads of 16

    example = model.spec.example(3)
    found = original_attention(model, example)
    assert (found.peak, found.total) == (layer(TOKENS, TOKENS), 3 * layer(TOKENS, TOKENS))
    found = converted_attention(model, example, np.full(3, 16), None)
    keys = TOKENS if model.method.mode == "carry" else 16
    assert found.peak <= layer(TOKENS, TOKENS)
    outside = model.method.head_blocks + model.method.tail_blocks
    assert found.total == outside * layer(TOKENS, TOKENS) + (3 - outside) * layer(16, keys)
    nothing = attention_memory(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    assert (nothing.peak, nothing.total) == (0, 0)


def test_the_figures_are_read_back_whole(figures):
    assert EvaluationReport.from_json(figures).to_json() == figures


def test_a_page_without_images(figures):
    rows = [{k: v for k, v in row.items() if k in ("name", "gmacs", "step_ms", "mode")} for row in figures["rows"]]
    page = evaluation_page(EvaluationReport.from_json({**figures, "rows": rows, "images": {}}))
    assert "Quality" not in page
    assert "GMACs" in page


# What is refused


def other_original(job, folder):
    shutil.copytree(job.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["source"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_bundles_of_different_originals(main_job, chunk_job, tmp_path):
    said = refusal(2, "evaluate", main_job.folder, other_original(chunk_job, tmp_path / "other"))
    assert "different originals" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lite-cfg", "5x"), "--guidance"),
        (("--guidance", 2, "--lite-cfg", "200x"), "leave nothing"),
        (("--images", 3), "at least 5"),
        (("--json", "no/such/folder/f.json"), "cannot write"),
        (("--features", "resnet"), "efficientnet-lite0"),
        (("--steps", 2), "steps that keep everything"),
    ],
)
def test_wrong_words(main_job, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    run = run_cli("evaluate", main_job.folder, *words)
    assert run.code == 2
    assert said in run.err.splitlines()[-1]
    assert "Traceback" not in run.err
    assert contents(tmp_path) == []


def test_the_same_bundle_twice(main_job):
    assert "given twice" in refusal(2, "evaluate", main_job.folder, main_job.folder)


def test_too_few_real_images(main_job, network, real):
    run = run_cli("evaluate", main_job.folder, "--images", 8, "--real", real, "--features", network)
    assert run.code == 2
    assert "at least 16 are needed" in run.err


def test_npz_must_be_a_folder(main_job, tmp_path):
    (tmp_path / "file").write_text("")
    assert "give a folder" in refusal(2, "evaluate", main_job.folder, "--npz", tmp_path / "file")


def test_real_pictures_may_lie_in_any_folders(main_job, network, tmp_path):
    for number in range(10):
        folder = tmp_path / "pictures" / ("deep/er" if number % 2 else "flat")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 20), 20 * number).save(folder / f"{number}.png")
    words = (*QUICK, "--real", tmp_path / "pictures", "--features", network, "--json", tmp_path / "f.json")
    run = run_cli("evaluate", main_job.folder, *words)
    assert run.code == 0, run.err
    assert json.loads((tmp_path / "f.json").read_text())["images"]["real_count"] == 5


def test_too_few_images_to_judge():
    assert Wanted(images=0).images == 0
    with pytest.raises(UsageError, match="at least 5"):
        Wanted(images=4)
