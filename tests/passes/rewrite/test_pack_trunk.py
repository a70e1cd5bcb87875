"""PackTrunk: which ops come, which go, where the gathers land, and which plan inputs stay."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from dcconvert.passes.frontend.token_stream import FindTokenStream
from dcconvert.passes.ir.errors import CheckFailedError, UnsupportedModelError
from dcconvert.passes.ir.pass_runner import PassResult, run_passes
from dcconvert.passes.ir.program import Program
from dcconvert.passes.planning.chunk_plan import PLAN_ARRAYS, Planner
from dcconvert.passes.rewrite.pack_trunk import PackTrunk, closing_norm
from tests.passes.harness import (
    BATCH,
    GRID,
    WIDTH,
    Block,
    TinyModel,
    count,
    plan_tensors,
    random_keep,
    tiny_inputs,
    tiny_program,
)

aten, ops = torch.ops.aten, torch.ops.dcconvert

# A block's linears: modulation, qkv, projection, MLP.
LINEARS = 4


def packed(module: TinyModel | None = None, **options: int | str) -> Program:
    program = tiny_program(module, **options)
    run_passes(program, (FindTokenStream(), PackTrunk()))
    return program


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (0, 0), (0, 1)])
def test_op_counts(head, tail):
    before = Counter(node.target for node in tiny_program().graph.nodes)
    program = packed(head_blocks=head, tail_blocks=tail)
    after = Counter(node.target for node in program.graph.nodes)
    trunk = 3 - head - tail
    assert before[aten.scaled_dot_product_attention.default] == 3
    assert after[aten.scaled_dot_product_attention.default] == head + tail
    assert after[ops.padded_attention.default] == trunk
    assert after[ops.chunk.default] == after[ops.dechunk.default] == 1
    for target in (aten.linear.default, aten.layer_norm.default, aten.silu.default, aten.mul.Tensor):
        assert after[target] == before[target], target


def test_two_gathers_an_attention_and_one_for_each_per_sample_value():
    """The grid is entered at the fused qkv and left after attention; shift, scale and gate are gathered by tile."""
    program = packed(head_blocks=0, tail_blocks=0)
    assert count(program.graph_module, ops.gather_tokens.default, "grid_index") == 3
    assert count(program.graph_module, ops.gather_tokens.default, "packed_index") == 3
    assert count(program.graph_module, aten.index_select.default, "sample_ids") == 3 * 3
    entering = [
        n.args[0] for n in program.graph.nodes if n.target is ops.gather_tokens.default and "grid" in str(n.args[1])
    ]
    leaving = [n for n in program.graph.nodes if n.target is ops.gather_tokens.default and "packed" in str(n.args[1])]
    assert all(node.target is aten.linear.default for node in entering)
    assert all(user.target is aten.linear.default for node in leaving for user in node.users)


def test_the_modulation_stays_per_sample():
    program = packed(head_blocks=0, tail_blocks=0)
    batch = str(program.batch)
    firsts = [str(n.meta["val"].shape[0]) for n in program.graph.nodes if n.target is aten.linear.default]
    assert firsts.count(batch) == 3 + 1  # three modulations and the final layer; all others are packed


@pytest.mark.parametrize(
    ("packing", "unused"),
    [
        ("rows", {"segment_ids", "cu_seqlens", "cu_seqlens_kv"}),
        ("bins", {"row_lengths", "cu_seqlens", "cu_seqlens_kv"}),
        ("varlen", {"row_lengths", "segment_ids", "cu_seqlens_kv"}),
    ],
)
def test_plan_inputs(packing, unused):
    program = packed(packing=packing)
    wanted = [name for name in PLAN_ARRAYS if name not in unused]
    assert sorted(program.plan_inputs) == sorted(wanted)
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    assert sorted(names) == sorted(["x", "t", *wanted])
    assert all(node.users for node in program.plan_inputs.values())


def test_values_are_those_of_the_original_at_any_head_and_tail():
    module, inputs = TinyModel(Block() for _ in range(3)), tiny_inputs(2)
    for head, tail in ((0, 0), (2, 0), (0, 2)):
        program = packed(module, head_blocks=head, tail_blocks=tail)
        plan = plan_tensors(Planner(GRID, 4, 4).full_plan(2))
        (found,) = program.graph_module(*inputs, *(plan[name] for name in program.plan_inputs))
        torch.testing.assert_close(found, module(*inputs))


def test_dropping_changes_the_trunk_only_where_it_should():
    """Kept alone, a sample's tokens do not see the dropped ones: changing those leaves the kept updates alone."""
    module = TinyModel(Block() for _ in range(3))
    program = packed(module, head_blocks=0, tail_blocks=0, members=1)
    keep = random_keep((4,) * BATCH, 8)
    plan = plan_tensors(Planner(GRID, 1, 4).plan(keep))
    x, t = tiny_inputs()
    changed = x.clone()
    pixels = torch.from_numpy(keep).view(BATCH, 1, *GRID).repeat_interleave(2, 2).repeat_interleave(2, 3)
    changed[~pixels.expand_as(x)] += 5
    given = [plan[name] for name in program.plan_inputs]
    a, b = (program.graph_module(value, t, *given)[0] for value in (x, changed))
    mask = torch.from_numpy(keep)
    torch.testing.assert_close(a[mask], b[mask])
    assert (a[~mask] - b[~mask]).abs().min() > 0


def test_positions_added_inside_the_trunk_follow_the_tokens():
    class Positioned(Block):
        def __init__(self) -> None:
            super().__init__()
            self.positions = torch.nn.Parameter(torch.randn(1, 8, WIDTH))

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return super().forward(x + self.positions, c)

    program = packed(TinyModel(Positioned() for _ in range(3)))
    assert count(program.graph_module, ops.gather_tokens.default) == 3  # to rows and back, and the positions


def test_a_result_of_another_shape_is_caught():
    program = packed()
    start, _ = program.found_trunk()
    program.trunk = (start, next(n for n in program.graph.nodes if n.target is ops.chunk.default))
    with pytest.raises(CheckFailedError, match="dechunk gives"):
        PackTrunk().ensures(program)


def test_the_result_says_how_often_it_fired():
    program = tiny_program(head_blocks=0)
    FindTokenStream().call(program)
    result = PackTrunk().call(program)
    assert isinstance(result, PassResult)
    assert result.matches == 2
    assert "2 attentions" in result.notes[0]


@pytest.mark.parametrize("also", [False, True])
def test_values_are_brought_back_behind_the_one_norm_that_reads_the_last_block(also):
    """Something else that reads the last block would get what no norm has seen."""
    graph = torch.fx.Graph()
    end = graph.call_function(aten.relu.default, (graph.placeholder("x"),))
    norm = graph.call_function(aten.rms_norm.default, (end, [4]))
    graph.output((norm, end) if also else (norm,))
    if also:
        with pytest.raises(UnsupportedModelError, match="needs an RMS norm after the last block"):
            closing_norm(end)
    else:
        assert closing_norm(end) is norm
