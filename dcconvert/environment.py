"""The machine and the versions that a figure was measured with."""

from __future__ import annotations

import importlib
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch


def machine() -> dict[str, Any]:
    """Processor, memory and versions, for manifests, reports and benchmark files; None for what is not installed."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": version_of("onnx"),
        "numpy": np.__version__,
        "onnxruntime": version_of("onnxruntime"),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts["gpu"] = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, compute capability {gpu.major}.{gpu.minor}"
        facts["cuda"] = torch.version.cuda
    return facts


def version_of(package: str) -> str | None:
    """A package's version; None if it cannot be imported."""
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError:
        return None


def memory_gb() -> float | None:
    try:
        import psutil
    except ImportError:
        return None
    return round(psutil.virtual_memory().total / 1e9, 1)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def set_threads(threads: int) -> None:
    """How many threads torch uses; 0 leaves it to torch."""
    if threads:
        torch.set_num_threads(threads)
