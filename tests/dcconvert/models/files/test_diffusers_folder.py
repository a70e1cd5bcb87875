"""Folders that diffusers or a training script saved: which files are read, and folders that are not what they say."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import dcconvert
from benchmarks.families import FAMILIES, made
from dcconvert.models.files.diffusers_folder import read_folder
from dcconvert.models.load import diffusers_source
from dcconvert.passes.ir.errors import DcconvertError, UnsupportedModelError, UsageError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model() -> Any:
    return made(FAMILIES["sd3"])[0]


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def same(found: Any, wanted: Any) -> bool:
    found, wanted = found.state_dict(), wanted.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", ["1GB", "40KB"])
def test_variants_and_shards(variant, shards, model, tmp_path, capfd):
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=shards)
    source = diffusers_source(tmp_path)
    assert same(source.module, model)
    assert capfd.readouterr().err == ""  # no progress bar
    assert len(source.weights["files"]) == len(list(tmp_path.glob("*.safetensors")))


@pytest.mark.parametrize("name", ["diffusers-dit", "pixart", "flux"])
def test_tables_that_are_not_saved_are_computed(name, tmp_path):
    original = made(FAMILIES[name])[0]
    original.save_pretrained(tmp_path)
    module = dcconvert.load_model(tmp_path)
    assert same(module, original)
    wanted = dict(original.named_buffers())
    assert all(torch.equal(buffer, wanted[key]) for key, buffer in module.named_buffers())


def test_only_one_set_of_weights_is_read(folder, model):
    """And the hash is that of these files, as before."""
    before = diffusers_source(folder).sha256
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    source = diffusers_source(folder)
    assert source.sha256 == before
    assert same(source.module, model)
    assert source.notes == (f"Weights: {WEIGHTS}.", "Passed over: fp16.")


def test_averaged_weights_come_first(folder, model):
    tensors = {name: value + 1 for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / "diffusion_pytorch_model.ema.safetensors")
    save_file(tensors, folder / "diffusion_pytorch_model.non_ema.safetensors")
    source = diffusers_source(folder)
    assert torch.equal(source.module.state_dict()["proj_out.bias"], model.proj_out.bias + 1)
    assert source.weights["averaged"]
    assert source.notes[0].endswith("ema.safetensors (averaged).")


def test_a_folder_of_a_training_run(folder, tmp_path):
    """As accelerate's scripts save it: the transformer beside its average."""
    run = tmp_path / "checkpoint-500"
    shutil.copytree(folder, run / "transformer")
    shutil.copytree(folder, run / "transformer_ema")
    found = read_folder(run)
    assert found.path == run / "transformer_ema"
    assert found.passed_over == ["transformer"]


def test_reading_leaves_the_callers_state_alone(folder):
    diffusers.utils.logging.set_verbosity_info()
    before = torch.get_rng_state()
    dcconvert.load_model(folder)
    assert diffusers.utils.logging.get_verbosity() == logging.INFO
    diffusers.utils.logging.set_verbosity_warning()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_class_that_stood_for_two(folder):
    """Older folders name Transformer2DModel."""
    for norm, name in (("ada_norm_zero", "DiTTransformer2DModel"), ("ada_norm_single", "PixArtTransformer2DModel")):
        (folder / "config.json").write_text(json.dumps({"_class_name": "Transformer2DModel", "norm_type": norm}))
        assert read_folder(folder).name == name


# --- folders that are not what they say ----------------------------------------------------------------


def with_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def write_config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


def write_index(entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "elsewhere.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": entries}))

    return change


def fifo(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return changed


WRONG: dict[str, tuple[Callable[[Path], Any], str, type[DcconvertError]]] = {
    "2^31 layers": (with_config(num_layers=2**31), "num_layers is 2147483648, but its tensors have", UsageError),
    "layers without end": (with_config(num_layers=10**4000), "num_layers is out of range", UsageError),
    "negative layers": (with_config(num_layers=-1), "has no transformer_blocks.0", UsageError),
    "one layer less": (with_config(num_layers=1), "with this config.json has no transformer_blocks.", UsageError),
    "tables without end": (with_config(pos_embed_max_size=2**20), "tables of more than", UsageError),
    "heads": (with_config(num_attention_heads=2**30), "cannot make the SD3Transformer2DModel", UsageError),
    "words": (with_config(num_layers="three"), "cannot make the SD3Transformer2DModel", UsageError),
    "null": (with_config(caption_projection_dim=None), "cannot make the SD3Transformer2DModel", UsageError),
    "nested": (write_config("[" * 100_000 + "]" * 100_000), "it is not a JSON object", UsageError),
    "not text": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"),
        "it is not a JSON object",
        UsageError,
    ),
    "class of two lines": (with_config(_class_name="a\nb"), "holds a a\\nb; supported", UnsupportedModelError),
    "a class of another kind": (with_config(_class_name="AutoencoderKL"), "supported are", UnsupportedModelError),
    "quantised": (
        with_config(quantization_config={"quant_method": "x"}),
        "quantised (x)",
        UnsupportedModelError,
    ),
    "config is a pipe": (fifo("config.json"), "is a pipe, device or socket", UsageError),
    "weights are a pipe": (fifo(WEIGHTS), "is a pipe, device or socket", UsageError),
    "outside": (write_index({"x": "../secret.safetensors"}), "does not name the files", UsageError),
    "absolute": (write_index({"x": "/etc/passwd"}), "does not name the files", UsageError),
    "no shards": (write_index({}), "does not name the files", UsageError),
    "numbers": (write_index({"x": 3}), "does not name the files", UsageError),
    "a list": (write_index([1]), "does not name the files", UsageError),
    "a shard less": (write_index({"x": "a\n.safetensors"}), "lacks a\\n.safetensors", UsageError),
    "a tensor less": (
        change_tensors(lambda t: t.pop("proj_out.bias")),
        "1 tensors of SD3Transf",
        UsageError,
    ),
    "a tensor more": (change_tensors(lambda t: t.update(x=torch.zeros(2))), "has no x", UsageError),
    "another shape": (
        change_tensors(lambda t: t.update({"proj_out.bias": torch.zeros(3)})),
        "proj_out.bias is [3]",
        UsageError,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_folders_are_one_line(name, folder):
    change, said, kind = WRONG[name]
    change(folder)
    with pytest.raises(kind) as caught:
        dcconvert.load_model(folder)
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700
