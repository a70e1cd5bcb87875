"""A module of diffusers made for weights that are there already: without memory for its own, drawing no numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

MOST_BUFFERED = 2**28  # values of all tables that a class computes
DRAWN = (torch.empty, torch.randn, torch.rand)  # what parameters are made of; tables are computed from other things


class OnMeta(TorchFunctionMode):
    """Parameters have no memory; buffers are computed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in DRAWN:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def built(name: str, config: Mapping[str, Any]) -> nn.Module:
    """The class `name` of diffusers with a configuration: parameters on the meta device, tables on the CPU.

    It is made on the meta device first, so that a table of any size costs nothing. ValueError for a table that is too
    large, and whatever the class raises.
    """
    import diffusers

    cls: Any = getattr(diffusers, name)
    with quiet():
        with torch.device("meta"):
            empty: nn.Module = cls.from_config(dict(config))
        if sum(math.prod(buffer.shape) for buffer in empty.buffers()) > MOST_BUFFERED:
            raise ValueError(f"its configuration asks for tables of more than {MOST_BUFFERED} values")
        if not any(buffer.is_meta for buffer in empty.buffers()):
            return empty
        with OnMeta():
            module: nn.Module = cls.from_config(dict(config))
    return module


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers logs errors only and warns of nothing, and does as before afterwards."""
    import diffusers

    logging = diffusers.utils.logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
