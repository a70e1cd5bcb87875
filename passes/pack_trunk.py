"""Pack the trunk: kept tokens of all samples together, in tiles of one sample each."""

from __future__ import annotations

import torch
from torch.fx import Node

from dcconvert.passes.errors import CheckFailedError
from dcconvert.passes.infra import Pass, PassResult, Program, remove_dead_code, where
from dcconvert.passes.packing import Packer
from dcconvert.passes.rules import find_rule
from dcconvert.passes.token_stream import dependents

aten = torch.ops.aten

# Hints for the symbolic sizes: distinct, above one, and no size a model is likely to have.
HINT_TILES, HINT_TILE, HINT_ROWS, HINT_SLOTS = 61, 67, 53, 59


class PackTrunk(Pass):
    """Rewrite h -> trunk -> h' as chunk -> packed trunk -> dechunk.

    1. The plan's index tensors become graph inputs.
    2. `chunk` packs the trunk's input h [B, N, D] into u [G, L, D].
    3. Every trunk node that depends on h is written again by its op's packing rule, giving v [G, L, D].
    4. `dechunk` adds the update v - u to h near the tokens it was computed for.
    """

    exact = True

    def call(self, program: Program) -> PassResult:
        stream, (start, end) = program.found_stream(), program.found_trunk()
        add_plan_inputs(program)
        nodes = trunk_nodes(program, start, end)
        packer = Packer(program, find_rule, stream.tokens, program.options.packing)
        users = [user for user in end.users if user not in nodes]
        with program.graph.inserting_after(end):
            marker = program.graph.call_function(aten.alias.default, (end,))  # new nodes go before it
        with program.graph.inserting_before(marker):
            members = (packer.plan_input("chunk_index"), packer.plan_input("chunk_weight"))
            packed = packer.emit(torch.ops.dcconvert.chunk.default, start, *members)
            packer.start(start, packed)
            for node in nodes:
                packer.visit(node)
            update = packer.emit(aten.sub.Tensor, packer.get(end, "packed").node, packed)
            fill = (packer.plan_input("fill_index"), packer.plan_input("fill_weight"))
            result = packer.emit(torch.ops.dcconvert.dechunk.default, start, update, *fill)
        program.graph.erase_node(marker)
        for user in users:
            user.replace_input_with(end, result)
        remove_dead_code(program.graph)
        drop_unused_inputs(program)
        program.trunk = (start, result)
        return PassResult(packer.attentions, (f"{len(nodes)} trunk nodes rewritten, {packer.attentions} attentions",))

    def ensures(self, program: Program) -> None:
        start, end = program.found_trunk()
        if str(end.meta["val"].shape) != str(start.meta["val"].shape):
            raise CheckFailedError(
                f"dechunk gives {tuple(end.meta['val'].shape)} where the trunk had {tuple(start.meta['val'].shape)}; "
                "this is a bug of dcconvert"
            )
        for node in program.graph.nodes:
            if node.op == "call_function" and not node.users:
                raise CheckFailedError(f"{where(node)} is still in the graph but unused; this is a bug of dcconvert")


def trunk_nodes(program: Program, start: Node, end: Node) -> list[Node]:
    """Nodes on a path from `start` to `end`, in graph order, `start` left out."""
    after = dependents(program, start)
    needed, found = {end}, []
    for node in reversed(after):
        if node in needed and node is not start:
            found.append(node)
            needed.update(node.all_input_nodes)
    return found[::-1]


def add_plan_inputs(program: Program) -> None:
    """Graph inputs for the plan; names and shapes are those of `dcconvert.passes.plan.Plan`."""
    stream, options = program.found_stream(), program.options
    batch, tiles, tile = program.batch, program.new_size(HINT_TILES), program.new_size(HINT_TILE)
    slots = program.new_size(HINT_SLOTS)
    rows = batch if options.packing == "rows" else program.new_size(HINT_ROWS)  # one sample a row
    index, weight = torch.int64, program.found_trunk()[0].meta["val"].dtype
    for name, shape, dtype in (
        ("chunk_index", (tiles, tile, options.members), index),
        ("chunk_weight", (tiles, tile, options.members), weight),
        ("sample_ids", (tiles,), index),
        ("grid_index", (rows, slots), index),
        ("packed_index", (tiles, tile), index),
        ("row_lengths", (rows,), index),
        ("segment_ids", (rows, slots), index),
        ("fill_index", (batch, stream.tokens, options.neighbours), index),
        ("fill_weight", (batch, stream.tokens, options.neighbours), weight),
    ):
        program.plan_inputs[name] = program.placeholder(name, shape, dtype)


def drop_unused_inputs(program: Program) -> None:
    for name, node in list(program.plan_inputs.items()):
        if not node.users:
            program.graph.erase_node(node)
            del program.plan_inputs[name]
