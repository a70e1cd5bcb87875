"""Inputs to try an exported graph with, so that tools which make up random ones need not.

Random indices point outside the arrays that they index. polygraphy reads these files:
`polygraphy run onnx/denoise.onnx --onnxrt --load-inputs onnx/example_inputs/denoise.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.json import save_json
from torch import Tensor

FOLDER = "example_inputs"
MOST_BYTES = 32_000_000  # of the arrays; the state of a large model in mode carry would be larger than its weights


def write_example_inputs(graph: Path, feed: Mapping[str, Any]) -> None:
    """Write `example_inputs/GRAPH.json` beside an ONNX file; nothing for inputs of more than MOST_BYTES."""
    arrays = {name: as_numpy(value) for name, value in feed.items() if isinstance(value, Tensor | np.ndarray)}
    if sum(array.nbytes for array in arrays.values()) > MOST_BYTES:
        return
    folder = graph.parent / FOLDER
    folder.mkdir(exist_ok=True)
    save_json([arrays], str(folder / f"{graph.stem}.json"), description=None)


def as_numpy(value: Tensor | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)
