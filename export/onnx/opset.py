"""The opset of an ONNX file."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from dcconvert.passes.ir.errors import UsageError


def opset_of(path: Path) -> int:
    """The version of the standard operators that a file uses; UsageError for one that cannot be read."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}; convert the model again") from error
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
