"""Small configurations of diffusers' transformer classes with random weights, and one call of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.families import BATCH, HEADS, POOLED, SIDE, TEXT, TEXT_WIDTH, WIDTH, image, size, steps, text

Kwargs = dict[str, Any]
Made = tuple[Kwargs, Kwargs]  # the configuration of a class, and one call

LAYERS, FRAMES = 4, 5
GRID = SIDE // 2  # tokens along a side
TOKENS = GRID * GRID
ROPE = (4, 6, 6)
STREAMS = {"num_layers": 3, "num_single_layers": 3}
LATENTS = {"in_channels": 4, "out_channels": 4}

MODELS: dict[str, tuple[Callable[[], Made], float]] = {}


def model(name: str, scale: float = 1000.0) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Register a class of diffusers; `scale`: its timestep at pure noise."""

    def register(make: Callable[[], Made]) -> Callable[[], Made]:
        MODELS[name] = (make, scale)
        return make

    return register


def video(channels: int = 4, frames: int = FRAMES) -> Tensor:
    return torch.randn(BATCH, channels, frames, SIDE, SIDE)


def patches(channels: int = 16, count: int = TOKENS) -> Tensor:
    return torch.randn(BATCH, count, channels)


def places(axes: int = 3, height: int = GRID, width: int = GRID) -> Tensor:
    """Positions [N, axes] of an image's tokens; the rows and columns are the second and third axis."""
    found = torch.zeros(height, width, axes)
    found[..., 1] = torch.arange(height).unsqueeze(1)
    found[..., 2] = torch.arange(width)
    return found.flatten(0, 1)


def text_mask() -> Tensor:
    mask = torch.ones(BATCH, TEXT, dtype=torch.bool)
    mask[1, 4:] = False
    return mask


def pooled(width: int = POOLED) -> Tensor:
    return torch.randn(BATCH, width)


def classes() -> Tensor:
    return torch.arange(BATCH)


def sizes() -> Kwargs:
    side = torch.full((BATCH, 2), 64.0)
    return {"original_size": side, "target_size": side.clone(), "crop_coords": torch.zeros(BATCH, 2)}


def flux_call(**more: Any) -> Kwargs:
    return {
        "hidden_states": patches(),
        "encoder_hidden_states": text(),
        "timestep": steps(1.0),
        "img_ids": places(),
        "txt_ids": torch.zeros(TEXT, 3),
        **more,
    }


def flux_like(**more: Any) -> Kwargs:
    return size(**STREAMS, in_channels=16, joint_attention_dim=TEXT_WIDTH, axes_dims_rope=ROPE, **more)


def wan_like(**more: Any) -> Kwargs:
    more = {"rope_max_seq_len": 32, **more}
    return size(num_layers=LAYERS, **LATENTS, text_dim=TEXT_WIDTH, freq_dim=16, ffn_dim=48, **more)


def wan_call(channels: int = 4, **more: Any) -> Kwargs:
    return {"hidden_states": video(channels), "timestep": steps().long(), "encoder_hidden_states": text(), **more}


# Images


@model("DiTTransformer2DModel")
def dit() -> Made:
    config: Kwargs = size(num_layers=LAYERS, in_channels=4, out_channels=8, sample_size=SIDE, num_embeds_ada_norm=1000)
    return config, {"hidden_states": image(), "timestep": steps().long(), "class_labels": classes()}


@model("Transformer2DModel")
def transformer_2d() -> Made:
    config: Kwargs = size(num_layers=LAYERS, in_channels=4, out_channels=8, sample_size=SIDE, patch_size=2)
    config |= {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False}
    config |= {"attention_bias": True, "activation_fn": "gelu-approximate"}
    return config, {"hidden_states": image(), "timestep": steps().long(), "class_labels": classes()}


@model("PixArtTransformer2DModel")
def pixart() -> Made:
    config: Kwargs = size(num_layers=LAYERS, in_channels=4, out_channels=8, sample_size=SIDE, cross_attention_dim=WIDTH)
    config |= {"caption_channels": TEXT_WIDTH, "use_additional_conditions": False}
    call: Kwargs = {
        "encoder_attention_mask": text_mask().float(),
        "timestep": steps().long(),
        "encoder_hidden_states": text(),
    }
    return config, {"hidden_states": image(), **call, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


@model("HunyuanDiT2DModel")
def hunyuan_dit() -> Made:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    config: Kwargs = size(
        num_layers=LAYERS, in_channels=4, patch_size=2, sample_size=SIDE, cross_attention_dim=TEXT_WIDTH
    )
    config |= {"cross_attention_dim_t5": TEXT_WIDTH, "pooled_projection_dim": POOLED, "hidden_size": WIDTH}
    config |= {"text_len": TEXT, "text_len_t5": TEXT, "use_style_cond_and_image_meta_size": False}
    rotary = get_2d_rotary_pos_embed(WIDTH // HEADS, ((0, 0), (GRID, GRID)), (GRID, GRID), output_type="pt")
    call: Kwargs = {"encoder_hidden_states": text(), "encoder_hidden_states_t5": text(), "timestep": steps()}
    call |= {"text_embedding_mask": torch.ones(BATCH, TEXT), "text_embedding_mask_t5": torch.ones(BATCH, TEXT)}
    return config, {"hidden_states": image(), **call, "image_rotary_emb": rotary}


def sd3_config(**more: Any) -> Kwargs:
    config: Kwargs = size(num_layers=LAYERS, **LATENTS, sample_size=SIDE, joint_attention_dim=TEXT_WIDTH)
    config |= {"caption_projection_dim": WIDTH, "pooled_projection_dim": POOLED, "pos_embed_max_size": SIDE}
    return {**config, **more}


@model("SD3Transformer2DModel")
def sd3() -> Made:
    call: Kwargs = {"encoder_hidden_states": text(), "pooled_projections": pooled(), "timestep": steps()}
    return sd3_config(qk_norm="rms_norm", num_layers=6, dual_attention_layers=(0, 1, 2)), {
        "hidden_states": image(),
        **call,
    }


@model("AuraFlowTransformer2DModel", 1.0)
def auraflow() -> Made:
    config: Kwargs = size(num_mmdit_layers=4, num_single_dit_layers=4, **LATENTS, sample_size=SIDE)
    config |= {"joint_attention_dim": TEXT_WIDTH, "caption_projection_dim": WIDTH, "pos_embed_max_size": SIDE * SIDE}
    return config, {"hidden_states": image(), "encoder_hidden_states": text(), "timestep": steps(1.0)}


@model("SanaTransformer2DModel")
def sana() -> Made:
    config: Kwargs = size(num_layers=LAYERS, **LATENTS, sample_size=SIDE, caption_channels=TEXT_WIDTH)
    config |= {"num_cross_attention_heads": HEADS, "cross_attention_head_dim": 16, "cross_attention_dim": WIDTH}
    return config, {"hidden_states": image(), "encoder_hidden_states": text(), "timestep": steps()}


LUMINA: Kwargs = {
    "sample_size": SIDE,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": WIDTH,
    "num_layers": LAYERS,
    "num_attention_heads": HEADS,
    "multiple_of": 16,
}


@model("LuminaNextDiT2DModel", 1.0)
def lumina_next() -> Made:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    config: Kwargs = {**LUMINA, "num_kv_heads": HEADS, "cross_attention_dim": TEXT_WIDTH}
    rotary = get_2d_rotary_pos_embed_lumina(WIDTH // HEADS, 384, 384)
    call: Kwargs = {"encoder_hidden_states": text(), "encoder_mask": torch.ones(BATCH, TEXT), "timestep": steps(1.0)}
    return config, {"hidden_states": image(), **call, "image_rotary_emb": rotary, "cross_attention_kwargs": {}}


@model("Lumina2Transformer2DModel", 1.0)
def lumina2() -> Made:
    config: Kwargs = {**LUMINA, "num_refiner_layers": 2, "num_kv_heads": 1}
    config |= {"axes_dim_rope": ROPE, "axes_lens": (32, 16, 16), "cap_feat_dim": TEXT_WIDTH}
    call: Kwargs = {
        "encoder_hidden_states": text(),
        "encoder_attention_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
    }
    return config, {"hidden_states": image(), "timestep": steps(1.0), **call}


@model("CogView3PlusTransformer2DModel")
def cogview3() -> Made:
    config: Kwargs = size(num_layers=LAYERS, **LATENTS, sample_size=SIDE, text_embed_dim=TEXT_WIDTH)
    config |= {"time_embed_dim": POOLED, "condition_dim": 8, "pos_embed_max_size": SIDE}
    return config, {"hidden_states": image(), "encoder_hidden_states": text(), "timestep": steps().long(), **sizes()}


@model("CogView4Transformer2DModel")
def cogview4() -> Made:
    config: Kwargs = size(num_layers=LAYERS, **LATENTS, sample_size=SIDE, text_embed_dim=TEXT_WIDTH)
    config |= {"time_embed_dim": POOLED, "condition_dim": 8, "pos_embed_max_size": SIDE, "rope_axes_dim": (16, 16)}
    return config, {"hidden_states": image(), "encoder_hidden_states": text(), "timestep": steps().long(), **sizes()}


@model("GlmImageTransformer2DModel")
def glm_image() -> Made:
    config: Kwargs = size(
        num_layers=LAYERS, **LATENTS, text_embed_dim=TEXT_WIDTH, time_embed_dim=POOLED, condition_dim=8
    )
    config |= {"prior_vq_quantizer_codebook_size": 16}
    call: Kwargs = {
        "prior_token_id": torch.randint(0, 16, (BATCH, TOKENS)),
        "prior_token_drop": torch.zeros(BATCH, dtype=torch.bool),
    }
    given = {name: value for name, value in sizes().items() if name != "original_size"}
    return config, {"hidden_states": image(), "encoder_hidden_states": text(), "timestep": steps(), **call, **given}


@model("FluxTransformer2DModel", 1.0)
def flux() -> Made:
    config: Kwargs = flux_like(pooled_projection_dim=POOLED, guidance_embeds=True)
    return config, flux_call(pooled_projections=pooled(), guidance=torch.full((BATCH,), 3.5))


@model("Flux2Transformer2DModel", 1.0)
def flux2() -> Made:
    config: Kwargs = {**flux_like(), "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16}
    ids: Kwargs = {"img_ids": places(4), "txt_ids": torch.zeros(TEXT, 4)}
    return config, flux_call(**ids, guidance=torch.full((BATCH,), 3.5))


@model("Flux3Transformer2DModel", 1.0)
def flux3() -> Made:
    config: Kwargs = {**flux_like(), "axes_dims_rope": (4, 4, 4, 4), "timestep_channels": 16, "cond_in_channels": 16}
    config["num_single_layers"] = 5  # the first and the last one differ from the others
    return config, flux_call(img_ids=places(4), txt_ids=torch.zeros(TEXT, 4))


@model("ChromaTransformer2DModel", 1.0)
def chroma() -> Made:
    config: Kwargs = flux_like(approximator_num_channels=16, approximator_hidden_dim=WIDTH, approximator_layers=1)
    mask = torch.ones(BATCH, TEXT + TOKENS, dtype=torch.bool)
    return config, flux_call(attention_mask=mask)


@model("BriaTransformer2DModel", 1.0)
def bria() -> Made:
    return flux_like(), flux_call()


@model("BriaFiboTransformer2DModel", 1.0)
def bria_fibo() -> Made:
    layers = [text(WIDTH // 2) for _ in range(6)]
    return flux_like(text_encoder_dim=WIDTH // 2), flux_call(text_encoder_layers=layers)


@model("BriaFibo2Transformer2DModel", 1.0)
def bria_fibo2() -> Made:
    config: Kwargs = {
        "in_channels": 4,
        "patch_size": 2,
        "dim": WIDTH,
        "n_layers": LAYERS,
        "n_refiner_layers": 1,
        "n_heads": HEADS,
    }
    config |= {"cap_feat_dim": TEXT_WIDTH, "injection_layer_ids": (1,), "perceiver_num_layers": 1}
    config |= {"min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 4, "gist_min_text_len": 4}
    config |= {"gist_max_text_len": 16, "axes_dims": ROPE, "axes_lens": (32, 16, 16)}
    words = torch.randn(BATCH, 2, TEXT, TEXT_WIDTH)
    return config, {"hidden_states": image(), "timestep": steps(1.0), "encoder_hidden_states": words}


@model("LongCatImageTransformer2DModel", 1.0)
def longcat_image() -> Made:
    return flux_like(pooled_projection_dim=POOLED), flux_call()


@model("OvisImageTransformer2DModel", 1.0)
def ovis_image() -> Made:
    return flux_like(out_channels=16), flux_call()


@model("QwenImageTransformer2DModel", 1.0)
def qwen_image() -> Made:
    config: Kwargs = size(
        num_layers=LAYERS, in_channels=16, out_channels=4, joint_attention_dim=TEXT_WIDTH, axes_dims_rope=ROPE
    )
    call: Kwargs = {"hidden_states": patches(), "encoder_hidden_states": text(), "timestep": steps(1.0)}
    mask = torch.ones(BATCH, TEXT, dtype=torch.bool)
    return config, {**call, "encoder_hidden_states_mask": mask, "img_shapes": [(1, GRID, GRID)] * BATCH}


@model("QwenImage21Transformer2DModel", 1.0)
def qwen_image_21() -> Made:
    config: Kwargs = size(
        num_layers=LAYERS, in_channels=16, out_channels=16, context_in_dim=TEXT_WIDTH, axes_dims_rope=ROPE
    )
    call: Kwargs = {"hidden_states": patches(), "encoder_hidden_states": text(), "timestep": steps(1.0)}
    pixels = torch.arange(TEXT + TOKENS // 4).repeat(BATCH, 1) >= TEXT  # four tokens for each of these places
    return config, {**call, "img_shapes": [[(1, GRID, GRID)]] * BATCH, "img_mask": pixels}


@model("NucleusMoEImageTransformer2DModel", 1.0)
def nucleus() -> Made:
    config: Kwargs = size(
        num_layers=LAYERS, in_channels=16, out_channels=4, joint_attention_dim=TEXT_WIDTH, axes_dims_rope=ROPE
    )
    config |= {"num_key_value_heads": 1, "moe_enabled": False, "capacity_factors": [8.0] * LAYERS}
    call: Kwargs = {"hidden_states": patches(), "encoder_hidden_states": text(), "timestep": steps(1.0)}
    return config, {**call, "img_shapes": [(1, GRID, GRID)] * BATCH}


@model("HunyuanImageTransformer2DModel")
def hunyuan_image() -> Made:
    config: Kwargs = size(**STREAMS, num_refiner_layers=1, in_channels=4, out_channels=4, patch_size=(2, 2))
    config |= {"text_embed_dim": TEXT_WIDTH, "rope_axes_dim": (8, 8)}
    call: Kwargs = {"encoder_hidden_states": text(), "encoder_attention_mask": text_mask(), "timestep": steps()}
    return config, {"hidden_states": image(), **call}


@model("HiDreamImageTransformer2DModel")
def hidream() -> Made:
    config: Kwargs = size(
        **STREAMS, patch_size=2, **LATENTS, caption_channels=[TEXT_WIDTH, TEXT_WIDTH], text_emb_dim=POOLED
    )
    config |= {"num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (8, 4, 4)}
    config |= {"max_resolution": (SIDE, SIDE), "llama_layers": list(range(6)), "force_inference_output": True}
    llama = torch.randn(6, BATCH, TEXT, TEXT_WIDTH)
    call: Kwargs = {
        "encoder_hidden_states_t5": text(),
        "encoder_hidden_states_llama3": llama,
        "pooled_embeds": pooled(),
    }
    return config, {"hidden_states": image(), "timesteps": steps(), **call}


@model("OmniGenTransformer2DModel", 1.0)
def omnigen() -> Made:
    config: Kwargs = {"in_channels": 4, "patch_size": 2, "hidden_size": WIDTH, "num_attention_heads": HEADS}
    config |= {"num_key_value_heads": HEADS, "intermediate_size": 48, "num_layers": LAYERS, "pad_token_id": 0}
    config |= {"vocab_size": 32, "pos_embed_max_size": SIDE, "time_step_dim": 16}
    length = TEXT + 1 + TOKENS
    config |= {"rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}}
    call: Kwargs = {"input_ids": torch.randint(1, 32, (BATCH, TEXT)), "input_img_latents": [], "input_image_sizes": {}}
    call |= {"attention_mask": torch.ones(BATCH, length, length), "position_ids": torch.arange(length).repeat(BATCH, 1)}
    return config, {"hidden_states": image(), "timestep": steps(1.0), **call}


@model("PRXTransformer2DModel", 1.0)
def prx() -> Made:
    config: Kwargs = {
        "in_channels": 4,
        "patch_size": 2,
        "context_in_dim": TEXT_WIDTH,
        "hidden_size": WIDTH,
        "num_heads": HEADS,
    }
    call: Kwargs = {"encoder_hidden_states": text(), "attention_mask": text_mask(), "timestep": steps(1.0)}
    return {**config, "depth": LAYERS, "axes_dim": [8, 8]}, {"hidden_states": image(), **call}


@model("ErnieImageTransformer2DModel")
def ernie() -> Made:
    config: Kwargs = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_layers": LAYERS, "ffn_hidden_size": 48}
    config |= {
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "text_in_dim": TEXT_WIDTH,
        "rope_axes_dim": (8, 4, 4),
    }
    call: Kwargs = {"text_bth": text(), "text_lens": torch.full((BATCH,), TEXT)}
    return config, {"hidden_states": image(), "timestep": steps(), **call}


@model("Ideogram4Transformer2DModel", 1.0)
def ideogram4() -> Made:
    config: Kwargs = size(
        num_layers=LAYERS, in_channels=16, intermediate_size=48, adaln_dim=16, llm_features_dim=TEXT_WIDTH
    )
    config |= {"mrope_section": (4, 2, 2)}
    length = TEXT + TOKENS
    words, pixels = torch.zeros(BATCH, length, TEXT_WIDTH), torch.zeros(BATCH, length, 16)
    words[:, :TEXT], pixels[:, TEXT:] = text(), patches()
    order = torch.cat([torch.arange(TEXT).unsqueeze(1).expand(TEXT, 3), places().long() + 65536])
    kinds = torch.tensor([3] * TEXT + [2] * TOKENS).repeat(BATCH, 1)
    call: Kwargs = {
        "position_ids": order.repeat(BATCH, 1, 1),
        "segment_ids": torch.ones_like(kinds),
        "indicator": kinds,
    }
    return config, {"hidden_states": pixels, "encoder_hidden_states": words, "timestep": steps(1.0), **call}


@model("Krea2Transformer2DModel", 1.0)
def krea2() -> Made:
    config: Kwargs = size(
        num_layers=LAYERS, in_channels=16, num_key_value_heads=1, intermediate_size=48, axes_dims_rope=ROPE
    )
    config |= {
        "timestep_embed_dim": 16,
        "text_hidden_dim": TEXT_WIDTH,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
    }
    config |= {"text_num_key_value_heads": 2, "text_intermediate_size": 32}
    config |= {"num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1}
    words = torch.randn(BATCH, TEXT, 3, TEXT_WIDTH)
    ids = torch.cat([torch.zeros(TEXT, 3), places()])
    call: Kwargs = {"encoder_hidden_states": words, "position_ids": ids, "encoder_attention_mask": text_mask()}
    return config, {"hidden_states": patches(), "timestep": steps(1.0), **call}


@model("ZImageTransformer2DModel", 1.0)
def z_image() -> Made:
    config: Kwargs = {"in_channels": 4, "dim": WIDTH, "n_layers": LAYERS, "n_refiner_layers": 1, "n_heads": HEADS}
    config |= {"n_kv_heads": HEADS, "cap_feat_dim": TEXT_WIDTH, "axes_dims": ROPE, "axes_lens": (256, 64, 64)}
    latents = [torch.randn(4, 1, SIDE, SIDE) for _ in range(BATCH)]
    return config, {"x": latents, "t": steps(1.0), "cap_feats": [torch.randn(TEXT, TEXT_WIDTH) for _ in range(BATCH)]}


@model("PriorTransformer")
def prior() -> Made:
    config: Kwargs = size(num_layers=LAYERS, embedding_dim=16, num_embeddings=TEXT, additional_embeddings=4)
    call: Kwargs = {"proj_embedding": pooled(16), "encoder_hidden_states": text(16), "timestep": steps()}
    return config, {"hidden_states": pooled(16), **call}
