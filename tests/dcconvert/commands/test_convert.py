"""The main job end to end on a tiny checkpoint in both modes, and the commands on the bundle it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dcconvert
from dcconvert.commands.rewrite_bundle import most_buckets
from dcconvert.export.bundle import read_bundle
from dcconvert.export.runtimes.ort import OrtModel, OrtState
from dcconvert.images.pixels import to_images
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.methods import METHODS, method_of
from dcconvert.sampling.samplers import Sampler, initial_noise, labels_for
from tests.dcconvert.harness import CONFIG, TOKENS, contents, refusal, run_cli, write_checkpoint

STEPS = {"carry": 12, "chunk": 4}
SOLVER = {"carry": "euler", "chunk": "dpm++"}


def test_the_bundle_is_complete(each_job, mode):
    names = {name for name in contents(each_job.folder) if not (each_job.folder / name).is_dir()}
    assert names == {
        *("manifest.json", "model.safetensors", "graph.json", "report.json", "report.html", "samples.png"),
        *("token_maps.png", "onnx/route.onnx", "onnx/denoise.onnx"),
        *("onnx/example_inputs/route.json", "onnx/example_inputs/denoise.json"),
    }
    assert not [path for path in each_job.folder.parent.iterdir() if path.name.startswith(".")]
    graphs = [path.name for path in (each_job.folder.parent / "graphs").glob("*.txt")]
    assert {name.split(".")[0].split("_")[1] for name in graphs} == {part.name for part in method_of(mode).pipeline()}


def test_the_stages_are_told_in_order(each_job, mode):
    lines = [line.split("  ")[1].strip() for line in each_job.run.err.splitlines()]
    compared = ["convert in mode chunk, to compare"] if mode == "carry" else []
    state = [line for line in lines if line.startswith("State of a sampling run")]
    assert [line for line in lines if line not in state] == [
        *("read checkpoint", "rewrite", "verify in torch", "export ONNX", "compare with ONNX Runtime"),
        *("count operations", "export original", "measure latency", "measure memory", *compared, "compare images"),
    ]
    assert len(state) == (mode == "carry")


def test_the_manifest_says_what_was_done(each_job, mode):
    manifest = each_job.manifest
    assert manifest["command"].startswith("dcconvert tiny.safetensors --ratio 4x")
    conversion = manifest["conversion"]
    assert (conversion["mode"], conversion["schedule"], conversion["ratio"]) == (mode, "falling", 4)
    assert [item["name"] for item in conversion["passes"]] == [part.name for part in method_of(mode).pipeline()]
    assert manifest["config"] == CONFIG.as_dict()
    wanted = {"prediction": "flow", "steps": STEPS[mode], "solver": SOLVER[mode]}
    assert {name: manifest["sampler"][name] for name in wanted} == wanted
    assert max(manifest["parity"].values()) < 1e-3


def test_the_report_says_how_it_was_made(each_job, mode):
    report = each_job.report
    conversion = report["conversion"]
    assert (conversion["mode"], conversion["router"]) == (mode, {"carry": "drift", "chunk": "pool"}[mode])
    assert conversion["sampler"] == f"{SOLVER[mode]}, {STEPS[mode]} steps"
    assert report["limits"] == [*METHODS[mode].limits]
    page = (each_job.folder / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    for title in ("Checks", "Latency", "Compute", "Fidelity", "Memory", "Buckets", "Passes", "Limits"):
        assert f"<h2>{title}" in page
    blocks = {"carry": 0, "chunk": 1}[mode]
    assert (conversion["head_blocks"], conversion["tail_blocks"]) == (blocks, blocks)


def test_the_size_of_the_state_is_told(main_job, chunk_job):
    """Keys and values of three blocks and the update: (2 x 3 + 1) x 64 tokens x 32 values in two slots of float32."""
    megabytes = 2 * 7 * TOKENS * 32 * 4 / 1e6
    told = main_job.report["conversion"]
    assert told["state_mb_a_sample"] == pytest.approx(megabytes)
    assert told["state_mb_batch_2"] == pytest.approx(2 * megabytes)
    assert told["state_dtype"] == "float32"
    assert f"{2 * megabytes:.1f} MB at batch 2" in main_job.run.err
    assert not [name for name in chunk_job.report["conversion"] if name.startswith("state_mb")]


def test_the_first_steps_of_carry_keep_everything(main_job):
    report = main_job.report
    kept = [step["kept"] for step in report["compute"]["per_step"]]
    assert report["conversion"]["warm_up_steps"] == 1
    assert kept[0] == TOKENS
    assert max(kept[1:]) < TOKENS
    assert max(main_job.manifest["buckets"]["buckets"], key=lambda bucket: bucket["tokens"])["row_tokens"] == TOKENS


def test_the_report_measures_both_and_the_controls(each_job, mode):
    report, steps = each_job.report, STEPS[mode]
    assert all(check["passed"] for check in report["checks"])
    assert {row["runtime"] for row in report["latency"]} == {"ONNX Runtime CPU", "torch CPU, eager"}
    for row in report["latency"]:
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["flop_ratio"])
    kept = [step["kept"] for step in report["compute"]["per_step"]]
    assert kept == sorted(kept, reverse=True)
    assert sum(kept) / len(kept) == pytest.approx(16, abs=0.5)
    assert report["conversion"]["kept_tokens_mean"] == 16
    rows = report["fidelity"]["images"]["rows"]
    at_compute = max(1, round(steps / report["compute"]["ratio"]))
    at_latency = max(1, round(steps / report["latency"][0]["speedup"]))
    fewer = sorted({at_compute, at_latency} - {steps}, reverse=True)
    chunk = [f"chunk 4x, {steps} steps"]
    equal = at_latency if at_latency < steps else at_compute
    best = [f"original, {solver}, {equal} steps" for solver in ("unipc", "graded") if equal < steps]
    assert [row["name"] for row in rows] == [
        *("original, 14 steps, reference", f"original, {steps} steps"),
        *(f"original, {count} steps" for count in fewer),
        *best,
        *(chunk if mode == "carry" else []),
        f"{mode} 4x, {steps} steps",
    ]
    assert rows[0]["solver"] == "adams"
    assert {row["solver"] for row in rows[1:] if row["name"] not in best} == {SOLVER[mode]}
    assert report["buckets"]["expected_waste"] < 0.1


@torch.no_grad()
def test_a_loaded_bundle_is_the_converted_model(each_job, mode):
    dit = dcconvert.load_checkpoint(each_job.checkpoint)
    options = dcconvert.Options(mode=mode)
    fresh, loaded = dcconvert.convert(dit, 4, schedule="falling", options=options), dcconvert.load(each_job.folder)
    runs = [model.with_schedule(fresh.schedule).start(2) for model in (fresh, loaded)]
    for level in (1000.0, 800.0, 300.0):
        given = {"x": torch.randn(2, 1, 16, 16), "t": torch.full((2,), level), "y": torch.tensor([0, 3])}
        found, wanted = (run.step(given, np.full(2, 16))[0] for run in runs)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


# Sampling from the command line


def sample(folder: Path, out: Path, *words: Any) -> np.ndarray:
    run = run_cli("sample", folder, "-o", out, *words)
    assert run.code == 0, run.err
    with Image.open(out) as image:
        return np.asarray(image)


@pytest.mark.parametrize("guidance", [1, 2])
def test_sample_draws_both_rows_in_every_runtime(guidance, each_job, tmp_path):
    words = ("-n", 3, "--steps", 10, "--compare", "--guidance", guidance)
    pixels = {}
    for runtime in ("ort", "torch"):
        pixels[runtime] = sample(each_job.folder, tmp_path / "grid.png", "--runtime", runtime, *words).astype(int)
        assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    assert pixels["ort"].shape[0] > 2 * 32
    assert np.abs(pixels["ort"] - pixels["torch"]).max() <= 2


def test_halves_of_guidance_share_their_tokens_unless_told_otherwise(main_job, tmp_path):
    words = (main_job.folder, tmp_path / "one.png", "-n", 2, "--guidance", 3)
    shared, again, separate = sample(*words), sample(*words), sample(*words, "--separate-halves")
    np.testing.assert_array_equal(shared, again)
    assert (shared != separate).any()


def test_the_solver_can_be_chosen(main_job, tmp_path):
    """Every solver draws another picture; the bundle's own is the default."""
    draw = {
        words: sample(main_job.folder, tmp_path / "one.png", "-n", 2, "--steps", 9, *words)
        for words in ((), ("--solver", "euler"), ("--solver", "dpm++"), ("--solver", "unipc"))
    }
    own, euler, *others = draw.values()
    np.testing.assert_array_equal(own, euler)
    assert all((picture != euler).any() for picture in others)


@torch.no_grad()
def test_the_picture_shows_what_the_samplers_make(main_job, tmp_path):
    pixels = sample(main_job.folder, tmp_path / "one.png", "-n", 2, "--solver", "unipc")
    model = dcconvert.load(main_job.folder)
    sampler = Sampler("flow", 12, "unipc")
    run = model.with_schedule(model.schedule.fitted(sampler.taus)).start(2)
    images = sampler.run(lambda x, t, y: run.step({"x": x, "t": t, "y": y})[0], initial_noise(0, 2, 1, 16),
                         labels_for(2, 4))  # fmt: skip
    (first, second) = (image.repeat(2, 0).repeat(2, 1) for image in to_images(images))
    rows = [row for row in range(pixels.shape[0] - 31) if near(pixels[row : row + 32, :32], first)]
    assert len(rows) >= 1
    assert any(near(pixels[rows[0] : rows[0] + 32, at : at + 32], second) for at in range(30, pixels.shape[1] - 31))


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(found.astype(int) - wanted.reshape(32, 32, -1).astype(int)).max() <= 2)


def test_carry_says_how_large_its_state_is_before_it_samples(main_job, chunk_job, tmp_path):
    for guidance, batch in ((1, 3), (2, 6)):
        words = ("-n", 3, "--steps", 9, "--guidance", guidance, "-o", tmp_path / "one.png")
        assert f"at batch {batch}" in run_cli("sample", main_job.folder, *words).out
    assert "State" not in run_cli("sample", chunk_job.folder, "-n", 1, "--steps", 2, "-o", tmp_path / "one.png").out


def test_too_few_steps_to_sample_with(main_job, tmp_path):
    said = refusal(2, "sample", main_job.folder, "--steps", 2, "-o", tmp_path / "one.png")
    assert "steps that keep everything" in said
    assert list(tmp_path.iterdir()) == []


def test_lite_guidance_gives_other_images(each_job, tmp_path):
    words = ("-n", 2, "--steps", 12, "--guidance", 2)
    for name, more in (("plain", ()), ("same", ("--lite-cfg", "4x")), ("lite", ("--lite-cfg", "5x"))):
        sample(each_job.folder, tmp_path / f"{name}.png", *words, *more)
    plain, same, lite = ((tmp_path / f"{name}.png").read_bytes() for name in ("plain", "same", "lite"))
    assert plain == same != lite
    assert "--guidance" in refusal(2, "sample", each_job.folder, "--lite-cfg", "5x", "-o", tmp_path / "x.png")


# The other commands


def test_a_bundle_from_python_works_on_the_command_line(main_job, tmp_path):
    model = dcconvert.convert(dcconvert.load_checkpoint(main_job.checkpoint), 2)
    model.save(tmp_path / "saved", batches=(1,))
    sample(tmp_path / "saved", tmp_path / "one.png", "-n", 1, "--steps", 10)
    with pytest.raises(dcconvert.UsageError, match="exists already"):
        model.save(tmp_path / "saved")


def test_inspect_shows_cuts_and_passes(main_job, mode):
    run = run_cli("inspect", main_job.checkpoint, "--mode", mode)
    assert run.code == 0, run.err
    assert "trunk starts" in run.out
    assert {"carry": "CarryTrunk", "chunk": "PackTrunk"}[mode] in run.out
    assert ("State of a sampling run" in run.out) == (mode == "carry")


@torch.no_grad()
def test_ratio_1_is_the_original(main_job, mode):
    dit = dcconvert.load_checkpoint(main_job.checkpoint)
    inputs = (torch.randn(2, 1, 16, 16), torch.tensor([900.0, 100.0]), torch.tensor([0, 3]))
    model = dcconvert.convert(dit, "1x", options=dcconvert.Options(mode=mode))
    torch.testing.assert_close(model(*inputs), dit(*inputs), rtol=1e-5, atol=1e-5)


# Options of a conversion


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """Everything that mode carry can be told, and no measurements."""
    folder = tmp_path_factory.mktemp("half")
    checkpoint = write_checkpoint(folder / "tiny.safetensors")
    words = ("--ratio", "2x", "--steps", 12, "--warm-up", 2, "--refresh", 5, "--state", "fp16", "--solver", "unipc")
    more = ("--mode", "carry", "--router", "age", "--batch", 2, "--buckets", 3, "--no-measure")
    run = run_cli(checkpoint, *words, *more, "-o", folder / "half")
    assert run.code == 0, run.err
    return folder / "half"


def test_as_many_buckets_as_were_asked_for(half):
    bundle = read_bundle(half)
    assert len(bundle.bucket_set.buckets) == 3
    assert bundle.bucket_set.expected_waste == 0
    assert bundle.model.schedule.levels == bundle.bucket_set.lengths
    assert most_buckets(bundle) == 3
    bundle.manifest["most_buckets"] = "many"
    with pytest.raises(UsageError, match="most_buckets in the manifest is not a number of at least 2"):
        most_buckets(bundle)


def test_warm_up_and_refresh_steps_keep_everything(half):
    report = json.loads((half / "report.json").read_text())
    kept = [step["kept"] for step in report["compute"]["per_step"]]
    assert [step for step, count in enumerate(kept) if count == TOKENS] == [0, 1, 6, 11]
    assert np.mean(kept) == pytest.approx(32, abs=0.5)
    conversion = report["conversion"]
    assert (conversion["warm_up_steps"], conversion["refresh_every"]) == (2, 5)
    assert conversion["router"] == "age"


def test_a_state_in_half_precision_is_half_as_large(half, main_job):
    conversion = json.loads((half / "report.json").read_text())["conversion"]
    whole = main_job.report["conversion"]
    assert conversion["state_dtype"] == "float16"
    assert conversion["state_mb_a_sample"] == pytest.approx(whole["state_mb_a_sample"] / 2)
    bundle = read_bundle(half)
    assert bundle.model.method.remembered_as == "fp16"
    run = OrtModel(bundle.onnx, bundle.model.planner, bundle.bucket_set, threads=1).start(2)
    assert isinstance(run.state, OrtState)
    assert {value.numpy().dtype for value in run.state.values.values()} == {np.dtype(np.float16)}


def test_a_bundle_is_sampled_as_it_was_converted(half, tmp_path):
    manifest = json.loads((half / "manifest.json").read_text())
    assert (manifest["sampler"]["steps"], manifest["sampler"]["solver"]) == (12, "unipc")
    own = sample(half, tmp_path / "one.png", "-n", 2)
    np.testing.assert_array_equal(own, sample(half, tmp_path / "one.png", "-n", 2, "--steps", 12, "--solver", "unipc"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--mode", "chunk", "--warm-up", 1), "warm-up and refresh steps apply only to mode carry"),
        (("--mode", "chunk", "--refresh", 5), "warm-up and refresh steps apply only to mode carry"),
        (("--mode", "chunk", "--state", "fp16"), "method chunk has no state"),
        (("--mode", "chunk", "--router", "drift"), "method chunk has no router 'drift': choose one of"),
        (("--mode", "chunk", "--router", "age"), "method chunk has no router 'age': choose one of"),
        (("--warm-up", 0), "0 is not in the range 1<=x"),
        (("--warm-up", 6), "6 steps that keep everything, of 20, leave nothing for the others at 4x"),
        (("--refresh", 2), "steps that keep everything, of 20, leave nothing for the others at 4x"),
        (("--refresh", 4), "steps that keep everything, of 20, leave nothing for the others at 4x"),
        (("--mode", "both"), "'both' is not one of 'steps', 'carry', 'chunk'"),
        (("--router", "crystal"), "'crystal' is not one of"),
        (("--state", "int8"), "'int8' is not one of"),
        (("--solver", "heun"), "'heun' is not one of"),
        (("--warm-up", -1), "-1 is not in the range"),
        (("--solver", "unipc", "--steps", 1001), "1001 sampling steps"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_options_that_cannot_be(words, says, main_job, tmp_path):
    run = run_cli(main_job.checkpoint, "--ratio", "4x", "--steps", 20, *words, "-o", tmp_path / "out")
    assert run.code == 2
    *before, last = run.err.splitlines()
    assert all(line.startswith(("done", "note")) for line in before)
    assert last.startswith("error: ")
    assert says in last
    assert list(tmp_path.iterdir()) == []


def test_the_dense_steps_are_those_of_the_run_that_was_asked_for(main_job, tmp_path):
    """20 of 200 steps are within the 50 that 4x may cost; of the 50 steps of a default run they would not be."""
    words = (main_job.checkpoint, "--ratio", "4x", "--steps", 200, "--warm-up", 20, "--batch", 1, "--no-measure")
    run = run_cli(*words, "-o", tmp_path / "out")
    assert run.code == 0, run.err
    schedule = read_bundle(tmp_path / "out").model.schedule
    assert schedule.dense_first == 20
    assert schedule.run_counts(1 - np.arange(200) / 200, TOKENS).mean() == pytest.approx(16, abs=0.5)
