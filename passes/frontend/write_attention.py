"""Attention written by hand, softmax(q k^T s) v, becomes the attention op."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dcconvert.passes.frontend.canonicalise import CASTS
from dcconvert.passes.frontend.merged_batch import axes_of, order_of, split_batch
from dcconvert.passes.ir.graph_tools import remove_dead_code
from dcconvert.passes.ir.node_args import operand
from dcconvert.passes.ir.pass_runner import Pass, PassResult
from dcconvert.passes.ir.program import Program

aten = torch.ops.aten

SOFTMAX = {aten.softmax.int, aten._softmax.default}
SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
# Values at most this large hide a key, and are so large that a score added to them is lost: a query whose keys are all
# hidden sees them all alike.
MASKED, MASKED_HALF = -1e9, -6e4


@dataclass(frozen=True)
class Product:
    """A product of two tensors, whose axes are named by letters as in an einsum equation."""

    operands: tuple[Node, Node]
    letters: tuple[str, str]
    result: str
    factor: float = 1.0


@dataclass
class Scores:
    """What stands between q k^T and the softmax: numbers and tensors it is multiplied with, and masks."""

    product: Product
    factor: float = 1.0
    factors: list[Node] = field(default_factory=list)
    hidden: list[tuple[Node, float]] = field(default_factory=list)  # true where a key is hidden, by a score of this
    biases: list[Node] = field(default_factory=list)


class WriteAttention(Pass):
    """Replace softmax(q k^T s + mask) v, over keys, by scaled_dot_product_attention(q, k, v, mask).

    1. Products may be matmul, bmm, baddbmm with beta 0, or einsum, with the axes in any order; there are one or two
       batch axes (samples, heads). Samples and heads that were merged into one axis are taken apart again.
    2. Scores may be multiplied with numbers and with tensors that are the same for all queries and keys, and masked by
       an added tensor or by large negative values.
    3. Keys and values that several heads of queries share are repeated for each of them.
    4. The softmax may be in another precision. Weights that have other users are still computed for them.
    """

    optional = True
    exact = True

    def call(self, program: Program) -> PassResult:
        matches = 0
        for node in list(program.graph.nodes):
            product = product_of(node)
            if product is None:
                continue
            softmax, which = weights_of(product)
            if softmax is None or (scores := scores_of(softmax)) is None:
                continue
            made = written(program, node, product, which, scores)
            if made is not None:
                made.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
                made.meta["stack_trace"] = node.meta.get("stack_trace")
                node.replace_all_uses_with(made)
                matches += 1
        matches += sum(repeat_keys(program, node) for node in list(program.graph.nodes))
        if matches:
            remove_dead_code(program.graph)
        return PassResult(matches, (f"{matches} attention ops written anew",) if matches else ())


def repeat_keys(program: Program, node: Node) -> bool:
    """Give every head of queries keys and values of its own, if several share them; False for any other op."""
    if node.target is not aten.scaled_dot_product_attention.default or not node.kwargs.get("enable_gqa"):
        return False
    heads = int(operand(node).meta["val"].shape[1])
    with program.graph.inserting_before(node):
        for place in (1, 2):
            value = operand(node, place)
            _, own, *rest = value.meta["val"].shape
            if int(own) != heads:
                copies = program.emit(aten.stack.default, ([value] * (heads // int(own)), 2))
                node.update_arg(place, program.emit(aten.reshape.default, (copies, [-1, heads, *map(int, rest)])))
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "enable_gqa"}
    return True


def product_of(node: Any) -> Product | None:
    """A node as a product of two tensors; None for any other op."""
    if not isinstance(node, Node) or not isinstance(node.meta.get("val"), Tensor):
        return None
    if node.target is aten.einsum.default:
        equation, operands = node.args[0], node.args[1]
        if not isinstance(operands, list | tuple) or len(operands) != 2 or "." in str(equation):
            return None
        inputs, _, result = str(equation).replace(" ", "").partition("->")
        first, _, second = inputs.partition(",")
        return Product((operands[0], operands[1]), (first, second), result) if result else None  # type: ignore[arg-type]
    factor, operands = 1.0, node.args
    if node.target is aten.baddbmm.default and node.kwargs.get("beta", 1) == 0:
        factor, operands = float(node.kwargs.get("alpha", 1)), node.args[1:]  # type: ignore[arg-type]
    elif node.target not in (aten.matmul.default, aten.bmm.default):
        return None
    one, two = operands[:2]
    rank = node.meta["val"].ndim
    if not (isinstance(one, Node) and isinstance(two, Node)) or rank not in (3, 4):
        return None
    if one.meta["val"].ndim != rank or two.meta["val"].ndim != rank:
        return None
    batch = "bh"[: rank - 2]
    return Product((one, two), (f"{batch}ix", f"{batch}xj"), f"{batch}ij", factor)


def weights_of(product: Product) -> tuple[Node | None, int]:
    """The softmax over the last axis that one operand of a product is, apart from its type, and which operand."""
    for which, source in enumerate(product.operands):
        while source.target in CASTS:
            source = source.all_input_nodes[0]
        if source.target in SOFTMAX:
            rank, axis = source.meta["val"].ndim, source.args[1]
            if isinstance(axis, int) and axis % rank == rank - 1 and rank in (3, 4):
                return source, which
    return None, 0


def scores_of(softmax: Node) -> Scores | None:
    """The product whose softmax is taken, and what was done to it; None for anything else."""
    node: Any = softmax.args[0]
    factor = 1.0
    factors: list[Node] = []
    hidden: list[tuple[Node, float]] = []
    biases: list[Node] = []
    while isinstance(node, Node):
        product = product_of(node)
        if product is not None:
            return Scores(product, factor * product.factor, factors, hidden, biases)
        given: Any = node.args or (None,)
        source, rest = given[0], given[1:]
        if node.target in CASTS:
            node = source
        elif node.target in SCALES and isinstance(rest[0], int | float):
            factor = factor / rest[0] if node.target in (aten.div.Tensor, aten.div.Scalar) else factor * rest[0]
            node = source
        elif node.target is aten.mul.Tensor and (pair := apart(node, same_for_all)):
            node, other = pair
            factors.append(other)
        elif node.target is aten.add.Tensor and not node.kwargs and (pair := apart(node, lambda n: True)):
            if factor != 1.0 or factors:
                return None  # scores and bias are scaled together
            node, other = pair
            biases.append(other)
        elif node.target is aten.masked_fill.Scalar and hides(rest[1], source):
            hidden.append((rest[0], float(rest[1])))
            node = source
        else:
            return None
    return None


def hides(value: Any, scores: Node) -> bool:
    """Whether scores of this value are those of keys that nobody sees."""
    half = scores.meta["val"].dtype in (torch.float16, torch.bfloat16)
    return isinstance(value, int | float) and value <= (MASKED_HALF if half else MASKED)


def apart(node: Node, fits: Any) -> tuple[Node, Node] | None:
    """The operand of a commutative op that has its shape, and the other one, if the other one fits."""
    shape = str(node.meta["val"].shape)
    for one, other in (node.args[:2], node.args[1::-1]):
        if isinstance(one, Node) and isinstance(other, Node) and str(one.meta["val"].shape) == shape and fits(other):
            return one, other
    return None


def same_for_all(node: Node) -> bool:
    """Whether a value is the same for all queries and keys: its last two axes, if it has them, have size one."""
    return all(size == 1 for size in node.meta["val"].shape[-2:] if not isinstance(size, torch.SymInt)) and not any(
        isinstance(size, torch.SymInt) for size in node.meta["val"].shape[-2:]
    )


def written(program: Program, node: Node, product: Product, which: int, scores: Scores) -> Node | None:
    """The attention op for softmax(scores) times values, with the axes of `node`; None if the axes do not fit."""
    first = scores.product
    *batch, query, key = named(first)
    if not query or product.factor != 1:
        return None
    of_query = 0 if query in first.letters[0] and key not in first.letters[0] else 1
    shared = [x for x in first.letters[0] if x in first.letters[1] and x not in first.result]
    if len(shared) != 1 or sorted(first.letters[of_query]) != sorted([*batch, query, *shared]):
        return None
    if sorted(first.letters[1 - of_query]) != sorted([*batch, key, *shared]):
        return None
    # The second product may use other letters for the axes of the weights.
    again = dict(zip(product.letters[which], first.result, strict=True))
    values = "".join(again.get(x, x.upper()) for x in product.letters[1 - which])
    result = "".join(again.get(x, x.upper()) for x in product.result)
    made = [x for x in values if x.isupper()]
    if len(made) != 1 or sorted(values) != sorted([*batch, key, *made]):
        return None
    if sorted(result) != sorted([*batch, query, *made]):
        return None
    with program.graph.inserting_before(node):
        layout = Layout.of(program, batch, first)
        if layout is None:
            return None
        q = layout.heads(first.operands[of_query], first.letters[of_query], [query, *shared])
        k = layout.heads(first.operands[1 - of_query], first.letters[1 - of_query], [key, *shared])
        v = layout.heads(product.operands[1 - which], values, [key, *made])
        for factor in scores.factors:
            q = program.emit(aten.mul.Tensor, (q, layout.of_scores(factor, first.result, [query, key])))
        mask = layout.mask(scores, first.result, [query, key], q)
        like = product.operands[1 - which].meta["val"].dtype
        q, k = (x if x.meta["val"].dtype == like else program.emit(aten.to.dtype, (x, like)) for x in (q, k))
        given = (q, k, v) if mask is None else (q, k, v, mask)
        op = aten.scaled_dot_product_attention.default
        attention = program.emit(op, given, {"scale": float(scores.factor)})
        attention.meta["stack_trace"] = node.meta.get("stack_trace")
        attention.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        return layout.merged(attention, result, [query, *made])


def named(product: Product) -> list[str]:
    """The letters of the batch axes of the scores, of the queries and of the keys, which come last."""
    key, others = product.result[-1], product.result[:-1]
    shared = [x for x in others if x in product.letters[0] and x in product.letters[1]]
    queries = [x for x in others if x not in shared]
    if len(queries) != 1 or len(shared) not in (1, 2):
        return ["", ""]
    return [*shared, queries[0], key]


def moved(program: Program, value: Node, order: list[int]) -> Node:
    """A value with its axes in another order; earlier changes of the order are taken into account."""
    while value.target in (aten.transpose.int, aten.permute.default):
        before = axes_of(value)
        order, value = [before[axis] for axis in order], value.all_input_nodes[0]
    return value if order == sorted(order) else program.emit(aten.permute.default, (value, order))


@dataclass(frozen=True)
class Layout:
    """How the batch axes of an attention written by hand become samples and heads [B, H, N, d].

    `batch`: the letters of the batch axes; `heads`: of one axis that samples and heads were merged into, 0 for an axis
    of samples alone; `samples_first`: the order in which they were merged.
    """

    program: Program
    batch: tuple[str, ...]
    merged_heads: int = 0
    samples_first: bool = True

    @classmethod
    def of(cls, program: Program, batch: list[str], product: Product) -> Layout | None:
        symbol = str(program.batch)
        places = [product.letters[0].index(x) for x in batch]
        sizes = [product.operands[0].meta["val"].shape[place] for place in places]
        if len(batch) == 2:
            ours = [x for x, size in zip(batch, sizes, strict=True) if str(size) == symbol]
            return cls(program, (*ours, *(x for x in batch if x not in ours))) if len(ours) == 1 else None
        if str(sizes[0]) == symbol:
            return cls(program, tuple(batch))
        order = order_of(program, product.operands[0], places[0])
        return cls(program, tuple(batch), *order) if order else None

    def heads(self, value: Node, letters: str, last: list[str]) -> Node:
        """A value [B, H, *last]."""
        order = [letters.index(x) for x in (*self.batch, *last)]
        emit = self.program.emit
        if self.merged_heads:
            axis = letters.index(self.batch[0])
            value = split_batch(self.program, value, axis, self.merged_heads, self.samples_first)
            wide = [x + (x > axis) for x in order]
            sample, head = (axis, axis + 1) if self.samples_first else (axis + 1, axis)
            order = [sample, head, *wide[1:]]
        elif len(self.batch) == 1:
            value = emit(aten.unsqueeze.default, (value, 0))
            order = [order[0] + 1, 0, *(x + 1 for x in order[1:])]
        return moved(self.program, value, order)

    def of_scores(self, value: Node, letters: str, last: list[str]) -> Node:
        """A factor or mask that broadcasts to the scores, with axes that broadcast to [B, H, *last]."""
        rank = value.meta["val"].ndim
        if rank == 0:
            return value
        for _ in range(len(letters) - rank):
            value = self.program.emit(aten.unsqueeze.default, (value, 0))
        if self.merged_heads and value.meta["val"].shape[letters.index(self.batch[0])] == 1:
            value = self.program.emit(aten.unsqueeze.default, (value, letters.index(self.batch[0])))
            axis = letters.index(self.batch[0])
            order = [axis, axis + 1, *(letters.index(x) + (letters.index(x) > axis) for x in last)]
            return moved(self.program, value, order)
        return self.heads(value, letters, last)

    def mask(self, scores: Scores, letters: str, last: list[str], q: Node) -> Node | None:
        """One mask for the attention op: boolean, true for keys that are seen, or a bias; None without one."""
        emit = self.program.emit
        bias: Node | None = None
        for value in scores.biases:
            value = self.of_scores(value, letters, last)
            bias = value if bias is None else emit(aten.add.Tensor, (bias, value))
        seen: Node | None = None
        for hidden, filled in scores.hidden:
            if hidden.meta["val"].dtype != torch.bool:
                hidden = emit(aten.to.dtype, (hidden, torch.bool))
            hidden = self.of_scores(hidden, letters, last)
            if bias is not None:
                bias = emit(aten.masked_fill.Scalar, (bias, hidden, filled))
            elif filled == -math.inf:
                own = emit(aten.logical_not.default, (hidden,))
                seen = own if seen is None else emit(aten.logical_and.default, (seen, own))
            else:  # a finite value is not the same as no key: with all keys hidden, all count alike
                numbers = emit(aten.to.dtype, (hidden, q.meta["val"].dtype))
                bias = emit(aten.mul.Tensor, (numbers, filled))
        if seen is None or bias is None:
            return seen if bias is None else bias
        return emit(aten.masked_fill.Scalar, (bias, emit(aten.logical_not.default, (seen,)), -math.inf))

    def merged(self, value: Node, letters: str, last: list[str]) -> Node:
        """A value [B, H, *last] with the axes of a value that has these letters."""
        emit = self.program.emit
        if len(self.batch) == 1 and not self.merged_heads:
            value = emit(aten.select.int, (value, 1, 0))
            names = [self.batch[0], *last]
        elif self.merged_heads:
            sizes = value.meta["val"].shape
            if not self.samples_first:
                value = emit(aten.permute.default, (value, [1, 0, 2, 3]))
            value = emit(aten.reshape.default, (value, [-1, int(sizes[2]), int(sizes[3])]))
            names = [self.batch[0], *last]
        else:
            names = [*self.batch, *last]
        order = [names.index(x) for x in letters]
        return value if order == sorted(order) else emit(aten.permute.default, (value, order))
