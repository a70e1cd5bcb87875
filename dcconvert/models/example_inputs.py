"""One call of a model: random inputs of the right shapes for every class that is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcconvert.models.dc_dit import RefinedDiT
from dcconvert.models.dit import DiT
from dcconvert.models.key_tables import Size
from dcconvert.passes.ir.spec import EXAMPLE_BATCH


def dit_inputs(model: DiT | RefinedDiT, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random (x, t, y) for a DiT or DC-DiT, on its device; x is of its precision, t always of float32."""
    cfg, generator = model.cfg, torch.Generator().manual_seed(seed)
    x = torch.randn(batch, cfg.in_channels, cfg.image_size, cfg.image_size, generator=generator)
    t = torch.rand(batch, generator=generator) * 1000
    place = model.pos_embed
    return x.to(place), t.to(place.device), torch.arange(batch, device=place.device) % cfg.num_classes


FLUX = "FluxTransformer2DModel"  # its pipeline makes patches of 2 pixels; its own are tokens


def sides(size: Size) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def latents(config: Any, size: Size | None) -> Tensor:
    return torch.randn(EXAMPLE_BATCH, config.in_channels, *sides(size or config.sample_size))


def timesteps(scale: float = 1000.0) -> Tensor:
    return torch.linspace(0.9, 0.4, EXAMPLE_BATCH) * scale


def dit_call(config: Any, size: Size | None) -> dict[str, Any]:
    classes = torch.arange(EXAMPLE_BATCH) % config.num_embeds_ada_norm
    return {"hidden_states": latents(config, size), "timestep": timesteps().long(), "class_labels": classes}


def pixart_call(config: Any, size: Size | None) -> dict[str, Any]:
    """Texts of 120 tokens (PixArt-alpha) or 300 (PixArt-Sigma, whose positions are scaled for larger images)."""
    count = 300 if not config.use_additional_conditions else 120
    image = latents(config, size)
    height, width = image.shape[2:]
    pixels = torch.tensor([[height * 8.0, width * 8.0]]).expand(EXAMPLE_BATCH, 2)
    extra = {"resolution": pixels, "aspect_ratio": torch.full((EXAMPLE_BATCH, 1), height / width)}
    return {
        "hidden_states": image,
        "encoder_hidden_states": torch.randn(EXAMPLE_BATCH, count, config.caption_channels),
        "timestep": timesteps().long(),
        "added_cond_kwargs": extra if config.use_additional_conditions else dict.fromkeys(extra),
        "encoder_attention_mask": torch.ones(EXAMPLE_BATCH, count),
    }


def sd3_call(config: Any, size: Size | None) -> dict[str, Any]:
    """77 tokens of CLIP and 256 of T5."""
    return {
        "hidden_states": latents(config, size),
        "encoder_hidden_states": torch.randn(EXAMPLE_BATCH, 333, config.joint_attention_dim),
        "pooled_projections": torch.randn(EXAMPLE_BATCH, config.pooled_projection_dim),
        "timestep": timesteps(),
    }


def flux_call(config: Any, size: Size | None) -> dict[str, Any]:
    """512 tokens of T5; patches of 2 x 2 of a latent image of 128 x 128 (1024 pixels)."""
    height, width = sides(size or 128)
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    guidance = {"guidance": torch.full((EXAMPLE_BATCH,), 3.5)} if config.guidance_embeds else {}
    return {
        "hidden_states": torch.randn(EXAMPLE_BATCH, rows.numel(), config.in_channels),
        "encoder_hidden_states": torch.randn(EXAMPLE_BATCH, 512, config.joint_attention_dim),
        "pooled_projections": torch.randn(EXAMPLE_BATCH, config.pooled_projection_dim),
        "timestep": timesteps(1.0),
        "img_ids": places,
        "txt_ids": torch.zeros(512, 3),
        **guidance,
    }
