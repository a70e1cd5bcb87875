"""dcconvert rewrites trained diffusion transformers into dynamic-chunking ones and exports them.

    import dcconvert
    dit = dcconvert.load_checkpoint("model.pt")
    fast = dcconvert.convert(dit, ratio=4)
    fast.save("model-dc4x")
    fast = dcconvert.load("model-dc4x")

`dcconvert.passes` holds the graph rewriting, `dcconvert.export` what turns the result into ONNX.
"""

from __future__ import annotations

from pathlib import Path

# A clone without symbolic links has text files where passes and export should be links: look one folder up.
if (Path(__file__).parent / "passes").is_file():
    __path__.append(str(Path(__file__).resolve().parent.parent))

from dcconvert.api import Converted, convert, load
from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.models.dit_checkpoint import load_checkpoint
from dcconvert.models.load import load_model
from dcconvert.passes.ir.errors import CheckFailedError, DcconvertError, UnsupportedModelError, UsageError
from dcconvert.passes.methods import method_of as Options

__version__ = "0.1.0"

__all__ = [
    "CheckFailedError",
    "Converted",
    "DcconvertError",
    "DiT",
    "DiTConfig",
    "Options",
    "UnsupportedModelError",
    "UsageError",
    "convert",
    "load",
    "load_checkpoint",
    "load_model",
]
