"""`dcconvert upcycle` from the command line: a trained bundle, whole or not at all, whatever stops it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dcconvert.export.bundle import read_bundle
from dcconvert.export.checks.parity import IDENTITY
from dcconvert.export.runtimes.ort import OrtModel
from dcconvert.passes.trained.weight_sets import PREFIX
from dcconvert.train.loop import validation_rounds, without_some
from tests.dcconvert.harness import Run, contents, run_cli, write_checkpoint
from tests.sharing import made_once

pytestmark = pytest.mark.slow

WORDS = ("--samples", 48, "--batch", 8, "--teacher-samples", 12, "--images", 2, "--lr", "1e-3", "--save-every", 2)
STEPS = 6


@pytest.fixture(scope="module")
def converted(run_folder, tmp_path_factory) -> Path:
    def make(folder: Path) -> None:
        checkpoint = write_checkpoint(folder / "tiny.safetensors")
        words = ("--ratio", "4x", "--mode", "chunk", "--steps", 4, "--batch", 2, "--no-measure")
        run = run_cli(checkpoint, *words, "-o", folder / "bundle")
        assert run.code == 0, run.err

    made = made_once(run_folder / "upcycle-converted", make)
    return Path(shutil.copytree(made / "bundle", tmp_path_factory.mktemp("chunk") / "bundle"))


@pytest.fixture
def bundle(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def trained(converted, run_folder, tmp_path_factory):
    """The bundle that a run without a stop makes, and what the command printed."""

    def make(folder: Path) -> None:
        run = run_cli("upcycle", converted, "-o", folder / "bundles" / "out", *WORDS)
        assert run.code == 0, run.err
        run.write(folder)

    made = made_once(run_folder / "upcycle-trained", make)
    own = Path(shutil.copytree(made / "bundles", tmp_path_factory.mktemp("trained"), dirs_exist_ok=True))
    return own / "out", Run.read(made)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "model.safetensors"))


@contextlib.contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Ctrl-C in the middle of the round that ends with this step of its optimiser."""
    made = itertools.count(1)

    def look(optimiser: Any, args: Any, kwargs: Any) -> None:
        if next(made) == step:
            signal.raise_signal(signal.SIGINT)

    hook = register_optimizer_step_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def test_a_trained_bundle_says_how_it_was_made(trained, converted):
    out, run = trained
    manifest, report = (json.loads((out / name).read_text()) for name in ("manifest.json", "report.json"))
    found = manifest["upcycling"]
    assert found["samples"] == 48
    assert found["data"] == "teacher"
    assert found["data_samples"] == 12
    assert [row["step"] for row in found["log"]] == [0, *sorted(validation_rounds(STEPS))]
    assert all(row["output"] > 0 and row["psnr"] > 0 for row in found["log"][1:])
    assert report["upcycling"] == found
    assert "Upcycling" in (out / "report.html").read_text()
    assert IDENTITY not in manifest["parity"]
    assert IDENTITY in json.loads((converted / "manifest.json").read_text())["parity"]
    assert f"{found['log'][-1]['psnr']:.2f} dB after 48 samples" in run.out
    assert "Bundle: " in run.out
    assert contents(out.parent) == ["out"] or {path.name for path in out.parent.iterdir()} == {"out"}


def test_a_trained_bundle_has_both_sets_of_weights(trained, converted):
    after, before = weights(trained[0]), weights(converted)
    for name, value in before.items():
        if name in after:
            torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    changed = [name for name in after if name.startswith(PREFIX)]
    assert changed
    assert any((after[name] != before[name.removeprefix(PREFIX)]).any() for name in changed)
    original = read_bundle(trained[0]).model.original_graph
    inputs = tuple(read_bundle(converted).model.spec.example(2).values())
    torch.testing.assert_close(original(*inputs), read_bundle(converted).model.original_graph(*inputs), rtol=0, atol=0)


def test_a_trained_bundle_runs_in_onnx_runtime(trained):
    found = read_bundle(trained[0])
    inputs, counts = found.model.spec.example(2), np.full(2, 16)
    session = OrtModel(found.onnx, found.model.planner, found.bucket_set, threads=1)
    [on_ort] = session.start(2).step({name: value.numpy() for name, value in inputs.items()}, counts)
    [in_torch] = found.model.start(2).step(inputs, counts)
    np.testing.assert_allclose(on_ort, in_torch.detach().numpy(), rtol=1e-3, atol=1e-3)


def test_two_processes_train_together(trained, bundle):
    """Started by torchrun: nearly the weights of one process, which has the whole batch in one relative error."""
    out = bundle.with_name("out")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "dcconvert.cli"]
    words = [sys.executable, *launch, "upcycle", bundle, "-o", out, *WORDS, "--threads", 1]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([str(word) for word in words], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    one, two, before = weights(trained[0]), weights(out), weights(bundle)
    names = [name for name in one if name.startswith(PREFIX)]

    def distance(a, b):
        return float(sum((a[name] - b[name]).square().sum() for name in names)) ** 0.5

    moved = distance(one, {name: before[name.removeprefix(PREFIX)] for name in names})
    assert 0 < distance(one, two) < 0.5 * moved
    assert len(json.loads((out / "manifest.json").read_text())["upcycling"]["log"]) == 1 + len(validation_rounds(STEPS))
    assert not out.with_name("out.upcycle").exists()


def test_a_run_that_was_stopped_goes_on(trained, bundle):
    before = weights(bundle)
    others = ("notes.txt", "failures.json", "engines/x/engines.json", "onnx/mine.plan")
    for name in (*others, "onnx/ort-cuda/route.onnx"):  # the last is of the old weights
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text("from before")
    with interrupted_at(3):
        run = run_cli("upcycle", bundle, *WORDS)
    assert run.code == 130
    assert run.err.splitlines()[-1].startswith("error: stopped: run the same command to resume from step 3 of 6")
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle", "bundle.upcycle"}
    assert all(torch.equal(value, before[name]) for name, value in weights(bundle).items())
    run = run_cli("upcycle", bundle, *WORDS)
    assert run.code == 0, run.err
    assert "resuming at step 3 of 6" in run.err
    assert all((bundle / name).read_text() == "from before" for name in others)
    assert "failures.json is from before this training" in run.err
    assert not (bundle / "onnx" / "ort-cuda").exists()
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle"}
    after, wanted = weights(bundle), weights(trained[0])
    assert after.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in after.items())
    logs = [json.loads((folder / "manifest.json").read_text())["upcycling"]["log"] for folder in (bundle, trained[0])]
    assert [row["psnr"] for row in logs[0]] == [row["psnr"] for row in logs[1]]


def test_an_unfinished_run_goes_on_with_the_same_options_only(bundle):
    with interrupted_at(2):
        assert run_cli("upcycle", bundle, *WORDS).code == 130
    run = run_cli("upcycle", bundle, *WORDS, "--train", "lora")
    assert run.code == 2
    assert "holds an unfinished run with train all, not lora" in run.err
    (bundle.with_name("bundle.upcycle") / "state.pt").write_bytes(b"damaged")
    run = run_cli("upcycle", bundle, *WORDS)
    assert run.code == 2
    assert "state.pt, it is damaged: delete" in run.err.splitlines()[-1]


def test_low_rank_changes_merge_into_the_linear_layers(bundle, tmp_path):
    images = np.random.default_rng(0).normal(size=(9, 1, 16, 16)).clip(-1, 1).astype(np.float32)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(9) % 4)
    words = ("--data", tmp_path / "data.npz", "--train", "lora", "--rank", 2, "--ratios", "2x", "--ratios", "4x")
    run = run_cli("upcycle", bundle, *WORDS, *words, "--bf16")
    assert run.code == 0, run.err
    after = weights(bundle)
    names = [name for name in after if name.startswith(PREFIX)]
    ranks = [int(torch.linalg.matrix_rank(after[n] - after[n.removeprefix(PREFIX)], atol=1e-4)) for n in names]
    assert len(names) >= 3 * 4  # four linear layers a block
    assert max(ranks) == 2
    assert min(ranks) >= 1
    assert json.loads((bundle / "manifest.json").read_text())["upcycling"]["ratios"] == [2, 4]


def test_an_upcycled_bundle_can_be_upcycled(trained, tmp_path):
    run = run_cli("upcycle", trained[0], "-o", tmp_path / "more", *WORDS, "--train", "lora")
    assert run.code == 0, run.err
    first, second = (
        json.loads((f / "manifest.json").read_text())["upcycling"]["log"] for f in (trained[0], tmp_path / "more")
    )
    assert second[0]["psnr"] == pytest.approx(first[-1]["psnr"], abs=1e-3)
    [earlier] = json.loads((tmp_path / "more" / "manifest.json").read_text())["upcycling"]["earlier"]
    assert earlier["psnr"] == first[-1]["psnr"]


def test_a_failed_export_leaves_the_bundle_and_the_state(bundle, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = (bundle / "manifest.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", full)
        run = run_cli("upcycle", bundle, *WORDS)
    assert run.code == 2
    assert (bundle / "manifest.json").read_bytes() == before
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle", "bundle.upcycle"}
    run = run_cli("upcycle", bundle, *WORDS)  # nothing is trained again
    assert run.code == 0, run.err
    assert "resuming at step 6 of 6" in run.err


def test_a_full_disk_is_one_line(bundle, monkeypatch):
    def fails(value, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 64 vs 0")

    monkeypatch.setattr("torch.save", fails)
    run = run_cli("upcycle", bundle, *WORDS)
    assert run.code == 2
    assert "state.pt: the disk is full" in run.err.splitlines()[-1]
    assert contents(bundle.with_name("bundle.upcycle")) == ["teacher_samples.safetensors"]


def test_samples_of_another_model_are_drawn_anew(bundle):
    with interrupted_at(2):
        assert run_cli("upcycle", bundle, *WORDS).code == 130
    state = bundle.with_name("bundle.upcycle")
    samples = load_file(str(state / "teacher_samples.safetensors"))
    save_file({n: v * 0 for n, v in samples.items()}, str(state / "teacher_samples.safetensors"), {"bundle": "other"})
    (state / "state.pt").unlink()
    with interrupted_at(2):
        assert run_cli("upcycle", bundle, *WORDS).code == 130
    again = load_file(str(state / "teacher_samples.safetensors"))
    torch.testing.assert_close(again["images"], samples["images"], rtol=0, atol=0)


def test_an_unfinished_run_knows_its_bundle(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]  # as in older bundles: without hashes, only the unfinished run notices
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with interrupted_at(2):
        assert run_cli("upcycle", bundle, *WORDS).code == 130
    tensors = weights(bundle)
    (bundle / "model.safetensors").unlink()
    save_file({name: value * 1.01 for name, value in tensors.items()}, str(bundle / "model.safetensors"))
    run = run_cli("upcycle", bundle, *WORDS)
    assert run.code == 2
    assert "holds an unfinished run on a bundle that was changed since: delete the folder" in run.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--data", "missing"), "missing does not exist"),
        (("--train", "everything"), "'everything' is not one of"),
        (("--batch", 1), "1 is not in the range"),
        (("--lr", 0), "0.0 is not in the range"),
        (("--ratio", "2x"), "runs at 4x, which is not among the ratios to train for: add --ratio 4x"),
        (("--seed", 10**15), "is not in the range"),
        (("--ratios", "100x"), "100x leaves less than one of the 64 tokens"),
    ],
)
def test_options_that_cannot_be(words, says, bundle):
    run = run_cli("upcycle", bundle, *WORDS, *words)
    assert run.code == 2
    assert says in run.err.splitlines()[-1]
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle"}


def test_mode_carry_learns_on_its_own_runs(main_job, tmp_path):
    words = ("--samples", 96, "--batch", 4, "--images", 2, "--unroll", 4, "--reference-steps", 8, "--threads", 1)
    run = run_cli("upcycle", main_job.folder, "-o", tmp_path / "tuned", *words)
    assert run.code == 0, run.err
    found = json.loads((tmp_path / "tuned" / "manifest.json").read_text())["upcycling"]
    assert found["data"] == "runs"
    assert [row["samples"] for row in found["log"]] == [0, 48, 96]
    assert all(row["drift"] > 0 for row in found["log"][1:])
    assert "its own sampling runs" in (tmp_path / "tuned" / "report.html").read_text()
    changed = weights(tmp_path / "tuned")
    assert any(
        (changed[n] != changed[n.removeprefix(PREFIX)]).any()
        for n in changed
        if n.startswith(PREFIX) and n.removeprefix(PREFIX) in changed
    )


def test_mode_carry_takes_no_data(main_job):
    run = run_cli("upcycle", main_job.folder, "--data", "images")
    assert run.code == 2
    assert "is in mode carry, which is trained on its own sampling runs: leave out --data" in run.err


def test_new_paths_are_exported(bundle):
    run = run_cli("upcycle", bundle, *WORDS, "--train", "router", "--train", "adapters")
    assert run.code == 0, run.err
    found = weights(bundle)
    assert {name.split(".")[0] for name in found} >= {"router_adapter", "dechunk_adapter"}
    assert not any(name.startswith(PREFIX) for name in found)
    assert found["dechunk_adapter.back.weight"].any()
    run = run_cli("upcycle", bundle, "-o", bundle.with_name("again"), *WORDS, "--train", "adapters")
    assert run.code == 0, run.err


def test_another_bundle_is_not_overwritten(trained, converted):
    run = run_cli("upcycle", converted, "-o", trained[0])
    assert run.code == 2
    assert "exists already" in run.err


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 0), (1.0, 400), (0.25, 100)])
def test_some_samples_lose_their_class(share, wanted):
    labels, generator = torch.arange(400) % 4, torch.Generator().manual_seed(0)
    found = without_some(labels, share, 4, generator)
    lost = found == 4
    assert int(lost.sum()) == pytest.approx(wanted, abs=0 if share in (0, 1) else 30)
    assert torch.equal(found[~lost], labels[~lost])
    assert torch.equal(without_some(labels, share, None, generator), labels)  # of a model without such a class


def test_the_unconditional_half_of_guidance_is_trained(trained):
    """No image of the data is without a class: its embedding changes because some lose theirs."""
    after = weights(trained[0])
    [name] = [name for name in after if name.startswith(PREFIX) and after[name].shape[0] == 5]
    changed = (after[name] != after[name.removeprefix(PREFIX)]).any(1)
    assert changed[4]


def test_validation_rounds_end_with_the_last():
    assert validation_rounds(3) == {1, 2, 3}
    assert max(validation_rounds(313)) == 313
    assert len(validation_rounds(313)) == 8
