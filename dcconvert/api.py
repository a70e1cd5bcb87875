"""The Python API: convert a module, save and load the result."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn
from torch.export import ExportedProgram

from dcconvert.environment import machine
from dcconvert.export.buckets import BucketSet, choose_buckets
from dcconvert.export.bundle import FORMAT_VERSION, ONNX, read_bundle, write_model
from dcconvert.export.checks.flops import run_ratio
from dcconvert.export.files import MANIFEST, new_folder, write_json
from dcconvert.models.dc_dit import RefinedDiT
from dcconvert.models.dit import DiT
from dcconvert.models.dit_checkpoint import LoadedDiT, LoadedRefined
from dcconvert.models.example_inputs import dit_inputs
from dcconvert.models.own_architecture import as_rewritten
from dcconvert.models.pipelines.drop_in import DropIn, is_diffusers, spent_line
from dcconvert.passes.frontend.plain_module import unwrapped
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.ir.spec import EXAMPLE_BATCH
from dcconvert.passes.methods import method_of
from dcconvert.passes.methods.method import Method
from dcconvert.passes.pipeline import rewrite
from dcconvert.passes.planning.schedule import AUTO, LEVELS, Policy, Timetable, noise_levels, parse_ratio
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.infer_runs import last_loop
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.sampling.bundle_runs import run_of, stored_table, write_table
from dcconvert.sampling.fitting import fitted
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Sampler

DEFAULT_BATCHES = (1, 8)
DEFAULT_STEPS = 50


class Converted(DynamicModel):
    """A DynamicModel that can be written as a bundle.

    `facts` go into the bundle's manifest. For a DiT from a checkpoint, they say how to sample it. `run_table` is that
    of the bundle it was read from, in mode steps.
    """

    facts: dict[str, Any]
    run_table: RunTable | None

    @classmethod
    def of(cls, model: DynamicModel, facts: dict[str, Any], run_table: RunTable | None = None) -> Converted:
        made = cls(model.graphs, model.planner, model.records)
        made.facts, made.run_table = facts, run_table
        return made

    def with_schedule(self, schedule: Timetable) -> Converted:
        return self.of(super().with_schedule(schedule), self.facts)

    def with_steps(self, steps: int) -> Converted:
        """The same weights and graphs for runs of another number of steps; UsageError if they cannot reach the
        ratio."""
        return self.of(super().with_steps(steps), {**self.facts, "steps": steps})

    def choose_buckets(self, batches: Sequence[int] = DEFAULT_BATCHES) -> BucketSet:
        """Buckets for batch sizes and a sampling run at evenly spaced noise levels, with the model's steps."""
        steps = int(self.facts.get("steps", DEFAULT_STEPS))
        taus = noise_levels(steps)
        planner = StepPlanner(self.spec, self.method, self.schedule.fitted(taus))
        counts = planner.bucket_counts(taus)
        return choose_buckets(batches, counts, self.spec.tokens, max(LEVELS, len(self.schedule.levels)) - 1)

    def save(self, folder: str | Path, batches: Sequence[int] = DEFAULT_BATCHES, force: bool = False) -> Path:
        """Write a bundle: weights, graphs, ONNX files, manifest, and in mode steps the table of a run.

        UsageError if the folder exists already.
        """
        from dcconvert.export.onnx.export import export_onnx  # needs onnxscript

        target = Path(folder)
        with new_folder(target, force) as work:
            bucket_set = self.choose_buckets(batches)
            write_model(self, work)
            export_onnx(self, work / ONNX)
            write_json(manifest(self, bucket_set, **self.facts), work / MANIFEST)
            if run := self.run_table or self.default_run():
                write_table(run, work)
        return target

    def summary(self) -> str:
        """As `DynamicModel.summary`, with the operations of the whole model, for the schedule and for the last run."""
        steps = int(self.facts.get("steps", DEFAULT_STEPS))
        lines = [super().summary()]
        if not self.schedule.data_dependent or self.schedule.seen:
            whole = run_ratio(self, self.planner.run_counts(noise_levels(steps)).tolist())
            lines.append(f"{whole:.3g}x fewer operations in the whole model, over {steps} steps")
        if (loop := last_loop(self.runs)) is not None:
            lines.append(spent_line(self, loop, steps))
        return "\n".join(lines)

    def default_run(self) -> Sampler | RunTable | None:
        """How a bundle is sampled if nothing was fitted; None for a model that does not say how to sample it."""
        if "sampler" not in self.facts:
            return None
        facts = self.facts["sampler"]
        sampler = Sampler(facts["prediction"], int(facts["steps"]), facts["solver"])
        return run_of(self, sampler, self.schedule.ratio)


@overload
def convert(module: DiT | ExportedProgram, ratio: float | str = 4, **options: Any) -> Converted: ...


@overload
def convert(
    module: nn.Module, ratio: float | str = 4, *, example_inputs: Sequence[Any] | Mapping[str, Any], **options: Any
) -> Converted: ...


@overload
def convert(module: nn.Module, ratio: float | str = 4, **options: Any) -> Converted | DropIn: ...


def convert(
    module: nn.Module | ExportedProgram,
    ratio: float | str = 4,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    timestep_scale: float | None = None,
    **options: Any,
) -> Converted | DropIn:
    """Rewrite a diffusion transformer so that it computes fewer tokens, with the same call signature.

    Args:
        module: a `dcconvert.DiT`, a diffusers transformer, or any module that `torch.export` can capture, with patch
            tokens and repeating attention blocks. It is put in eval mode and shares its weights with the result. An
            exported program of such a module, with a dynamic batch size, is accepted too.
        ratio: tokens divided by kept tokens, on average over a run: 4, "4x", "2.5x"; 1 keeps everything.
        example_inputs: the inputs of one call, positional (a sequence) or by name (a mapping), with a batch of at least
            2. Optional for a `dcconvert.DiT`, and for a diffusers transformer, which is then converted when its
            pipeline first calls it: `pipe.transformer = dcconvert.convert(pipe.transformer, ratio=4)`.
        timestep_scale: the timestep at pure noise [1000; for a diffusers transformer, inferred from its first call].
        options: those of `convert_call`.

    Raises:
        UsageError: bad ratio, options or example inputs.
        UnsupportedModelError: the model holds something no pass or rule supports; the message names it.
    """
    if isinstance(module, DropIn):
        module = module.undo()
    if isinstance(module, nn.Module):
        module = unwrapped(module)
    if isinstance(module, ExportedProgram):
        args, kwargs = module.example_inputs or ((), {})
        example_inputs = kwargs or args
    elif example_inputs is None and is_diffusers(module):
        inspect.signature(convert_call).bind(module, ratio, example_inputs=(), **options)
        asked, spending = chosen(ratio, **options)  # errors now, and not when a pipeline calls it
        as_rewritten(module, asked, bool(options.get("refine_grid")))
        steps, grid = options.pop("steps", DEFAULT_STEPS), options.pop("grid", None)
        policy = spending.policy if asked.stateful else None
        return DropIn(module, partial(convert_call, ratio=ratio, **options), steps, policy, timestep_scale, grid)
    if example_inputs is None:
        if not isinstance(module, DiT | RefinedDiT):
            raise UsageError(f"capturing a {type(module).__name__} needs example_inputs: pass the inputs of one call")
        example_inputs = dit_inputs(module, EXAMPLE_BATCH)
    return convert_call(
        module, ratio, example_inputs=example_inputs, timestep_scale=timestep_scale or 1000.0, **options
    )


def convert_call(
    module: nn.Module | ExportedProgram,
    ratio: float | str = 4,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    schedule: str | Policy | None = None,
    steps: int = DEFAULT_STEPS,
    warm_up: int = AUTO,
    refresh: int = 0,
    buckets: int = LEVELS,
    options: Method | None = None,
    preset: str | None = None,
    refine_grid: bool = False,
    timestep: str | None = None,
    timestep_scale: float = 1000.0,
    grid: tuple[int, int] | None = None,
    prediction: str | None = None,
    fit: bool = True,
    dump_graphs: Path | None = None,
) -> Converted:
    """`convert` on one call's inputs.

    Args:
        module, ratio, example_inputs: as in `convert`.
        schedule: how the kept fraction changes over time: constant, rising or falling (toward clean images), or a
            Policy; None for the default of the mode.
        steps: sampling steps of a run; the ratio is an average over them.
        warm_up, refresh: mode carry: how many initial steps, and every how many later steps, compute everything.
        buckets: maximum number of different kept-token counts in a run; each is a static shape of the exported model.
        options: a method with its options, made by `dcconvert.Options`.
        preset: the name of a method, one of `dcconvert.passes.methods.METHODS`, instead of schedule and options.
        refine_grid: preset dc-dit on a DiT: run its blocks on tokens of one pixel, as in `dcconvert.models.dc_dit`;
            needs training.
        timestep: the name of the timestep input, if it cannot be guessed.
        timestep_scale: its value at pure noise.
        grid: (H, W) of the tokens, if it cannot be inferred from the model and is not square.
        prediction: what the model predicts, eps or flow; preset ddit needs it [from the checkpoint].
        fit: presets dc-dit and ddit, for a model from a DiT checkpoint: fit the method to the ratio on runs of the
            converted model, which takes a minute for a small model. Other models use the method's own constants;
            `summary` says so.
        dump_graphs: folder for the readable graph after each pass.

    Raises:
        UsageError: bad ratio, options or example inputs.
        UnsupportedModelError: the model holds something no pass or rule supports; the message names it.
    """
    args: Sequence[Any] = () if isinstance(example_inputs, Mapping) else example_inputs
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    method, spending = chosen(
        ratio, schedule=schedule, steps=steps, warm_up=warm_up, refresh=refresh, options=options, preset=preset
    )
    info = getattr(module, "checkpoint_info", None)
    predicts = prediction or method.predicts or str(getattr(info, "prediction", ""))
    rewritten, original, router, method = as_rewritten(module, method.with_prediction(predicts), refine_grid)
    model = rewrite(
        rewritten,
        args,
        kwargs,
        method,
        spending,
        timestep=timestep,
        timestep_scale=timestep_scale,
        grid=grid,
        router=router,
        original=original,
        dump=dump_graphs,
    )
    if model.spec.timestep is not None:
        check_scale(model.flat_inputs(tuple(args), kwargs)[model.spec.timestep], timestep_scale)
    model = method.finished(model)
    model = model.with_schedule(model.planner.levelled(noise_levels(steps), buckets))
    if fit and info:
        model = fitted(model, Sampler(predicts, steps), info.config)
    return Converted.of(model, {"steps": steps, **sampling_facts(module, steps)})


def chosen(
    ratio: float | str,
    *,
    schedule: str | Policy | None = None,
    steps: int = DEFAULT_STEPS,
    warm_up: int = AUTO,
    refresh: int = 0,
    options: Method | None = None,
    preset: str | None = None,
    **_: Any,
) -> tuple[Method, Timetable]:
    """Method and schedule that the arguments of `convert_call` select; UsageError for invalid combinations."""
    wanted = parse_ratio(ratio)
    if preset is not None:
        if options is not None or schedule is not None:
            raise UsageError(
                f"preset '{preset}' sets the schedule and the options: leave out the preset, or schedule and options"
            )
        options = method_of(preset, wanted)
    method = options or method_of()
    if isinstance(schedule, Policy):
        policy = schedule
    else:
        policy = Policy(schedule, wanted) if schedule else method.policy(wanted)
    if not method.stateful:
        if warm_up > 0 or refresh:
            raise UsageError("warm-up and refresh steps apply only to mode carry: leave them out in mode chunk")
        return method, policy.timetable()
    if warm_up == 0:
        raise UsageError("mode carry needs at least one warm-up step: the first step has nothing to carry over")
    return method, replace(policy, warm_up=warm_up, refresh=refresh).timetable(noise_levels(steps))


def check_scale(times: Tensor, timestep_scale: float) -> None:
    """Raises UsageError if the example timesteps are in 0 to 1 and `timestep_scale` is larger."""
    if timestep_scale > 1 and times.is_floating_point() and bool(((times > 0) & (times < 1)).all()):
        raise UsageError(
            f"the example inputs have timesteps such as {float(times.flatten()[0]):.3g}, but timestep_scale, the value "
            f"at pure noise, is {timestep_scale:g}: pass timestep_scale=1, or timesteps from 0 to {timestep_scale:g}"
        )


def sampling_facts(module: nn.Module | ExportedProgram, steps: int, solver: str = "euler") -> dict[str, Any]:
    """The manifest's facts about sampling, for a DiT from a checkpoint; empty for other modules."""
    if not isinstance(module, LoadedDiT | LoadedRefined):
        return {}
    info = module.checkpoint_info
    sampler = {"prediction": info.prediction, "steps": steps, "solver": solver, "class_names": info.class_names}
    return {"sampler": sampler, "config": info.config.as_dict()}


def load(folder: str | Path) -> Converted:
    """Read a bundle back as a torch module."""
    bundle = read_bundle(Path(folder))
    kept = ("steps", "sampler", "config")
    facts = {name: bundle.manifest[name] for name in kept if name in bundle.manifest}
    return Converted.of(bundle.model, facts, stored_table(bundle))


def manifest(model: DynamicModel, bucket_set: BucketSet, **more: Any) -> dict[str, Any]:
    """The manifest of a bundle; `more` is added at the top level."""
    from dcconvert.export.onnx.lowerings import PORTABLE  # needs onnxscript

    return {
        "format_version": FORMAT_VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "conversion": {
            "ratio": model.schedule.ratio,
            "schedule": model.schedule.kind,
            "mode": model.method.mode,
            **model.method.as_dict(),
            "passes": [record.as_dict() for record in model.records],
        },
        "grid": list(model.spec.grid),
        "tokens": model.spec.tokens,
        "buckets": bucket_set.to_dict(),
        "opset": PORTABLE.opset,
        "machine": machine(),
        **more,
    }
