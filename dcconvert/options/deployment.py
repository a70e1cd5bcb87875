"""Options of `dcconvert build` and `export-triton`."""

from __future__ import annotations

import click

from dcconvert.export.triton.repository import RUNS
from dcconvert.options.click_classes import option, options, section
from dcconvert.options.shared import POSITIVE, force, out

build_options = options(
    section(
        "What to build",
        option(
            "--runtime",
            "target",
            default="trt",
            type=click.Choice(["trt", "ort-cuda"]),
            aliases=["--target"],
            help="Build TensorRT engines (trt), or fp16 graphs for ONNX Runtime on CUDA (ort-cuda).",
        ),
    ),
    section(
        "TensorRT",
        option(
            "--backend",
            type=click.Choice(["tensorrt", "tensorrt-rtx"]),
            show_default="tensorrt on a machine with a GPU, otherwise tensorrt-rtx",
            help="Library that builds the engines; tensorrt-rtx needs no GPU to build.",
        ),
        option(
            "--compute-capability",
            default="",
            metavar="X.Y",
            show_default="all that it supports",
            help="GPU that tensorrt-rtx builds for, such as 8.9.",
        ),
        option("--precision", default="fp16", type=click.Choice(["fp16", "bf16"]), help="Precision of the engines."),
        option(
            "--attention",
            default="auto",
            type=click.Choice(["auto", "masks", "packed"]),
            help="Attention with masks or on packed tokens; auto: packed tokens if the backend supports them.",
        ),
        option(
            "--per-bucket", is_flag=True, help="Build one engine per bucket instead of one with a profile per bucket."
        ),
        option(
            "--ranges",
            is_flag=True,
            help="Make profiles cover all lengths between two buckets, not only the exact lengths.",
        ),
        option("--dry-run", is_flag=True, help="Print the profiles, engines and memory without building anything."),
    ),
)


triton_options = options(
    section(
        "Model repository",
        option("--name", default="dit", help="Name of the model for clients."),
        option("--device", default="gpu", type=click.Choice(["gpu", "cpu"]), help="Device that runs the model."),
        option(
            "--max-runs",
            default=RUNS,
            type=POSITIVE,
            help="Sampling runs that may be open at a time; further ones wait. Modes steps and carry.",
        ),
    ),
    section("Output", out("Folder for the model repository.", required=True), force("repository")),
)
