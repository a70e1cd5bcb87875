"""How packing rules read the arguments of an op."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, Node

from dcconvert.passes.ir.errors import UnsupportedModelError
from dcconvert.passes.ir.node_args import integer, integers, nodes, operand


@pytest.fixture
def permute() -> Node:
    graph = Graph()
    return graph.call_function(torch.ops.aten.permute.default, (graph.placeholder("x"), [1, 0]))


@pytest.fixture
def select() -> Node:
    """select(x, 1, index) with an index that another node computes."""
    graph = Graph()
    return graph.call_function(torch.ops.aten.select.int, (graph.placeholder("x"), 1, graph.placeholder("index")))


def test_operand(permute):
    assert operand(permute) is permute.args[0]
    with pytest.raises(UnsupportedModelError, match=r"aten\.permute.*argument 1 is \[1, 0\].* needs a tensor"):
        operand(permute, 1)


def test_integer(select):
    assert integer(select, 1) == 1
    assert integer(select, 3, 7) == 7  # left out
    with pytest.raises(UnsupportedModelError, match=r"aten\.select.*argument 2 is index.* needs a plain integer"):
        integer(select, 2)
    with pytest.raises(UnsupportedModelError, match="argument 3 is nothing"):
        integer(select, 3)


def test_integers(permute, select):
    assert integers(permute, 1) == [1, 0]
    for position in (0, 1):
        with pytest.raises(UnsupportedModelError, match=r"aten\.select.* needs a list of plain integers"):
            integers(select, position)
    permute.args = (permute.args[0], [1, permute.args[0]])
    with pytest.raises(UnsupportedModelError, match=r"argument 1 is \[1, x\]"):
        integers(permute, 1)


def test_nodes():
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    cat = graph.call_function(torch.ops.aten.cat.default, ([x, y], 1))
    assert nodes(cat, 0) == [x, y]
    cat.args = ([x, 2], 1)
    for position in (0, 1):
        with pytest.raises(UnsupportedModelError, match="needs a list of tensors"):
            nodes(cat, position)
