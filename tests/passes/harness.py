"""What the tests of the passes share: tiny models, a one-op trunk, and the slow definition of a packed trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.capture import capture
from dcconvert.passes.ir.graph_tools import placeholders
from dcconvert.passes.ir.pass_runner import check_graph
from dcconvert.passes.ir.program import Program, TokenStream
from dcconvert.passes.methods import method_of
from dcconvert.passes.planning.chunk_plan import Plan, Planner
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.rewrite.pack_trunk import PackTrunk
from dcconvert.passes.runtime.model import DynamicModel

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

BATCH = 3
GRID = (2, 4)
TOKENS = 8
WIDTH = 12


def randomise(module: Any, std: float = 0.2) -> nn.Module:
    """Non-zero random weights everywhere, gates included: a zero gate would hide a wrong trunk."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.eval()


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def first_tensor(value: Any) -> Tensor:
    """The first tensor of a model's output, whatever it is wrapped in."""
    return next(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def pick(call: Call, samples: Sequence[int]) -> Call:
    """The same call with its samples in another order, or only some of them."""
    module, args, kwargs = call

    def picked(value: Any) -> Any:
        return value[list(samples)] if isinstance(value, Tensor) and value.ndim and len(value) == BATCH else value

    return module, tuple(map(picked, args)), {name: picked(value) for name, value in kwargs.items()}


def count(module: GraphModule | Iterable[Node], target: Any, *operands: str) -> int:
    """How many nodes call `target`, with a placeholder called so among their operands if one is given."""
    nodes = module.graph.nodes if isinstance(module, GraphModule) else module
    return sum(n.target is target and set(operands) <= {i.name for i in n.all_input_nodes} for n in nodes)


# Models


def dit_call(image_size: int = 8, depth: int = 3, width: int = 32, heads: int = 2, batch: int = BATCH) -> Call:
    """A DiT with Facebook's architecture and one call of it."""
    config = DiTConfig(depth=depth, width=width, heads=heads, patch=2, image_size=image_size, num_classes=10)
    x = torch.randn(batch, 4, image_size, image_size)
    return randomise(DiT(config)), (x, torch.rand(batch) * 1000, torch.arange(batch) % 10), {}


def diffusers_call(sample_size: int = 8) -> Call:
    from diffusers import DiTTransformer2DModel

    module = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=sample_size,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    steps, classes = torch.tensor([1, 500, 999]), torch.tensor([1, 2, 3])
    x = torch.randn(BATCH, 4, sample_size, sample_size)
    return randomise(module), (x,), {"timestep": steps, "class_labels": classes, "return_dict": False}


def pixart_call(sample_size: int = 8) -> Call:
    from diffusers import PixArtTransformer2DModel

    module = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=sample_size,
        patch_size=2,
        cross_attention_dim=32,
        caption_channels=24,
        use_additional_conditions=False,
    )
    mask = torch.ones(BATCH, 7)
    mask[1, 4:] = 0
    kwargs = {
        "encoder_hidden_states": torch.randn(BATCH, 7, 24),
        "timestep": torch.tensor([1, 500, 999]),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return randomise(module), (torch.randn(BATCH, 4, sample_size, sample_size),), kwargs


class Block(nn.Module):
    """A transformer block with one adaLN chunk: x + gate * attention(modulated x), then an MLP."""

    def __init__(self, width: int = WIDTH, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 3 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c).unsqueeze(1).chunk(3, dim=2)
        b, n, d = x.shape
        y = F.layer_norm(x, (d,)) * (1 + scale) + shift
        q, k, v = self.qkv(y).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + gate * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + F.silu(self.mlp(x))


class TinyModel(nn.Module):
    """Patchify, positions, the given blocks, a linear layer: the smallest model the pipeline takes.

    Call it as `model(x, t)` with x [B, 2, 4, 8] (a 2 x 4 token grid) and t [B].
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(2, WIDTH, 2, 2)
        self.positions = nn.Parameter(torch.empty(1, TOKENS, WIDTH))
        self.blocks = nn.ModuleList(blocks)
        self.final = nn.Linear(WIDTH, 8)
        randomise(self)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = torch.sin(t.unsqueeze(1) * torch.arange(WIDTH))
        x = self.patchify(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, c)
        return self.final(x)


def tiny_inputs(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, 4, 8), torch.rand(batch)


def tiny_program(module: nn.Module | None = None, **options: Any) -> Program:
    """A captured and normalised TinyModel (three plain blocks unless a module is given)."""
    program = capture(
        module or TinyModel(Block() for _ in range(3)),
        tiny_inputs(),
        {},
        method_of(**{"mode": "chunk", **options}),
    )
    Normalise().call(program)
    return program


# Plans


def random_keep(counts: Iterable[int], tokens: int, seed: int = 0) -> np.ndarray:
    """Keep mask with these counts at random places."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(tokens) < kept for kept in counts])


def larger(planner: Planner, keep: np.ndarray, tile: int = 4) -> Bucket:
    """A bucket with spare tiles and slots (and spare rows where a row need not be a sample)."""
    tiled = int((-(-keep.sum(1) // tile)).sum()) * tile
    rows = len(keep) + (2 if planner.packing == "bins" else 0)
    return Bucket(len(keep), tiled + 3 * tile, rows, keep.shape[1] + 5, tile)


def plan_tensors(plan: Plan, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    arrays = {name: torch.from_numpy(array) for name, array in plan.arrays().items()}
    return {name: a.to(dtype) if a.is_floating_point() else a for name, a in arrays.items()}


def run_with_plan(model: DynamicModel, call: Call, plan: Plan) -> Tensor:
    """One call of a converted model under a plan of our choice."""
    with torch.no_grad():
        inputs = model.flat_inputs(call[1], call[2])
        _, live = model.route(inputs)
        return first_tensor(model.denoise(inputs, live, plan))


# One trunk, and what it must compute


class Body(nn.Module):
    """A function of the tokens h [B, N, D] and of values from outside the trunk, as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor, outside: tuple[Tensor, ...]) -> Tensor:
        return self.function(h, *outside)


def trunk_program(body: Callable[..., Tensor], h: Tensor, outside: tuple[Tensor, ...], packing: str) -> Program:
    """The program whose whole graph is the trunk `body(h, *outside)`, captured and ready for PackTrunk."""
    program = capture(Body(body), (h, outside), {}, method_of("chunk", packing=packing, members=2, neighbours=2))
    Normalise().call(program)
    start = placeholders(program.graph)[0]
    (end,) = next(iter(reversed(program.graph.nodes))).args[0]
    program.stream = TokenStream(start, GRID, h.shape[2], [start, end], [start, end])
    program.trunk = (start, end)
    return program


def pack(body: Callable[..., Tensor], h: Tensor, *outside: Tensor, packing: str = "rows") -> Program:
    """`trunk_program` after PackTrunk."""
    program = trunk_program(body, h, outside, packing)
    PackTrunk().call(program)
    check_graph(program.graph_module, "PackTrunk")
    PackTrunk().ensures(program)
    return program


def run_packed(program: Program, plan: Plan, h: Tensor, *outside: Tensor) -> Tensor:
    tensors = plan_tensors(plan, h.dtype)
    given = (tensors[name] for name in program.plan_inputs)
    (result,) = program.graph_module(h, *outside, *given)
    return result


def by_hand(
    body: Callable[..., Tensor], plan: Plan, h: Tensor, *outside: Tensor, token_axis: int | None = None
) -> Tensor:
    """The definition of a packed trunk: every sample alone, on its kept tokens, in loops.

    A kept token enters as the weighted mean of its members; every position leaves with its own value plus
    the weighted updates of its fill neighbours. `token_axis`: that of the first value from outside, of which every
    kept token gets the part of its place.
    """
    plain = plan_tensors(plan, h.dtype)
    members, weights = plain["chunk_index"].flatten(0, -2), plain["chunk_weight"].flatten(0, -2)
    flat = h.flatten(0, 1)
    updates: dict[int, Tensor] = {}
    for b in range(len(h)):
        kept = [int(plan.fill_index[b, n, 0]) for n in np.flatnonzero(plan.keep[b])]
        rows = [(weights[p].unsqueeze(1) * flat[members[p]]).sum(0) for p in kept]
        u = torch.stack(rows).unsqueeze(0)
        own = [o[b : b + 1] if o.ndim and o.shape[0] == len(h) else o for o in outside]
        if token_axis is not None:
            own[0] = own[0].index_select(token_axis, torch.from_numpy(np.flatnonzero(plan.keep[b])))
        v = body(u, *own)
        updates.update(zip(kept, (v - u)[0], strict=True))
    result = h.clone()
    for b, n in np.ndindex(*plan.keep.shape):
        for p, w in zip(plan.fill_index[b, n].tolist(), plan.fill_weight[b, n].tolist(), strict=True):
            if w:
                result[b, n] += w * updates[p]
    return result


def check_trunk(
    body: Callable[..., Tensor],
    *outside: Tensor,
    packing: str = "rows",
    width: int = WIDTH,
    token_axis: int | None = None,
) -> Program:
    """Pack `body`; everything kept it must equal the original, and dropping tokens the definition (`by_hand`).

    Even counts, mixed counts and a bucket with room to spare are tried. Returns the packed program.
    """
    h = torch.randn(BATCH, TOKENS, width)
    program = pack(body, h, *outside, packing=packing)
    planner = Planner(GRID, 2, 2, packing)
    torch.testing.assert_close(run_packed(program, planner.full_plan(BATCH), h, *outside), body(h, *outside))
    for counts in ((4, 4, 4), (5, 2, 3)):
        keep = random_keep(counts, TOKENS)
        for bucket in (None, larger(planner, keep)):
            plan = planner.plan(keep, bucket)
            found = run_packed(program, plan, h, *outside)
            torch.testing.assert_close(
                found, by_hand(body, plan, h, *outside, token_axis=token_axis), atol=1e-5, rtol=1e-5
            )
    return program


def targets(body: Callable[..., Tensor], *outside: Tensor) -> set[Any]:
    """The ops that a trunk holds before packing: shows that a test exercises the op it is about."""
    program = trunk_program(body, torch.randn(BATCH, TOKENS, WIDTH), outside, "rows")
    return {node.target for node in program.graph.nodes if node.op == "call_function"}
