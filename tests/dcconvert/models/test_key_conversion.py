"""Checkpoints of SD3, FLUX and PixArt under the names of their own repositories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import dcconvert
from benchmarks.families import FAMILIES, made
from dcconvert.models.key_conversion import layout_of, original_model, renamed
from dcconvert.models.key_tables import LAYOUTS, Layout, pixart_config
from dcconvert.models.load import open_source
from tests.dcconvert.harness import refusal, run_cli

SD3, FLUX, PIXART = LAYOUTS


def in_original_names(layout: Layout, module: Any) -> dict[str, Tensor]:
    """A module's tensors as the repository has them: the table read from right to left."""
    state, made_ = module.state_dict(), {}
    width = module.config.num_attention_heads * module.config.attention_head_dim
    if layout is PIXART:
        state["pos_embed.pos_embed"] = module.pos_embed.pos_embed
    for line in layout.names.strip().splitlines():
        old, new = line.split(": ")
        stem, parts = new.split("#.") if "#" in new else (None, new)
        for block in range(9) if stem else [0]:
            names = [f"{stem}{block}.{part}" if stem else part for part in parts.split("|")]
            for kind in (".weight", ".bias", ""):
                if all(name + kind in state for name in names):
                    value = torch.cat([state[name + kind] for name in names])
                    if "modulation" in old and len(value) == 2 * width:
                        value = torch.cat(value.chunk(2)[::-1])
                    kind = ".scale" if old.endswith(("query_norm", "key_norm")) else kind
                    made_[old.replace("#", str(block)) + kind] = value.clone()
    return made_


def small_flux() -> Any:
    """Heads of 32, which divide among the axes as FLUX's 128 do."""
    torch.manual_seed(0)
    model: Any = diffusers.FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        in_channels=16,
        num_attention_heads=2,
        attention_head_dim=32,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    return model.eval()


MODELS = {
    "sd3": (SD3, lambda: made(FAMILIES["sd3"])[0]),
    "sd35": (SD3, lambda: made(FAMILIES["sd35"])[0]),
    "flux": (FLUX, small_flux),
    "pixart": (PIXART, lambda: made(FAMILIES["pixart"])[0]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("original")
    for name, (layout, make) in MODELS.items():
        save_file(in_original_names(layout, make()), root / f"{name}.safetensors")
    return {name: root / f"{name}.safetensors" for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_model_that_it_was_made_of(files, name):
    layout, make = MODELS[name]
    original: Any = make()
    source = open_source(files[name], heads=2, image_size=8)
    module: Any = source.module
    assert source.kind == f"{layout.title} checkpoint, as {layout.cls}"
    assert source.prediction == ("eps" if name == "pixart" else "flow")
    found, wanted = source.module.state_dict(), original.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    used = {key for key in module.config if not key.startswith("_")} - {"sample_size", "interpolation_scale"}
    assert {key: module.config[key] for key in used} == {key: original.config[key] for key in used}
    with torch.no_grad():
        torch.testing.assert_close(source.module(**source.example)[0], original(**source.example)[0])


def test_stable_diffusion_3_as_diffusers_reads_it():
    """Against the converter inside diffusers, with both kinds of attention and normalised queries."""
    tensors = in_original_names(SD3, made(FAMILIES["sd35"])[0])
    width = len(tensors["x_embedder.proj.weight"])
    found = renamed(SD3, Path("x"), tensors, width)
    same(found, convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors)))


def test_flux_as_diffusers_reads_it():
    """Against the converter inside diffusers, which knows one width: matrices of one column, each value its row."""
    width = 3072
    model = small_flux()
    tensors = {}
    for number, (name, value) in enumerate(in_original_names(FLUX, model).items()):
        rows = width * len(value) // model.inner_dim
        column = torch.arange(rows * 1.0) + number / 1000
        tensors[name] = column.reshape([rows] + [1] * (value.ndim - 1))
    same(renamed(FLUX, Path("x"), tensors, width), convert_flux_transformer_checkpoint_to_diffusers(dict(tensors)))


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_pixart_by_hand():
    """One block under the names of the repository; the order in which fused projections lie is q, k, v."""
    table = torch.randn(2, 4)
    qkv, kv = torch.arange(12.0)[:, None].expand(12, 4), torch.arange(8.0)[:, None].expand(8, 4)
    tensors = {
        "x_embedder.proj.weight": torch.randn(4, 1, 2, 2),
        "t_block.1.bias": torch.randn(24),
        "csize_embedder.mlp.2.weight": torch.randn(4, 4),
        "y_embedder.y_embedding": torch.randn(3, 5),
        "blocks.10.scale_shift_table": torch.randn(6, 4),
        "blocks.10.attn.qkv.weight": qkv,
        "blocks.10.cross_attn.kv_linear.weight": kv,
        "final_layer.scale_shift_table": table,
    }
    found = renamed(PIXART, Path("x"), tensors, 4)
    to = "transformer_blocks.10"
    assert found.keys() == {
        "pos_embed.proj.weight",
        "adaln_single.linear.bias",
        "adaln_single.emb.resolution_embedder.linear_2.weight",
        f"{to}.scale_shift_table",
        *(f"{to}.attn1.to_{part}.weight" for part in "qkv"),
        *(f"{to}.attn2.to_{part}.weight" for part in "kv"),
        "scale_shift_table",
    }
    assert [int(found[f"{to}.attn1.to_{part}.weight"][0, 0]) for part in "qkv"] == [0, 4, 8]
    assert [int(found[f"{to}.attn2.to_{part}.weight"][0, 0]) for part in "kv"] == [0, 4]
    assert torch.equal(found["scale_shift_table"], table)  # shift first, there as here


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 4.0])
def test_how_far_apart_the_positions_of_pixart_are(scale):
    """PixArt-Sigma has 0.5 at 256 pixels, 2 at 1024: read off the table, so that other sizes agree with it."""
    model = diffusers.PixArtTransformer2DModel(
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=32,
        cross_attention_dim=32,
        caption_channels=8,
        sample_size=16,
        interpolation_scale=scale,
        use_additional_conditions=True,
    )
    tensors = in_original_names(PIXART, model)
    config = pixart_config(tensors, 32, 1)
    assert config["interpolation_scale"] == scale
    assert (config["sample_size"], config["use_additional_conditions"]) == (16, True)


def test_other_models_in_the_file_are_left_alone(files, tmp_path):
    tensors = {f"model.diffusion_model.{name}": value for name, value in load_file(files["sd3"]).items()}
    save_file({**tensors, "first_stage_model.x.weight": torch.zeros(3)}, tmp_path / "all.safetensors")
    module = dcconvert.load_model(tmp_path / "all.safetensors", heads=2)
    assert isinstance(module, diffusers.SD3Transformer2DModel)


@pytest.mark.slow
def test_the_main_job_on_a_file(files, tmp_path):
    out = tmp_path / "out"
    words = ("--ratio", "2x", "--batch", "2", "--steps", "8", "--image-size", "8", "--heads", "2", "--no-measure")
    run = run_cli(files["pixart"], *words, "-o", out)
    assert run.code == 0, run.err
    report = json.loads((out / "report.json").read_text())
    assert report["source"]["kind"] == "PixArt checkpoint, as PixArtTransformer2DModel"
    assert all(check["passed"] for check in report["checks"])


@pytest.mark.parametrize(
    ("change", "said", "code"),
    [
        (lambda t: t.pop("final_layer.linear.bias"), "1 tensors of SD3Transformer2DM", 2),
        (lambda t: t.pop("context_embedder.weight"), "context_embedder.weight is missing: save the whole", 2),
        (lambda t: t.update({"control.weight": torch.zeros(1)}), "looks like a variant of Stable Diffusion 3", 3),
        (
            lambda t: t.update({"joint_blocks.1.x_block.mlp.fc2.bias": torch.zeros(5)}),
            "wrong shapes: transformer_bl",
            2,
        ),
        (lambda t: t.update({"x_embedder.proj.weight": torch.zeros(32)}), "its tensors do not make one Stable Diff", 2),
        (lambda t: t["pos_embed"].fill_(torch.nan), "NaN or infinite values", 2),
        (
            lambda t: t.update({"joint_blocks.99999999.x_block.mlp.fc2.bias": torch.zeros(5)}),
            "99999999 is not one of 5 blocks",
            2,
        ),
        (lambda t: t.update({"context_embedder.weight": torch.tensor(1.0)}), "do not make one Stable Diff", 2),
        (lambda t: t.update({"joint_blocks.1.x_block.attn.qkv.bias": torch.zeros(5)}), "too few rows for 3 parts", 2),
    ],
)
def test_wrong_files_are_one_line(files, tmp_path, change, said, code):
    tensors = load_file(files["sd3"])
    change(tensors)
    save_file(tensors, tmp_path / "wrong.safetensors")
    words = ("--ratio", "2x", "--heads", "2", "-o", tmp_path / "out")
    assert said in refusal(code, tmp_path / "wrong.safetensors", *words)
    assert not (tmp_path / "out").exists()


def test_more_input_than_output(tmp_path):
    """FLUX Fill, Canny and Depth read an image beside the noise."""
    torch.manual_seed(0)
    config = dict(small_flux().config) | {"in_channels": 96, "out_channels": 16}
    original: Any = diffusers.FluxTransformer2DModel.from_config(config).eval()
    save_file(in_original_names(FLUX, original), tmp_path / "fill.safetensors")
    source = open_source(tmp_path / "fill.safetensors", image_size=8)
    assert source.example["hidden_states"].shape[-1] == 96
    with torch.no_grad():
        torch.testing.assert_close(source.module(**source.example)[0], original(**source.example)[0])


@pytest.mark.parametrize(("texts", "scale"), [(120, 1.0), (300, 0.125)])
def test_positions_that_are_computed(texts, scale, tmp_path):
    """PixArt's release for 256 pixels has none. How far apart they are is told by the number of text tokens."""
    config = dict(made(FAMILIES["pixart"])[0].config) | {"interpolation_scale": scale, "sample_size": 8}
    del config["_use_default_values"]
    original: Any = diffusers.PixArtTransformer2DModel.from_config(config)
    tensors = in_original_names(PIXART, original)
    wanted = tensors.pop("pos_embed")
    torch.save({"state_dict": {**tensors, "y_embedder.y_embedding": torch.zeros(texts, 8)}}, tmp_path / "x.pth")
    module: Any = dcconvert.load_model(tmp_path / "x.pth", heads=2, image_size=8)
    torch.testing.assert_close(module.pos_embed.pos_embed, wanted)
    with pytest.raises(dcconvert.UsageError, match="pass --image-size"):
        dcconvert.load_model(tmp_path / "x.pth", heads=2)


def test_quantised_files_are_named(files, tmp_path):
    tensors = load_file(files["flux"])
    packed = {name: value.to(torch.uint8).reshape(-1, 1) for name, value in tensors.items() if value.ndim == 2}
    save_file({**tensors, **packed, "img_in.weight.absmax": torch.ones(4)}, tmp_path / "nf4.safetensors")
    with pytest.raises(dcconvert.UnsupportedModelError, match=r"quantised \(bitsandbytes, 4 bits"):
        dcconvert.load_model(tmp_path / "nf4.safetensors")


def test_heads_of_flux_that_are_not_divided_as_its_own():
    tensors = in_original_names(FLUX, made(FAMILIES["flux"])[0])
    assert layout_of(tensors) is FLUX
    with pytest.raises(dcconvert.UsageError, match="heads of 16 do not divide as those of FLUX"):
        original_model(FLUX, Path("x"), tensors)
