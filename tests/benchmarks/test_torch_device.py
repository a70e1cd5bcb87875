"""A model in torch that is called from the host: the same steps as those of the model itself."""

from __future__ import annotations

import numpy as np
import torch

import dcconvert
from benchmarks.torch_device import TorchDevice
from dcconvert.models.example_inputs import dit_inputs
from dcconvert.passes.methods import method_of


def test_computed_and_skipped_steps_are_those_of_the_model() -> None:
    config = dcconvert.DiTConfig(
        depth=3, width=32, heads=2, patch=2, image_size=8, in_channels=1, num_classes=10, learn_sigma=False
    )
    torch.manual_seed(0)
    dit = dcconvert.DiT(config).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.normal_(std=0.2)
    model = dcconvert.convert(dit, 4, options=method_of("steps"))
    wanted, found = model.start(2), TorchDevice(model, "cpu").start(2)
    x, t, y = dit_inputs(dit, 2)
    for step, tokens in enumerate([model.spec.tokens, model.spec.tokens, 0]):
        given = {"x": x, "t": t * (1 - 0.1 * step), "y": y}
        counts = np.full(2, tokens)
        with torch.inference_mode():
            [expected] = wanted.step(given, counts)
            [output] = found.step({name: value.numpy() for name, value in given.items()}, counts)
        assert isinstance(output, np.ndarray)
        np.testing.assert_allclose(output, expected.numpy(), rtol=0, atol=1e-6)
