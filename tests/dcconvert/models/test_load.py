"""Folders that diffusers saved, on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import dcconvert
from benchmarks.families import FAMILIES, made
from dcconvert.models.load import CLASSES, diffusers_source, open_source, parse_size
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from tests.dcconvert.harness import refusal, run_cli, write_checkpoint
from tests.passes.harness import dit_call

NAMES = {
    "diffusers-dit": "DiTTransformer2DModel",
    "pixart": "PixArtTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "flux": "FluxTransformer2DModel",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Every class that is read, saved as diffusers does."""
    root = tmp_path_factory.mktemp("diffusers")
    for name in NAMES:
        made(FAMILIES[name])[0].save_pretrained(root / name)
    return {name: root / name for name in NAMES}


def test_every_class_that_is_read_is_tested():
    assert set(CLASSES) == set(NAMES.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_becomes_a_model_and_a_call(folders, name):
    source = open_source(folders[name], image_size=8)
    assert source.kind.startswith(f"{NAMES[name]} of diffusers 0.")
    assert source.timestep_scale == (1.0 if name == "flux" else 1000.0)
    assert len(source.sha256) == 64
    original = made(FAMILIES[name])[0]
    with torch.no_grad():
        torch.testing.assert_close(source.module(**source.example)[0], original(**source.example)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
def test_images_that_are_not_square(folders, name):
    source = open_source(folders[name], image_size=(8, 4))
    model = rewrite(
        source.module,
        (),
        source.example,
        dcconvert.Options(mode="carry"),
        Policy("constant", 2).timetable(),
        timestep_scale=source.timestep_scale,
        grid=source.grid,
    )
    assert model.spec.grid == (4, 2)


@pytest.mark.parametrize(
    ("text", "found"), [("64", 64), (64, 64), ("96x64", (96, 64)), ("96X64", (96, 64)), ("8 x 4", (8, 4))]
)
def test_sizes(text, found):
    assert parse_size(text) == found


@pytest.mark.parametrize("text", ["0", "", "x", "8x", "4x4x4", "-8", "8.5"])
def test_wrong_sizes(text):
    with pytest.raises(dcconvert.UsageError, match="write it as 64, or 96x64"):
        parse_size(text)


def test_sizes_that_a_model_cannot_have(folders, tmp_path):
    words = ("--ratio", "2x", "-o", tmp_path / "out")
    assert "must be a multiple of 2" in refusal(2, folders["flux"], "--image-size", "9", *words)
    assert "write it as 64" in refusal(2, folders["flux"], "--image-size", "9y", *words)
    write_checkpoint(tmp_path / "tiny.safetensors")
    assert "a DiT checkpoint has square images" in refusal(
        2, tmp_path / "tiny.safetensors", "--image-size", "32x16", *words
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("sd3", "carry"), ("diffusers-dit", "chunk")])
def test_the_main_job_on_a_folder(folders, name, mode, tmp_path):
    out = tmp_path / "out"
    words = ("--ratio", "2x", "--batch", "2", "--steps", "8", "--image-size", "8", "--mode", mode, "-o", out)
    run = run_cli(folders[name], *words)
    assert run.code == 0, run.err
    report = json.loads((out / "report.json").read_text())
    assert report["source"]["kind"].startswith(NAMES[name])
    assert all(check["passed"] for check in report["checks"])
    assert report["latency"][0]["original_ms"]["median"] > 0
    assert "fidelity" not in report
    assert "needs its pipeline" in report["limits"][-1]
    assert dcconvert.load(out).spec.tokens == 16
    assert "use it from Python" in refusal(2, "sample", out, "-o", tmp_path / "s.png")


def test_a_pipeline_folder_is_read_as_its_transformer(folders, tmp_path):
    shutil.copytree(folders["sd3"], tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    assert diffusers_source(tmp_path).kind.startswith("SD3Transformer2DModel")


@pytest.mark.slow
def test_inspect_names_what_it_found(folders):
    run = run_cli("inspect", folders["flux"], "--image-size", "8")
    assert run.code == 0, run.err
    assert "FluxTransformer2DModel of diffusers" in run.out
    assert "trunk ends" in run.out


@pytest.mark.parametrize(
    ("change", "said", "code"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is a folder without config.json", 2),
        (lambda folder: (folder / "config.json").write_text("[1]"), "it is not a JSON object", 2),
        (lambda folder: (folder / "config.json").write_text('{"_class_name": "UNet"}'), "supported are", 3),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "has no diffusion_pytorch_model", 2),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"x"), "is truncated or damaged", 2),
    ],
)
def test_wrong_folders_are_one_line(folders, tmp_path, change, said, code):
    shutil.copytree(folders["sd3"], tmp_path / "model")
    change(tmp_path / "model")
    assert said in refusal(code, tmp_path / "model", "--ratio", "2x", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pickle_beside_the_config_is_not_opened(folders, tmp_path):
    """Weights are read from safetensors only."""
    shutil.copytree(folders["sd3"], tmp_path / "model")
    next((tmp_path / "model").glob("*.safetensors")).unlink()
    torch.save({"x": torch.zeros(1)}, tmp_path / "model" / "diffusion_pytorch_model.bin")
    assert "has no diffusion_pytorch_model.safetensors (there: config.json, diffusion_pytorch_model.bin)" in refusal(
        2, tmp_path / "model", "--ratio", "2x", "-o", tmp_path / "out"
    )


def exported(path: Path) -> torch.export.ExportedProgram:
    module, args, _ = dit_call()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, args, dynamic_shapes=({0: batch},) * 3)
    torch.export.save(program, path)
    return program


def test_an_exported_program_is_not_opened_by_the_command_line(tmp_path):
    exported(tmp_path / "model.pt2")
    said = refusal(2, tmp_path / "model.pt2", "--ratio", "2x", "-o", tmp_path / "out")
    assert "may contain code that torch.export.load runs" in said


def test_an_exported_program_is_converted_from_python(tmp_path):
    program = exported(tmp_path / "model.pt2")
    model = dcconvert.convert(torch.export.load(tmp_path / "model.pt2"), ratio=1)
    x, t, y = program.example_inputs[0]
    with torch.no_grad():
        wanted = program.module()(x, t, y)
        assert float((model(x, t, y) - wanted).norm() / wanted.norm()) < 1e-5
        assert model(x[:1], t[:1], y[:1]).shape == wanted[:1].shape


def test_an_exported_program_of_one_batch_size_is_refused():
    module, args, _ = dit_call()
    with pytest.raises(dcconvert.UsageError, match="is for one batch size: export it with dynamic_shapes"):
        dcconvert.convert(torch.export.export(module, args), ratio=2)


def test_a_checkpoint_is_a_source_too(tmp_path):
    path = tmp_path / "tiny.safetensors"
    write_checkpoint(path)
    source = open_source(path)
    assert source.dit is source.module
    assert source.config is not None
    assert source.prediction == "flow"
