"""Runs of a bundle: its sampler, its planner, and the bundle opened in a runtime."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import Tensor

from dcconvert.export import schemas
from dcconvert.export.bundle import Bundle
from dcconvert.export.disk.json_text import part_of_folder
from dcconvert.export.files import MANIFEST, read_json, write_json
from dcconvert.export.runtimes.openvino import OpenVinoModel
from dcconvert.export.runtimes.ort import OrtModel
from dcconvert.export.runtimes.ort_static import StaticModel
from dcconvert.export.runtimes.trt import open_engines
from dcconvert.export.schemas import fitting
from dcconvert.models.dit import DiTConfig
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.run import Runtime
from dcconvert.sampling.default_tables import default_table
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Sampler, Step
from dcconvert.sampling.shipped_tables import shipped_table
from dcconvert.sampling.steps import OrtPair

RUN = "run.json"  # a run table, beside the manifest


def dit_config(bundle: Bundle) -> DiTConfig:
    """The architecture a bundle was made from; UsageError for one made from another kind of module."""
    if "config" not in bundle.manifest:
        raise UsageError(f"{bundle.folder} was not made from a DiT checkpoint: use it from Python with dcconvert.load")
    config, spec = DiTConfig(**bundle.manifest["config"]), bundle.model.spec
    found = (config.in_channels, config.image_size, config.image_size)
    wanted = next((item.shape for item in spec.input_specs if item.name == spec.image), ())
    if found != tuple(wanted):
        raise UsageError(
            f"{bundle.folder / MANIFEST}: the config is of images {list(found)}, but the graphs take {list(wanted)}; "
            "convert the model again"
        )
    rows, needed = max(item.rows for item in spec.input_specs), config.num_classes + config.null_class
    if 0 < rows < needed:
        raise UsageError(
            f"{bundle.folder / MANIFEST}: config.num_classes is {config.num_classes}, but the model has a table of "
            f"{rows} labels; convert the model again"
        )
    return config


def run_of(
    model: DynamicModel, sampler: Sampler, ratio: float, sha256: str = "", guidance: float = 1.0
) -> Sampler | RunTable:
    """How a model is sampled at a ratio: by the sampler itself, or by a table that stands for its run.

    `sha256`: of the checkpoint; a table that was fitted to it ships with some.
    """
    if model.method.remembers != "updates":
        return sampler
    made = default_table(sampler.prediction, sampler.steps, ratio, guidance)
    return shipped_table(sha256, made.evaluations) or made


def write_table(run: Sampler | RunTable, folder: Path) -> None:
    """Write `run.json` beside a bundle's graphs, for a run that is a table."""
    if isinstance(run, RunTable):
        write_json(run.to_dict(), folder / RUN)


def stored_table(bundle: Bundle) -> RunTable | None:
    """The run table of a bundle, if it has one; UsageError for a damaged one."""
    path = bundle.folder / RUN
    if not path.exists():
        return None
    table = read_table(part_of_folder(bundle.folder, RUN))  # people may write their own
    if table.updates > bundle.model.spec.updates:
        raise UsageError(
            f"{path}: a row has {table.updates} weights, but the model keeps {bundle.model.spec.updates} updates; "
            "make the table again with 'dcconvert tune'"
        )
    return table


def read_table(path: Path) -> RunTable:
    """The run table in a file; UsageError for a file that does not hold one."""
    return RunTable.from_dict(fitting(read_json(path), schemas.RUN, path, "make it with 'dcconvert tune'"))


def bundle_run(
    bundle: Bundle, steps: int | None = None, solver: str | None = None, guidance: float = 1.0
) -> tuple[Sampler | RunTable, StepPlanner]:
    """The run of a bundle, and its planner; arguments and errors as in `run_planner`.

    In mode steps it is the table in `run.json`, or diffusers' solver with the bundle's own schedule, if a solver is
    given. It is the default table instead if other steps are given, or if `run.json` has the default table for another
    guidance scale (`replaced_note`).
    """
    sampler, planner = run_planner(bundle, steps, solver)
    if bundle.model.method.remembers != "updates" or solver is not None:
        return sampler, planner
    ratio = bundle.model.schedule.ratio
    table = stored_table(bundle) if steps in (None, bundle.manifest["sampler"]["steps"]) else None
    if table and (table.guidance == guidance or table != run_of(bundle.model, sampler, ratio, "", table.guidance)):
        return table, planner
    return run_of(bundle.model, sampler, ratio, "", guidance), planner


def replaced_note(bundle: Bundle, run: Sampler | RunTable) -> str:
    """What to tell a user whose run is not that of `run.json`, because of its guidance or steps; else nothing."""
    stored = stored_table(bundle)
    if stored is None or run == stored:
        return ""
    made = f"{run.solver}, by the bundle's schedule"
    if isinstance(run, RunTable):
        made = f"the default table for guidance {run.guidance:g}: {run.evaluations} of {run.steps} steps are computed"
    return f"{bundle.folder / RUN} is not used; the run is {made}"


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
    if (
        model.method.fixed_steps
        and model.schedule.data_dependent
        and (sampler.steps, sampler.solver) != (facts["steps"], facts["solver"])
    ):
        raise UsageError(
            f"{bundle.folder} chooses patch sizes by a threshold found for {facts['steps']} {facts['solver']} steps: "
            f"convert again with --steps {sampler.steps} --solver {sampler.solver}"
        )
    return sampler, StepPlanner(model.spec, model.method, model.schedule.fitted(sampler.taus))


def opened(
    runtime: str, bundle: Bundle, planner: StepPlanner, scratch: Path | None
) -> tuple[Runtime, Step, int | None]:
    """A bundle in a runtime, the original beside it, and the most samples it takes at once (None: any number).

    With `scratch` the original is exported there for ONNX Runtime on the CPU, to run in the same runtime; beside GPU
    runtimes it runs in torch.
    """
    model = bundle.model

    def in_torch(*values: Tensor) -> Tensor:
        return cast(Tensor, model.original_graph(*values)[0])

    most = max(bundle.bucket_set.batches)
    if runtime == "torch":
        return model.with_schedule(planner.schedule), in_torch, None
    if runtime == "trt":
        engines = open_engines(bundle.folder, bundle.onnx, planner)
        return engines, in_torch, max(engines.bucket_set.batches)
    if runtime == "ort-cuda":
        graphs = bundle.onnx / runtime
        if not graphs.is_dir():
            raise UsageError(
                f"{bundle.folder} has no graphs for {runtime}: 'dcconvert build --runtime {runtime}' makes them"
            )
        return StaticModel(graphs, planner, bundle.bucket_set), in_torch, most
    if runtime == "openvino":
        return OpenVinoModel(bundle.onnx, planner), in_torch, None
    # No bucket set: guidance doubles the batch, each step has its own shape.
    if scratch is None:
        return OrtModel(bundle.onnx, planner), in_torch, None
    beside = OrtPair.open(model, planner, None, bundle.onnx, scratch)
    return beside.converted, beside.original_step, None
