"""The tensor names of Stable Diffusion 3, FLUX and PixArt in their own repositories and in diffusers.

The layouts differ little: projections that are fused in the repositories are separate in diffusers, and a modulation of
two parts has the shift before the scale, in diffusers after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Size = int | tuple[int, int]  # of an image in latent pixels: its side, or its height and width
SIGMA_TEXTS = 300  # tokens of a text in PixArt-Sigma; PixArt-alpha has 120


class SizeNeededError(Exception):
    """Neither the tensors nor the caller tell the image size."""


@dataclass(frozen=True)
class Layout:
    """The names of one repository, and the class of diffusers for its models.

    `marker`: a tensor that no other layout has. `patches`: the projection with as many rows as the model is wide.
    `names`: a line for every module, here and in diffusers; # is the number of a block, a|b|c (inside it) share the
    rows, as many as the model is wide but for the last. `config`: arguments of the class, of tensors, width, heads and
    the image size. `head_size` says the width of a head, None where nothing tells. `ignored` is no part of the class.
    """

    title: str
    cls: str
    prediction: str
    marker: str
    patches: str
    names: str
    config: Callable[[Tensors, int, int, Size | None], dict[str, Any]]
    head_size: Callable[[Tensors], int | None]
    ignored: tuple[str, ...] = ()


def blocks_of(tensors: Tensors, stem: str) -> int:
    """The number of blocks. ValueError unless they are numbered without a gap, so that it is bounded by the tensors."""
    found = {name.split(".")[1] for name in tensors if name.startswith(f"{stem}.")}
    if odd := sorted(found - {str(number) for number in range(len(found))}):
        raise ValueError(f"{stem}.{odd[0][:20]} is not one of {len(found)} blocks")
    return len(found)


def sd3_config(tensors: Tensors, width: int, heads: int, image: Size | None = None) -> dict[str, Any]:
    """As read off the shapes; 128 latent pixels a side (1024 pixels), what SD3 is for, or as far as positions reach."""
    _, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    places = math.isqrt(tensors["pos_embed"].shape[1])
    count = blocks_of(tensors, "joint_blocks")
    return {
        "sample_size": min(128, places * patch),
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": len(tensors["final_layer.linear.weight"]) // patch**2,
        "num_layers": count,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "joint_attention_dim": tensors["context_embedder.weight"].shape[1],
        "caption_projection_dim": width,
        "pooled_projection_dim": tensors["y_embedder.mlp.0.weight"].shape[1],
        "pos_embed_max_size": places,
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in tensors else None,
        "dual_attention_layers": tuple(
            block for block in range(count) if f"joint_blocks.{block}.x_block.attn2.qkv.weight" in tensors
        ),
    }


def flux_config(tensors: Tensors, width: int, heads: int, image: Size | None = None) -> dict[str, Any]:
    """As read off the shapes. FLUX Fill, Canny and Depth read an image beside the noise, and give fewer channels."""
    size, channels = width // heads, tensors["img_in.weight"].shape[1]
    rows = len(tensors["final_layer.linear.weight"])
    axes = (size // 8, 7 * size // 16, 7 * size // 16)  # rotary: number of the image, row, column
    if sum(axes) != size or any(axis % 2 for axis in axes):
        raise ValueError(f"heads of {size} do not divide as those of FLUX")
    return {
        "in_channels": channels,
        "out_channels": None if rows == channels else rows,
        "num_layers": blocks_of(tensors, "double_blocks"),
        "num_single_layers": blocks_of(tensors, "single_blocks"),
        "num_attention_heads": heads,
        "attention_head_dim": size,
        "joint_attention_dim": tensors["txt_in.weight"].shape[1],
        "pooled_projection_dim": tensors["vector_in.in_layer.weight"].shape[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in tensors,
        "axes_dims_rope": axes,
    }


def pixart_config(tensors: Tensors, width: int, heads: int, image: Size | None = None) -> dict[str, Any]:
    """As read off the shapes; how far apart positions are is read off the second of them.

    A file may have no positions, since they can be computed: then the model is for images of `image` latent pixels, and
    they are as far apart as in the release with as many text tokens (PixArt-Sigma has 300). SizeNeededError without it.
    """
    _, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    if (table := tensors.get("pos_embed")) is None:
        if image is None:
            raise SizeNeededError("its positions are not stored, but computed: pass --image-size (latent pixels).")
        height, width_ = image if isinstance(image, tuple) else (image, image)
        side = round(math.sqrt(height * width_) / patch)
        texts = tensors.get("y_embedder.y_embedding")
        sigma = texts is not None and len(texts) >= SIGMA_TEXTS
        scale = side * patch / 64 if sigma else max(side * patch // 64, 1)
    else:
        step = torch.atan2(
            table[0, 1, 0], table[0, 1, width // 4]
        )  # sine and cosine of the lowest frequency, one column on
        side, scale = math.isqrt(table.shape[1]), round(1 / float(step), 3)
    return {
        "sample_size": side * patch,
        "interpolation_scale": scale,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": len(tensors["final_layer.linear.weight"]) // patch**2,
        "num_layers": blocks_of(tensors, "blocks"),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "cross_attention_dim": width,
        "caption_channels": tensors["y_embedder.y_proj.fc1.weight"].shape[1],
        "use_additional_conditions": "csize_embedder.mlp.0.weight" in tensors,
    }


# One line a module: `name of the repository: name in diffusers`.
SD3_NAMES = """
pos_embed: pos_embed.pos_embed
x_embedder.proj: pos_embed.proj
context_embedder: context_embedder
t_embedder.mlp.0: time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2: time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0: time_text_embed.text_embedder.linear_1
y_embedder.mlp.2: time_text_embed.text_embedder.linear_2
joint_blocks.#.x_block.adaLN_modulation.1: transformer_blocks.#.norm1.linear
joint_blocks.#.x_block.attn.qkv: transformer_blocks.#.attn.to_q|attn.to_k|attn.to_v
joint_blocks.#.x_block.attn.ln_q: transformer_blocks.#.attn.norm_q
joint_blocks.#.x_block.attn.ln_k: transformer_blocks.#.attn.norm_k
joint_blocks.#.x_block.attn.proj: transformer_blocks.#.attn.to_out.0
joint_blocks.#.x_block.attn2.qkv: transformer_blocks.#.attn2.to_q|attn2.to_k|attn2.to_v
joint_blocks.#.x_block.attn2.ln_q: transformer_blocks.#.attn2.norm_q
joint_blocks.#.x_block.attn2.ln_k: transformer_blocks.#.attn2.norm_k
joint_blocks.#.x_block.attn2.proj: transformer_blocks.#.attn2.to_out.0
joint_blocks.#.x_block.mlp.fc1: transformer_blocks.#.ff.net.0.proj
joint_blocks.#.x_block.mlp.fc2: transformer_blocks.#.ff.net.2
joint_blocks.#.context_block.adaLN_modulation.1: transformer_blocks.#.norm1_context.linear
joint_blocks.#.context_block.attn.qkv: transformer_blocks.#.attn.add_q_proj|attn.add_k_proj|attn.add_v_proj
joint_blocks.#.context_block.attn.ln_q: transformer_blocks.#.attn.norm_added_q
joint_blocks.#.context_block.attn.ln_k: transformer_blocks.#.attn.norm_added_k
joint_blocks.#.context_block.attn.proj: transformer_blocks.#.attn.to_add_out
joint_blocks.#.context_block.mlp.fc1: transformer_blocks.#.ff_context.net.0.proj
joint_blocks.#.context_block.mlp.fc2: transformer_blocks.#.ff_context.net.2
final_layer.adaLN_modulation.1: norm_out.linear
final_layer.linear: proj_out
"""

FLUX_NAMES = """
img_in: x_embedder
txt_in: context_embedder
time_in.in_layer: time_text_embed.timestep_embedder.linear_1
time_in.out_layer: time_text_embed.timestep_embedder.linear_2
vector_in.in_layer: time_text_embed.text_embedder.linear_1
vector_in.out_layer: time_text_embed.text_embedder.linear_2
guidance_in.in_layer: time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer: time_text_embed.guidance_embedder.linear_2
double_blocks.#.img_mod.lin: transformer_blocks.#.norm1.linear
double_blocks.#.img_attn.qkv: transformer_blocks.#.attn.to_q|attn.to_k|attn.to_v
double_blocks.#.img_attn.norm.query_norm: transformer_blocks.#.attn.norm_q
double_blocks.#.img_attn.norm.key_norm: transformer_blocks.#.attn.norm_k
double_blocks.#.img_attn.proj: transformer_blocks.#.attn.to_out.0
double_blocks.#.img_mlp.0: transformer_blocks.#.ff.net.0.proj
double_blocks.#.img_mlp.2: transformer_blocks.#.ff.net.2
double_blocks.#.txt_mod.lin: transformer_blocks.#.norm1_context.linear
double_blocks.#.txt_attn.qkv: transformer_blocks.#.attn.add_q_proj|attn.add_k_proj|attn.add_v_proj
double_blocks.#.txt_attn.norm.query_norm: transformer_blocks.#.attn.norm_added_q
double_blocks.#.txt_attn.norm.key_norm: transformer_blocks.#.attn.norm_added_k
double_blocks.#.txt_attn.proj: transformer_blocks.#.attn.to_add_out
double_blocks.#.txt_mlp.0: transformer_blocks.#.ff_context.net.0.proj
double_blocks.#.txt_mlp.2: transformer_blocks.#.ff_context.net.2
single_blocks.#.modulation.lin: single_transformer_blocks.#.norm.linear
single_blocks.#.linear1: single_transformer_blocks.#.attn.to_q|attn.to_k|attn.to_v|proj_mlp
single_blocks.#.norm.query_norm: single_transformer_blocks.#.attn.norm_q
single_blocks.#.norm.key_norm: single_transformer_blocks.#.attn.norm_k
single_blocks.#.linear2: single_transformer_blocks.#.proj_out
final_layer.adaLN_modulation.1: norm_out.linear
final_layer.linear: proj_out
"""

PIXART_NAMES = """
pos_embed: pos_embed.pos_embed
x_embedder.proj: pos_embed.proj
y_embedder.y_proj.fc1: caption_projection.linear_1
y_embedder.y_proj.fc2: caption_projection.linear_2
t_embedder.mlp.0: adaln_single.emb.timestep_embedder.linear_1
t_embedder.mlp.2: adaln_single.emb.timestep_embedder.linear_2
csize_embedder.mlp.0: adaln_single.emb.resolution_embedder.linear_1
csize_embedder.mlp.2: adaln_single.emb.resolution_embedder.linear_2
ar_embedder.mlp.0: adaln_single.emb.aspect_ratio_embedder.linear_1
ar_embedder.mlp.2: adaln_single.emb.aspect_ratio_embedder.linear_2
t_block.1: adaln_single.linear
blocks.#.scale_shift_table: transformer_blocks.#.scale_shift_table
blocks.#.attn.qkv: transformer_blocks.#.attn1.to_q|attn1.to_k|attn1.to_v
blocks.#.attn.proj: transformer_blocks.#.attn1.to_out.0
blocks.#.cross_attn.q_linear: transformer_blocks.#.attn2.to_q
blocks.#.cross_attn.kv_linear: transformer_blocks.#.attn2.to_k|attn2.to_v
blocks.#.cross_attn.proj: transformer_blocks.#.attn2.to_out.0
blocks.#.mlp.fc1: transformer_blocks.#.ff.net.0.proj
blocks.#.mlp.fc2: transformer_blocks.#.ff.net.2
final_layer.scale_shift_table: scale_shift_table
final_layer.linear: proj_out
"""

LAYOUTS = (
    Layout(
        title="Stable Diffusion 3",
        cls="SD3Transformer2DModel",
        prediction="flow",
        marker="joint_blocks.0.x_block.attn.qkv.weight",
        patches="x_embedder.proj.weight",
        names=SD3_NAMES,
        config=sd3_config,
        head_size=lambda _: 64,
    ),
    Layout(
        title="FLUX",
        cls="FluxTransformer2DModel",
        prediction="flow",
        marker="double_blocks.0.img_attn.qkv.weight",
        patches="img_in.weight",
        names=FLUX_NAMES,
        config=flux_config,
        head_size=lambda tensors: len(tensors["double_blocks.0.img_attn.norm.query_norm.scale"]),
    ),
    Layout(
        title="PixArt",
        cls="PixArtTransformer2DModel",
        prediction="eps",
        marker="y_embedder.y_proj.fc1.weight",
        patches="x_embedder.proj.weight",
        names=PIXART_NAMES,
        config=pixart_config,
        head_size=lambda _: None,
        ignored=("y_embedder.y_embedding",),  # the embedding of no text, which the pipeline gives instead
    ),
)
