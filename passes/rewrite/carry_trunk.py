"""Rewrite the trunk for mode `carry`: kept tokens are computed, the others are read from the state."""

from __future__ import annotations

import torch
from torch.fx import Node

from dcconvert.passes.ir.errors import CheckFailedError
from dcconvert.passes.ir.plan_inputs import CARRY_INPUTS
from dcconvert.passes.ir.program import Program
from dcconvert.passes.ir.spec import SLOTS, STATE_DTYPES
from dcconvert.passes.packing.packer import Packer
from dcconvert.passes.packing.rules import find_rule
from dcconvert.passes.rewrite.pack_trunk import PackTrunk, add_plan_inputs

aten = torch.ops.aten

UPDATE = "update"


class CarryTrunk(PackTrunk):
    """Rewrite h -> trunk -> h' with a state that is passed from step to step.

    1. The plan's index tensors and, for every carried value, a state [P, B, C, N, E] become graph inputs: P slots hold
       the last computed values of C x E numbers of each of N tokens.
    2. The kept tokens of h are packed and every trunk node is rewritten by its op's packing rule, as in PackTrunk.
    3. Self-attention writes the keys and values of the kept tokens into their states and attends to those of all
       tokens, read from there. (Cross-attention takes its keys from outside the tokens, and works as in PackTrunk.)
    4. The trunk's update is written and read in the same way: h' = h + update.
    5. New outputs: `distance` [B, N], between the last two updates of each token, then every state.
    """

    def prepare(self, program: Program) -> Packer:
        add_plan_inputs(program, CARRY_INPUTS)
        memory = Memory(program)
        return Packer(program, find_rule, program.found_stream().tokens, "rows", memory)

    def enter(self, packer: Packer, start: Node) -> Node:
        return packer.emit(torch.ops.dcconvert.gather_tokens.default, start, packer.plan_input("token_index"))

    def leave(self, packer: Packer, start: Node, update: Node) -> Node:
        memory = packer.carry
        assert isinstance(memory, Memory)
        everywhere = memory(UPDATE, packer.emit(aten.unsqueeze.default, update, 1))
        memory.give_out(distance(packer, memory.written[UPDATE]))
        return packer.emit(aten.add.Tensor, start, packer.emit(aten.squeeze.dim, everywhere, 1))

    def ensures(self, program: Program) -> None:
        super().ensures(program)
        output = next(iter(reversed(program.graph.nodes)))
        found = [node.target for node in output.args[0][-len(program.state) :]]
        if not program.state or any(target is not torch.ops.dcconvert.cache_write.default for target in found):
            raise CheckFailedError("the states are not the graph's last outputs; this is a bug in dcconvert")


class Memory:
    """Adds a state to the graph for every value that is carried."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.written: dict[str, Node] = {}
        self._cache_index: dict[int, Node] = {}
        self._weight: dict[int, Node] = {}

    def __call__(self, name: str, values: Node) -> Node:
        """Packed values [G, C, L, E] of the kept tokens -> those of all tokens [B, C, N, E]."""
        program, value = self.program, values.meta["val"]
        _, channels, _, width = value.shape
        dtype = STATE_DTYPES[program.method.remembered_as] or value.dtype
        shape = (SLOTS, program.batch, int(channels), program.found_stream().tokens, int(width))
        state = program.state[name] = program.placeholder(name, shape, dtype)
        if dtype != value.dtype:
            values = program.emit(aten.to.dtype, (values, dtype))
        written = program.emit(
            torch.ops.dcconvert.cache_write.default, (state, values, self.cache_index(int(channels)))
        )
        self.written[name] = written
        return program.emit(torch.ops.dcconvert.cache_read.default, (written, self.weight(int(width))))

    def weight(self, width: int) -> Node:
        """The plan's weights [P, B, N] spread over the values of a token: [P, B, 1, N, E]."""
        if width not in self._weight:
            weight = self.program.plan_inputs["recall_weight"]
            for axis in (2, 4):
                weight = self.program.emit(aten.unsqueeze.default, (weight, axis))
            self._weight[width] = self.program.emit(aten.expand.default, (weight, [-1, -1, -1, -1, width]))
        return self._weight[width]

    def cache_index(self, channels: int) -> Node:
        if channels not in self._cache_index:
            index = self.program.plan_inputs["write_index"]
            self._cache_index[channels] = self.program.emit(torch.ops.dcconvert.cache_index.default, (index, channels))
        return self._cache_index[channels]

    def give_out(self, distance: Node) -> None:
        """Add the distance and the states to the graph's outputs."""
        output = next(iter(reversed(self.program.graph.nodes)))
        output.args = ((*output.args[0], distance, *self.written.values()),)


def distance(packer: Packer, state: Node) -> Node:
    """Euclidean distance [B, N] between the two slots of a state [P, B, 1, N, D]."""
    newer, older = (packer.emit(aten.select.int, state, 0, slot) for slot in range(SLOTS))
    moved = packer.emit(aten.sub.Tensor, newer, older)
    moved = packer.emit(aten.to.dtype, moved, torch.float32)  # squares overflow in half precision
    squares = packer.emit(aten.mul.Tensor, moved, moved)
    return packer.emit(aten.sqrt.default, packer.emit(aten.sum.dim_IntList, squares, [1, 3]))
