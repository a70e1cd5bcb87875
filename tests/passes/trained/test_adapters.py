"""Adapters, gates and features: new paths that change nothing before training, and passes that keep the contract."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.methods import method_of
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.rewritten import example_of, rewritten
from dcconvert.passes.serialise.graph_json import model_from_dict, model_tensors, model_to_dict
from dcconvert.passes.trained.adapters import (
    GATE,
    AddDechunkAdapter,
    AddGate,
    AddRouterAdapter,
    DechunkAdapter,
    RouterAdapter,
    ShowFeatures,
    has_adapter,
    with_dechunk_adapter,
    with_gate,
    with_router_adapter,
)
from tests.passes.contract_harness import check_contract
from tests.passes.harness import GRID, WIDTH, Block, TinyModel, tiny_inputs


@cache
def converted(mode: str = "chunk") -> DynamicModel:
    torch.manual_seed(0)
    module = TinyModel(Block() for _ in range(3))
    return rewrite(module, tiny_inputs(), {}, method_of(mode), Policy("constant", 2).timetable(), timestep_scale=1.0)


def test_each_edit_is_recorded():
    model = converted()
    made = with_gate(with_dechunk_adapter(with_router_adapter(model)))
    new = made.records[len(model.records) :]
    assert [record.name for record in new] == ["AddRouterAdapter", "AddDechunkAdapter", "AddGate"]
    assert [record.notes for record in new] == [("in route",), ("in denoise",), ("in denoise",)]
    assert "AddRouterAdapter: 1 matches in route" in made.summary()
    assert not has_adapter(model, "router_adapter")  # its graphs are copies


def test_an_adapter_is_added_once():
    made = with_router_adapter(with_dechunk_adapter(converted()))
    assert with_router_adapter(with_dechunk_adapter(made)) is made


def test_a_model_out_of_a_file_has_no_fake_values_and_gets_them():
    model = converted()
    read = model_from_dict(model_to_dict(model), model_tensors(model))
    wanted, found = (model_to_dict(with_router_adapter(with_gate(one))) for one in (model, read))
    assert found["graphs"] == wanted["graphs"]
    assert found["spec"] == wanted["spec"]


@pytest.mark.parametrize("add", [with_gate, with_dechunk_adapter])
def test_mode_carry_has_no_dechunk(add):
    with pytest.raises(CheckFailedError, match="0 dechunks, but mode chunk needs one"):
        add(converted("carry"))


@pytest.mark.parametrize(
    ("current", "graph"),
    [
        (AddRouterAdapter(RouterAdapter(GRID, WIDTH)), "route"),
        (AddDechunkAdapter(DechunkAdapter(GRID, WIDTH)), "denoise"),
        (AddGate(), "denoise"),
        (ShowFeatures(), "denoise"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_broken_one_is_stopped(current, graph):
    model = converted()
    tiles = model.planner.full_plan(2).arrays()["chunk_index"].shape[:2]
    check_contract(current, model.graph(graph), {**example_of(model), GATE: torch.ones(*tiles, 1)})


def test_an_adapter_that_changes_something_is_stopped():
    adapter, model = RouterAdapter(GRID, WIDTH), converted()
    torch.nn.init.ones_(adapter.score.bias)
    with pytest.raises(CheckFailedError, match="AddRouterAdapter changed the model's output"):
        rewritten(model, {"route": AddRouterAdapter(adapter)})
