"""Embeddings and pixels of larger patches, derived from those of a trained model by linear algebra.

FlexiViT (arXiv 2212.08013) resizes an embedding by the pseudo-inverse of a bilinear resize, so that an enlarged patch
is embedded like the original one; DDiT (arXiv 2602.16968) starts from this and trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMES = 1000  # table entries of the noise level


@cache
def enlarging(patch: int, scale: int) -> Tensor:
    """Bilinear resize of a patch of `patch` pixels per side by `scale`: [(scale patch)^2, patch^2] in float64."""
    pixels = torch.eye(patch * patch, dtype=torch.float64).view(-1, 1, patch, patch)
    large = F.interpolate(pixels, scale_factor=scale, mode="bilinear", align_corners=False)
    return large.flatten(1).T.contiguous()


@cache
def reducing(patch: int, scale: int) -> Tensor:
    """Its pseudo-inverse [patch^2, (scale patch)^2]: the patch whose enlargement is nearest."""
    return torch.linalg.pinv(enlarging(patch, scale))


def resized(positions: Tensor, grid: tuple[int, int], scales: Sequence[int]) -> list[Tensor]:
    """Position terms [N, D] on the coarser grids of all scales but the first, by bilinear interpolation."""
    image = positions.float().T.reshape(1, -1, *grid)
    sizes = [(grid[0] // scale, grid[1] // scale) for scale in scales[1:]]
    found = [F.interpolate(image, size=size, mode="bilinear", align_corners=False) for size in sizes]
    return [value.flatten(2)[0].T.contiguous().to(positions.dtype) for value in found]


def frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.clone().contiguous(), requires_grad=False)


class PatchEmbedding(nn.Module):
    """Tokens of all patch sizes but the first. DDiT's vector for each size is part of the positions."""

    def __init__(self, weight: Tensor, positions: Sequence[Tensor], scales: Sequence[int]) -> None:
        super().__init__()
        patch = weight.shape[2]
        made = [weight.double().flatten(2) @ reducing(patch, scale).to(weight.device) for scale in scales[1:]]
        self.weights = nn.ParameterList(
            frozen(value.view(*weight.shape[:2], scale * patch, scale * patch).to(weight))
            for value, scale in zip(made, scales[1:], strict=True)
        )
        self.positions = nn.ParameterList(frozen(value) for value in positions)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, C, H, W] -> tokens [B, sum of N / scale^2, D]."""
        parts = []
        for weight, positions in zip(self.weights, self.positions, strict=True):
            tokens = F.conv2d(x, weight, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
            parts.append(tokens + positions)
        return torch.cat(parts, 1)


class PatchOutput(nn.Module):
    """The last linear layer for all patch sizes but the first; each patch gives the features of scale^2 tokens."""

    def __init__(self, weight: Tensor, bias: Tensor | None, order: Tensor, patch: int, scales: Sequence[int]) -> None:
        super().__init__()
        matrix = torch.cat([spreading(order, patch, scale) for scale in scales[1:]]).to(weight.device)
        self.weight = frozen((matrix @ weight.double()).to(weight))
        self.bias = None if bias is None else frozen((matrix @ bias.double()).to(bias))

    def forward(self, x: Tensor) -> Tensor:
        """[G, L, D] -> [G, L, sum of scale^2 F]."""
        return F.linear(x, self.weight, self.bias)


def spreading(order: Tensor, patch: int, scale: int) -> Tensor:
    """[scale^2 F, F]: from a token's features to those of the tokens of a patch `scale` times as large."""
    features, area = len(order), patch * patch
    channel, pixel = order // area, order % area
    large = (
        enlarging(patch, scale).view(scale, patch, scale, patch, area).permute(0, 2, 1, 3, 4).reshape(-1, area, area)
    )
    same_channel = (channel[:, None] == channel[None]).double()
    return (large[:, pixel][:, :, pixel] * same_channel).reshape(-1, features)


class PatchSkip(nn.Module):
    """What is added to a prediction directly from the input: detail that patches of the current size cannot represent.

    The part of a patch that no enlarged patch can represent is mostly noise. If the data have variance v in this part
    (`detail`, 0 if unknown), and alpha and sigma are the weights of data and noise, the best linear estimate of the
    noise is sigma / (alpha^2 v + sigma^2) times this part, and that of the data is alpha v / (alpha^2 v + sigma^2)
    times it. (DDiT learns its skip.)
    """

    order: Tensor
    alpha: Tensor
    sigma: Tensor
    detail: Tensor

    def __init__(
        self,
        grid: tuple[int, int],
        order: Tensor,
        patch: int,
        scales: Sequence[int],
        prediction: str,
        channels: int,
        timestep_scale: float = TIMES,
    ) -> None:
        super().__init__()
        self.steps = TIMES / timestep_scale
        self.grid, self.patch, self.scales, self.prediction = grid, patch, tuple(scales), prediction
        self.channels = int(channels)
        # Features of channels that the input does not have (learned variances) come from a column of zeros.
        self.register_buffer("order", order.clamp(max=self.channels * patch * patch))
        alpha, sigma = noise_levels(prediction)
        self.register_buffer("alpha", alpha)
        self.register_buffer("sigma", sigma)
        self.register_buffer("detail", torch.zeros(len(scales)))
        for scale in scales[1:]:
            lost = torch.eye((scale * patch) ** 2, dtype=torch.float64) - enlarging(patch, scale) @ reducing(
                patch, scale
            )
            self.register_buffer(f"lost_{scale}", lost.float())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Image [B, C, H, W] and timesteps [B] of 0 to `timestep_scale` -> features [B, N scales, F] that are added."""
        parts = [torch.zeros_like(self.features(x))]
        parts += [self.features(self.lost(x, scale)) for scale in self.scales[1:]]
        rows = torch.stack(parts, 2)
        place = (t * self.steps).round().long().clamp(0, TIMES)
        alpha, sigma = self.alpha[place].unsqueeze(1), self.sigma[place].unsqueeze(1)  # [B, 1]
        noise = alpha.square() * self.detail + sigma.square()
        gain = (sigma - alpha * self.detail if self.prediction == "flow" else sigma) / noise
        return (rows * gain.to(rows.dtype)[:, None, :, None]).flatten(1, 2)

    def lost(self, x: Tensor, scale: int) -> Tensor:
        """The part of an image that is lost in patches `scale` times as large."""
        side = scale * self.patch
        down, right = self.grid[0] // scale, self.grid[1] // scale
        patches = x.reshape(-1, self.channels, down, side, right, side).permute(0, 1, 2, 4, 3, 5)
        found = F.linear(
            patches.reshape(-1, self.channels, down, right, side * side), getattr(self, f"lost_{scale}").to(x.dtype)
        )
        image = found.reshape(-1, self.channels, down, right, side, side).permute(0, 1, 2, 4, 3, 5)
        return image.reshape(-1, self.channels, down * side, right * side)

    def features(self, x: Tensor) -> Tensor:
        """An image as features of the tokens [B, N, F]."""
        (height, width), patch = self.grid, self.patch
        cells = x.reshape(-1, self.channels, height, patch, width, patch).permute(0, 2, 4, 1, 3, 5)
        plain = F.pad(cells.reshape(-1, height * width, self.channels * patch * patch), (0, 1))
        return plain.index_select(2, self.order)


def noise_levels(prediction: str) -> tuple[Tensor, Tensor]:
    """alpha and sigma at timesteps 0 to 1000: of a rectified flow, or of DiT's linear schedule of betas ("eps")."""
    if prediction == "flow":
        sigma = torch.arange(TIMES + 1) / TIMES
        return 1 - sigma, sigma.clamp_min(1e-3)
    left = torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMES, dtype=torch.float64), 0)
    left = torch.cat([left, left[-1:]])
    return left.sqrt().float(), (1 - left).sqrt().float()
