"""Options of `dcconvert tune`, `calibrate` and `upcycle`."""

from __future__ import annotations

import click

from dcconvert.options.click_classes import OTHER, PATH, option, options, section
from dcconvert.options.shared import (
    ANY,
    POSITIVE,
    RATIO,
    THREADS,
    images,
    mode_defaults,
    out,
    ratios,
    reference_steps,
    seed,
)
from dcconvert.sampling.samplers import SOLVERS
from dcconvert.train.distillation import TRAINABLE, Recipe

RECIPE = Recipe()
BUDGET = option(
    "--ratio",
    type=RATIO,
    show_default="the bundle's ratio",
    help="Compute budget: that of the original with the bundle's steps, divided by this number.",
)

calibrate_options = options(
    section(
        "How much to compute",
        BUDGET,
        option(
            "--solver",
            type=click.Choice(SOLVERS),
            show_default="the bundle's solver",
            help="Solver to calibrate for and to store.",
        ),
    ),
    section(
        "Measuring",
        images(32, "Number of images to compare candidates on."),
        reference_steps(),
        option(
            "--batch",
            default=0,
            type=ANY,
            show_default="the bundle's largest batch size",
            help="Number of images to draw at a time.",
        ),
        seed("Seed of the first image; the final comparison uses fresh seeds."),
    ),
    section(OTHER, THREADS),
)


tune_options = options(
    section(
        "What to tune for",
        BUDGET,
        option("--latency", type=click.FloatRange(0, min_open=True), help="Milliseconds of a whole run, here."),
        option("--psnr", type=click.FloatRange(0, min_open=True), help="Image quality in dB, at the least cost."),
        option("--batch", default=1, type=POSITIVE, help="Number of images in a run, for --latency and the table."),
        option("--guidance", default=1.0, type=float, help="Classifier-free guidance scale to tune for."),
    ),
    section(
        "Without a fit",
        option(
            "--table",
            type=PATH,
            help="Take the run table of another bundle, or a run.json, if it is as good here as the unfitted default.",
        ),
    ),
    section(
        "Measuring",
        images(16, "Number of images to fit the tables to.", least=2),
        option("--fresh", default=32, type=click.IntRange(2), help="Number of other images to compare the tables on."),
        option(
            "--polish",
            default=0,
            type=ANY,
            help="Rounds of Gauss-Newton on the final images after the fit: better runs of few steps, slow for many.",
        ),
        reference_steps(),
        seed("Seed of the first image."),
    ),
    section(OTHER, THREADS),
)


upcycle_options = options(
    section(
        "Training data",
        option(
            "--data",
            metavar="PATH",
            show_default="samples of the original; in mode carry, its sampling runs",
            help="Images to train on: a folder (one sub-folder per class), .npy or .npz.",
        ),
        option(
            "--teacher-samples",
            default=1024,
            type=POSITIVE,
            help="Number of samples to draw with the original if there is no --data.",
        ),
    ),
    section(
        "What to train",
        option(
            "--train",
            multiple=True,
            type=click.Choice(TRAINABLE),
            show_default="all, or what the preset's paper trains",
            help="What to train: all weights or low-rank updates of them (lora), the new router, the new adapters; "
            "may be repeated.",
        ),
        ratios("Ratio to train for", show_default="the bundle's ratio", aliases=["--ratios"]),
    ),
    section(
        "Training",
        option("--samples", default=RECIPE.samples, type=POSITIVE, help="Number of samples to train on in total."),
        option("--batch", default=RECIPE.batch, type=click.IntRange(2), help="Batch size; at least 2."),
        option(
            "--lr",
            type=click.FloatRange(0, min_open=True),
            show_default=mode_defaults(lambda method: f"{method.learning_rate:g}"),
            help="Learning rate.",
        ),
        option(
            "--ema",
            default=RECIPE.ema,
            type=click.FloatRange(0, 1, max_open=True),
            help="Decay of the moving average of the weights; below 1.",
        ),
        option("--bf16", is_flag=True, help="Train with bfloat16 autocast, on hardware that supports it."),
        option("--save-every", default=100, type=POSITIVE, help="Number of training steps between saves."),
        seed("Seed of the training."),
    ),
    section("LoRA", option("--rank", default=RECIPE.rank, type=POSITIVE, help="LoRA rank.")),
    section(
        "Mode carry",
        option("--unroll", default=RECIPE.unroll, type=POSITIVE, help="Sampling steps per loss window."),
    ),
    section(
        "Mode chunk",
        option(
            "--feature-weight",
            default=RECIPE.feature_weight,
            type=click.FloatRange(0),
            help="Weight of the loss on the trunk's features.",
        ),
        option(
            "--ratio-weight",
            default=RECIPE.ratio_weight,
            type=click.FloatRange(0),
            help="Weight of the ratio loss of a trained router.",
        ),
    ),
    section("Validation", images(16, "Number of images for the validation curve."), reference_steps()),
    section("Output", out("Folder for the trained bundle.", show_default="the bundle is replaced")),
    section(OTHER, THREADS),
)
