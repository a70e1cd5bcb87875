"""A module as its author wrote it, for the time of its capture: not compiled, and without hooks that move weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

COMPILED = "_orig_mod"  # the child of a module that torch.compile returned
MOVES = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")  # diffusers' hooks


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside those that `torch.compile` returned."""
    while isinstance(found := module._modules.get(COMPILED), nn.Module):
        module = found
    return module


@contextmanager
def plain(module: nn.Module) -> Iterator[nn.Module]:
    """The module, until the end of the context, without what was put around it.

    Compiled modules are the ones inside, and hooks of accelerate and diffusers that move weights between devices do
    nothing. Where a hook casts the weights for each call, the casts become part of the call. Everything is put back.
    """
    module = unwrapped(module)
    with ExitStack() as stack:
        for parent in list(module.modules()):
            inner = {name: unwrapped(child) for name, child in parent._modules.items() if child is not None}
            put(stack, parent._modules, inner)
        for part in module.modules():
            own = vars(part)
            if own.get("_compiled_call_impl") is not None:
                put(stack, own, {"_compiled_call_impl": None})
            if "_hf_hook" in own and "_old_forward" in own:
                put(stack, own, {"forward": own["_old_forward"]})
            if (registry := own.get("_diffusers_hook")) is not None:
                for name, reference in zip(registry._hook_order, registry._fn_refs, strict=True):
                    put(stack, vars(reference), without(part, name, registry.hooks[name], reference))
        yield module


def without(module: nn.Module, name: str, hook: Any, reference: Any) -> dict[str, Any]:
    """What one of diffusers' hooks does instead: nothing if it moves weights, and casts that are part of the call."""
    casts = hasattr(hook, "storage_dtype") and hasattr(hook, "compute_dtype")
    if name not in MOVES and not casts:
        return {}
    changes = {"pre_forward": lambda _, *args, **kwargs: (args, kwargs), "post_forward": lambda _, output: output}
    return {**changes, "forward": casting(module, reference.forward, hook.compute_dtype)} if casts else changes


def casting(module: nn.Module, forward: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """A forward whose weights are of a type, by casts that a tracer sees."""

    def with_casts(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for part in module.modules():
                floats = {n: p for n, p in part._parameters.items() if p is not None and p.is_floating_point()}
                put(stack, part._parameters, {name: weight.to(dtype) for name, weight in floats.items()})
            return forward(*args, **kwargs)

    return with_casts


def put(stack: ExitStack, values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change some values of a dict until the stack closes."""
    missing = [name for name in changes if name not in values]
    before = {name: values[name] for name in changes if name in values}
    stack.callback(lambda: [values.pop(name) for name in missing])
    stack.callback(values.update, before)
    values.update(changes)
