"""SplitProjections: fused projections come apart, other linear layers do not."""

from __future__ import annotations

import torch

from dcconvert.passes.frontend.token_stream import FindTokenStream
from dcconvert.passes.ir.pass_runner import run_passes
from dcconvert.passes.rewrite.split_projections import SplitProjections
from tests.passes.harness import Block, TinyModel, count, tiny_inputs, tiny_program

aten = torch.ops.aten


def test_every_fused_projection_becomes_three_and_the_output_stays():
    module, inputs = TinyModel(Block() for _ in range(3)), tiny_inputs()
    program = tiny_program(module)
    before = count(program.graph_module, aten.linear.default)
    records = run_passes(program, (FindTokenStream(), SplitProjections()))
    assert records[-1].matches == 3
    assert count(program.graph_module, aten.linear.default) == before + 2 * 3
    assert count(program.graph_module, aten.unbind.int) == 0
    with torch.no_grad():
        torch.testing.assert_close(program.graph_module(*inputs)[0], module(*inputs), rtol=1e-5, atol=1e-5)


def test_features_out_of_order_stay_together():
    class Interleaved(Block):
        def forward(self, x, c):
            b, n, d = x.shape
            q, k, v = self.qkv(x).reshape(b, n, self.heads, d // self.heads, 3).permute(4, 0, 2, 1, 3).unbind(0)
            return x + self.proj(
                torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
            )

    program = tiny_program(TinyModel(Interleaved() for _ in range(3)))
    records = run_passes(program, (FindTokenStream(), SplitProjections()))
    assert records[-1].matches == 0


def test_features_that_are_used_twice_stay_together():
    class Shared(Block):
        def forward(self, x, c):
            b, n, d = x.shape
            both = self.qkv(x)
            q, k, v = both.reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + self.proj(
                torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
            )
            return x + both[..., :d].sin()

    program = tiny_program(TinyModel(Shared() for _ in range(3)))
    records = run_passes(program, (FindTokenStream(), SplitProjections()))
    assert records[-1].matches == 0
