"""The contract of a pass, and how the runner holds passes to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dcconvert.passes.frontend.capture import capture
from dcconvert.passes.ir.errors import CheckFailedError, UnsupportedModelError
from dcconvert.passes.ir.graph_tools import module_path, placeholders, readable, where
from dcconvert.passes.ir.pass_runner import Pass, PassResult, run_passes
from dcconvert.passes.ir.program import Program
from dcconvert.passes.methods import method_of

aten = torch.ops.aten
CHUNK = method_of("chunk")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


def program() -> Program:
    return capture(Model(), (torch.randn(3, 4),), {}, CHUNK)


def linear_of(given: Program) -> torch.fx.Node:
    return next(node for node in given.graph.nodes if node.target is aten.linear.default)


class Insert(Pass):
    """Puts exp after the linear; notes what was called, in order."""

    def __init__(self, fake: bool = True) -> None:
        self.fake = fake
        self.calls: list[str] = []

    def requires(self, program: Program) -> None:
        self.calls.append("requires")

    def call(self, program: Program) -> PassResult:
        self.calls.append("call")
        node = linear_of(program)
        with program.graph.inserting_after(node):
            new = program.graph.call_function(aten.exp.default, (node,))
            if self.fake:
                new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return PassResult(1, ("one exp",))

    def ensures(self, program: Program) -> None:
        self.calls.append("ensures")


class Nothing(Pass):
    def call(self, program: Program) -> PassResult:
        return PassResult(0, ("nearest miss: a gelu",))


class MayDoNothing(Nothing):
    optional = True


class Unordered(Pass):
    """Leaves a node before the node it uses."""

    def call(self, program: Program) -> PassResult:
        linear_of(program).append(placeholders(program.graph)[0])
        return PassResult(1)


class Broken(Pass):
    def call(self, program: Program) -> PassResult:
        return PassResult(1)

    def ensures(self, program: Program) -> None:
        raise CheckFailedError("two tokens are missing")


def test_a_pass_is_checked_called_and_checked_and_the_new_graph_runs():
    given, current = program(), Insert()
    records = run_passes(given, (current,))
    assert current.calls == ["requires", "call", "ensures"]
    x = torch.randn(5, 4)
    weight, bias = (given.graph_module.get_parameter(f"inner.{name}") for name in ("weight", "bias"))
    torch.testing.assert_close(given.graph_module(x)[0], torch.nn.functional.linear(x, weight, bias).exp() * 2)
    (record,) = records
    assert (record.name, record.matches, record.notes) == ("Insert", 1, ("one exp",))
    assert record.nodes_after == record.nodes_before + 1
    assert record.seconds >= 0
    assert record.as_dict()["notes"] == ["one exp"]


def test_a_pass_that_matches_nothing_is_an_error_that_names_it():
    with pytest.raises(UnsupportedModelError, match="Nothing found nothing to do in this model: nearest miss: a gelu"):
        run_passes(program(), (Nothing(),))


def test_an_optional_pass_may_match_nothing():
    (record,) = run_passes(program(), (MayDoNothing(),))
    assert record.matches == 0


def test_a_node_without_a_fake_value_is_caught():
    with pytest.raises(CheckFailedError, match="Insert left exp_default without a fake value"):
        run_passes(program(), (Insert(fake=False),))


def test_a_graph_that_does_not_lint_is_caught():
    with pytest.raises(CheckFailedError, match="Unordered left a graph that does not lint"):
        run_passes(program(), (Unordered(),))


def test_a_broken_promise_stops_the_run():
    after = Insert()
    with pytest.raises(CheckFailedError, match="two tokens are missing"):
        run_passes(program(), (Broken(), after))
    assert after.calls == []


def test_a_pass_must_say_what_it_does():
    with pytest.raises(NotImplementedError):
        Pass().call(program())


def test_dump_writes_the_graph_after_each_pass(tmp_path):
    folder = tmp_path / "new" / "graphs"
    run_passes(program(), (MayDoNothing(), Insert()), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["00_MayDoNothing.graph.txt", "01_Insert.graph.txt"]
    before, after = (path.read_text() for path in sorted(folder.iterdir()))
    assert "aten.exp" not in before
    assert "exp_default (" in after
    assert "call_function[aten.linear.default](x" in after
    assert "# inner" in after


def test_readable_has_a_line_a_node():
    given = program()
    assert len(readable(given.graph_module).splitlines()) == len(given.graph.nodes)


def test_messages_name_op_module_and_source_line():
    node = linear_of(program())
    assert module_path(node) == "inner"
    assert where(node).startswith("aten.linear.default in inner (linear.py:")
    bare = torch.fx.Graph().call_function(aten.exp.default, ())
    assert where(bare) == "aten.exp.default in the model"


def test_emit_and_placeholder_have_fake_values():
    given = program()
    size = given.new_size(59)
    added = given.placeholder("extra", (size, 4), torch.float32)
    assert placeholders(given.graph)[-1] is added
    with given.graph.inserting_after(linear_of(given)):
        node = given.emit(aten.mul.Tensor, (added, 2.0))
    assert str(node.meta["val"].shape) == str(added.meta["val"].shape)
    assert isinstance(node.meta["val"].shape[0], torch.SymInt)


def test_new_sizes_are_independent():
    given = program()
    sizes = {str(given.new_size(hint)) for hint in (53, 59, 61)} | {str(given.batch)}
    assert len(sizes) == 4
