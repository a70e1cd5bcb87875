"""What the sub-commands do: inspect, sample, and finding the model of the demo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from dcconvert.evaluate.measure_steps import ConvertedStep, Runtime
from dcconvert.export.bundle import Bundle, read_bundle
from dcconvert.export.runtimes.ort import OrtModel
from dcconvert.export.runtimes.ort_static import StaticModel
from dcconvert.export.runtimes.trt import open_engines
from dcconvert.export.triton_repository import export_triton
from dcconvert.methods.presets import as_rewritten
from dcconvert.models.dit import DiTConfig
from dcconvert.models.load import open_source
from dcconvert.passes.frontend.canonicalise import Normalise
from dcconvert.passes.frontend.token_stream import FindTokenStream
from dcconvert.passes.ir.errors import DcconvertError, UsageError
from dcconvert.passes.ir.program import Options, Program, module_path, run_passes
from dcconvert.passes.ir.spec import StateSpec
from dcconvert.passes.pipeline import captured, pipeline_of
from dcconvert.passes.planning.schedule import DIFFERENCE
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.run import Backend
from dcconvert.report.conversion import state_note
from dcconvert.report.figures import save_comparison
from dcconvert.sampling.samplers import Guidance, Sampler, Step, initial_noise, labels_for
from dcconvert.terminal import Stages

SHIPPED = "fashion_dit.safetensors"


def shipped_model() -> Path:
    """Path of the small trained DiT that comes with the package."""
    path = Path(str(resources.files("dcconvert") / "assets" / SHIPPED))
    if not path.is_file():
        raise UsageError(f"this installation has no {SHIPPED}: install dcconvert from a wheel or a full checkout")
    return path


def inspect_checkpoint(
    path: Path, options: Options, console: Console, *, dump_graphs: Path | None, **read: Any
) -> None:
    """Print what was recognised, the cut points and what the passes would do, or why they would not."""
    source = open_source(path, **read)
    table = Table(title=f"{path.name}: {source.kind}", show_header=False, title_justify="left")
    for name, value in source.facts.items():
        table.add_row(name.replace("_", " "), str(value))
    table.add_row("parameters", f"{sum(p.numel() for p in source.module.parameters()) / 1e6:.1f} M")
    table.add_row("sha256", source.sha256)
    console.print(table)
    args, kwargs = ((), source.example) if isinstance(source.example, dict) else (source.example, None)
    program = captured(source.module, args, kwargs, options, grid=source.grid)
    run_passes(program, (Normalise(), FindTokenStream()))
    print_cuts(program, console)
    try:
        options = replace(options, prediction=source.prediction)
        module, _, router, options = as_rewritten(source.module, options)
        program = captured(module, args, kwargs, options, grid=source.grid)
        program.router, program.timestep_scale = router, source.timestep_scale
        records = run_passes(program, pipeline_of(options), dump_graphs)
    except DcconvertError as error:
        console.print(f"[bold red]would not convert:[/bold red] {escape(str(error))}", highlight=False)
        raise
    steps = Table(title="passes", title_justify="left")
    for column in ("pass", "matches", "nodes", "notes"):
        steps.add_column(column)
    for record in records:
        nodes = f"{record.nodes_before} -> {record.nodes_after}"
        steps.add_row(record.name, str(record.matches), nodes, "; ".join(record.notes))
    console.print(steps)
    if states := [StateSpec.of(node) for node in program.state.values()]:
        tokens = program.found_stream().tokens
        console.print(state_note(sum(state.bytes(tokens) for state in states), (1, 8)), highlight=False)


def print_cuts(program: Program, console: Console) -> None:
    """The cut points of the token stream, block boundaries and trunk marked."""
    stream, (start, end) = program.found_stream(), program.found_trunk()
    title = f"{len(stream.cuts)} cut points on {stream.grid[0]}x{stream.grid[1]} tokens"
    table = Table(title=title, title_justify="left")
    for column in ("node", "op", "module", ""):
        table.add_column(column)
    numbers = {node: i for i, node in enumerate(stream.boundaries)}
    for node in stream.cuts:
        marks = [f"after block {numbers[node] - 1}"] if numbers.get(node) else []
        marks += ["trunk starts"] if node is start else ["trunk ends"] if node is end else []
        table.add_row(node.name, str(node.target), module_path(node), ", ".join(marks))
    console.print(table)


def dit_config(bundle: Bundle) -> DiTConfig:
    """The architecture a bundle was made from; UsageError for one made from another kind of module."""
    try:
        return DiTConfig(**bundle.manifest["config"])
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{bundle.folder} was not made from a DiT checkpoint: use it from Python with dcconvert.load"
        ) from error


def run_planner(bundle: Bundle, steps: int | None, solver: str | None = None) -> tuple[Sampler, StepPlanner]:
    """The sampler of a bundle and a planner whose schedule has its mean over exactly these steps.

    UsageError for a bundle made from another kind of module than a DiT.
    """
    dit_config(bundle)
    try:
        facts = bundle.manifest["sampler"]
        sampler = Sampler(str(facts["prediction"]), steps or int(facts["steps"]), solver or str(facts["solver"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{bundle.folder} does not say how to sample it: convert the checkpoint again") from error
    model = bundle.model
    if model.schedule.kind == DIFFERENCE and (sampler.steps, sampler.solver) != (facts["steps"], facts["solver"]):
        raise UsageError(
            f"{bundle.folder} chooses patch sizes by a threshold found for {facts['steps']} {facts['solver']} steps: "
            f"convert again with --steps {sampler.steps} --solver {sampler.solver}"
        )
    return sampler, StepPlanner(model.spec, model.options, model.schedule.fitted(sampler.taus))


def opened(
    runtime: str, bundle: Bundle, planner: StepPlanner, scratch: Path | None
) -> tuple[Backend, Step, int | None]:
    """A bundle in a runtime, the original beside it, and the most samples it takes at once (None: any number).

    With `scratch` the original is exported there for ONNX Runtime on the CPU, to run in the same runtime; beside GPU
    runtimes it runs in torch.
    """
    model = bundle.model

    def in_torch(*values: Tensor) -> Tensor:
        return cast(Tensor, model.original_graph(*values)[0])

    most = max(bundle.ladder.batches)
    if runtime == "torch":
        return model.with_schedule(planner.schedule), in_torch, None
    if runtime == "trt":
        engines = open_engines(bundle.folder, bundle.onnx, planner)
        return engines, in_torch, max(engines.ladder.batches)
    if runtime == "ort-cuda":
        graphs = bundle.onnx / runtime
        if not graphs.is_dir():
            raise UsageError(
                f"{bundle.folder} has no graphs for {runtime}: 'dcconvert build --target {runtime}' makes them"
            )
        return StaticModel(graphs, planner, bundle.ladder), in_torch, most
    # No ladder: guidance doubles the batch, each step has its own shape.
    if scratch is None:
        return OrtModel(bundle.onnx, planner), in_torch, None
    beside = Runtime.open(model, planner, None, bundle.onnx, scratch)
    return beside.converted, beside.original_step, None


def sample_bundle(
    folder: Path,
    console: Console,
    *,
    runtime: str,
    count: int,
    steps: int | None,
    solver: str | None,
    guidance: Guidance,
    separate_halves: bool,
    seed: int,
    labels: tuple[int, ...],
    compare: bool,
    vae: Path | None,
    out: Path,
) -> None:
    """Sample a bundle, on request beside the original, and write a PNG grid."""
    bundle = read_bundle(folder)
    config = dit_config(bundle)
    sampler, planner = run_planner(bundle, steps, solver)
    noise = initial_noise(seed, count, config.in_channels, config.image_size)
    classes = torch.tensor(labels).repeat(count)[:count] if labels else labels_for(count, config.num_classes)
    if int(classes.max()) >= config.num_classes or int(classes.min()) < 0:
        raise UsageError(f"--label must be from 0 to {config.num_classes - 1}")
    null_class = config.num_classes if config.null_class else None
    stages = Stages(Console(stderr=True))
    images: dict[str, Tensor] = {}

    model, options = bundle.model, bundle.model.options
    groups = 1 if separate_halves else guidance.halves
    lite = None if guidance.ratio is None else planner.at_ratio(guidance.ratio, sampler.taus)
    name = f"{options.mode}, {model.schedule.ratio:g}x"
    if model.spec.states:
        console.print(state_note(model.spec.state_bytes, (count * guidance.halves,)), highlight=False)
    with tempfile.TemporaryDirectory(prefix="dcconvert-") as scratch:
        backend, original, batch = opened(runtime, bundle, planner, Path(scratch) if compare else None)
    if batch is not None and batch < guidance.halves:
        raise UsageError(f"{folder} has no bucket for the two halves of guidance: convert with --batch 2 or more")

    def draw(name: str, new_step: Callable[[], Step]) -> None:
        with stages.stage(f"sample {name}") as tick, torch.inference_mode():
            images[name] = sampler.run_batches(
                new_step,
                noise,
                classes,
                count if batch is None else batch // guidance.halves,
                guidance=guidance.scale,
                null_class=null_class,
                on_step=lambda *_: tick("steps"),
            )

    draw(name, lambda: ConvertedStep(model, backend, groups, lite))
    if compare:
        draw("original", lambda: original)
    save_comparison(dict(reversed(images.items())), out, vae)
    console.print(escape(f"Images: {out}"), highlight=False, soft_wrap=True)


def triton_repository(folder: Path, out: Path, console: Console, *, name: str, device: str, force: bool) -> None:
    """Write a Triton model repository of a bundle, and say what the server needs."""
    if not name.replace("_", "").replace("-", "").isalnum():
        raise UsageError(f"--name {name}: letters, digits, - and _ only, for it names folders")
    source = export_triton(read_bundle(folder), out, name, device, force)
    console.print(
        escape(
            f"Graphs: {source}\nThe server needs its onnxruntime and python backends, and dcconvert installed for the "
            f"latter.\nStart it with: tritonserver --model-repository {out}"
        ),
        highlight=False,
        soft_wrap=True,
    )
