"""InsertRouter: scores join the outputs, the router's state joins the program, nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dcconvert.passes.frontend.token_stream import FindTokenStream
from dcconvert.passes.ir.pass_runner import run_passes
from dcconvert.passes.ir.program import Program
from dcconvert.passes.methods import method_of
from dcconvert.passes.modules.routers import CARRY_ROUTERS, PLAIN_ROUTERS
from dcconvert.passes.rewrite.inline import inline
from dcconvert.passes.rewrite.insert_router import InsertRouter
from tests.passes.harness import BATCH, GRID, TOKENS, Block, TinyModel, tiny_inputs, tiny_program


def with_router(name: str, module: nn.Module | None = None, mode: str = "chunk") -> Program:
    program = tiny_program(module, router=name, seed=3, mode=mode)
    run_passes(program, (FindTokenStream(), InsertRouter()))
    return program


def hidden_state(module: TinyModel, x: Tensor, t: Tensor, mode: str = "chunk") -> Tensor:
    """What the trunk's input is, computed by the original: the stream before the first block, or after it."""
    seen: list[Tensor] = []
    take = (lambda block, args, result: args[0]) if mode == "carry" else lambda block, args, result: result
    hook = module.blocks[0].register_forward_hook(lambda *call: seen.append(take(*call)))
    module(x, t)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("name", "mode"),
    [("merge", "tome"), *((name, "chunk") for name in PLAIN_ROUTERS), *((name, "carry") for name in CARRY_ROUTERS)],
)
def test_scores_are_the_routers_and_come_first(name, mode):
    module, inputs = TinyModel(Block() for _ in range(3)), tiny_inputs(5)
    program = with_router(name, module, mode)
    with torch.no_grad():
        scores, output = program.graph_module(*inputs)
        wanted = method_of(mode, router=name, seed=3).router_module(GRID)(hidden_state(module, *inputs, mode))
        torch.testing.assert_close(output, module(*inputs), rtol=0, atol=0)
    torch.testing.assert_close(scores, wanted)
    assert program.scores is not None
    shape = [str(size) for size in program.scores.meta["val"].shape]
    assert shape == [str(program.batch), str(TOKENS), *(["2"] if name == "merge" else [])]


def test_fixed_priorities_become_a_buffer():
    program = with_router("random")
    assert "router.priorities" in dict(program.graph_module.named_buffers())


def test_a_router_with_parameters_of_its_own():
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(12, 4), nn.SiLU(), nn.Linear(4, 1))

        def forward(self, h: Tensor) -> Tensor:
            return self.layers(h).squeeze(-1).sigmoid()

    module, router, inputs = TinyModel(Block() for _ in range(3)), Learned(), tiny_inputs()
    program = tiny_program(module)
    run_passes(program, (FindTokenStream(),))
    output = list(program.graph.nodes)[-1]
    with program.graph.inserting_before(output):
        program.scores = inline(program.graph_module, router, (program.found_trunk()[0],), "learned")
    output.args = ((program.scores,),)
    program.graph_module.recompile()
    with torch.no_grad():
        torch.testing.assert_close(program.graph_module(*inputs)[0], router(hidden_state(module, *inputs)))


def test_a_model_that_has_a_router_of_its_own_keeps_it():
    """Also where its tensor is called like the random router's."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.priorities = nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.priorities

    class Routed(TinyModel):
        def __init__(self) -> None:
            super().__init__(Block() for _ in range(3))
            self.router = Own()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.router(super().forward(x, t))

    module, inputs = Routed(), tiny_inputs()
    for name in ("predictability", "pool", "random"):
        program = with_router(name, module)
        torch.testing.assert_close(program.graph_module(*inputs)[1], module(*inputs))


def test_random_scores_differ_with_the_seed():
    scores = []
    for seed in (0, 0, 1):
        program = tiny_program(router="random", seed=seed)
        run_passes(program, (FindTokenStream(), InsertRouter()))
        scores.append(program.graph_module(*tiny_inputs(BATCH))[0])
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
