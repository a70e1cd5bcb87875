"""The presets: their constants, and each of them from the command line through training and evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dcconvert.export.bundle import read_bundle
from dcconvert.export.checks.parity import IDENTITY
from dcconvert.export.runtimes.ort import OrtModel
from dcconvert.passes.ir.spec import NEW_PATHS
from dcconvert.passes.methods import METHODS, PRESETS
from dcconvert.passes.methods.dc_dit import TAIL_DROPS
from dcconvert.passes.runtime.run import Run
from dcconvert.sampling import fitting
from dcconvert.sampling.samplers import Sampler, initial_noise
from dcconvert.sampling.steps import ConvertedStep
from dcconvert.train.distillation import Recipe, StepDistillation
from tests.dcconvert.harness import CONFIG, refusal, run_cli, tiny_dit
from tests.sharing import made_once

pytestmark = pytest.mark.slow

DEEP = replace(CONFIG, depth=6)
FEW_BLOCKS = ("--head-blocks", 1, "--tail-blocks", 1)  # for SparseDiT's groups
WORDS = {"sparsedit": FEW_BLOCKS}
RATIO = {"dc-dit": "4x", "sparsedit": "4x", "ddit": "2x", "tome": "4x"}
TRAIN = {"dc-dit": ("all", "router"), "sparsedit": ("all",), "ddit": ("lora", "adapters"), "tome": ("all",)}


@pytest.fixture(scope="module", autouse=True)
def few_images() -> Iterator[None]:
    """Presets are fitted on fewer runs than users have: it is the same work, sooner done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "IMAGES", 8)
        yield


SHORT = ("--samples", 24, "--batch", 8, "--teacher-samples", 8, "--images", 2, "--lr", "1e-3", "--reference-steps", 9)
every_preset = pytest.mark.parametrize("preset", PRESETS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A model with blocks enough for SparseDiT's groups, and a smaller one for the others."""
    folder = tmp_path_factory.mktemp("models")
    paths = {name: folder / f"{name}.safetensors" for name in PRESETS}
    for name, path in paths.items():
        config = DEEP if name == "sparsedit" else CONFIG
        entry = {"config": config.as_dict(), "prediction": "flow"}
        save_file(tiny_dit(config).state_dict(), path, metadata={"dcconvert": json.dumps(entry)})
    return paths


@pytest.fixture(scope="module")
def checkpoint(checkpoints) -> Path:
    return checkpoints["sparsedit"]


class Bundles:
    """A bundle of each preset, made when the first test of any process asks for it; every process has copies."""

    def __init__(self, checkpoints: dict[str, Path], shared: Path, own: Path) -> None:
        self.checkpoints, self.shared, self.own = checkpoints, shared, own

    def __getitem__(self, preset: str) -> Path:
        copy = self.own / preset
        if not copy.exists():
            shutil.copytree(made_once(self.shared / f"preset-{preset}", partial(self.make, preset)) / "bundle", copy)
        return copy

    def make(self, preset: str, folder: Path) -> None:
        words = ("--batch", 1, "--batch", 4, "--steps", 8, "--images", 2, "--reference-steps", 9)
        named = ("--ratio", RATIO[preset], "--preset", preset, *words, *WORDS.get(preset, ()))
        run = run_cli(self.checkpoints[preset], *named, "-o", folder / "bundle")
        assert run.code == 0, run.err


@pytest.fixture(scope="module")
def bundles(checkpoints, run_folder, tmp_path_factory) -> Bundles:
    return Bundles(checkpoints, run_folder, tmp_path_factory.mktemp("presets"))


@every_preset
def test_the_main_job(bundles, preset):
    manifest, report = (json.loads((bundles[preset] / name).read_text()) for name in ("manifest.json", "report.json"))
    assert manifest["conversion"]["method"] == preset
    assert {*METHODS[preset].limits} <= {*report["limits"]}
    names = {check["name"] for check in report["checks"]}
    assert (IDENTITY in names) == (preset != "sparsedit")
    assert report["compute"]["ratio"] > 1.1
    assert len(report["fidelity"]["images"]["rows"]) >= 3
    buckets = report["buckets"]["buckets"]
    assert {bucket["batch"] for bucket in buckets} == {1, 4}


@every_preset
def test_torch_and_onnx_runtime_agree_over_a_run(bundles, preset):
    bundle = read_bundle(bundles[preset])
    model, names = bundle.model, bundle.model.spec.inputs
    sampler = Sampler("flow", 8)
    session = OrtModel(bundle.onnx, model.planner, bundle.bucket_set)
    runs = {"torch": Run(model, 4), "ort": session.start(4)}
    kept: dict[str, list[list[int]]] = {name: [] for name in runs}

    def step(x, t, y):
        values = dict(zip(names, (x, t, y), strict=True))
        with torch.no_grad():
            found = runs["torch"].step(values)[0]
        other = runs["ort"].step({name: value.numpy() for name, value in values.items()})[0]
        np.testing.assert_allclose(other, found.numpy(), rtol=1e-3, atol=1e-3)
        for name, run in runs.items():
            kept[name].append(run.kept.tolist())
        return found

    sampler.run(step, initial_noise(0, 4, 1, 16), torch.arange(4))
    assert kept["torch"] == kept["ort"]
    if preset == "dc-dit":  # found by each sample for itself
        assert len({tuple(counts) for counts in kept["torch"]}) > 1
    if preset == "ddit":
        assert kept["torch"][:3] == [[64] * 4] * 3
        assert {count for counts in kept["torch"] for count in counts} <= {64, 16, 4}
    if preset == "sparsedit":
        assert [counts[0] for counts in kept["torch"]] == sorted(counts[0] for counts in kept["torch"])
        assert {round(count**0.5) ** 2 == count for counts in kept["torch"] for count in counts} == {True}


@every_preset
def test_training(bundles, preset, tmp_path):
    """What is trained unless told otherwise, is what the preset's paper trains."""
    run = run_cli("upcycle", bundles[preset], "-o", tmp_path / "out", *SHORT, "--rank", 2)
    assert run.code == 0, run.err
    assert ("Its runs keep one token in" in run.out) == (preset in ("dc-dit", "ddit"))
    before, after = (load_file(str(folder / "model.safetensors")) for folder in (bundles[preset], tmp_path / "out"))
    assert set(before) <= set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith((*NEW_PATHS, "router")) for name in moved), moved
    assert any(name.startswith("trained.blocks") for name in after)
    own = {
        "sparsedit": "recovery.0.sparse",
        "ddit": "patch_sizes.output.weight",
        "dc-dit": "router_adapter.score.weight",
    }
    if preset in own:
        assert own[preset] in moved
    bundle = read_bundle(tmp_path / "out")
    assert tuple(bundle.manifest["upcycling"]["train"]) == TRAIN[preset]
    assert bundle.model.method.name == preset
    assert bundle.model.schedule.data_dependent == (preset in ("dc-dit", "ddit"))


@pytest.mark.parametrize("train", ["lora", "router"])
def test_routers_are_fitted_again_after_training(bundles, train, tmp_path):
    """Whether they were trained or only the weights around them: a ratio loss is a soft target."""
    run = run_cli("upcycle", bundles["dc-dit"], "-o", tmp_path / "out", "--train", train, *SHORT)
    assert run.code == 0, run.err
    before, after = (load_file(str(folder / "model.safetensors")) for folder in (bundles["dc-dit"], tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith("router_adapter.") for name in moved)
    assert "router_adapter.score.bias" in moved
    assert (train == "router") == ("router_adapter.score.weight" in moved)
    model = read_bundle(tmp_path / "out").model
    assert tokens_of_runs(model, replace(model.schedule, levels=())).mean() / 64 == pytest.approx(0.25, abs=0.02)


@every_preset
def test_evaluation_and_samples(bundles, preset, tmp_path):
    target = tmp_path / "figures.json"
    words = ("--images", 6, "--runs", 1, "--batch", 2, "--features", "none", "--reference-steps", 9)
    run = run_cli("evaluate", bundles[preset], *words, "--json", target)
    assert run.code == 0, run.err
    rows = json.loads(target.read_text())["rows"]
    assert any(row["mode"] == "chunk" for row in rows)
    lite = {"ddit": [], "sparsedit": ["--lite-cfg", "6x"]}.get(preset, ["--lite-cfg", "8x"])  # its coarsest grid: 7.1x
    for guidance in ([], ["--guidance", "2", *lite]):
        run = run_cli("sample", bundles[preset], "-n", 2, *guidance, "-o", tmp_path / "images.png")
        assert run.code == 0, run.err


def test_merged_and_structural_presets_have_no_router_to_train(bundles, tmp_path):
    for preset in ("tome", "sparsedit"):
        message = refusal(2, "upcycle", bundles[preset], "-o", tmp_path / "out", "--train", "router")
        assert f"cannot train 'router': method {preset} has no trainable router" in message


def test_inspect_and_wrong_use(checkpoint, tmp_path):
    run = run_cli("inspect", checkpoint, "--preset", "ddit")
    assert run.code == 0, run.err
    assert "PatchSizes" in run.out
    message = refusal(2, checkpoint, "--ratio", "4x", "--preset", "tome", "--schedule", "falling", "-o", tmp_path / "a")
    assert "preset tome has its own" in message
    shallow = refusal(2, checkpoint, "--ratio", "4x", "--preset", "sparsedit", "-o", tmp_path / "a", after=["read"])
    assert "a group of sparse and dense blocks needs 4" in shallow
    many = refusal(
        2,
        checkpoint,
        "--ratio",
        "8x",
        "--preset",
        "ddit",
        "--steps",
        8,
        "-o",
        tmp_path / "a",
        after=["read", "rewrite"],
    )
    assert "at most: choose a ratio below 8x, or more steps" in many
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("preset", ["tome", "ddit"])
def test_graphs_in_half_precision(bundles, preset, tmp_path):
    folder = shutil.copytree(bundles[preset], tmp_path / "bundle")
    run = run_cli("build", folder, "--target", "ort-cuda")
    assert run.code == 0, run.err
    assert (folder / "onnx" / "ort-cuda" / "denoise.onnx").is_file()


def test_refinements_have_no_blocks_around_the_trunk(checkpoint, tmp_path):
    words = ("--ratio", "2x", "--head-blocks", 1, "-o", tmp_path / "out")
    message = refusal(2, checkpoint, *words, "--preset", "dc-dit", "--refine-grid")
    assert "--refine-grid runs all blocks on the kept tokens" in message
    message = refusal(2, checkpoint, *words, "--preset", "ddit")
    assert "all blocks run in the patch size of the step: leave out --head-blocks" in message
    assert not (tmp_path / "out").exists()


def test_steps_that_a_threshold_was_not_found_for(bundles, tmp_path):
    message = refusal(2, "sample", bundles["ddit"], "--steps", 5, "-o", tmp_path / "images.png")
    assert "a threshold found for 8 euler steps: convert again with --steps 5 --solver euler" in message
    message = refusal(2, "evaluate", bundles["ddit"], "--solver", "unipc", "--images", 5)
    assert "convert again with --steps 8 --solver unipc" in message


def test_ratios_beyond_the_coarsest_grid(bundles, tmp_path):
    message = refusal(2, "evaluate", bundles["sparsedit"], "--ratio", "40x", "--images", 5)
    assert "choose a ratio below 40x, or convert again" in message


def test_commands_that_a_preset_has_no_use_for(bundles, tmp_path):
    for preset in ("dc-dit", "ddit", "tome"):
        message = refusal(2, "export-triton", bundles[preset], "-o", tmp_path / "out")
        assert f"was made with method {preset}, whose plan needs more" in message
    for preset in ("dc-dit", "ddit", "sparsedit"):
        message = refusal(2, "stress", bundles[preset])
        assert f"was made with method {preset}: stress is for bundles" in message
    for preset in PRESETS:
        assert "calibrate is for mode carry" in refusal(2, "calibrate", bundles[preset])
    assert not (tmp_path / "out").exists()


def test_a_threshold_serves_one_ratio(bundles, tmp_path):
    words = ("-n", 2, "--guidance", 2, "--lite-cfg", "8x", "-o", tmp_path / "images.png")
    message = refusal(2, "sample", bundles["ddit"], *words)
    assert "patch sizes are chosen by a threshold found for 2x: convert again for 8x" in message


@pytest.mark.parametrize("preset", ["dc-dit", "ddit"])
def test_what_is_expected_is_what_runs_keep(bundles, preset):
    """Of the images that it was fitted on exactly, of others about; the cost is that of the steps that are expected."""
    bundle = read_bundle(bundles[preset])
    model, sampler = bundle.model, Sampler("flow", 8)
    for seed, tolerance in ((fitting.SEED, 1e-6), (0, 0.15)):
        step = ConvertedStep(model, model)
        with torch.inference_mode():
            sampler.run(step, initial_noise(seed, fitting.IMAGES, 1, 16), torch.arange(fitting.IMAGES) % 4)
        kept = np.mean(step.kept) / 64
        assert model.schedule.expected == pytest.approx(kept, abs=tolerance)
    counts = model.planner.run_counts(sampler.taus)
    rounding = 0.05 if preset == "ddit" else 0.02  # eight steps of one of three patch sizes each
    assert counts.mean() / 64 == pytest.approx(model.schedule.expected, abs=rounding)
    report = json.loads((bundles[preset] / "report.json").read_text())
    assert [step["kept"] for step in report["compute"]["per_step"]] == counts.tolist()
    assert report["conversion"]["kept_tokens_mean"] == pytest.approx(64 * model.schedule.expected)


def tokens_of_runs(model, schedule):
    """Kept tokens [steps, B] of the runs that presets are fitted on, under a schedule."""
    model = model.with_schedule(schedule)
    step = ConvertedStep(model, model)
    with torch.inference_mode():
        noise = initial_noise(fitting.SEED, fitting.IMAGES, 1, 16)
        Sampler("flow", 8).run(step, noise, torch.arange(fitting.IMAGES) % 4)
    return np.stack(step.kept)


def test_the_natural_numbers_are_fitted_to_the_ratio(bundles):
    """On runs of the model itself one token in four is kept by its score, or because it is the first or the last."""
    model = read_bundle(bundles["dc-dit"]).model
    natural = tokens_of_runs(model, replace(model.schedule, levels=()))
    assert natural.mean() / 64 == pytest.approx(0.25, abs=0.02)
    assert model.schedule.levels[-1] == 64


@pytest.mark.parametrize("ratio", [5, 8])
def test_tail_dropping_drops(bundles, ratio):
    model = read_bundle(bundles["dc-dit"]).model
    dropped = model.planner.at_ratio(ratio, Sampler("flow", 8).taus).schedule
    before, after = tokens_of_runs(model, model.schedule), tokens_of_runs(model, dropped)
    assert {*after.ravel().tolist()} <= {*dropped.levels}
    assert after.mean() == pytest.approx(before.mean() * 4 / ratio, rel=0.1)
    assert after.mean() / 64 == pytest.approx(dropped.expected, rel=0.1)


def test_training_drops_too_and_rounds_nothing_up(bundles):
    model = read_bundle(bundles["dc-dit"]).model
    made = StepDistillation(model, Recipe(), Sampler("flow", 8).taus)
    assert [round(planner.schedule.policy.dropped, 6) for planner in made.planners] == list(TAIL_DROPS)
    scores = np.where(np.arange(64) % 3 == 0, 0.9, 0.1)[None]  # 22 of them, the first and the last included
    found = [int(planner.found_counts(scores, None)[0]) for planner in made.planners]
    assert found == [22 - int(drop * 22 + 1e-9) for drop in TAIL_DROPS]
