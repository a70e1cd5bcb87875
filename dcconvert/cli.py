"""The command line: `dcconvert model.pt --ratio 4x`, and the sub-commands around it."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from dcconvert import __version__
from dcconvert.models.load import parse_size, shipped_model
from dcconvert.passes.ir.errors import DcconvertError, UsageError
from dcconvert.passes.ir.spec import STATE_DTYPES
from dcconvert.passes.methods import METHODS, MODES, PRESETS, find, method_of
from dcconvert.passes.methods.method import Method
from dcconvert.passes.modules.routers import CARRY_ROUTERS
from dcconvert.passes.planning.schedule import AUTO, KINDS, LEVELS, parse_ratio
from dcconvert.sampling.samplers import SOLVERS, Guidance
from dcconvert.train.distillation import TRAINABLE, Recipe

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
DEFAULTS, RECIPE = method_of(), Recipe()


def both(default: Callable[[type[Method]], Any]) -> str:
    """A default of both modes, for the help."""
    return ", ".join(f"{mode}: {default(METHODS[mode])}" for mode in MODES)


DEFAULT_BLOCKS = both(lambda method: method.blocks)
DEFAULT_ROUTERS = both(lambda method: method.routers[0])
DEFAULT_SCHEDULES = both(lambda method: method.schedule)
DEFAULT_RATES = both(lambda method: f"{method.learning_rate:g}")
INSPECT_RATIO = 4.0  # where a command takes none and a preset asks


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic in new versions of click only
    """What a function reads, whose UsageError is click's."""

    def __init__(self, name: str, read: Callable[[Any], Any]) -> None:
        self.name, self.read = name, read

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            return self.read(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


RATIO, SIZE = Parsed("ratio", parse_ratio), Parsed("size", parse_size)


def checkpoint_options(command: Any) -> Any:
    """What cannot always be read off a checkpoint."""
    for decorate in (
        click.option("--heads", type=int, help="Attention heads, for widths other than those of DiT-S/B/L/XL."),
        click.option("--image-size", type=SIZE, help="Latent pixels: a side, or 96x64 (height, width) [its own]."),
        click.option("--prediction", type=click.Choice(["eps", "flow"]), help="What the model predicts [eps]."),
    ):
        command = decorate(command)
    return command


def rewriting_options(command: Any) -> Any:
    """What the passes can be told."""
    for decorate in (
        click.option(
            "--mode",
            type=click.Choice(MODES),
            help=f"carry: dropped tokens are carried over from earlier steps; chunk: they are absent [{DEFAULTS.mode}]",
        ),
        click.option(
            "--preset",
            type=click.Choice(list(PRESETS)),
            help="A published method, in mode chunk: DC-DiT, SparseDiT, DDiT, or token merging as a control.",
        ),
        click.option(
            "--head-blocks",
            type=click.IntRange(0),
            help=f"Blocks before the trunk [{DEFAULT_BLOCKS}].",
        ),
        click.option(
            "--tail-blocks",
            type=click.IntRange(0),
            help=f"Blocks after the trunk [{DEFAULT_BLOCKS}].",
        ),
        click.option(
            "--router",
            type=click.Choice(CARRY_ROUTERS),
            help=f"Which tokens are kept [{DEFAULT_ROUTERS}].",
        ),
        click.option(
            "--state",
            "state_dtype",
            type=click.Choice(list(STATE_DTYPES)),
            help=f"Precision of what mode carry remembers [{DEFAULTS.remembered_as}].",
        ),
        click.option("--seed", default=DEFAULTS.seed, show_default=True, help="Seed of router and sampling."),
        click.option("--dump-graphs", type=click.Path(path_type=Path), help="Folder for the graph after each pass."),
    ):
        command = decorate(command)
    return command


def command_line() -> str:
    """The words this run was started with, as `main` was given them."""
    return str(click.get_current_context().find_root().obj)


def pick_method(values: dict[str, Any], ratio: float) -> Method:
    """The method out of a command's parameters (taken out of `values`), at a ratio; UsageError for what it has not."""
    names = ("head_blocks", "tail_blocks", "router", "state_dtype", "seed")
    given = {name: value for name in names if (value := values.pop(name)) is not None}
    mode, preset = values.pop("mode"), values.pop("preset")
    name = preset or mode or DEFAULTS.name
    if mode is not None and find(name).mode != mode:
        raise UsageError(f"preset {name} has mode {find(name).mode}: leave --mode out, or the preset")
    for option, flag in (("state_dtype", "--state"),):
        if option in given and option not in find(name).option_names():
            raise UsageError(f"method {name} has no state whose precision could be chosen: leave {flag} out")
    return method_of(name, ratio, **given)


@click.group(context_settings=CONTEXT)
@click.version_option(__version__)
def commands() -> None:
    """Rewrite a trained diffusion transformer into a dynamic-chunking one.

    dcconvert MODEL --ratio 4x converts, verifies, exports and measures; it is short for dcconvert convert.
    """


@commands.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--ratio", required=True, type=RATIO, help="Tokens divided by kept tokens: 4x, 4, 2.5x; 1 keeps all.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Bundle folder [MODEL-dc4x beside you].")
@click.option(
    "--schedule",
    type=click.Choice(KINDS),
    help=f"Kept tokens from noise to image: as many, more, or fewer [{DEFAULT_SCHEDULES}].",
)
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1), help="Batch size to export for; repeatable [1, 8]."
)
@click.option("--warm-up", type=click.IntRange(1), help="First steps of a run that keep everything [carry: 3].")
@click.option(
    "--refresh", default=0, type=click.IntRange(0), help="Keep everything at every N-th step after them [never]."
)
@click.option(
    "--buckets", default=LEVELS, show_default=True, type=click.IntRange(2), help="Most static shapes a batch size."
)
@click.option("--steps", default=50, show_default=True, type=click.IntRange(1), help="Sampling steps of a run.")
@click.option("--solver", default="euler", show_default=True, type=click.Choice(SOLVERS), help="euler is DDIM for eps.")
@click.option(
    "--images", default=16, show_default=True, type=click.IntRange(0), help="Images for the fidelity figures."
)
@click.option(
    "--reference-steps", default=200, show_default=True, type=click.IntRange(1), help="Steps of the reference."
)
@click.option("--refine-grid", is_flag=True, help="With --preset dc-dit: tokens of one pixel; needs training.")
@click.option("--threads", default=0, type=click.IntRange(0), help="Threads [one a core].")
@click.option("--no-measure", is_flag=True, help="Skip latency, memory and fidelity.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@checkpoint_options
@rewriting_options
def convert(model: Path, out: Path | None, **values: Any) -> None:
    """Convert a checkpoint (the default command): verify, export ONNX, measure, report."""
    from dcconvert.commands.convert import Settings, run_job, set_threads
    from dcconvert.report.conversion import terminal_table
    from dcconvert.terminal import Stages

    set_threads(values["threads"])
    head, tail = values["head_blocks"], values["tail_blocks"]
    method = pick_method(values, values["ratio"])
    if values["refine_grid"] and (head is not None or tail is not None):
        raise UsageError("--refine-grid runs all blocks on the kept tokens: leave out --head-blocks and --tail-blocks")
    if method.name in PRESETS:
        if values["schedule"]:
            raise UsageError(f"--schedule {values['schedule']}: preset {method.name} has its own; leave one out")
        values["schedule"] = method.policy(values["ratio"])
    target = out or Path(f"{model.stem}-dc{values['ratio']:g}x")
    values["warm_up"] = AUTO if values["warm_up"] is None else values["warm_up"]
    values["batches"] = values["batches"] or (1, 8)
    values["measure"] = not values.pop("no_measure")
    settings = Settings(model, target, method=method, command=command_line(), **values)
    console = Console(stderr=True)
    report = run_job(settings, Stages(console))
    Console().print(terminal_table(report))
    Console().print(escape(f"Bundle: {target}\nReport: {target / 'report.html'}"), highlight=False, soft_wrap=True)


@commands.command()
@click.argument("model", type=click.Path(path_type=Path))
@checkpoint_options
@rewriting_options
def inspect(model: Path, **values: Any) -> None:
    """Say what was recognised in a checkpoint, where it can be cut, and what would be rewritten."""
    from dcconvert.commands.inspect import inspect_checkpoint

    inspect_checkpoint(model, pick_method(values, INSPECT_RATIO), Console(), **values)


@commands.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--runtime", default="ort", show_default=True, type=click.Choice(["ort", "torch", "ort-cuda", "trt"]))
@click.option("-n", "--count", default=16, show_default=True, type=click.IntRange(1), help="Images.")
@click.option("--steps", type=click.IntRange(1), help="Sampling steps [those of the bundle].")
@click.option("--solver", type=click.Choice(SOLVERS), help="Sampler [that of the bundle].")
@click.option("--guidance", default=1.0, show_default=True, help="Classifier-free guidance scale; 1 is none.")
@click.option("--lite-cfg", type=RATIO, help="Ratio of guidance's unconditional half [that of the bundle].")
@click.option(
    "--separate-halves",
    is_flag=True,
    help="With guidance, let conditional and unconditional half each choose their tokens (mode carry shares them).",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--label", "labels", multiple=True, type=int, help="Class; repeatable [all classes in turn].")
@click.option("--compare", is_flag=True, help="Show the fixed-token original beside it, same seeds.")
@click.option("--vae", type=click.Path(path_type=Path), help="diffusers AutoencoderKL folder, for latent models.")
@click.option("-o", "--out", default="samples.png", show_default=True, type=click.Path(path_type=Path))
def sample(bundle: Path, **values: Any) -> None:
    """Draw images with a bundle into a PNG grid."""
    from dcconvert.commands.sample import sample_bundle

    guidance = Guidance(values.pop("guidance"), values.pop("lite_cfg"))
    sample_bundle(bundle, Console(), guidance=guidance, **values)


@commands.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--batch", default=0, type=click.IntRange(0), help="Images at a time [the first bundle's largest batch].")
@click.option("--runs", default=15, show_default=True, type=click.IntRange(1), help="Interleaved runs.")
@click.option("--images", default=64, show_default=True, type=click.IntRange(0), help="Of each row; 0: cost only.")
@click.option("--ratio", "ratios", multiple=True, type=RATIO, help="Repeatable [that of each bundle].")
@click.option("--steps", type=click.IntRange(1), help="Sampling steps [those of each bundle].")
@click.option("--solver", type=click.Choice(SOLVERS), help="Sampler [that of each bundle].")
@click.option("--guidance", default=1.0, show_default=True, help="Classifier-free guidance scale; 1 is none.")
@click.option("--lite-cfg", type=RATIO, help="Ratio of guidance's unconditional half [that of the bundle].")
@click.option("--real", type=click.Path(path_type=Path), help="Real images: a folder, .npy or .npz.")
@click.option("--real-images", default=5000, show_default=True, type=click.IntRange(1), help="Most of them to use.")
@click.option(
    "--features", default="auto", show_default=True, help="auto, none, efficientnet-lite0, inception or FILE.onnx."
)
@click.option("--vae", type=click.Path(path_type=Path), help="diffusers AutoencoderKL folder, for latent models.")
@click.option("--reference-steps", default=200, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**40), help="Of the first image.")
@click.option("--threads", default=0, type=click.IntRange(0), help="Threads [one a core].")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write a page with plots and samples.")
@click.option("--npz", type=click.Path(path_type=Path), help="Folder for the images, as the ADM suite reads them.")
def evaluate(bundles: tuple[Path, ...], **values: Any) -> None:
    """Measure bundles against the fixed-token original, and the original with fewer steps: cost and final images."""
    from dcconvert.commands.evaluate import Settings, evaluate_bundles
    from dcconvert.evaluate.image_quality import Wanted

    guidance = Guidance(values.pop("guidance"), values.pop("lite_cfg"))
    names = ("images", "seed", "reference_steps", "real", "real_images", "features", "vae")
    wanted = Wanted(**{name: values.pop(name) for name in names})
    evaluate_bundles(Settings(bundles, command_line(), wanted, guidance, **values), Console())


@commands.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Folder, .npy or .npz [samples of the original].")
@click.option("--ratio", "ratios", multiple=True, type=RATIO, default=("4x", "16x"), help="Repeatable [4x and 16x].")
@click.option("--count", default=4, show_default=True, type=click.IntRange(1), help="Cases of each kind of detail.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**40))
@click.option("--threads", default=0, type=click.IntRange(0), help="Threads [one a core].")
def stress(bundle: Path, **values: Any) -> None:
    """Run images full of detail through a bundle, and show in its report where the router starves it."""
    from dcconvert.commands.stress import Settings, stress_bundle

    stress_bundle(Settings(bundle, command=command_line(), **values), Console())


@commands.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--ratio", type=RATIO, help="Divides the compute of a run of the bundle's steps [that of the bundle].")
@click.option("--solver", type=click.Choice(SOLVERS), help="Sampler to calibrate for and to store [the bundle's].")
@click.option("--images", default=32, show_default=True, type=click.IntRange(1), help="Images to judge by.")
@click.option("--reference-steps", default=200, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, help="Of the first image; fresh ones follow for the comparison.")
@click.option("--threads", default=0, type=click.IntRange(0), help="Threads [one a core].")
@click.option("--batch", default=0, type=click.IntRange(0), help="Images at a time [the bundle's largest batch].")
def calibrate(bundle: Path, **values: Any) -> None:
    """Find the steps, warm-up and kept-fraction curve with the best final images at a given compute, and store them."""
    from dcconvert.commands.calibrate import Settings, calibrate_bundle

    calibrate_bundle(Settings(bundle, command=command_line(), **values), Console())


@commands.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Another folder [the bundle is replaced].")
@click.option(
    "--data",
    help="Folder of pictures (a sub-folder a class), .npy or .npz [samples of the original; carry: its own runs].",
)
@click.option("--teacher-samples", default=1024, show_default=True, type=click.IntRange(1), help="How many of them.")
@click.option(
    "--train",
    multiple=True,
    type=click.Choice(TRAINABLE),
    help="The weights (all, or lora: low-rank changes), new paths; repeatable [all; of a preset, what its paper does].",
)
@click.option("--samples", default=RECIPE.samples, show_default=True, type=click.IntRange(1), help="Seen in training.")
@click.option("--batch", default=RECIPE.batch, show_default=True, type=click.IntRange(2))
@click.option("--lr", type=click.FloatRange(0, min_open=True), help=f"Learning rate [{DEFAULT_RATES}].")
@click.option("--rank", default=RECIPE.rank, show_default=True, type=click.IntRange(1), help="Of lora.")
@click.option("--ratios", multiple=True, type=RATIO, help="Trained for; repeatable [that of the bundle].")
@click.option("--feature-weight", default=RECIPE.feature_weight, show_default=True, type=click.FloatRange(0))
@click.option(
    "--ratio-weight", default=RECIPE.ratio_weight, show_default=True, type=click.FloatRange(0), help="Of router."
)
@click.option("--unroll", default=RECIPE.unroll, show_default=True, type=click.IntRange(1), help="Steps, mode carry.")
@click.option("--ema", default=RECIPE.ema, show_default=True, type=click.FloatRange(0, 1, max_open=True))
@click.option("--bf16", is_flag=True, help="Autocast to bfloat16, for processors that have it.")
@click.option("--images", default=16, show_default=True, type=click.IntRange(1), help="Of the validation curve.")
@click.option("--reference-steps", default=200, show_default=True, type=click.IntRange(1))
@click.option("--save-every", default=100, show_default=True, type=click.IntRange(1), help="Steps between saves.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**40))
@click.option("--threads", default=0, type=click.IntRange(0), help="Threads [one a core].")
def upcycle(bundle: Path, out: Path | None, **values: Any) -> None:
    """Train a bundle with its original as the teacher. Stopped, the same command goes on."""
    from dcconvert.commands.upcycle import upcycle_bundle
    from dcconvert.train.loop import Settings

    names = ("train", "samples", "batch", "rank", "ratios", "feature_weight", "ratio_weight", "unroll", "ema", "seed")
    recipe = Recipe(lr=values.pop("lr") or 0.0, **{name: values.pop(name) for name in names})
    settings = Settings(bundle, out or bundle, recipe=recipe, command=command_line(), **values)
    upcycle_bundle(settings, Console())


@commands.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target", default="trt", show_default=True, type=click.Choice(["trt", "ort-cuda"]), help="ort-cuda: fp16."
)
@click.option("--backend", type=click.Choice(["tensorrt", "tensorrt-rtx"]), help="[tensorrt on a GPU, else -rtx]")
@click.option("--precision", default="fp16", show_default=True, type=click.Choice(["fp16", "bf16"]))
@click.option("--attention", default="auto", show_default=True, type=click.Choice(["auto", "masks", "packed"]))
@click.option("--compute-capability", default="", help="GPU that tensorrt-rtx builds for, such as 8.9 [those it can].")
@click.option("--per-bucket", is_flag=True, help="An engine for each bucket, instead of one with a profile for each.")
@click.option("--ranges", is_flag=True, help="Profiles for all lengths between two buckets, instead of exact ones.")
@click.option("--dry-run", is_flag=True, help="Print profiles, engines and memory; build nothing.")
def build(bundle: Path, **values: Any) -> None:
    """Make what GPU runtimes need: TensorRT engines, one profile a bucket; for ort-cuda, graphs in fp16.

    TensorRT-RTX builds ahead of time, without a GPU.
    """
    from dcconvert.commands.build import Settings, build_bundle

    build_bundle(Settings(bundle, **values), Console())


@commands.command("export-triton")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the model repository.")
@click.option("--name", default="dit", show_default=True, help="The model that clients call.")
@click.option("--device", default="gpu", show_default=True, type=click.Choice(["gpu", "cpu"]))
@click.option("--force", is_flag=True, help="Replace an existing repository.")
def triton(bundle: Path, out: Path, name: str, device: str, force: bool) -> None:
    """Write a model repository for NVIDIA Triton Inference Server."""
    from dcconvert.commands.triton_repository import triton_repository

    triton_repository(bundle, out, Console(), name=name, device=device, force=force)


@commands.command()
@click.option("--ratio", default="4x", show_default=True, type=RATIO)
@click.option("-o", "--out", default="demo", show_default=True, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace an earlier demo.")
@click.pass_context
def demo(ctx: click.Context, ratio: float, out: Path, force: bool) -> None:
    """Run the main job on the small trained model that ships with dcconvert."""

    ctx.invoke(convert, model=shipped_model(), ratio=ratio, out=out, force=force)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a first word that is no command is a model to convert; errors are one line and an exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    known = {*commands.commands, *CONTEXT["help_option_names"], "--version"}
    given = shlex.join(["dcconvert", *words])
    if words and words[0] not in known:
        near = difflib.get_close_matches(words[0], commands.commands, 1)
        if near and not Path(words[0]).exists():
            message = f"there is no command and no file '{words[0]}': did you mean 'dcconvert {near[0]}'?"
            fail(message, UsageError.exit_code)
        words.insert(0, "convert")
    try:
        commands.main(args=words or ["--help"], prog_name="dcconvert", standalone_mode=False, obj=given)
    except DcconvertError as error:
        fail(str(error), error.exit_code)
    except click.ClickException as error:
        fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted; nothing was left behind", 130)
    except OSError as error:
        fail(f"{error.filename or 'the system'}: {error.strerror or error}", UsageError.exit_code)


def fail(message: str, code: int) -> None:
    Console(stderr=True).print(f"[bold red]error:[/bold red] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
