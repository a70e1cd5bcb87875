"""dcconvert rewrites trained diffusion transformers so that sampling steps compute fewer tokens, and exports them.

    import dcconvert
    dit = dcconvert.load_checkpoint("model.pt")
    fast = dcconvert.convert(dit, ratio=4)
    fast.save("model-dc4x")
    fast = dcconvert.load("model-dc4x")

`dcconvert.passes` rewrites the graph, and `dcconvert.export` exports the result to ONNX.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcconvert.api import Converted, convert, load
    from dcconvert.models.dit import DiT, DiTConfig
    from dcconvert.models.dit_checkpoint import load_checkpoint
    from dcconvert.models.load import load_model
    from dcconvert.passes.ir.errors import CheckFailedError, DcconvertError, UnsupportedModelError, UsageError
    from dcconvert.passes.methods import method_of as Options

# A clone without symbolic links has text files where passes and export should be links: look one folder up.
if (Path(__file__).parent / "passes").is_file():
    __path__.append(str(Path(__file__).resolve().parent.parent))

# ONNX Runtime reads this when it is imported. Whoever wants its telemetry sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

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

# Where the names above are. They are read when they are first used: torch alone takes seconds to import.
ERRORS = "dcconvert.passes.ir.errors"
HOMES = {
    "CheckFailedError": (ERRORS, "CheckFailedError"),
    "Converted": ("dcconvert.api", "Converted"),
    "DcconvertError": (ERRORS, "DcconvertError"),
    "DiT": ("dcconvert.models.dit", "DiT"),
    "DiTConfig": ("dcconvert.models.dit", "DiTConfig"),
    "Options": ("dcconvert.passes.methods", "method_of"),
    "UnsupportedModelError": (ERRORS, "UnsupportedModelError"),
    "UsageError": (ERRORS, "UsageError"),
    "convert": ("dcconvert.api", "convert"),
    "load": ("dcconvert.api", "load"),
    "load_checkpoint": ("dcconvert.models.dit_checkpoint", "load_checkpoint"),
    "load_model": ("dcconvert.models.load", "load_model"),
}


if not TYPE_CHECKING:  # type checkers see the imports above, and misspelt names

    def __getattr__(name: str) -> Any:
        if name not in HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = HOMES[name]
        globals()[name] = getattr(import_module(module), attribute)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
