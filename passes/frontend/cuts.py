"""Find the places where the graph can be cut: where nothing but tokens is still needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from dcconvert.passes.ir.graph_tools import output_node
from dcconvert.passes.ir.program import Program

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Cut:
    """A place where the graph can be cut: after `last`, only the tokens `node` [B, N, D] and `contexts` are live.

    Contexts [B, X, E] are tokens beside those of the grid, such as text in joint attention. In a single stream, `node`
    [B, N+X, D] holds both, with those of the grid from `start` on.
    """

    node: Node
    contexts: tuple[Node, ...]
    last: Node
    start: int | None = None

    def beside(self, tokens: int) -> int:
        """How many tokens there are besides the N of the grid."""
        return count_tokens(self.contexts) if self.start is None else size_of(self.node) - tokens


def dependents(program: Program, roots: Iterable[Node]) -> list[Node]:
    """All nodes with tensors that depend on those of `roots`, including these, in graph order; sizes do not count."""
    found = set(roots)
    for node in program.graph.nodes:
        valued = isinstance(node.meta.get("val"), Tensor | list | tuple)
        if node.op != "output" and valued and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return [node for node in program.graph.nodes if node in found]


def ancestors(roots: Iterable[Node], ends: Callable[[Node], bool] = lambda _: False) -> set[Node]:
    """The roots and everything they are computed from; the search stops at nodes for which `ends` is true."""
    found: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend([] if ends(node) else node.all_input_nodes)
    return found


def main_stream(program: Program, root: Node) -> list[Node]:
    """The nodes that depend on `root`, without those that serve only outputs that leave the model early.

    An output leaves early if it does not depend on the last attention op: features of an earlier block, for example.
    """
    stream = dependents(program, [root])
    last = next((node for node in reversed(stream) if node.target is ATTENTION), None)
    if last is None:
        return stream
    late = set(dependents(program, [last]))
    outputs = [node for node in output_node(program.graph).all_input_nodes if node in late]
    main = ancestors(outputs) if outputs else set(stream)
    return [node for node in stream if node in main]


def find_cuts(program: Program, stream: Sequence[Node], tokens: int, single: bool = False) -> list[Cut]:
    """Cut points of a stream by liveness, in graph order. If several have the same `node`, it is the last with the
    fewest other tokens.

    A value that later blocks need is not live any longer because it is an output too. `single`: cuts inside single
    streams count too.
    """
    position = {node: i for i, node in enumerate(stream)}
    last_use = {node: last_used(node, position) for node in stream}
    beside = passing(stream, position)
    starts = joined_starts(program, stream, tokens) if single else {}
    cuts: dict[Node, Cut] = {}
    live: set[Node] = set()
    for i, node in enumerate(stream):
        live = {value for value in live if last_use[value] > i} | ({node} if last_use[node] > i else set())
        counted = {value for value in live if beside.get(value, i) >= i}
        grids = [value for value in counted if is_token_tensor(value, program.batch, tokens)]
        others = tuple(sorted(counted - set(grids), key=position.__getitem__))
        if not all(is_token_tensor(value, program.batch) for value in others):
            continue
        if len(grids) == 1:
            cut = Cut(grids[0], others, node)
        elif not grids and len(others) == 1 and size_of(others[0]) in starts:
            cut = Cut(others[0], (), node, starts[size_of(others[0])])
        else:
            continue
        known = cuts.get(cut.node)
        if known is None or known.beside(tokens) >= cut.beside(tokens) > 0:
            cuts[cut.node] = cut
    # A point with more contexts is in the middle of a block.
    fewest = min((cut.beside(tokens) for cut in cuts.values() if cut.beside(tokens)), default=0)
    return [cut for cut in cuts.values() if cut.beside(tokens) <= fewest]


def last_used(node: Node, position: Mapping[Node, int]) -> int:
    """The position of a value's last user in the stream; the end of the stream for a result of the model."""
    uses = [position[user] for user in node.users if user in position]
    result = any(user.op == "output" for user in node.users) and not uses
    return len(position) if result else max(uses, default=-1)


def joined_starts(program: Program, stream: Sequence[Node], tokens: int) -> dict[int, int]:
    """Where the grid's tokens begin among N+X tokens, by the number N+X; from the `cat` ops that join two values."""
    inside = set(stream)
    found: dict[int, set[int]] = {}
    for node in stream:
        if node.target is not aten.cat.default or not is_token_tensor(node, program.batch):
            continue
        parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
        if axis not in (1, -2) or not isinstance(parts, list | tuple) or len(parts) != 2:
            continue
        ours = [p for p in parts if isinstance(p, Node) and p in inside and is_token_tensor(p, program.batch, tokens)]
        if len(ours) == 1:
            start = 0 if parts[0] is ours[0] else size_of(node) - tokens
            found.setdefault(size_of(node), set()).add(start)
    return {size: min(starts) for size, starts in found.items() if len(starts) == 1}


def passing(stream: Sequence[Node], position: Mapping[Node, int]) -> dict[Node, int]:
    """Values made before the first attention and needed after the last, and the position from which they bypass the
    blocks.

    Between their last use before the blocks and their first use after them, they are not part of the stream.
    """
    places = [i for i, node in enumerate(stream) if node.target is ATTENTION]
    if len(places) < 2:
        return {}
    found = {}
    for node in stream[: places[0]]:
        uses = [position[user] for user in node.users if user in position]
        if max(uses, default=-1) > places[-1]:
            found[node] = max((use for use in uses if use < places[-1]), default=position[node])
    return found


def size_of(node: Node) -> int:
    """The number of tokens of a value [B, N, D]."""
    return int(node.meta["val"].shape[1])


def count_tokens(contexts: Sequence[Node]) -> int:
    return sum(map(size_of, contexts))


def is_token_tensor(node: Node, batch: torch.SymInt, tokens: int | None = None) -> bool:
    """Whether a node returns [B, `tokens`, D]; None stands for any number of tokens."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != 3 or not same(value.shape[0], batch):
        return False
    count: int | torch.SymInt = value.shape[1]
    return not isinstance(count, torch.SymInt) and (tokens is None or count == tokens)


def same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are the same expression (no guard is added)."""
    return str(a) == str(b)
