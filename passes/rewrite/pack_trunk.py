"""Pack the trunk: kept tokens of all samples together, in tiles of one sample each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from dcconvert.passes.frontend.reach import trunk_nodes
from dcconvert.passes.ir.errors import CheckFailedError, UnsupportedModelError
from dcconvert.passes.ir.graph_tools import remove_dead_code, where
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.plan_inputs import CHUNK_INPUTS, MODEL, PlanInput
from dcconvert.passes.ir.program import Program
from dcconvert.passes.ir.spec import SLOTS
from dcconvert.passes.packing.packer import Packer
from dcconvert.passes.packing.rules import find_rule

aten = torch.ops.aten


# Hints for the symbolic sizes: distinct, above one, and unlikely as sizes in a model.
HINTS = {"tiles": 61, "tile_tokens": 67, "row_tokens": 59, "rows": 53, "segments": 71}


class PackTrunk(Pass):
    """Rewrite h -> trunk -> h' as chunk -> packed trunk -> dechunk.

    1. The plan's index tensors become graph inputs.
    2. `chunk` packs the trunk's input h [B, N, D] into u [G, L, D].
    3. Every trunk node that depends on h is rewritten by its op's packing rule; the result is v [G, L, D].
    4. `dechunk` adds the update v - u to h near the tokens it was computed for. For models with DC-DiT's own
       architecture, it returns v itself, after the norm that closes the trunk.
    """

    exact = True

    def call(self, program: Program) -> PassResult:
        start, end = program.found_trunk()
        if program.method.by_values:
            end = closing_norm(end)
        contexts = program.found_stream().contexts.get(end, ())
        nodes = trunk_nodes(program, start, (end, *contexts))
        packer = self.prepare(program)
        users = {value: [user for user in value.users if user not in nodes] for value in (end, *contexts)}
        with program.graph.inserting_before(nodes[-1].next):
            packed = self.enter(packer, start)
            packer.start(start, packed)
            for node in nodes:
                packer.visit(node)
            update = packer.get(end, "packed").node
            if not program.method.by_values:
                update = packer.emit(aten.sub.Tensor, update, packed)
            result = self.leave(packer, start, update)
        for value, outside in users.items():
            for user in outside:
                user.replace_input_with(value, result if value is end else packer.outside(value))
        remove_dead_code(program.graph)
        drop_unused_inputs(program)
        program.trunk = (start, result)
        return PassResult(packer.attentions, (f"{len(nodes)} trunk nodes rewritten, {packer.attentions} attentions",))

    def prepare(self, program: Program) -> Packer:
        """The packer of this trunk, with the plan's inputs declared."""
        add_plan_inputs(program, CHUNK_INPUTS)
        return Packer(program, find_rule, program.found_stream().tokens, program.method.row_packing)

    def enter(self, packer: Packer, start: Node) -> Node:
        """The trunk's input [B, N, D] packed [G, L, D]."""
        members = (packer.plan_input("chunk_index"), packer.plan_input("chunk_weight"))
        return packer.emit(torch.ops.dcconvert.chunk.default, start, *members)

    def leave(self, packer: Packer, start: Node, update: Node) -> Node:
        """The trunk's output [B, N, D] from its packed update [G, L, D], or packed values."""
        if packer.program.method.by_values:
            start = packer.emit(aten.zeros_like.default, start)
        fill = (packer.plan_input("fill_index"), packer.plan_input("fill_weight"))
        return packer.emit(torch.ops.dcconvert.dechunk.default, start, update, *fill)

    def ensures(self, program: Program) -> None:
        start, end = program.found_trunk()
        if str(end.meta["val"].shape) != str(start.meta["val"].shape):
            raise CheckFailedError(
                f"dechunk gives {tuple(end.meta['val'].shape)} where the trunk had {tuple(start.meta['val'].shape)}; "
                "this is a bug in dcconvert"
            )
        for node in program.graph.nodes:
            if node.op == "call_function" and not node.users:
                raise CheckFailedError(f"{where(node)} is still in the graph but unused; this is a bug in dcconvert")


def closing_norm(end: Node) -> Node:
    """The norm that follows the last block; raises UnsupportedModelError if there is none."""
    norms = [user for user in end.users if user.target is aten.rms_norm.default]
    if len(norms) != 1 or len(end.users) != 1:
        raise UnsupportedModelError("dechunk by values needs an RMS norm after the last block, as DC-DiT has it")
    return norms[0]


def add_plan_inputs(program: Program, wanted: Mapping[str, PlanInput]) -> None:
    """Add graph inputs for the plan; inputs with the same axis share its symbolic size in this program."""
    stream, method = program.found_stream(), program.method
    planner = method.planner(stream.grid)
    sizes: dict[str, int | torch.SymInt] = {name: program.new_size(hint) for name, hint in HINTS.items()}
    if method.row_packing != "bins":
        sizes["rows"] = program.batch  # one sample per row
    sizes |= {"batch": program.batch, "tokens": stream.tokens, "members": planner.members}
    sizes |= {"neighbours": planner.neighbours, "slots": SLOTS, "address": 4}
    own = program.found_trunk()[0].meta["val"].dtype
    for name, kind in wanted.items():
        shape = tuple(sizes[axis] for axis in kind.axes)
        program.plan_inputs[name] = program.placeholder(name, shape, own if kind.dtype is MODEL else kind.dtype)


def drop_unused_inputs(program: Program) -> None:
    for name, node in list(program.plan_inputs.items()):
        if not node.users:
            program.graph.erase_node(node)
            del program.plan_inputs[name]
