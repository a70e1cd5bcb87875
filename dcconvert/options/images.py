"""Options of `dcconvert sample`, `evaluate` and `stress`."""

from __future__ import annotations

import click

from dcconvert.options.click_classes import OTHER, PATH, option, options, section
from dcconvert.options.shared import (
    ANY,
    GUIDANCE,
    LITE_CFG,
    POSITIVE,
    THREADS,
    VAE,
    images,
    out,
    ratios,
    reference_steps,
    run_options,
    seed,
)

sample_options = options(
    section(
        "What to draw",
        images(16, "Number of images.", names=["count"], aliases=["--count"]),
        option(
            "--label",
            "labels",
            multiple=True,
            type=int,
            show_default="all classes in turn",
            help="Class to draw; may be repeated.",
        ),
        seed("Seed of the images."),
        option("--compare", is_flag=True, help="Also draw the original's images from the same seeds, for comparison."),
    ),
    section(
        "Sampling run",
        option(
            "--runtime",
            default="ort",
            type=click.Choice(["ort", "torch", "openvino", "ort-cuda", "trt"]),
            help='Runtime; "dcconvert build" makes what ort-cuda and trt need.',
        ),
        *run_options("the bundle's"),
    ),
    section(
        "Guidance",
        GUIDANCE,
        LITE_CFG,
        option(
            "--separate-halves",
            is_flag=True,
            help="Mode carry: choose tokens separately for the conditional and unconditional halves, not the same "
            "tokens for both.",
        ),
    ),
    section("Output", out("PNG file for the grid.", default="samples.png", metavar="FILE"), VAE),
)


evaluate_options = options(
    section(
        "How much to compute",
        ratios("Ratio to run the bundles at", show_default="each bundle's ratio"),
        *run_options("each bundle's"),
    ),
    section("Guidance", GUIDANCE, LITE_CFG),
    section(
        "Measuring time and memory",
        option(
            "--batch",
            default=0,
            type=ANY,
            show_default="the first bundle's largest batch size",
            help="Number of images to draw at a time.",
        ),
        option("--runs", default=15, type=POSITIVE, help="Number of timed runs, alternating with the original's."),
    ),
    section(
        "Measuring images",
        images(64, "Number of images to draw for each row; 0 measures time and memory only.", least=0),
        seed("Seed of the first image."),
        reference_steps(),
        option("--real", type=PATH, help="Real images to compare with: a folder, .npy or .npz."),
        option("--real-images", default=5000, type=POSITIVE, help="Maximum number of real images to use."),
        option(
            "--features",
            default="auto",
            metavar="NETWORK",
            help="Network for distances between images: auto, none, efficientnet-lite0, inception or FILE.onnx.",
        ),
        VAE,
    ),
    section(
        "Output",
        option("--json", "json_path", type=PATH, metavar="FILE", help="Also write the figures to a JSON file."),
        option("--html", type=PATH, metavar="FILE", help="Also write a web page with plots and samples."),
        option(
            "--npz", type=PATH, metavar="FOLDER", help="Also write the images in the ADM evaluation suite's format."
        ),
    ),
    section(OTHER, THREADS),
)


stress_options = options(
    section(
        "What to run",
        option(
            "--data",
            type=PATH,
            show_default="samples of the original",
            help="Images to choose from: a folder, .npy or .npz. Not in mode steps.",
        ),
        option(
            "--cases",
            "count",
            default=4,
            type=POSITIVE,
            aliases=["--count"],
            help="Number of images for each kind of detail.",
        ),
        seed("Seed of the noise."),
    ),
    section(
        "How much to compute",
        ratios("Ratio to run the bundle at", show_default="4x, 16x; in mode steps the bundle's own"),
    ),
    section(OTHER, THREADS),
)
