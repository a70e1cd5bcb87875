"""A converted transformer in diffusers' own pipelines: same pictures when everything is kept, and the original back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dcconvert
from benchmarks.families import FAMILIES, POOLED, TEXT, TEXT_WIDTH, made
from dcconvert import Converted, UnsupportedModelError, UsageError, load
from dcconvert.models.pipelines.drop_in import DropIn
from tests.passes.harness import relative

pytestmark = pytest.mark.slow

pytest.importorskip("transformers", reason="pipelines with text need transformers: pip install 'dcconvert[test]'")

STEPS = 4
Run = Callable[..., Tensor]


def vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return AutoencoderKL(**blocks, block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)


def prompt(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings of a text, and pooled ones."""
    generator = torch.Generator().manual_seed(3)
    wide, pooled = torch.randn(1, TEXT, TEXT_WIDTH, generator=generator), torch.randn(1, POOLED, generator=generator)
    return wide.to(dtype), pooled.to(dtype)


def dit(transformer: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import DDIMScheduler, DiTPipeline

    return DiTPipeline(transformer, vae(), DDIMScheduler()), {"class_labels": [1, 2], "output_type": "np"}


def pixart(transformer: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    wide, _ = prompt(transformer.dtype)
    texts = {"prompt_embeds": wide, "negative_prompt_embeds": wide * 0, "prompt": None, "negative_prompt": None}
    masks = dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(1, TEXT))
    size = {"height": 8, "width": 8, "use_resolution_binning": False, "output_type": "latent"}
    pipe = PixArtAlphaPipeline(None, None, vae(), transformer, DPMSolverMultistepScheduler())
    return pipe, {**texts, **masks, **size}


def sd3(transformer: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    wide, pooled = prompt(transformer.dtype)
    texts = {"prompt_embeds": wide, "pooled_prompt_embeds": pooled}
    negative = {"negative_prompt_embeds": wide * 0, "negative_pooled_prompt_embeds": pooled * 0}
    none = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    parts = {"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": vae()}
    size = {"height": 8, "width": 8, "output_type": "latent"}
    return StableDiffusion3Pipeline(**parts, **none), {**texts, **negative, **size}


def flux(transformer: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    wide, pooled = prompt(transformer.dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    none = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2")}
    pipe = FluxPipeline(scheduler=scheduler, vae=vae(), transformer=transformer, **none)
    size = {"height": 8, "width": 16, "output_type": "latent"}
    return pipe, {"prompt_embeds": wide, "pooled_prompt_embeds": pooled, **size}


PIPELINES = {"diffusers-dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux}


def pictures(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Run]:
    """A pipeline, its original transformer, and what runs it from the same noise."""
    transformer = made(FAMILIES[name])[0].to(dtype)
    pipe, given = PIPELINES[name](transformer)
    pipe.vae.to(dtype)
    pipe.set_progress_bar_config(disable=True)

    def run(**more: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        found = pipe(**{**given, **more}, num_inference_steps=STEPS, generator=generator).images
        return torch.as_tensor(found).float()

    return pipe, transformer, run


@pytest.mark.parametrize("name", PIPELINES)
def test_one_line_in_a_pipeline(name):
    pipe, original, run = pictures(name)
    wanted = run()
    pipe.transformer = dcconvert.convert(pipe.transformer, ratio=1)
    assert relative(run(), wanted) < 1e-5
    pipe.transformer = dcconvert.convert(original, ratio=2, steps=STEPS)
    found = run()
    assert relative(found, wanted) < 0.3  # not something else
    # The random weights of this one move the image further than a sampler does, and every call is taken for a new one.
    assert (relative(found, wanted) > 1e-7) == (name != "pixart")
    assert torch.equal(run(), found)  # a second image remembers nothing of the first
    pipe.transformer = pipe.transformer.undo()
    assert pipe.transformer is original
    assert torch.equal(run(), wanted)


def operations(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counted:
        run()
    return counted.get_total_flops()


def test_fewer_tokens_are_computed_in_a_run():
    pipe, original, run = pictures("sd3")
    pipe.transformer = dcconvert.convert(pipe.transformer, ratio=2, steps=STEPS)
    run()
    spent = operations(run)
    assert operations(run) == spent  # a second image remembers nothing of the first
    pipe.transformer = original
    assert spent < 0.9 * operations(run)


@pytest.mark.parametrize("mode", ["carry", "chunk"])
def test_half_precision_and_what_the_pipeline_asks_for(mode):
    pipe, original, run = pictures("sd3", torch.bfloat16)
    wanted = run()
    options = dcconvert.Options(mode=mode)
    pipe.transformer = dcconvert.convert(pipe.transformer, ratio=1, options=options)
    assert (pipe.transformer.dtype, pipe.transformer.config) == (torch.bfloat16, original.config)
    assert relative(run(), wanted) < 0.02


def grids(drop: Any) -> list[str]:
    """What the summary says of the conversions there are."""
    return re.findall(r"\d+x\d+ = \d+ tokens", drop.summary())


def test_other_sizes_are_other_conversions():
    pipe, _, run = pictures("sd3")
    pipe.transformer = drop = dcconvert.convert(pipe.transformer, ratio=2)
    assert "will be converted when it is called" in drop.summary()
    with pytest.raises(UsageError, match="the model has 0 conversions"):
        drop.save("anywhere")
    run()
    run(height=16, width=8)
    run()
    assert grids(drop) == ["8x4 = 32 tokens", "4x4 = 16 tokens"]  # the last one used is the last
    with pytest.raises(UsageError, match="the model has 2 conversions"):
        drop.save("anywhere")
    for height in (4, 12, 16):
        run(height=height, width=12)
    assert grids(drop) == ["4x4 = 16 tokens", "2x6 = 12 tokens", "6x6 = 36 tokens", "8x6 = 48 tokens"]  # the last ones


def test_a_conversion_becomes_a_bundle(tmp_path):
    pipe, _, run = pictures("sd3")
    pipe.transformer = dcconvert.convert(pipe.transformer, ratio=2)
    run()
    folder = pipe.transformer.save(tmp_path / "bundle", batches=(2,))
    assert load(folder).spec.grid == (4, 4)


def test_calls_with_and_without_prompt_are_kept_apart():
    """Pipelines that call the transformer twice a step say so by `cache_context`."""
    transformer, args, kwargs = made(FAMILIES["wan"])
    drop: Any = dcconvert.convert(transformer, ratio=2, steps=STEPS)
    assert type(drop) is DropIn
    other = {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"] + 1}

    def outputs(*names: str) -> dict[str, list[torch.Tensor]]:
        """Of a run whose steps call these in turn."""
        drop.forget()
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for t in (999, 700, 400):
            for name in names:
                given = {**(kwargs if name == "cond" else other), "timestep": torch.full((len(args[0]),), t)}
                with drop.cache_context(name), torch.no_grad():
                    found[name].append(drop(*args, **given)[0])
        return found

    together, alone = outputs("cond", "uncond"), outputs("cond") | outputs("uncond")
    for name, steps in alone.items():
        assert all(torch.equal(a, b) for a, b in zip(together[name], steps, strict=True))
        with torch.no_grad():
            whole = drop.undo()(
                *args, **{**(kwargs if name == "cond" else other), "timestep": torch.full((len(args[0]),), 400)}
            )
        assert relative(steps[-1], whole[0]) > 1e-4  # it went on from the steps before


def test_outputs_have_the_form_that_was_asked_for():
    transformer, args, kwargs = made(FAMILIES["sd3"])
    drop = dcconvert.convert(transformer, ratio=1)
    plain = drop(*args, **kwargs)
    named = drop(*args, **{name: value for name, value in kwargs.items() if name != "return_dict"})
    assert isinstance(plain, tuple)
    torch.testing.assert_close(named.sample, plain[0])
    assert (
        drop(*[a[:1] for a in args], **{n: v if n == "return_dict" else v[:1] for n, v in kwargs.items()})[0].ndim == 4
    )


def test_with_example_inputs_it_is_converted_at_once():
    transformer, args, kwargs = made(FAMILIES["sd3"])
    given = {"hidden_states": args[0], **kwargs}
    model: Any = dcconvert.convert(transformer, ratio=2, example_inputs=given)
    assert type(model) is Converted


def test_wrong_options_are_noticed_before_the_first_call():
    transformer, _, _ = made(FAMILIES["sd3"])
    with pytest.raises(UsageError, match="ratio"):
        dcconvert.convert(transformer, ratio=0.5)
    with pytest.raises(TypeError, match="ratioo"):
        dcconvert.convert(transformer, ratioo=2)


def test_wrong_calls_are_named():
    transformer, args, kwargs = made(FAMILIES["sd3"])
    drop = dcconvert.convert(transformer, ratio=2)
    with pytest.raises(UsageError, match=r"SD3Transformer2DModel cannot be called with these arguments: .*prompt"):
        drop(*args, **kwargs, prompt="a cat")
    with pytest.raises(AttributeError, match="no_such_thing"):
        drop.no_such_thing  # noqa: B018


def test_a_model_that_is_not_supported_says_so_when_it_is_called():
    transformer, args, kwargs = made(FAMILIES["sana"])
    drop = dcconvert.convert(transformer, ratio=2, options=dcconvert.Options("carry"))
    with pytest.raises(UnsupportedModelError, match="no attention that could be recognised"):
        drop(*args, **kwargs)
