"""The support matrix: every family of diffusion transformers, converted, exported and checked in both modes.

    python -m benchmarks.families            # some minutes on two cores

Models are the real classes in small configurations with random weights. Per mode, on four samples: keeping everything
equals the original, no sample sees another, and ONNX Runtime agrees with torch in three buckets. A family that cannot
be converted is listed with the reason that dcconvert gives.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import write_result
from dcconvert.export.checks.parity import IDENTITY, INVARIANCE, ISOLATION
from dcconvert.export.checks.written import check_promises, check_written
from dcconvert.export.onnx.export import export_onnx
from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.passes.ir.errors import DcconvertError
from dcconvert.passes.methods import MODES, method_of
from dcconvert.passes.methods.method import Method
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.runtime.model import DynamicModel

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a module and one call of it

BATCH, WIDTH, HEADS, TEXT, TEXT_WIDTH, POOLED = 3, 32, 2, 7, 24, 16
SIDE, CHANNELS = 8, 4  # of a latent image
SHORT = {IDENTITY: "identity", ISOLATION: "isolation", INVARIANCE: "invariance"}  # names of checks


@dataclass(frozen=True)
class Family:
    """One architecture: published models, the class that is tried, and how to make a small one."""

    models: str
    cls: str
    make: Callable[[], Call]
    timestep_scale: float = 1000.0


def image(channels: int = CHANNELS) -> Tensor:
    return torch.randn(BATCH, channels, SIDE, SIDE)


def text(width: int = TEXT_WIDTH, count: int = TEXT) -> Tensor:
    return torch.randn(BATCH, count, width)


def steps(scale: float = 1000.0) -> Tensor:
    return torch.tensor([0.01, 0.5, 0.99]) * scale


def size(**more: Any) -> dict[str, Any]:
    return {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, **more}


def facebook_dit() -> Call:
    module = DiT(DiTConfig(depth=4, width=WIDTH, heads=HEADS, patch=2, image_size=SIDE, num_classes=10))
    return module, (image(), steps(), torch.arange(BATCH)), {}


def sit() -> Call:
    """SiT has DiT's layout; it predicts a velocity and takes times from 0 to 1."""
    module = DiT(
        DiTConfig(depth=4, width=WIDTH, heads=HEADS, patch=2, image_size=SIDE, num_classes=10, learn_sigma=False)
    )
    return module, (image(), steps(1.0), torch.arange(BATCH)), {}


def diffusers_dit() -> Call:
    from diffusers import DiTTransformer2DModel

    module = DiTTransformer2DModel(
        **size(num_layers=4, in_channels=4, out_channels=8, sample_size=SIDE, num_embeds_ada_norm=1000)
    )
    return module, (image(),), {"timestep": steps().long(), "class_labels": torch.arange(BATCH), "return_dict": False}


def pixart() -> Call:
    from diffusers import PixArtTransformer2DModel

    module = PixArtTransformer2DModel(
        **size(num_layers=4, in_channels=4, out_channels=8, sample_size=SIDE, cross_attention_dim=WIDTH),
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
    mask = torch.ones(BATCH, TEXT)
    mask[1, 4:] = 0
    more = {"encoder_hidden_states": text(), "encoder_attention_mask": mask, "timestep": steps().long()}
    return module, (image(),), {**more, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, **PLAIN}


PLAIN = {"return_dict": False}


def sd3(**more: Any) -> Call:
    from diffusers import SD3Transformer2DModel

    module = SD3Transformer2DModel(
        **size(num_layers=4, in_channels=4, out_channels=4, sample_size=SIDE, joint_attention_dim=TEXT_WIDTH),
        **{"caption_projection_dim": WIDTH, "pooled_projection_dim": POOLED, "pos_embed_max_size": SIDE, **more},
    )
    given = {"encoder_hidden_states": text(), "pooled_projections": torch.randn(BATCH, POOLED), "timestep": steps()}
    return module, (image(),), {**given, **PLAIN}


def sd35() -> Call:
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1, 2))


def flux() -> Call:
    from diffusers import FluxTransformer2DModel

    module = FluxTransformer2DModel(
        **size(num_layers=3, num_single_layers=3, in_channels=16, joint_attention_dim=TEXT_WIDTH),
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    side = SIDE // 2
    axes = (torch.zeros(1), torch.arange(side) * 1.0, torch.arange(side) * 1.0)
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    given = {
        "hidden_states": torch.randn(BATCH, side * side, 16),
        "encoder_hidden_states": text(),
        "pooled_projections": torch.randn(BATCH, POOLED),
        "timestep": steps(1.0),
        "img_ids": places.reshape(-1, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.full((BATCH,), 3.5),
    }
    return module, (), {**given, **PLAIN}


def auraflow() -> Call:
    from diffusers import AuraFlowTransformer2DModel

    module = AuraFlowTransformer2DModel(
        **size(num_mmdit_layers=4, num_single_dit_layers=2, in_channels=4, out_channels=4, sample_size=SIDE),
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=SIDE * SIDE,
    )
    return module, (image(),), {"encoder_hidden_states": text(), "timestep": steps(1.0), **PLAIN}


def cogview3() -> Call:
    from diffusers import CogView3PlusTransformer2DModel

    module = CogView3PlusTransformer2DModel(
        **size(num_layers=4, in_channels=4, out_channels=4, sample_size=SIDE, text_embed_dim=TEXT_WIDTH),
        time_embed_dim=POOLED,
        condition_dim=8,
        pos_embed_max_size=SIDE,
    )
    given = {"encoder_hidden_states": text(), "timestep": steps().long()}
    sizes = {"original_size": torch.full((BATCH, 2), 64.0), "target_size": torch.full((BATCH, 2), 64.0)}
    return module, (image(),), {**given, **sizes, "crop_coords": torch.zeros(BATCH, 2), **PLAIN}


def hunyuan_dit() -> Call:
    from diffusers import HunyuanDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    module = HunyuanDiT2DModel(
        **size(num_layers=4, in_channels=4, patch_size=2, sample_size=SIDE, cross_attention_dim=TEXT_WIDTH),
        cross_attention_dim_t5=TEXT_WIDTH,
        pooled_projection_dim=POOLED,
        hidden_size=WIDTH,
        text_len=TEXT,
        text_len_t5=TEXT,
        use_style_cond_and_image_meta_size=False,
    )
    rotary = get_2d_rotary_pos_embed(WIDTH // HEADS, ((0, 0), (4, 4)), (4, 4), output_type="pt")
    given = {"encoder_hidden_states": text(), "encoder_hidden_states_t5": text(), "timestep": steps()}
    masks = {"text_embedding_mask": torch.ones(BATCH, TEXT), "text_embedding_mask_t5": torch.ones(BATCH, TEXT)}
    return module, (image(),), {**given, **masks, "image_rotary_emb": rotary, **PLAIN}


def sana() -> Call:
    from diffusers import SanaTransformer2DModel

    module = SanaTransformer2DModel(
        **size(num_layers=4, in_channels=4, out_channels=4, sample_size=SIDE, caption_channels=TEXT_WIDTH),
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=WIDTH // HEADS,
        cross_attention_dim=WIDTH,
    )
    return module, (image(),), {"encoder_hidden_states": text(), "timestep": steps(), **PLAIN}


def qwen_image() -> Call:
    from diffusers import QwenImageTransformer2DModel

    module = QwenImageTransformer2DModel(
        **size(num_layers=4, in_channels=16, out_channels=4, joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(4, 6, 6))
    )
    given = {"hidden_states": torch.randn(BATCH, 16, 16), "encoder_hidden_states": text(), "timestep": steps(1.0)}
    mask = torch.ones(BATCH, TEXT, dtype=torch.bool)
    return module, (), {**given, "encoder_hidden_states_mask": mask, "img_shapes": [(1, 4, 4)] * BATCH, **PLAIN}


def latte() -> Call:
    from diffusers import LatteTransformer3DModel

    module = LatteTransformer3DModel(
        **size(num_layers=4, in_channels=4, out_channels=8, sample_size=SIDE, cross_attention_dim=WIDTH, patch_size=2),
        caption_channels=TEXT_WIDTH,
        video_length=3,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
    )
    video = torch.randn(BATCH, CHANNELS, 3, SIDE, SIDE)
    return module, (video,), {"encoder_hidden_states": text(), "timestep": steps().long(), **PLAIN}


def wan() -> Call:
    from diffusers import WanTransformer3DModel

    module = WanTransformer3DModel(
        **size(num_layers=4, in_channels=4, out_channels=4, text_dim=TEXT_WIDTH, freq_dim=16, ffn_dim=48),
        patch_size=(1, 2, 2),
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    video = torch.randn(BATCH, CHANNELS, 3, SIDE, SIDE)
    return module, (video,), {"encoder_hidden_states": text(), "timestep": steps().long(), **PLAIN}


FAMILIES = {
    "dit": Family("DiT", "Facebook's keys", facebook_dit),
    "sit": Family("SiT", "Facebook's keys", sit, 1.0),
    "diffusers-dit": Family("DiT", "DiTTransformer2DModel", diffusers_dit),
    "pixart": Family("PixArt-alpha, PixArt-Sigma", "PixArtTransformer2DModel", pixart),
    "sd3": Family("Stable Diffusion 3", "SD3Transformer2DModel", sd3),
    "sd35": Family("Stable Diffusion 3.5 medium", "SD3Transformer2DModel", sd35),
    "flux": Family("FLUX.1", "FluxTransformer2DModel", flux, 1.0),
    "auraflow": Family("AuraFlow", "AuraFlowTransformer2DModel", auraflow, 1.0),
    "cogview3": Family("CogView3-Plus", "CogView3PlusTransformer2DModel", cogview3),
    "wan": Family("Wan 2.1 (video)", "WanTransformer3DModel", wan),
    "latte": Family("Latte (video)", "LatteTransformer3DModel", latte),
    "hunyuan-dit": Family("Hunyuan-DiT", "HunyuanDiT2DModel", hunyuan_dit),
    "sana": Family("Sana", "SanaTransformer2DModel", sana),
    "qwen-image": Family("Qwen-Image", "QwenImageTransformer2DModel", qwen_image, 1.0),
}


STRUCTURAL = ("sparsedit", "ddit")  # presets that need more of a model than mode chunk does


def made(family: Family) -> Call:
    """A small model with random weights, all of which matter, and one call of it."""
    torch.manual_seed(0)
    module, args, kwargs = family.make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.08)
    return module.eval(), args, kwargs


def options_of(mode: str) -> Method:
    """A mode, or a preset that rewrites the blocks in its own way."""
    if mode in MODES:
        return method_of(mode)
    return method_of(mode, 2, head_blocks=0, tail_blocks=0)


def converted(family: Family, mode: str) -> DynamicModel:
    """The family's small model in a mode; DcconvertError if it cannot be converted."""
    half = Policy("constant", 2).timetable()
    return rewrite(*made(family), options_of(mode), half, timestep_scale=family.timestep_scale)


def checks(model: DynamicModel) -> dict[str, Any]:
    """What torch and ONNX Runtime give, as relative errors; CheckFailedError if ONNX cannot be written."""
    found = check_promises(model, model.spec.example(BATCH))
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder))
        compared = check_written(model, Path(folder), model.spec.example, buckets_of(model))
    worst = max(compared, key=lambda check: check.value / check.tolerance)
    failed = [check.name for check in (*found, *compared) if not check.passed]
    errors = {SHORT[check.name]: check.value for check in found if check.name in SHORT}
    return {**errors, "onnxruntime": worst.value, "failed": failed}


def buckets_of(model: DynamicModel) -> tuple[Bucket, ...]:
    """Some of a batch of one and of four, with padding and without."""
    tokens = model.spec.tokens
    half, few = tokens // 2, Bucket(4, 64, 4, 9, 4)
    if sizes := model.planner.sizes:  # the only numbers of tokens there are
        half, few = min(sizes), Bucket(4, 4 * min(sizes), 4, min(sizes), min(sizes))
    return (Bucket(1, half, 1, half, half), Bucket(4, 4 * tokens, 4, tokens, tokens), few)


def measured(
    key: str, family: Family, mode: str, check: Callable[[DynamicModel], dict[str, Any]] = checks
) -> dict[str, Any]:
    """One row of the matrix; `check` says what a converted model gives."""
    row = {"family": key, "models": family.models, "class": family.cls, "mode": mode}
    try:
        model = converted(family, mode)
        facts = {"grid": list(model.spec.grid), "blocks": model.spec.depth}
        return {**row, **facts, **check(model)}
    except DcconvertError as error:
        return {**row, "reason": str(error)}


def main(words: list[str] | None = None, check: Callable[[DynamicModel], dict[str, Any]] = checks) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--output", type=Path, default=None, help="[benchmarks/results/families_cpu.json]")
    args = parser.parse_args(words)
    warnings.simplefilter("ignore")
    rows = []
    for key in args.only:
        for mode in (*MODES, *STRUCTURAL):
            rows.append(measured(key, FAMILIES[key], mode, check))
            said = rows[-1].get("reason") or rows[-1]["failed"] or f"ONNX Runtime {rows[-1]['onnxruntime']:.0e}"
            print(f"{key}, {mode}: {said}", flush=True)
    print(f"Results: {write_result('families_cpu', {'batch': BATCH}, rows, args.output)}")


if __name__ == "__main__":
    main()
