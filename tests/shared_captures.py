"""Captures of models, shared by the tests of one process: a model is traced once for each kind of call.

Half of the time of a conversion is `torch.export`, and tests convert the same few tiny models hundreds of times. Here
a module of the same classes, with the same attributes and weights, that was called in the same way before, gets the
program of its forerunner over its own weights.
"""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dcconvert.passes.frontend import capture

REAL = capture.export
LARGEST = 1_000_000  # weights; a larger model is traced every time, and none is held in memory


class SharedCaptures:
    """`export` of capture with a memory; `made` and `reused` count its calls."""

    def __init__(self) -> None:
        self.known: dict[Any, tuple[ExportedProgram, list[str]]] = {}
        self.made = self.reused = 0

    def __call__(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, dynamic: bool = True
    ) -> ExportedProgram:
        if not dynamic:
            self.made += 1
            return REAL(module, args, kwargs, dynamic)
        key = key_of(module.eval(), args, kwargs)
        found = self.known.get(key)
        if found and assumed(found[0]) == found[1]:
            self.reused += 1
            return over(found[0], module)
        self.made += 1
        program = REAL(module, args, kwargs)
        if key is not None:
            self.known[key] = program, assumed(program)
        return program


def key_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    """What a capture depends on: every attribute and weight, the call, and the code of all submodules.

    None for a module that cannot be pickled, such as one of a class inside a test.
    """
    if sum(p.numel() for p in module.parameters()) > LARGEST:
        return None
    text = io.BytesIO()
    try:
        Described(text).dump((module, tuple(args), dict(kwargs or {})))
    except (AttributeError, RuntimeError, TypeError, pickle.PicklingError):
        return None
    return hashlib.sha256(text.getvalue()).hexdigest(), tuple(type(part).forward for part in module.modules())


class Described(pickle.Pickler):
    """Writes tensors by their values: torch would add numbers that differ from time to time."""

    def reducer_override(self, found: Any) -> Any:
        if not isinstance(found, Tensor):
            return NotImplemented
        values = found.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return Described, (type(found), str(found.dtype), tuple(found.shape), found.requires_grad, values)


def over(program: ExportedProgram, module: nn.Module) -> ExportedProgram:
    """The program with the tensors of another module, which are called the same."""
    own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    copied = copy.copy(program)
    copied._state_dict = {name: own[name] for name in program.state_dict}
    copied._constants = {name: own.get(name, value) for name, value in program.constants.items()}
    return copied


def assumed(program: ExportedProgram) -> list[str]:
    """What is known of the sizes of its inputs. If a pass of a test added to that, nobody else shall suffer from it."""
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    sizes: list[Any] = [size for value in values if isinstance(value, Tensor) for size in value.shape]
    inner = [size.node for size in sizes if isinstance(size, torch.SymInt)]
    return [f"{node.expr} in {node.shape_env.bound_sympy(node.expr)}" for node in inner]
