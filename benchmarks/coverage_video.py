"""Small configurations of diffusers' transformer classes for video and sound, and one call of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.coverage_models import (
    FRAMES,
    GRID,
    LATENTS,
    LAYERS,
    ROPE,
    STREAMS,
    Kwargs,
    Made,
    model,
    patches,
    pooled,
    text_mask,
    video,
    wan_call,
    wan_like,
)
from benchmarks.families import BATCH, HEADS, POOLED, SIDE, TEXT, TEXT_WIDTH, WIDTH, size, steps, text

LENGTH = 16  # of a sound, in latent steps


def frames_first(channels: int = 4) -> Tensor:
    return torch.randn(BATCH, FRAMES, channels, SIDE, SIDE)


def frames_last(channels: int) -> Tensor:
    return torch.randn(BATCH, FRAMES, SIDE, SIDE, channels)


# Video


@model("WanTransformer3DModel")
def wan() -> Made:
    return wan_like(cross_attn_norm=True), wan_call()


@model("SkyReelsV2Transformer3DModel")
def skyreels() -> Made:
    return wan_like(), wan_call()


@model("ChronoEditTransformer3DModel")
def chronoedit() -> Made:
    return wan_like(rope_temporal_skip_len=2), wan_call()


@model("WanVACETransformer3DModel")
def wan_vace() -> Made:
    config: Kwargs = wan_like(vace_layers=[0, 2], vace_in_channels=8)
    return config, wan_call(control_hidden_states=video(8), control_hidden_states_scale=torch.ones(2))


@model("AnyFlowTransformer3DModel")
def anyflow() -> Made:
    call: Kwargs = {
        "timestep": steps().unsqueeze(1).repeat(1, FRAMES),
        "r_timestep": steps().unsqueeze(1).repeat(1, FRAMES),
    }
    return wan_like(), {"hidden_states": frames_first(), "encoder_hidden_states": text(), **call}


@model("HeliosTransformer3DModel")
def helios() -> Made:
    config: Kwargs = {**wan_like(), "rope_dim": ROPE}
    del config["rope_max_seq_len"]
    history: Kwargs = {
        "latents_history_short": video(),
        "indices_latents_history_short": torch.arange(3).repeat(BATCH, 1),
    }
    history |= {"latents_history_mid": video(4, 4), "indices_latents_history_mid": torch.arange(4).repeat(BATCH, 1)}
    history |= {"latents_history_long": video(4, 4), "indices_latents_history_long": torch.arange(4).repeat(BATCH, 1)}
    return config, wan_call(indices_hidden_states=torch.arange(FRAMES).repeat(BATCH, 1), **history)


@model("WanAnimateTransformer3DModel")
def wan_animate() -> Made:
    config: Kwargs = wan_like(
        image_dim=8, motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16
    )
    config |= {
        "in_channels": 12,
        "latent_channels": 4,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
    }
    config |= {"face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2}
    call: Kwargs = {"encoder_hidden_states_image": torch.randn(BATCH, 5, 8), "pose_hidden_states": video(4, 2)}
    return config, wan_call(12, **call, face_pixel_values=torch.randn(BATCH, 3, 5, 16, 16))


@model("LTXVideoTransformer3DModel")
def ltx() -> Made:
    config: Kwargs = size(num_layers=LAYERS, in_channels=16, out_channels=16, cross_attention_dim=WIDTH)
    call: Kwargs = {
        "hidden_states": patches(16, FRAMES * GRID * GRID),
        "encoder_hidden_states": text(),
        "timestep": steps(),
    }
    call |= {"encoder_attention_mask": text_mask().float(), "num_frames": FRAMES, "height": GRID, "width": GRID}
    return {**config, "caption_channels": TEXT_WIDTH}, call


@model("SanaWMLTX2RefinerTransformer3DModel")
def sana_wm_refiner() -> Made:
    config: Kwargs = size(num_layers=LAYERS, in_channels=16, out_channels=16, cross_attention_dim=WIDTH)
    config |= {"caption_channels": TEXT_WIDTH, "audio_in_channels": 4, "audio_out_channels": 4}
    config |= {"audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}
    rotary = (torch.randn(BATCH, FRAMES * GRID * GRID, WIDTH), torch.randn(BATCH, FRAMES * GRID * GRID, WIDTH))
    call: Kwargs = {
        "hidden_states": patches(16, FRAMES * GRID * GRID),
        "encoder_hidden_states": text(),
        "timestep": steps().unsqueeze(1),
    }
    return config, {**call, "video_rotary_emb": rotary}


@model("LTX2VideoTransformer3DModel")
def ltx2() -> Made:
    config: Kwargs = size(num_layers=LAYERS, in_channels=16, out_channels=16, cross_attention_dim=WIDTH)
    config |= {"caption_channels": TEXT_WIDTH, "audio_in_channels": 4, "audio_out_channels": 4}
    config |= {"audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}
    call: Kwargs = {
        "hidden_states": patches(16, FRAMES * GRID * GRID),
        "audio_hidden_states": patches(4, 9),
        "timestep": steps(),
    }
    call |= {"encoder_hidden_states": text(), "audio_encoder_hidden_states": text()}
    return config, {**call, "num_frames": FRAMES, "height": GRID, "width": GRID, "audio_num_frames": 9}


@model("HunyuanVideoTransformer3DModel")
def hunyuan_video() -> Made:
    config: Kwargs = size(**STREAMS, num_refiner_layers=1, **LATENTS, text_embed_dim=TEXT_WIDTH)
    config |= {"pooled_projection_dim": POOLED, "rope_axes_dim": ROPE}
    call: Kwargs = {"encoder_attention_mask": text_mask(), "pooled_projections": pooled()}
    return config, wan_call(**call, guidance=torch.full((BATCH,), 6000.0))


@model("HunyuanVideo15Transformer3DModel")
def hunyuan_video15() -> Made:
    config: Kwargs = size(num_layers=LAYERS, num_refiner_layers=1, **LATENTS, patch_size=2, text_embed_dim=TEXT_WIDTH)
    config |= {"text_embed_2_dim": TEXT_WIDTH, "image_embed_dim": 8, "rope_axes_dim": ROPE}
    call: Kwargs = {
        "encoder_attention_mask": text_mask(),
        "encoder_hidden_states_2": text(),
        "image_embeds": torch.zeros(BATCH, 3, 8),
    }
    return config, {**wan_call(**call, encoder_attention_mask_2=text_mask()), "timestep": steps()}


@model("HunyuanVideoFramepackTransformer3DModel")
def framepack() -> Made:
    config: Kwargs = size(**STREAMS, num_refiner_layers=1, **LATENTS, text_embed_dim=TEXT_WIDTH)
    config |= {"pooled_projection_dim": POOLED, "rope_axes_dim": ROPE, "has_image_proj": True, "image_proj_dim": 8}
    config |= {"has_clean_x_embedder": True}
    call: Kwargs = {"encoder_attention_mask": text_mask(), "pooled_projections": pooled()}
    call |= {"image_embeds": torch.randn(BATCH, 3, 8), "indices_latents": torch.arange(FRAMES).repeat(BATCH, 1)}
    call |= {"latents_clean": video(4, 2), "indices_latents_clean": torch.arange(2).repeat(BATCH, 1)}
    call |= {"latents_history_2x": video(4, 2), "indices_latents_history_2x": torch.arange(2).repeat(BATCH, 1)}
    call |= {"latents_history_4x": video(4, 4), "indices_latents_history_4x": torch.arange(4).repeat(BATCH, 1)}
    return config, wan_call(**call, guidance=torch.full((BATCH,), 6000.0))


@model("MotifVideoTransformer3DModel")
def motif_video() -> Made:
    config: Kwargs = size(**STREAMS, **LATENTS, text_embed_dim=TEXT_WIDTH, rope_axes_dim=ROPE)
    return config, wan_call(encoder_attention_mask=text_mask())


@model("JoyImageEditTransformer3DModel")
def joyimage_edit() -> Made:
    config: Kwargs = {"in_channels": 4, "hidden_size": WIDTH, "num_attention_heads": HEADS, "text_dim": TEXT_WIDTH}
    return {**config, "num_layers": LAYERS, "rope_dim_list": list(ROPE)}, wan_call()


@model("MochiTransformer3DModel")
def mochi() -> Made:
    config: Kwargs = size(num_layers=LAYERS, in_channels=4, pooled_projection_dim=WIDTH, text_embed_dim=TEXT_WIDTH)
    config |= {"time_embed_dim": 16, "max_sequence_length": TEXT}
    return config, wan_call(encoder_attention_mask=text_mask())


@model("CosmosTransformer3DModel")
def cosmos() -> Made:
    config: Kwargs = size(
        num_layers=LAYERS, **LATENTS, text_embed_dim=TEXT_WIDTH, adaln_lora_dim=8, max_size=(8, 16, 16)
    )
    return {**config, "concat_padding_mask": False}, wan_call(fps=30)  # a padding mask needs torchvision


@model("AllegroTransformer3DModel")
def allegro() -> Made:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    config: Kwargs = {
        "num_attention_heads": HEADS,
        "attention_head_dim": 24,
        "num_layers": LAYERS,
        "cross_attention_dim": 48,
    }
    config |= {**LATENTS, "sample_height": SIDE, "sample_width": SIDE, "sample_frames": FRAMES}
    places = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (GRID, GRID)), (GRID, GRID), FRAMES)
    frequencies, positions = places[:3], torch.cartesian_prod(*places[3:]).long().T.reshape(3, 1, -1)
    call: Kwargs = {
        "encoder_attention_mask": torch.ones(BATCH, TEXT),
        "attention_mask": torch.ones(BATCH, FRAMES, SIDE, SIDE),
    }
    return {**config, "caption_channels": TEXT_WIDTH}, wan_call(
        **call, image_rotary_emb=(frequencies, tuple(positions))
    )


def cogvideox_config(**more: Any) -> Kwargs:
    config: Kwargs = size(
        num_layers=LAYERS, **LATENTS, time_embed_dim=POOLED, text_embed_dim=TEXT_WIDTH, sample_width=SIDE
    )
    config |= {"sample_height": SIDE, "sample_frames": 4 * FRAMES - 3, "max_text_seq_length": TEXT}
    return {**config, **more}


def cogvideox_call() -> Kwargs:
    return {"hidden_states": frames_first(), "encoder_hidden_states": text(), "timestep": steps().long()}


@model("CogVideoXTransformer3DModel")
def cogvideox() -> Made:
    """CogVideoX 2b: positions are added to the tokens."""
    return cogvideox_config(), cogvideox_call()


@model("CogVideoXTransformer3DModel (rotary)")
def cogvideox_rotary() -> Made:
    """CogVideoX 5b: rotary embeddings of the video's tokens."""
    count = FRAMES * GRID * GRID
    rotary = (torch.randn(count, WIDTH // HEADS), torch.randn(count, WIDTH // HEADS))
    return cogvideox_config(use_rotary_positional_embeddings=True), {**cogvideox_call(), "image_rotary_emb": rotary}


@model("ConsisIDTransformer3DModel")
def consisid() -> Made:
    count = FRAMES * GRID * GRID
    rotary = (torch.randn(count, WIDTH // HEADS), torch.randn(count, WIDTH // HEADS))
    return cogvideox_config(use_rotary_positional_embeddings=True), {**cogvideox_call(), "image_rotary_emb": rotary}


@model("EasyAnimateTransformer3DModel")
def easyanimate() -> Made:
    config: Kwargs = size(
        num_layers=LAYERS, mmdit_layers=LAYERS, **LATENTS, patch_size=2, sample_width=SIDE, sample_height=SIDE
    )
    config |= {"time_embed_dim": POOLED, "text_embed_dim": TEXT_WIDTH, "time_position_encoding_type": "3d_rope"}
    return config, {"hidden_states": video(), "timestep": steps(), "encoder_hidden_states": text()}


@model("LatteTransformer3DModel")
def latte() -> Made:
    config: Kwargs = size(num_layers=LAYERS, in_channels=4, out_channels=8, sample_size=SIDE, cross_attention_dim=WIDTH)
    config |= {"patch_size": 2, "caption_channels": TEXT_WIDTH, "video_length": FRAMES, "norm_type": "ada_norm_single"}
    config |= {"norm_elementwise_affine": False, "attention_bias": True, "activation_fn": "gelu-approximate"}
    return config, wan_call()


@model("SanaVideoTransformer3DModel")
def sana_video() -> Made:
    config: Kwargs = size(num_layers=LAYERS, **LATENTS, caption_channels=TEXT_WIDTH, num_cross_attention_heads=HEADS)
    return {**config, "cross_attention_head_dim": 16, "cross_attention_dim": WIDTH, "rope_max_seq_len": 32}, wan_call()


def kandinsky_config(**more: Any) -> Kwargs:
    config: Kwargs = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": TEXT_WIDTH,
        "in_text_dim2": POOLED,
        "time_dim": 16,
    }
    config |= {"model_dim": WIDTH, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": LAYERS, "axes_dims": ROPE}
    return {**config, **more}


@model("Kandinsky5Transformer3DModel")
def kandinsky5() -> Made:
    call: Kwargs = {"hidden_states": frames_last(4), "encoder_hidden_states": text(), "timestep": steps()}
    ranges = [torch.arange(FRAMES), torch.arange(GRID), torch.arange(GRID)]
    call |= {"pooled_projections": pooled(), "visual_rope_pos": ranges, "text_rope_pos": torch.arange(TEXT)}
    return kandinsky_config(), call


@model("Kandinsky6Transformer3DModel")
def kandinsky6() -> Made:
    call: Kwargs = {"hidden_states": frames_last(9), "encoder_hidden_states": text(), "timestep": steps()}
    config: Kwargs = kandinsky_config(visual_cond=True, in_audio_dim=4, out_audio_dim=4)
    return config, {**call, "pooled_projections": pooled()}


# Sound


@model("StableAudioDiTModel")
def stable_audio() -> Made:
    config: Kwargs = size(
        num_layers=LAYERS, sample_size=LENGTH, in_channels=4, out_channels=4, num_key_value_attention_heads=1
    )
    config |= {"cross_attention_dim": 16, "time_proj_dim": 16, "global_states_input_dim": POOLED}
    rotary = (torch.randn(LENGTH + 1, 8), torch.randn(LENGTH + 1, 8))
    call: Kwargs = {
        "hidden_states": torch.randn(BATCH, 4, LENGTH),
        "timestep": steps(),
        "encoder_hidden_states": text(),
    }
    call |= {"global_hidden_states": torch.randn(BATCH, 1, POOLED), "rotary_embedding": rotary}
    return {**config, "cross_attention_input_dim": TEXT_WIDTH}, call


@model("StableAudio3DiTModel", 1.0)
def stable_audio3() -> Made:
    config: Kwargs = {
        "io_channels": 4,
        "embed_dim": WIDTH,
        "depth": LAYERS,
        "num_heads": HEADS,
        "cond_token_dim": TEXT_WIDTH,
    }
    config |= {"global_cond_dim": POOLED, "local_add_cond_dim": 5, "timestep_features_dim": 16, "num_memory_tokens": 3}
    call: Kwargs = {
        "hidden_states": torch.randn(BATCH, 4, LENGTH),
        "timestep": steps(1.0),
        "encoder_hidden_states": text(),
    }
    return config, {**call, "global_hidden_states": pooled()}


@model("MiniMaxMusic3Transformer1DModel", 1.0)
def minimax_music() -> Made:
    config: Kwargs = size(num_layers=LAYERS, in_channels=4, condition_dim=TEXT_WIDTH, ff_inner_dim=48, rotary_dim=8)
    call: Kwargs = {"hidden_states": torch.randn(BATCH, 4, LENGTH), "timestep": steps(1.0)}
    return {**config, "fourier_embedding_dim": 16}, {**call, "encoder_hidden_states": text(TEXT_WIDTH, LENGTH)}


@model("AceStepTransformer1DModel", 1.0)
def ace_step() -> Made:
    config: Kwargs = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    config |= {"num_key_value_heads": 1, "head_dim": 16, "in_channels": 24, "audio_acoustic_hidden_dim": 8}
    call: Kwargs = {"timestep": steps(1.0), "timestep_r": steps(1.0), "context_latents": patches(16, 2 * LENGTH)}
    call |= {"hidden_states": patches(8, 2 * LENGTH), "encoder_hidden_states": text(WIDTH)}
    return {**config, "sliding_window": 64}, call


@model("LongCatAudioDiTTransformer", 1.0)
def longcat_audio() -> Made:
    config: Kwargs = {
        "dit_dim": WIDTH,
        "dit_depth": LAYERS,
        "dit_heads": HEADS,
        "dit_text_dim": TEXT_WIDTH,
        "latent_dim": 4,
    }
    call: Kwargs = {"hidden_states": patches(4, LENGTH), "encoder_hidden_states": text(), "timestep": steps(1.0)}
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    return {**config, "text_conv": False}, {**call, "encoder_attention_mask": text_mask(), "attention_mask": mask}


@model("MiniMaxH3Transformer3DModel", 1.0)
def minimax_h3() -> Made:
    config: Kwargs = size(
        hidden_size=WIDTH, num_layers=LAYERS, num_refiner_layers=1, ffn_dim=48, in_channels=4, freq_dim=16
    )
    config |= {"audio_in_channels": 4, "text_dim": TEXT_WIDTH, "time_embed_hidden_dim": 16, "time_embed_dim": 16}
    sound, frames = 5, 32
    length = TEXT + sound + frames
    order = torch.arange(length)
    tags = torch.tensor([1] * TEXT + [2] * sound + [0] * frames)
    ids = torch.stack([order, order % 4, order % 3], 1).float()
    call: Kwargs = {"timestep": torch.tensor([0.7, 0.3]), "timestep_indices": (tags == 2).long(), "token_tags": tags}
    call |= {"position_ids": ids, "text_indices": order[:TEXT], "audio_indices": order[TEXT : TEXT + sound]}
    call |= {
        "hidden_states": patches(16, frames),
        "audio_hidden_states": patches(4, sound),
        "encoder_hidden_states": text(),
    }
    return {**config, "rope_freq_dim": 2}, {**call, "video_indices": order[TEXT + sound :]}
