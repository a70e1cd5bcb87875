"""DC-DiT's own architecture: the release's checkpoints, its formulas, and a DiT made into one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import dcconvert
from dcconvert.export.bundle import read_bundle
from dcconvert.export.checks.parity import IDENTITY
from dcconvert.models.dc_dit import RefinedConfig, RefinedDiT
from dcconvert.models.dc_dit_checkpoint import BLOCKS
from dcconvert.models.dit import DiT, DiTConfig, modulate, sincos_positions
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.schedule import NATURAL
from dcconvert.passes.runtime.model import DynamicModel
from tests.dcconvert.harness import refusal, run_cli, tiny_dit, write_checkpoint
from tests.passes.harness import randomise, relative

CONFIG = RefinedConfig(depth=3, width=64, heads=2, image_size=8, in_channels=4, num_classes=10)


def release_names(depth: int) -> set[str]:
    """The keys of the release's checkpoints, as its repository's modules give them (AMD-AGI/DynamicChunkingDiT)."""
    both = ("weight", "bias")
    names = {"pos_embed", "y_embedder.embedding_table.weight"}
    names |= {
        f"{layer}.{part}" for layer in ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2") for part in both
    }
    names |= {f"final_layer.{layer}.{part}" for layer in ("linear", "adaLN_modulation.1") for part in both}
    for side, skip in (("encoder", 1), ("decoder", 0)):
        layers = ("norm1", "norm2", "conv1", "conv2", "cond_proj.1")
        names |= {f"hnet.{side}.layers.{n}.{layer}.{part}" for n in (0, 1) for layer in layers for part in both}
        names |= {f"hnet.{side}.layers.{skip}.skip_proj.{part}" for part in both}
        names.add(f"hnet.{side}.rmsnorm.weight")
    router = ("proj", "context_predictor", "residual_scorer.0", "residual_scorer.1", "residual_scorer.3")
    names |= {f"hnet.routing_module.{layer}.{part}" for layer in router for part in both}
    names |= {f"hnet.residual_proj.{part}" for part in both}
    blocks = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    inner = "hnet.main_network.main_network"
    names |= {f"{inner}.layers.{n}.{layer}.{part}" for n in range(depth) for layer in blocks for part in both}
    return names | {f"{inner}.rmsnorm.weight"}


@pytest.fixture
def module() -> RefinedDiT:
    torch.manual_seed(0)
    made = RefinedDiT(CONFIG)
    randomise(made, std=0.15)
    return made.eval()


def by_hand(m: RefinedDiT, x: Tensor, t: Tensor, y: Tensor, drop: float) -> tuple[Tensor, list[int]]:
    """The release's forward pass, sample by sample: route, keep p > 0.5, blocks, smooth, nearest, decode."""
    c = m.t_embedder(t) + m.y_embedder(y)
    side = CONFIG.image_size
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2).double()
    distance = (place[:, None] - place[None]).square().sum(-1)
    results, counts = [], []
    for b in range(len(x)):
        one, image = c[b : b + 1], m.x_embedder.proj(x[b : b + 1])
        for layer in m.hnet.encoder.layers:
            image = layer(image, one)
        encoded = m.hnet.encoder.rmsnorm(image.flatten(2).transpose(1, 2))
        z = m.hnet.routing_module.proj(encoded.transpose(1, 2).reshape(1, -1, side, side))
        logit = m.hnet.routing_module.residual_scorer(z - m.hnet.routing_module.context_predictor(z)).flatten()
        p = torch.sigmoid(logit).double()
        p[0] = p[-1] = 1.0
        kept = (p > 0.5).nonzero().squeeze(1)
        fewer = int(np.floor(drop * len(kept) + 1e-9))
        kept = kept[p[kept].argsort(stable=True)[fewer:]].sort().values
        counts.append(len(kept))
        tokens = (encoded + m.pos_embed)[:, kept]
        for block in m.hnet.main_network.main_network.layers:
            tokens = block(tokens, one)
        values = m.hnet.main_network.main_network.rmsnorm(tokens)[0].double()
        sure = p[kept].clamp(1e-4, 1 - 1e-4)
        weight = torch.exp(-distance[kept][:, kept] / 2) * sure
        smoothed = weight / weight.sum(1, keepdim=True) @ values
        values = sure[:, None] * values + (1 - sure[:, None]) * smoothed
        out = values[distance[:, kept].argmin(1)].float() + m.hnet.residual_proj(encoded)[0]
        image = out.T.reshape(1, -1, side, side)
        for layer in m.hnet.decoder.layers:
            image = layer(image, one)
        last = m.hnet.decoder.rmsnorm(image.flatten(2).transpose(1, 2))
        shift, scale = m.final_layer.adaLN_modulation(one).chunk(2, dim=1)
        pixels = m.final_layer.linear(modulate(F.layer_norm(last, last.shape[-1:], eps=1e-6), shift, scale))
        results.append(pixels.transpose(1, 2).reshape(1, -1, side, side))
    return torch.cat(results), counts


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, 8, 8), torch.rand(batch) * 1000, torch.arange(batch)


@pytest.mark.parametrize("ratio", [4, 8])
def test_a_converted_dc_dit_is_what_the_release_computes(module, ratio):
    """All tokens within reach of the smoothing (25 of them), scores on both sides of 0.5; at 8x half are dropped."""
    x, t, y = inputs()
    with torch.no_grad():
        model = dcconvert.convert(module, 4, preset="dc-dit")
        named = dict(zip(model.spec.inputs, (x, t, y), strict=True))
        level = torch.logit(model.route(named)[0].quantile(0.75))
        module.hnet.routing_module.residual_scorer[3].bias -= level
        model = dcconvert.convert(module, 4, preset="dc-dit")
        planner = model.planner.at_ratio(ratio, np.linspace(1, 0.1, 10))
        model = DynamicModel.with_schedule(model, planner.schedule)
        wanted, counts = by_hand(module, x, t, y, 1 - 4 / ratio)
        run = model.start(3)
        levels = run.runtime.planner.schedule.levels
        object.__setattr__(run.runtime.planner.schedule, "levels", ())  # no rounding up to the shapes of buckets
        found = run.step(named)[0]
    assert levels
    assert run.kept.tolist() == counts
    assert 2 < min(counts) <= max(counts) <= 25
    assert relative(found, wanted) < 1e-5


def test_every_token_kept_with_certainty_is_the_module_itself(module):
    model = dcconvert.convert(module, 1, preset="dc-dit")
    x, t, y = inputs()
    with torch.no_grad():
        torch.testing.assert_close(model.original(x, t, y), module(x, t, y), rtol=1e-5, atol=1e-5)


def write(module: RefinedDiT, path: Path) -> Path:
    """A checkpoint as the release saves it: averaged weights beside the trained ones."""
    torch.save({"model": module.state_dict(), "ema": module.state_dict(), "opt": {}}, path)
    return path


def test_the_releases_names(module, tmp_path):
    assert set(module.state_dict()) == release_names(3)
    loaded = dcconvert.load_model(write(module, tmp_path / "dc.pt"), heads=2)
    assert isinstance(loaded, RefinedDiT)
    assert loaded.cfg == CONFIG.__class__(**{**vars(CONFIG), "mlp_width": 256})
    x, t, y = inputs()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t, y), module(x, t, y))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("pos_embed"), "a DC-DiT without the keys pos_embed"),
        (lambda s: s.pop("hnet.residual_proj.bias"), "missing keys: hnet.residual_proj.bias"),
        (lambda s: s.update({"hnet.extra": torch.ones(1)}), "keys that a DC-DiT does not have: hnet.extra"),
        (lambda s: s.update({"hnet.encoder.rmsnorm.weight": torch.ones(3)}), r"is \[3\], expected \[64\]"),
        (lambda s: s.update({f"{BLOCKS}99999999.norm": torch.ones(1)}), r"layers\.99999999 is not one of 4 blocks"),
        (lambda s: s.update({f"{BLOCKS}x.norm": torch.ones(1)}), r"layers\.x is not one of 4 blocks"),
        (
            lambda s: s.update({"pos_embed": torch.ones(64)}),
            r"pos_embed has shape \[64\], in a DC-DiT it has 3 dimensions",
        ),
        (
            lambda s: s.update({f"{BLOCKS}0.mlp.fc1.weight": torch.tensor(1.0)}),
            r"has shape \[\], in a DC-DiT it has 2 dim",
        ),
        (lambda s: s.update({"y_embedder.embedding_table.weight": torch.ones(11, 2)}), "width 2 is not a multiple of"),
    ],
)
def test_checkpoints_that_are_not_whole(module, tmp_path, change, message):
    state = module.state_dict()
    change(state)
    torch.save(state, tmp_path / "dc.pt")
    with pytest.raises(UsageError, match=message):
        dcconvert.load_model(tmp_path / "dc.pt", heads=2)


def test_a_dc_dit_is_no_dit(module, tmp_path):
    from dcconvert.passes.ir.errors import UnsupportedModelError

    with pytest.raises(UnsupportedModelError, match=r"a DC-DiT, not a DiT"):
        dcconvert.load_checkpoint(write(module, tmp_path / "dc.pt"), heads=2)
    message = refusal(2, tmp_path / "dc.pt", "--ratio", "4x", "--heads", 2, "-o", tmp_path / "out", after=["read"])
    assert "needs preset dc-dit" in message


@pytest.mark.slow
def test_a_release_checkpoint_is_inspected_as_it_is_converted(module, tmp_path):
    path = write(module, tmp_path / "dc.pt")
    run = run_cli("inspect", path, "--preset", "dc-dit", "--heads", 2)
    assert run.code == 0, run.err
    assert "router own on" in " ".join(run.out.split())
    run = run_cli("inspect", path, "--heads", 2)
    assert run.code == 2
    assert "cut points" in run.out
    assert "needs preset dc-dit" in run.out


@pytest.mark.slow
def test_the_main_job_on_a_release_checkpoint(module, tmp_path):
    path = write(module, tmp_path / "dc.pt")
    words = ("--ratio", "5x", "--preset", "dc-dit", "--heads", 2, "--steps", 4, "--batch", 2, "--images", 2)
    run = run_cli(path, *words, "--reference-steps", 5, "-o", tmp_path / "out")
    assert run.code == 0, run.err
    bundle = read_bundle(tmp_path / "out")
    assert bundle.model.schedule.kind == NATURAL
    assert bundle.manifest["config"]["patch"] == 1
    taken = bundle.manifest["source"]["weights"]
    assert (taken["key"], taken["averaged"], taken["passed_over"]) == ("ema", True, ["model (101 tensors)"])
    names = {check["name"] for check in json.loads((tmp_path / "out" / "report.json").read_text())["checks"]}
    assert IDENTITY in names


# A DiT made into one


def test_refined_from_a_dit():
    dit = tiny_dit()
    made = RefinedDiT.of(dit)
    again = RefinedDiT.of(dit)
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), again.state_dict().values(), strict=True))
    for number, block in enumerate(dit.blocks):
        own = made.hnet.main_network.main_network.layers[number].state_dict()
        for name, value in block.state_dict().items():
            assert torch.equal(own[name], value)
    x, t, y = torch.randn(2, 1, 16, 16), torch.tensor([100.0, 900.0]), torch.tensor([0, 3])
    with torch.no_grad():
        assert not made(x, t, y).any()
    assert made.cfg.adapter


def test_positions_are_read_at_the_middle_of_pixels():
    dit = DiT(DiTConfig(depth=1, width=32, heads=2, patch=2, image_size=8))
    made = RefinedDiT.of(dit)
    wanted = sincos_positions(32, (torch.arange(8) - 0.5) / 2)
    torch.testing.assert_close(made.pos_embed.data, wanted)
    # The middle of a patch, between its four pixels, is nearly what the DiT has for the patch.
    cells = wanted.view(4, 2, 4, 2, 32).mean((1, 3)).reshape(16, 32)
    assert relative(cells, sincos_positions(32, 4)[0]) < 0.05


@pytest.mark.slow
def test_refining_trains_everything_but_the_embedders(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")
    words = ("--ratio", "4x", "--preset", "dc-dit", "--refine-grid", "--steps", 4, "--batch", 2, "--images", 2)
    run = run_cli(checkpoint, *words, "--reference-steps", 5, "-o", tmp_path / "fine")
    assert run.code == 0, run.err
    bundle = read_bundle(tmp_path / "fine")
    assert bundle.model.spec.grid == (16, 16)
    assert bundle.manifest["config"]["patch"] == 2  # of the original, which it is compared with
    few = ("--teacher-samples", 8, "--images", 2, "--reference-steps", 5)
    short = ("--samples", 24, "--batch", 8, "--lr", "1e-3", *few)
    run = run_cli("upcycle", tmp_path / "fine", "-o", tmp_path / "router", "--train", "router", *short)
    assert run.code == 0, run.err
    run = run_cli("upcycle", tmp_path / "fine", "-o", tmp_path / "out", *short)
    assert run.code == 0, run.err
    before, alone, after = (load_file(str(tmp_path / name / "model.safetensors")) for name in ("fine", "router", "out"))
    assert {name.split(".")[1] for name in alone if name not in before} == {"router"}
    trained = {name for name in after if name not in before}
    assert any("hnet.encoder" in name for name in trained)
    assert any("main_network.layers.2" in name for name in trained)
    assert not any("t_embedder" in name or "y_embedder" in name for name in trained)
    router = [name for name in trained if "residual_scorer.3.weight" in name]
    assert router  # trained without being asked for: it is what the preset's paper does
    assert all(not torch.equal(after[name], before[name.removeprefix("trained.")]) for name in router)


def test_refining_is_for_dits_and_preset_dc_dit(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")
    message = refusal(2, checkpoint, "--ratio", "4x", "--refine-grid", "-o", tmp_path / "out", after=["read"])
    assert "needs preset dc-dit" in message
    with pytest.raises(UsageError, match="converts only a DiT"):
        dcconvert.convert(RefinedDiT(CONFIG), 4, preset="dc-dit", refine_grid=True)


def test_metadata_is_read_from_safetensors_too(module, tmp_path):
    path = tmp_path / "dc.safetensors"
    save_file(module.state_dict(), path)
    assert isinstance(dcconvert.load_model(path, heads=2), RefinedDiT)


# Files as the release's training writes them


class HNetSettings:
    """A class of the training script, pickled beside the weights."""

    def __init__(self) -> None:
        self.num_heads, self.enc_dec_dim_factor = [4, 4], [2, None]


@pytest.mark.parametrize("narrow", [32, 64, 20])
def test_a_training_file_with_its_settings(narrow, tmp_path):
    """The settings tell the heads; the tensors tell how wide the convolutions are (enc_dec_dim_factor 2, none, 3)."""
    torch.manual_seed(0)
    made = RefinedDiT(
        RefinedConfig(depth=2, width=64, heads=4, image_size=4, num_classes=10, narrow_width=narrow)
    ).eval()
    randomise(made, std=0.15)
    raw = {name: value + 1 for name, value in made.state_dict().items()}
    content = {"model": raw, "ema": made.state_dict(), "opt": {"state": {}}, "config": HNetSettings()}
    torch.save(content, tmp_path / "0050000.pt")
    loaded = dcconvert.load_model(tmp_path / "0050000.pt")
    assert isinstance(loaded, RefinedDiT)
    assert (loaded.cfg.heads, loaded.cfg.narrow) == (4, narrow)
    x, t, y = torch.randn(2, 4, 4, 4), torch.rand(2) * 1000, torch.arange(2)
    with torch.no_grad():
        assert torch.equal(loaded(x, t, y), made(x, t, y))


def test_the_dechunk_of_other_settings_is_refused(tmp_path):
    """The width of the dechunk's Gaussian is no tensor: a model that was trained with another one would be wrong."""
    small = RefinedDiT(RefinedConfig(depth=1, width=64, heads=4, image_size=4)).state_dict()
    torch.save({"ema": small, "config": {"dechunk_kernel_sigma": 2.0}}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match=r"dechunk_kernel_sigma is 2, but at 4x4 tokens only 1 is supported"):
        dcconvert.load_model(tmp_path / "x.pt", heads=4)
