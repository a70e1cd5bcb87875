"""Options that more than one command has, with the same name and help everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from dcconvert.models.load import parse_size
from dcconvert.options.click_classes import PATH, option, section
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.spec import STATE_DTYPES
from dcconvert.passes.methods import METHODS, MODES, PRESETS, method_of
from dcconvert.passes.methods.method import Method
from dcconvert.passes.modules.routers import CARRY_ROUTERS
from dcconvert.passes.planning.schedule import parse_ratio
from dcconvert.sampling.samplers import SOLVERS


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic in new versions of click only
    """A parameter type that a function parses; its UsageError becomes click's."""

    def __init__(self, name: str, read: Callable[[Any], Any]) -> None:
        self.name, self.read = name, read

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            return self.read(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


def mode_defaults(default: Callable[[type[Method]], Any]) -> str:
    """The help's text for a default that depends on the mode."""
    return ", ".join(f"{default(METHODS[mode])} in mode {mode}" for mode in MODES)


RATIO, SIZE = Parsed("ratio", parse_ratio), Parsed("size", parse_size)
MOST = 10_000_000  # of steps, samples, images and other counts
ANY, POSITIVE, SEED_RANGE = click.IntRange(0, MOST), click.IntRange(1, MOST), click.IntRange(0, 2**40)
STEPS = click.IntRange(1, 10_000)  # of a sampling run

RATIO_HELP = "Total tokens divided by computed tokens, averaged over the run: 4x, 4 or 2.5x; 1 computes all."

THREADS = option(
    "--threads", default=0, type=click.IntRange(0, 1024), show_default="one per core", help="Number of CPU threads."
)
GUIDANCE = option("--guidance", default=1.0, help="Classifier-free guidance scale; 1 turns guidance off.")
LITE_CFG = option(
    "--lite-cfg",
    type=RATIO,
    show_default="the bundle's ratio",
    help="Ratio for the unconditional half of guidance; needs --guidance.",
)
VAE = option("--vae", type=PATH, metavar="FOLDER", help="Folder of a diffusers AutoencoderKL, for latent models.")


def out(text: str, **attrs: Any) -> Callable[[str], Any]:
    return option("-o", "--out", type=PATH, help=text, **{"metavar": "FOLDER", **attrs})


def force(what: str) -> Callable[[str], Any]:
    return option("--force", is_flag=True, help=f"Replace an existing {what}.")


def seed(text: str) -> Callable[[str], Any]:
    return option("--seed", default=0, type=SEED_RANGE, help=text)


def images(default: int, text: str, least: int = 1, **attrs: Any) -> Callable[[str], Any]:
    """`attrs` may contain another name for the value, or old names of the option."""
    names = ("-n", "--images", *attrs.pop("names", ()))
    return option(*names, default=default, type=click.IntRange(least), help=text, **attrs)


def reference_steps() -> Callable[[str], Any]:
    text = "Sampling steps of the reference images, which the original draws."
    return option("--reference-steps", default=200, type=STEPS, help=text)


def ratios(text: str, **attrs: Any) -> Callable[[str], Any]:
    """A ratio option that may be repeated."""
    return option("--ratio", "ratios", multiple=True, type=RATIO, help=f"{text}; may be repeated.", **attrs)


def run_options(whose: str) -> Any:
    """The steps and the solver of a sampling run; the default is the bundle's."""
    return (
        option("--steps", type=STEPS, show_default=f"{whose} steps", help="Sampling steps per run."),
        option(
            "--solver", type=click.Choice(SOLVERS), show_default=f"{whose} solver", help="Solver of the sampling run."
        ),
    )


method_options = section(
    "Method",
    option(
        "--mode",
        type=click.Choice(MODES),
        show_default=method_of().mode,
        help="How compute is saved. steps: some steps forecast the trunk from earlier steps; carry: tokens that a step "
        "does not compute reuse results of earlier steps; chunk: these tokens are left out of the trunk.",
    ),
    option(
        "--preset",
        type=click.Choice(list(PRESETS)),
        help=f"A published method, in mode chunk. {'; '.join(METHODS[name].title for name in PRESETS)}.",
    ),
    option(
        "--router",
        type=click.Choice(CARRY_ROUTERS),
        show_default=mode_defaults(lambda method: method.routers[0]),
        help="How the tokens to compute are chosen.",
    ),
    option(
        "--head-blocks",
        type=ANY,
        show_default=mode_defaults(lambda method: method.blocks),
        help="Blocks before the trunk, which compute every token.",
    ),
    option(
        "--tail-blocks",
        type=ANY,
        show_default=mode_defaults(lambda method: method.blocks),
        help="Blocks after the trunk, which compute every token.",
    ),
)

STATE = option(
    "--state",
    "state_dtype",
    type=click.Choice(list(STATE_DTYPES)),
    show_default=method_of("carry").remembered_as,
    help="Precision of the values carried between steps; model: the same as the model's.",
)

checkpoint_options = section(
    "What the checkpoint does not say",
    option(
        "--prediction",
        type=click.Choice(["eps", "flow"]),
        show_default="the checkpoint's, or eps if it does not say",
        help="What the model predicts: noise (eps) or velocity (flow).",
    ),
    option(
        "--image-size",
        type=SIZE,
        show_default="the checkpoint's",
        help="Size in latent pixels: one number, or height and width such as 96x64.",
    ),
    option(
        "--weights",
        metavar="KEY",
        show_default="averaged weights, if the file has them",
        help="Key of the weights to take from a training file, such as model or ema.",
    ),
    option(
        "--no-null-class",
        is_flag=True,
        help="The last class of a DiT is a class like the others, and not the empty one of guidance: it was trained "
        "without class dropout.",
    ),
    option("--heads", type=int, help="Number of attention heads, if the width is not that of DiT-S, B, L or XL."),
)

DUMP_GRAPHS = option("--dump-graphs", type=PATH, metavar="FOLDER", help="Write the graph after each pass to a folder.")
