"""DC-DiT's own architecture: tokens of one pixel, convolutions around the blocks (arXiv 2603.06351, version 2).

Names and shapes are those of the release's checkpoints, in which an H-Net (arXiv 2507.07955) of one stage holds the
blocks of a DiT. The forward pass here keeps every token; the passes make it drop those that the router says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcconvert.models.dit import Block, DiT, DiTConfig, LabelEmbedder, TimestepEmbedder, modulate, sincos_positions
from dcconvert.passes.trained.adapters import as_image, as_tokens

NARROW = 4  # the convolutions work on the width divided by this, unless a model says otherwise
CONVOLUTIONS = 2  # residual blocks of encoder and decoder each
GROUPS = 32
EPS = 1e-5  # of the RMS norms
UNSURE = -1.1  # the router's first bias: sigmoid 0.25


@dataclass(frozen=True)
class RefinedConfig:
    """The architecture of a DiT with one pixel per token. `adapter`: the layer norm on the conditioning of encoder and
    decoder, which upcycled models have. `narrow_width`: of the convolutions; 0: a quarter of the width."""

    depth: int
    width: int
    heads: int
    image_size: int
    in_channels: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True
    null_class: bool = True
    mlp_width: int = 0
    adapter: bool = False
    narrow_width: int = 0

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def narrow(self) -> int:
        return self.narrow_width or self.width // NARROW

    def dit(self) -> DiTConfig:
        """The DiT with these blocks, on tokens of one pixel."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("adapter", "narrow_width")}
        return DiTConfig(patch=1, **fields)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and a skip; the condition is added in between."""

    def __init__(self, width_in: int, width_out: int, width_condition: int) -> None:
        super().__init__()
        inner = min(width_in, width_out)
        self.norm1 = nn.GroupNorm(groups_of(width_in), width_in)
        self.norm2 = nn.GroupNorm(groups_of(inner), inner)
        self.conv1 = nn.Conv2d(width_in, inner, 3, padding=1)
        self.conv2 = nn.Conv2d(inner, width_out, 3, padding=1)
        self.skip_proj = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else None
        self.cond_proj = nn.Sequential(nn.SiLU(), nn.Linear(width_condition, inner))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.cond_proj(c)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.skip_proj is None else self.skip_proj(x))


def groups_of(width: int) -> int:
    """32, as in the release; fewer for widths that it does not divide."""
    return next(groups for groups in range(min(GROUPS, width), 0, -1) if width % groups == 0)


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, EPS)


class Stage(nn.Module):
    """Layers, and the RMS norm that closes them."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.rmsnorm = RmsNorm(width)


class Router(nn.Module):
    """Spatial predictability: how badly a token is predicted by those around it; the score of each [B, N].

    Call it with the trunk's input, which is the encoder's output and `positions` [1, N, D].
    """

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        inner = width // 4
        self.side = side
        self.proj = nn.Conv2d(width, inner, 1)
        self.context_predictor = nn.Conv2d(inner, inner, 3, padding=1)
        self.residual_scorer = nn.Sequential(
            nn.Conv2d(inner, inner, 3, padding=1),
            nn.GroupNorm(min(8, inner), inner),
            nn.SiLU(),
            nn.Conv2d(inner, 1, 1),
        )
        nn.init.constant_(self.residual_scorer[3].bias, UNSURE)  # type: ignore[arg-type]

    def forward(self, encoded: Tensor) -> Tensor:
        z = self.proj(as_image(encoded, (self.side, self.side)))
        return torch.sigmoid(self.residual_scorer(z - self.context_predictor(z))).flatten(1)


class TrunkRouter(nn.Module):
    """The router on what the trunk reads: the encoder's output with positions."""

    positions: Tensor

    def __init__(self, router: Router, positions: Tensor) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("positions", positions.detach().clone())

    def forward(self, h: Tensor) -> Tensor:
        scores: Tensor = self.router(h - self.positions)
        return scores


class Trunk(nn.Module):
    """The release's nesting of the blocks."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.main_network = Stage(layers, width)


class HNet(nn.Module):
    """Encoder, blocks and decoder, and the router between them."""

    def __init__(self, cfg: RefinedConfig) -> None:
        super().__init__()
        narrow, width = cfg.narrow, cfg.width
        into = [narrow] * CONVOLUTIONS + [width]
        self.encoder = Stage([ResBlock(a, b, width) for a, b in pairwise(into)], width)
        self.main_network = Trunk([Block(cfg.dit()) for _ in range(cfg.depth)], width)
        out = [width] + [narrow] * CONVOLUTIONS
        self.decoder = Stage([ResBlock(a, b, width) for a, b in pairwise(out)], narrow)
        self.routing_module = Router(width, cfg.image_size)
        self.residual_proj = nn.Linear(width, width)
        self.condition = nn.LayerNorm(width) if cfg.adapter else None

    def forward(self, x: Tensor, c: Tensor, positions: Tensor) -> Tensor:
        """Image [B, D/4, H, W], condition [B, D], positions [1, N, D] -> image [B, D/4, H, W] as tokens."""
        side = c if self.condition is None else self.condition(c)
        grid = (x.shape[2], x.shape[3])
        for layer in self.encoder.layers:
            x = layer(x, side)
        encoded = self.encoder.rmsnorm(as_tokens(x))
        residual = self.residual_proj(encoded)
        tokens = encoded + positions
        for block in self.main_network.main_network.layers:
            tokens = block(tokens, c)
        tokens = self.main_network.main_network.rmsnorm(tokens) + residual
        x = as_image(tokens, grid)
        for layer in self.decoder.layers:
            x = layer(x, side)
        return self.decoder.rmsnorm(as_tokens(x))


class PixelEmbed(nn.Module):
    def __init__(self, cfg: RefinedConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(cfg.in_channels, cfg.narrow, 3, padding=1)


class PixelOutput(nn.Module):
    def __init__(self, cfg: RefinedConfig) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(cfg.narrow, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(cfg.narrow, cfg.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 2 * cfg.narrow))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class RefinedDiT(nn.Module):
    """DC-DiT with every token kept. Call it as a DiT: x [B, C, H, W], t [B], y int64 [B]."""

    def __init__(self, cfg: RefinedConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.x_embedder = PixelEmbed(cfg)
        self.t_embedder = TimestepEmbedder(cfg.width)
        self.y_embedder = LabelEmbedder(cfg.dit())
        self.pos_embed = nn.Parameter(sincos_positions(cfg.width, cfg.image_size), requires_grad=False)
        self.hnet = HNet(cfg)
        self.final_layer = PixelOutput(cfg)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder(y)
        tokens = self.hnet(self.x_embedder.proj(x), c, self.pos_embed)
        return as_image(self.final_layer(tokens, c), (x.shape[2], x.shape[3]))

    def router(self) -> TrunkRouter:
        """The router that is inserted between encoder and blocks; it shares this model's weights."""
        return TrunkRouter(self.hnet.routing_module, self.pos_embed)

    @classmethod
    def of(cls, dit: DiT, seed: int = 0) -> RefinedDiT:
        """A DiT on tokens of one pixel: its blocks and embedders, everything around them new.

        Positions are those of the DiT's grid, read where the pixel is in a patch. New layers start as in the release,
        except the skip around the blocks and the last layer, which start at exactly zero, so the first output is zero.
        """
        old = dit.cfg
        fields = {name: getattr(old, name) for name in ("depth", "width", "heads", "image_size", "in_channels")}
        more = {name: getattr(old, name) for name in ("num_classes", "learn_sigma", "null_class", "mlp_width")}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls(RefinedConfig(**fields, **more, adapter=True))
        for part in (made.hnet.residual_proj, made.final_layer.linear):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
        made.t_embedder.load_state_dict(dit.t_embedder.state_dict())
        made.y_embedder.load_state_dict(dit.y_embedder.state_dict())
        for new, block in zip(made.hnet.main_network.main_network.layers, dit.blocks, strict=True):
            new.load_state_dict(block.state_dict())
        with torch.no_grad():
            # Pixel c of a patch of p lies (c - (p - 1) / 2) / p of a patch from the middle of the first one.
            coordinates = (torch.arange(old.image_size) - (old.patch - 1) / 2) / old.patch
            made.pos_embed.copy_(sincos_positions(old.width, coordinates))
        return made.to(dit.pos_embed).eval()


class Refined(nn.Module):
    """A DiT on tokens of one pixel beside the DiT itself: the same tensors' names behind `refined.`."""

    def __init__(self, dit: DiT, seed: int = 0) -> None:
        super().__init__()
        self.refined = RefinedDiT.of(dit, seed)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        found: Tensor = self.refined(x, t, y)
        return found
