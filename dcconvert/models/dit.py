"""The DiT architecture, with the parameter names of Facebook's checkpoints.

Written from the paper (Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748);
it shares no code with the CC BY-NC reference implementation, only names and shapes, so that published
state dicts load unchanged.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMESTEP_FREQUENCIES = 256  # width of the sinusoidal timestep features in every published DiT


@dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes a DiT's shapes. `image_size` is in latent pixels."""

    depth: int
    width: int
    heads: int
    patch: int
    image_size: int
    in_channels: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True
    null_class: bool = True
    mlp_width: int = 0  # 0: four times the width

    @property
    def unconditional_class(self) -> int | None:
        """The label of classifier-free guidance's unconditional half; None for a model that has none."""
        return self.num_classes if self.null_class else None

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def grid(self) -> int:
        return self.image_size // self.patch

    def as_dict(self) -> dict[str, int | bool]:
        return asdict(self)


def sincos_positions(width: int, grid: int | Tensor) -> Tensor:
    """Fixed 2-D sine-cosine table [1, grid*grid, width]; the first half encodes columns, the second rows.

    `grid`: places a side, or their coordinates.
    """
    places = torch.arange(grid) if isinstance(grid, int) else grid
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, cols = torch.meshgrid(places, places, indexing="ij")
    parts = []
    for coordinate in (cols, rows):
        angle = coordinate.reshape(-1, 1).double() * omega
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float().unsqueeze(0)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x [B, N, D] scaled and shifted by per-sample vectors [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbed(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(cfg.in_channels, cfg.width, cfg.patch, cfg.patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = TIMESTEP_FREQUENCIES // 2
        freqs = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angle = t.float().unsqueeze(-1) * freqs
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(features.to(cast(nn.Linear, self.mlp[0]).weight.dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(cfg.num_classes + int(cfg.null_class), cfg.width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        hidden = cfg.mlp_width or 4 * cfg.width
        self.fc1 = nn.Linear(cfg.width, hidden)
        self.fc2 = nn.Linear(hidden, cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning (paper, section 3.2)."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(cfg)
        self.norm2 = nn.LayerNorm(cfg.width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(cfg)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 6 * cfg.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(cfg.width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(cfg.width, cfg.patch**2 * cfg.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 2 * cfg.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """A class-conditional diffusion transformer.

    Call it as `model(x, t, y)` with x [B, C, H, W] (latents or pixels), t [B] (timesteps, 0 to 1000) and
    y int64 [B] (classes; the last row of the table is the "no class" of guidance). Returns
    [B, out_channels, H, W].
    """

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.x_embedder = PatchEmbed(cfg)
        self.t_embedder = TimestepEmbedder(cfg.width)
        self.y_embedder = LabelEmbedder(cfg)
        self.pos_embed = nn.Parameter(sincos_positions(cfg.width, cfg.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(cfg)

    def initialise(self) -> DiT:
        """Set the weights a training starts from: Xavier linears, adaLN gates and output at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.cfg.width, -1))
        for name in ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
            nn.init.normal_(self.get_parameter(name), std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith((".adaLN_modulation.1.weight", "x_embedder.proj.bias", "final_layer.linear.weight")):
                nn.init.zeros_(parameter)
        return self

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """[B, N, patch*patch*C] -> [B, C, H, W]."""
        g, p, c = self.cfg.grid, self.cfg.patch, self.cfg.out_channels
        image = tokens.reshape(tokens.shape[0], g, g, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(tokens.shape[0], c, g * p, g * p)
