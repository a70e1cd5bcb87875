"""Options of `dcconvert convert`, `inspect` and `demo`."""

from __future__ import annotations

import click

from dcconvert.options.click_classes import OTHER, option, options, section
from dcconvert.options.shared import (
    ANY,
    DUMP_GRAPHS,
    POSITIVE,
    RATIO,
    RATIO_HELP,
    STATE,
    STEPS,
    THREADS,
    checkpoint_options,
    force,
    images,
    method_options,
    mode_defaults,
    out,
    reference_steps,
    seed,
)
from dcconvert.passes.planning.schedule import KINDS, LEVELS
from dcconvert.sampling.samplers import SOLVERS

convert_options = options(
    method_options,
    section(
        "How much to compute",
        option("--ratio", required=True, type=RATIO, help=RATIO_HELP),
        option(
            "--schedule",
            type=click.Choice(KINDS),
            show_default=mode_defaults(lambda method: method.schedule),
            help="How the number of computed tokens changes from noise to image.",
        ),
    ),
    section(
        "Mode carry",
        option(
            "--warm-up",
            type=POSITIVE,
            show_default="3, but at most half of the run's compute",
            help="Number of initial steps that compute every token.",
        ),
        option(
            "--refresh",
            default=0,
            type=ANY,
            show_default="never",
            help="After the warm-up, compute every token at every N-th step.",
        ),
        STATE,
    ),
    section(
        "Preset dc-dit",
        option(
            "--refine-grid",
            is_flag=True,
            help="Turn a DiT into DC-DiT's own architecture, with tokens of one pixel; needs training.",
        ),
    ),
    section(
        "Sampling run",
        option("--steps", default=50, type=STEPS, help="Sampling steps per run."),
        option(
            "--solver",
            default="euler",
            type=click.Choice(SOLVERS),
            help="Solver of the sampling run; for models that predict noise, euler is DDIM.",
        ),
        seed("Seed of the router and of sampling."),
    ),
    checkpoint_options,
    section(
        "Output",
        out("Folder for the bundle.", show_default="MODEL-dc4x (at ratio 4x) in the current folder"),
        option(
            "--batch",
            "batches",
            multiple=True,
            type=click.IntRange(1, 4096),
            show_default="1, 8",
            help="Batch size to export for; may be repeated.",
        ),
        option(
            "--buckets",
            default=LEVELS,
            type=click.IntRange(2),
            help="Maximum number of buckets (static shapes) per batch size; at least 2.",
        ),
        DUMP_GRAPHS,
        force("bundle"),
    ),
    section(
        "Measuring",
        images(16, "Number of images for the fidelity figures; 0 skips them.", least=0),
        reference_steps(),
        option("--no-measure", is_flag=True, help="Do not measure latency, memory and fidelity."),
    ),
    section(OTHER, THREADS),
)


inspect_options = options(
    method_options,
    section("Mode carry", STATE),
    checkpoint_options,
    section("Output", DUMP_GRAPHS),
    section(OTHER, seed("Seed of the router.")),
)


demo_options = options(
    section(
        "How much to compute",
        option("--ratio", default="4x", type=RATIO, help=RATIO_HELP),
    ),
    section("Output", out("Folder for the bundle.", default="demo"), force("demo")),
)
