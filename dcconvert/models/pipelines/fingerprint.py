"""What a module computes with: its tree, its weights and its settings. A change means that it must be captured anew."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dcconvert.passes.runtime.infer_runs import version_of

# What every module has, and what hooks and compilers put there.
PUT_THERE = {"forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_is_torch_compile", "_internal_dict"}
ORDINARY = frozenset(vars(nn.Module())) | PUT_THERE
MOST = 64  # entries of a setting


def fingerprint(module: nn.Module) -> int:
    """A number that changes with the modules, the parameters and their versions, types and devices, and the settings.

    Settings are attributes that are not tensors or modules, such as the names, scales and states of adapters. Whole
    numbers are left out, because they count; other objects are known by their class.
    """
    parts: list[Any] = []
    for child in module.modules():
        parts.append(type(child))
        parts += [facts(tensor) for held in (child._parameters, child._buffers) for tensor in held.values()]
        own = vars(child)
        if len(own) > len(ORDINARY & own.keys()):
            parts += [(name, setting(value)) for name, value in own.items() if name not in ORDINARY]
    return hash(tuple(parts))


def facts(tensor: Tensor | None) -> Any:
    """Which tensor it is, and in which state."""
    return None if tensor is None else (id(tensor), version_of(tensor), tensor.dtype, tensor.device)


def setting(value: Any) -> Any:
    """A value that changes with a setting."""
    if isinstance(value, bool | float | str) or value is None:
        return value
    if isinstance(value, dict) and len(value) <= MOST:
        return tuple((str(name), setting(entry)) for name, entry in value.items())
    if isinstance(value, list | tuple | set) and len(value) <= MOST:
        return tuple(setting(entry) for entry in (sorted(value, key=str) if isinstance(value, set) else value))
    return id(value) if isinstance(value, Tensor) else type(value)
