"""Modules that were compiled, and hooks: the capture sees what the author wrote, and everything is put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcconvert.passes.frontend.capture import export
from dcconvert.passes.frontend.plain_module import plain, unwrapped


class Compiled(nn.Module):
    """Has the form that torch.compile gives a module, and cannot be called."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("this must not be called in a capture")


def test_compiled_modules_are_the_ones_inside():
    module = Two()
    inner = module.second
    module.second = Compiled(Compiled(inner))  # type: ignore[assignment]
    module.first._compiled_call_impl = refuse
    whole = Compiled(module)
    assert unwrapped(whole) is module
    with plain(whole) as found:
        assert found is module
        assert module.second is inner
        assert export(found, (torch.randn(3, 4),)).graph
    assert isinstance(module.second, Compiled)
    assert module.first._compiled_call_impl is refuse


def test_everything_is_put_back_after_an_error():
    module = Two()
    module.second = Compiled(module.second)  # type: ignore[assignment]
    with pytest.raises(RuntimeError), plain(module):
        raise RuntimeError
    assert isinstance(module.second, Compiled)


def test_hooks_of_accelerate_do_nothing_in_a_capture():
    hooks: Any = pytest.importorskip("accelerate.hooks")
    module, x = Two(), torch.randn(3, 4)

    class Refuse(hooks.ModelHook):
        pre_forward = refuse

    hooks.add_hook_to_module(module.first, Refuse())
    with plain(module) as found:
        assert found(x).shape == x.shape
    with pytest.raises(AssertionError):
        module(x)


def test_hooks_of_diffusers_that_move_weights_do_nothing_in_a_capture():
    hooks: Any = pytest.importorskip("diffusers.hooks.hooks")
    module, x = Two(), torch.randn(3, 4)

    class Refuse(hooks.ModelHook):
        pre_forward = refuse

    class Doubles(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 2

    wanted = module(x) * 2
    hooks.HookRegistry.check_if_exists_or_initialize(module).register_hook(Doubles(), "doubles")
    hooks.HookRegistry.check_if_exists_or_initialize(module.first).register_hook(Refuse(), "group_offloading")
    with plain(module) as found:
        torch.testing.assert_close(found(x), wanted)  # the other hook is part of the model
    with pytest.raises(AssertionError):
        module(x)


def test_casts_of_weights_become_part_of_the_graph():
    casting = pytest.importorskip("diffusers.hooks.layerwise_casting")
    module, x = Two(), torch.randn(3, 4)
    casting.apply_layerwise_casting_hook(module.first, torch.float16, torch.float32, False)
    with plain(module) as found:
        graph = export(found, (x,)).module()
    assert module.first.weight.dtype == torch.float16
    torch.testing.assert_close(graph(x), module(x))
