"""The presets from Python: a module alone, a model of a checkpoint, and what is refused before anything runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dcconvert
from dcconvert.models.dit import DiT
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.schedule import NATURAL
from dcconvert.sampling import fitting
from tests.dcconvert.harness import CONFIG, tiny_dit

pytestmark = pytest.mark.slow


def test_a_module_from_python():
    model = dcconvert.convert(DiT(CONFIG), 4, preset="dc-dit")
    assert (model.method.name, model.schedule.kind) == ("dc-dit", NATURAL)
    x, t, y = torch.randn(2, 1, 16, 16), torch.tensor([300.0, 700.0]), torch.tensor([0, 1])
    assert model(x, t, y).shape == (2, 1, 16, 16)
    assert "4x was requested, but not fitted on sampling runs" in model.summary()


def test_a_model_from_a_checkpoint_is_fitted_from_python_too(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "IMAGES", 8)  # the same work, sooner done
    path = tmp_path / "dit.safetensors"
    entry = {"config": CONFIG.as_dict(), "prediction": "flow"}
    save_file(tiny_dit().state_dict(), path, metadata={"dcconvert": json.dumps(entry)})
    dit = dcconvert.load_model(path)
    model = dcconvert.convert(dit, 4, preset="dc-dit", steps=4)
    assert 0.2 < model.schedule.mean < 0.3
    assert f"{64 * model.schedule.mean:.0f} kept on average (4x)" in model.summary()
    assert not dcconvert.convert(dit, 4, preset="dc-dit", steps=4, fit=False).schedule.seen
    assert dcconvert.convert(dit, 2, preset="ddit", steps=8).method.predicts == "flow"


def test_what_a_module_predicts_is_said_beside_the_preset():
    skips = [
        any("skip" in name for name, _ in dcconvert.convert(DiT(CONFIG), 2, preset="ddit", **said).named_buffers())
        for said in ({}, {"prediction": "eps"})
    ]
    assert skips == [False, True]
    with pytest.raises(UsageError, match="unknown prediction 'noise'"):
        dcconvert.convert(DiT(CONFIG), 2, preset="ddit", prediction="noise")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preset": "typo"}, "unknown method 'typo'"),
        ({"preset": "dc-dit", "refine_grid": True}, "refine_grid converts only a DiT"),
        ({"preset": "carry", "warm_up": 0}, "at least one warm-up step"),
        ({"ratio": 0.5}, "is not a number of at least 1"),
    ],
)
def test_a_drop_in_refuses_before_it_is_called(wrong, message):
    from diffusers import DiTTransformer2DModel

    module: Any = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=9
    )
    with pytest.raises(UsageError, match=message):
        dcconvert.convert(module, **wrong)
