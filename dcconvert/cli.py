"""The command line: `dcconvert model.pt --ratio 4x`, and the sub-commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from dcconvert import __version__
from dcconvert.export.disk.interrupts import Signals
from dcconvert.options.click_classes import PATH, Commands
from dcconvert.passes.ir.errors import CheckFailedError, DcconvertError, StoppedError, UsageError
from dcconvert.terminal import Stages, plain, prepare_streams, terminal

if TYPE_CHECKING:
    from dcconvert.passes.methods.method import Method

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
INSPECT_RATIO = 4.0  # for commands without --ratio, where a preset needs one


def options_of(command: str) -> Callable[[], Callable[[Any], Any]]:
    """A function that loads a command's options. They need torch, for the names of methods and solvers;
    `dcconvert --help` does not load them.
    """

    def read() -> Callable[[Any], Any]:
        from dcconvert.options.conversion import convert_options, demo_options, inspect_options
        from dcconvert.options.deployment import build_options, triton_options
        from dcconvert.options.images import evaluate_options, sample_options, stress_options
        from dcconvert.options.training import calibrate_options, tune_options, upcycle_options

        found = {
            "convert": convert_options,
            "inspect": inspect_options,
            "calibrate": calibrate_options,
            "tune": tune_options,
            "upcycle": upcycle_options,
            "sample": sample_options,
            "evaluate": evaluate_options,
            "stress": stress_options,
            "build": build_options,
            "export-triton": triton_options,
            "demo": demo_options,
        }
        return found[command]

    return read


def command_line() -> str:
    """The command line as `main` received it."""
    return str(click.get_current_context().find_root().obj)


def pick_method(values: dict[str, Any], ratio: float) -> Method:
    """The method that a command's parameters select, at a ratio. Removes these parameters from `values`.

    Raises UsageError for options that the method does not have.
    """
    from dcconvert.passes.methods import find, method_of

    names = ("head_blocks", "tail_blocks", "router", "state_dtype", "seed")
    given = {name: value for name in names if (value := values.pop(name)) is not None}
    mode, preset = values.pop("mode"), values.pop("preset")
    name = preset or mode or method_of().name
    if mode is not None and find(name).mode != mode:
        raise UsageError(f"--mode {mode}: preset {name} uses mode {find(name).mode}; leave out --mode or --preset")
    if "state_dtype" in given and "state_dtype" not in find(name).option_names():
        raise UsageError(f"--state: method {name} has no state with a choice of precision; leave out --state")
    return method_of(name, ratio, **given)


@click.group(cls=Commands, default="convert", context_settings=CONTEXT)
@click.version_option(__version__)
def commands() -> None:
    """Convert a trained diffusion transformer so that a sampling run computes only part of it.

    "dcconvert MODEL --ratio 4x" is short for "dcconvert convert MODEL --ratio 4x": it converts, verifies, exports and
    measures the model. "dcconvert COMMAND --help" lists the options of a command.
    """


@commands.command(late=options_of("convert"))
@click.argument("model", type=PATH)
def convert(model: Path, out: Path | None, **values: Any) -> None:
    """Convert a checkpoint, verify it, export it and measure it.

    MODEL is a checkpoint file, or a folder with a transformer or pipeline saved by diffusers. The result is a bundle: a
    folder with the converted model, its ONNX files and a report. This is the default command.
    """
    from dcconvert.commands.convert import Settings, run_job
    from dcconvert.environment import set_threads
    from dcconvert.passes.methods import PRESETS
    from dcconvert.passes.planning.schedule import AUTO
    from dcconvert.report.conversion import terminal_table

    set_threads(values["threads"])
    head, tail = values["head_blocks"], values["tail_blocks"]
    method = pick_method(values, values["ratio"])
    if values["refine_grid"] and (head is not None or tail is not None):
        raise UsageError("--refine-grid runs all blocks on the kept tokens: leave out --head-blocks and --tail-blocks")
    if method.name in PRESETS:
        if values["schedule"]:
            raise UsageError(
                f"--schedule {values['schedule']}: preset {method.name} has its own schedule; leave one of them out"
            )
        values["schedule"] = method.policy(values["ratio"])
    target = out or Path(f"{model.stem}-dc{values['ratio']:g}x")
    values["warm_up"] = AUTO if values["warm_up"] is None else values["warm_up"]
    values["batches"] = values["batches"] or (1, 8)
    values["measure"] = not values.pop("no_measure")
    values["null_class"] = False if values.pop("no_null_class") else None
    settings = Settings(model, target, method=method, command=command_line(), **values)
    report = run_job(settings, Stages(terminal(stderr=True)))
    console = terminal()
    console.print(terminal_table(report))
    console.print(f"Bundle: {target}\nReport: {target / 'report.html'}", highlight=False, soft_wrap=True)


@commands.command(late=options_of("inspect"))
@click.argument("model", type=PATH)
def inspect(model: Path, **values: Any) -> None:
    """Show what was found in a checkpoint and what would change.

    Prints the detected architecture, where its graph can be split into head, trunk and tail, and what each pass would
    rewrite. Converts nothing. MODEL is the same as for "dcconvert convert".
    """
    from dcconvert.commands.inspect import inspect_checkpoint

    values["null_class"] = False if values.pop("no_null_class") else None
    inspect_checkpoint(model, pick_method(values, INSPECT_RATIO), terminal(), **values)


@commands.command(late=options_of("calibrate"))
@click.argument("bundle", type=PATH)
def calibrate(bundle: Path, **values: Any) -> None:
    """Find and store the best steps and schedule for a budget.

    Searches for the number of steps, the warm-up and the curve of computed tokens that give the best final images for a
    given amount of compute, and stores them in the bundle.
    """
    from dcconvert.commands.calibrate import Settings, calibrate_bundle

    calibrate_bundle(Settings(bundle, command=command_line(), **values), terminal())


@commands.command(late=options_of("tune"))
@click.argument("bundle", type=PATH)
def tune(bundle: Path, **values: Any) -> None:
    """Fit a bundle's run table to its model, for a budget.

    For bundles in mode steps. Fits the coefficients of the steps and of the forecasts to a converged run of the
    original, by least squares. Compares all candidates and the original's own solvers on other images, and stores the
    best table. With --table it fits nothing: it checks the table of another bundle on this model, and takes it over.
    """
    from dcconvert.commands.tune import Settings, tune_bundle

    tune_bundle(Settings(bundle, command=command_line(), **values), terminal())


@commands.command(late=options_of("upcycle"))
@click.argument("bundle", type=PATH)
def upcycle(bundle: Path, out: Path | None, **values: Any) -> None:
    """Train a bundle with the original model as its teacher.

    If the training is stopped, the same command resumes it.
    """
    from dcconvert.commands.upcycle import upcycle_bundle
    from dcconvert.train.distillation import Recipe
    from dcconvert.train.loop import Settings

    names = ("train", "samples", "batch", "rank", "ratios", "feature_weight", "ratio_weight", "unroll", "ema", "seed")
    recipe = Recipe(lr=values.pop("lr") or 0.0, **{name: values.pop(name) for name in names})
    settings = Settings(bundle, out or bundle, recipe=recipe, command=command_line(), **values)
    upcycle_bundle(settings, terminal())


@commands.command(late=options_of("sample"))
@click.argument("bundle", type=PATH)
def sample(bundle: Path, **values: Any) -> None:
    """Draw images with a bundle and save them as a PNG grid."""
    from dcconvert.commands.sample import sample_bundle
    from dcconvert.sampling.samplers import Guidance

    guidance = Guidance(values.pop("guidance"), values.pop("lite_cfg"))
    sample_bundle(bundle, terminal(), guidance=guidance, **values)


@commands.command(late=options_of("evaluate"))
@click.argument("bundles", nargs=-1, required=True, type=PATH)
def evaluate(bundles: tuple[Path, ...], **values: Any) -> None:
    """Compare bundles with the original in cost and quality.

    Also measures the original with fewer steps: a bundle should beat it at the same cost.
    """
    from dcconvert.commands.evaluate import Settings, evaluate_bundles
    from dcconvert.evaluate.image_quality import Wanted
    from dcconvert.sampling.samplers import Guidance

    guidance = Guidance(values.pop("guidance"), values.pop("lite_cfg"))
    names = ("images", "seed", "reference_steps", "real", "real_images", "features", "vae")
    wanted = Wanted(**{name: values.pop(name) for name in names})
    evaluate_bundles(Settings(bundles, command_line(), wanted, guidance, **values), terminal())


@commands.command(late=options_of("stress"))
@click.argument("bundle", type=PATH)
def stress(bundle: Path, **values: Any) -> None:
    """Show what a bundle does to images full of fine detail.

    Adds the results to the bundle's report, with the places where the router gives detail too few tokens. In mode
    steps, which has no router, it compares skipped steps with the original in fewer steps.
    """
    from dcconvert.commands.stress import Settings, stress_bundle

    stress_bundle(Settings(bundle, command=command_line(), **values), terminal())


@commands.command(late=options_of("build"))
@click.argument("bundle", type=PATH)
def build(bundle: Path, **values: Any) -> None:
    """Build TensorRT engines, or fp16 graphs for ONNX Runtime.

    TensorRT builds for the GPU of this machine. TensorRT-RTX builds ahead of time, without a GPU.
    """
    from dcconvert.commands.build import Settings, build_bundle

    build_bundle(Settings(bundle, **values), terminal())


@commands.command("export-triton", late=options_of("export-triton"))
@click.argument("bundle", type=PATH)
def triton(bundle: Path, out: Path, **values: Any) -> None:
    """Write a model repository for Triton Inference Server."""
    from dcconvert.commands.triton_repository import triton_repository

    triton_repository(bundle, out, terminal(), **values)


@commands.command()
@click.argument("bundle", type=PATH)
def verify(bundle: Path) -> None:
    """Check that a bundle's files are those that were written.

    Compares every file with the hashes in the manifest, and checks the graphs as every command does before it runs
    them. A changed file is named; the exit code is then 1.
    """
    from dcconvert.export.bundle import verify as verify_bundle

    found, console = verify_bundle(bundle), terminal()
    if found.wrong:
        raise CheckFailedError("; ".join(found.wrong))
    if not found.listed:
        text = f"{bundle} was written before manifests listed hashes: its graphs were checked, its files cannot be."
    else:
        text = f"{found.same} files are as they were written."
        text += f"\nNot listed: {', '.join(found.others)}" if found.others else ""
    console.print(text, highlight=False, soft_wrap=True)


@commands.command(late=options_of("demo"))
@click.pass_context
def demo(ctx: click.Context, ratio: float, out: Path, force: bool) -> None:
    """Convert the small trained model that ships with dcconvert."""
    from dcconvert.models.load import shipped_model

    ctx.invoke(convert, model=shipped_model(), ratio=ratio, out=out, force=force)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Prints an error as one line and exits with its code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = plain(shlex.join(["dcconvert", *words]))
    prepare_streams()
    with Signals() as signals:
        try:
            commands.main(args=words or ["--help"], prog_name="dcconvert", standalone_mode=False, obj=given)
        except StoppedError as error:
            fail(str(error), signals.exit_code if signals.last else error.exit_code)
        except DcconvertError as error:
            fail(str(error), error.exit_code)
        except click.ClickException as error:
            fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            fail("interrupted; nothing was left behind", signals.exit_code)
        except BrokenPipeError:  # whoever read the help has read enough
            sys.stdout = sys.stderr
        except OSError as error:
            fail(f"{error.filename or 'the system'}: {error.strerror or error}", UsageError.exit_code)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            fail("there is not enough memory: use a smaller --batch or a machine with more", UsageError.exit_code)


def out_of_memory(error: Exception) -> bool:
    """Python's, torch's and ONNX Runtime's ways of saying that memory ran out."""
    signs = ("not enough memory", "out of memory", "bad_alloc", "failed to allocate memory")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


def fail(message: str, code: int) -> None:
    line = plain(" ".join(message.splitlines()))
    terminal(stderr=True).print(Text.assemble(("error:", "bold red"), f" {line}"), soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
