"""Graphs that the exporter can translate are not traced twice, and the files are the same."""

from __future__ import annotations

from contextlib import nullcontext

import onnx
import pytest
import torch
from torch import nn

from dcconvert.export.onnx import export
from dcconvert.export.onnx.export import export_graph  # not the one that tests share
from dcconvert.export.onnx.single_trace import single_trace

X = torch.randn(3, 4, 6)
BATCH = {0: torch.export.Dim("batch")}


class Plain(nn.Module):
    """Ops that the exporter translates, some of which a trace would replace."""

    def forward(self, x):
        first, second = x.chunk(2, dim=1)
        return (first.flatten(1) + second.reshape(-1, 12).unflatten(1, (3, 4)).flatten(1)).to(torch.float16)


class Composite(nn.Module):
    """An op that the exporter knows only by its parts."""

    def forward(self, x):
        return torch.rms_norm(x, (6,))


class InPlace(nn.Module):
    def forward(self, x):
        return (2 * x).add_(x)


def exported(module):
    return torch.export.export(module.eval(), (X,), dynamic_shapes=(BATCH,))


@pytest.mark.parametrize(("module", "same"), [(Plain(), True), (Composite(), False), (InPlace(), False)])
def test_only_programs_with_ops_to_replace_are_traced(module, same):
    program = exported(module)
    ops = {torch.ops.aten.rms_norm.default: lambda x, shape: x * x.square().mean(-1, keepdim=True).rsqrt()}
    with single_trace():
        assert (program.run_decompositions(ops) is program) is same
    assert exported(Plain()).run_decompositions(ops) is not program


def test_without_a_table_it_traces_as_ever():
    program = exported(Plain())
    with single_trace():
        assert program.run_decompositions() is not program


def test_after_an_error_torch_is_as_it_was():
    before = torch.export.ExportedProgram.run_decompositions
    with pytest.raises(KeyError), single_trace():
        raise KeyError
    assert torch.export.ExportedProgram.run_decompositions is before


def test_the_graph_is_the_one_of_two_traces(monkeypatch, tmp_path):
    graph = exported(Plain()).module()
    seen = []
    for name, context in (("one", single_trace), ("two", nullcontext)):
        monkeypatch.setattr(export, "single_trace", context)
        export_graph(graph, tmp_path / name, (X,), [("batch",)], ["out"])
        found = onnx.load(tmp_path / name).graph
        seen.append(([node.op_type for node in found.node], [*found.input], [*found.output]))
    assert seen[0] == seen[1]
