"""`dcconvert upcycle`: train a bundle in mode chunk with its original as the teacher, and write it anew."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcconvert.api import export_onnx
from dcconvert.commands import dit_config, run_planner
from dcconvert.distill import Distillation, Recipe, pick_ratio, planner_for, spread_times
from dcconvert.dit import DiTConfig
from dcconvert.evaluate import ConvertedStep
from dcconvert.export.bundle import MANIFEST, ONNX, Bundle, new_folder, read_bundle, write_json, write_model
from dcconvert.export.parity import IDENTITY, check_batch_invariance, check_isolation, require
from dcconvert.image_data import LabelledImages, read_images
from dcconvert.images import psnr_mean
from dcconvert.passes.errors import StoppedError, UsageError
from dcconvert.passes.model import DynamicModel
from dcconvert.passes.step_planner import StepPlanner
from dcconvert.passes.trained import trained_model
from dcconvert.progress import Stages
from dcconvert.report import without_nan, write_report
from dcconvert.reschedule import Rescheduled, old_report
from dcconvert.sampling import Sampler, initial_noise, labels_for

TEACHER = "teacher"
TEACHER_STEPS, TEACHER_SOLVER = 20, "unipc"
TEACHER_SEED, VALIDATION_SEED = 1_000_000, 2_000_000  # apart from each other and from the seeds that people choose
VALIDATIONS = 8  # in a run, after the one before it


@dataclass(frozen=True)
class Settings:
    """What an upcycling was asked for."""

    folder: Path
    out: Path
    data: str
    recipe: Recipe
    bf16: bool
    teacher_samples: int
    images: int  # for the validation curve, and again for the report
    reference_steps: int
    save_every: int
    threads: int
    command: str

    @property
    def state(self) -> Path:
        """Where an unfinished run waits: beside the bundle."""
        return self.out.with_name(f"{self.out.name}.upcycle")


@dataclass(frozen=True)
class Task:
    """A bundle that is to be trained, and how it is sampled."""

    settings: Settings
    bundle: Bundle
    config: DiTConfig
    sampler: Sampler
    planner: StepPlanner

    @classmethod
    def read(cls, settings: Settings) -> Task:
        """UsageError for a bundle that cannot be trained, or a place that cannot be written to."""
        bundle = read_bundle(settings.folder)
        mode = bundle.model.options.mode
        if mode != "chunk":
            raise UsageError(
                f"{bundle.folder} is in mode {mode}, which needs no training and has none yet: convert the checkpoint "
                "with --mode chunk"
            )
        if settings.out != settings.folder and settings.out.exists():
            raise UsageError(f"{settings.out} exists already: choose another folder with -o")
        sampler, planner = run_planner(bundle, None)
        for ratio in settings.recipe.ratios:
            planner_for(bundle.model, ratio, sampler.taus)  # raises before anything is drawn
        return cls(settings, bundle, dit_config(bundle), sampler, planner)

    @property
    def null_class(self) -> int | None:
        return self.config.num_classes if self.config.null_class else None

    def fingerprint(self) -> str:
        """What must be the same when a run goes on."""
        settings = self.settings
        facts = {**asdict(settings.recipe), "data": settings.data, "bf16": settings.bf16}
        facts |= {"teacher_samples": settings.teacher_samples, "images": settings.images}
        return json.dumps({**facts, "bundle": self.bundle.manifest["created"]})


def upcycle_bundle(settings: Settings, console: Console) -> None:
    """Train, export, check, measure, and put the new bundle in place; an unfinished run goes on where it was.

    Raises UsageError for a bundle, data or options that cannot be used, StoppedError for a run that was interrupted,
    CheckFailedError if the loss is no number or ONNX Runtime does not give what torch does.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    task = Task.read(settings)
    stages = Stages(Console(stderr=True))
    stored = read_state(task)
    data = training_data(task, stages)
    training = Training(task, data)
    if stored is not None:
        training.restore(stored)
        stages.note(f"going on at step {training.distillation.step} of {settings.recipe.steps}")
    training.run(Console(stderr=True))
    store(task, training, stages)
    shutil.rmtree(settings.state, ignore_errors=True)
    first, last = training.log[0], training.log[-1]
    console.print(
        f"PSNR to the original at {task.sampler.steps} steps: {first['psnr']:.2f} dB before, {last['psnr']:.2f} dB "
        f"after {last['samples']} samples ({settings.images} images)",
        highlight=False,
    )
    report = settings.out / "report.html"
    console.print(escape(f"Bundle: {settings.out}\nReport: {report}"), highlight=False, soft_wrap=True)


def read_state(task: Task) -> dict[str, Any] | None:
    """What an unfinished run left; UsageError if it was another run or the file is damaged."""
    path = task.settings.state / "state.pt"
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        known, asked = json.loads(state["fingerprint"]), json.loads(task.fingerprint())
    except Exception as error:
        raise UsageError(f"cannot read {path}: {error}; delete {task.settings.state} to start anew") from error
    if differ := [name for name in asked if asked[name] != known.get(name)]:
        name = differ[0]
        raise UsageError(
            f"{task.settings.state} holds an unfinished run with {name} {known.get(name)}, not {asked[name]}: "
            "give the same options to go on, or delete the folder to start anew"
        )
    return state


def training_data(task: Task, stages: Stages) -> LabelledImages:
    """Images from disk, or samples of the original, drawn once and kept for as long as the run is unfinished."""
    settings = task.settings
    if settings.data != TEACHER:
        return read_images(Path(settings.data), task.config)
    file = settings.state / "teacher_samples.safetensors"
    try:
        found = load_file(str(file))
        return LabelledImages(found["images"], found["labels"])
    except (OSError, SafetensorError, KeyError):
        pass  # none yet, or not whole
    count, config, model = settings.teacher_samples, task.config, task.bundle.model
    noise = initial_noise(TEACHER_SEED, count, config.in_channels, config.image_size)
    labels = labels_for(count, config.num_classes)
    sampler = Sampler(task.sampler.prediction, TEACHER_STEPS, TEACHER_SOLVER)
    with stages.stage("draw training images from the original") as tick, torch.inference_mode():
        parts = []
        for x, y in zip(noise.split(settings.recipe.batch), labels.split(settings.recipe.batch), strict=True):
            parts.append(sampler.run(lambda *v: model.original_graph(*v)[0], x, y))
            tick(f"batches of {settings.recipe.batch}")
        images = torch.cat(parts).clone()
    settings.state.mkdir(parents=True, exist_ok=True)
    save_file({"images": images, "labels": labels}, str(file))
    return LabelledImages(images, labels)


class Training:
    """The loop around a distillation: batches, precision, validation, and what is written on the way."""

    def __init__(self, task: Task, data: LabelledImages) -> None:
        self.task, self.data = task, data
        model, recipe = task.bundle.model, task.settings.recipe
        self.distillation = Distillation(model, recipe, task.sampler.taus)
        self.log: list[dict[str, Any]] = []
        self.seconds = 0.0
        count, config = task.settings.images, task.config
        self.noise = initial_noise(VALIDATION_SEED, count, config.in_channels, config.image_size)
        self.labels = labels_for(count, config.num_classes)
        self.wanted: Tensor | None = None
        self.losses: list[dict[str, float]] = []

    def batch(self) -> dict[str, Tensor]:
        """The model's inputs of the next step."""
        recipe, task, generator = self.task.settings.recipe, self.task, self.distillation.generator()
        pick = torch.randint(len(self.data), (recipe.batch,), generator=generator)
        clean, labels = self.data.images[pick], self.data.labels[pick].clone()
        dropped = torch.rand(recipe.batch, generator=generator) < recipe.class_dropout
        if task.null_class is not None:
            labels[dropped] = task.null_class
        t = task.sampler.times(spread_times(recipe.batch, generator))
        noise = torch.randn(clean.shape, generator=generator)
        values = (task.sampler.add_noise(clean, noise, t), t, labels)
        return dict(zip(task.bundle.model.spec.inputs, values, strict=True))

    def run(self, console: Console) -> None:
        """Train to the end; StoppedError, the state saved, if the user stops it."""
        steps, marks = self.task.settings.recipe.steps, validation_steps(self.task.settings.recipe.steps)
        with training_progress(console) as progress:
            bar = progress.add_task("train", total=steps, completed=self.distillation.step, note="")
            try:
                if not self.log:
                    self.validate(progress)
                while self.distillation.step < steps:
                    self.one_step()
                    done = self.distillation.step
                    rate = done * self.task.settings.recipe.batch / max(self.seconds, 1e-9)
                    note = f"loss {self.losses[-1]['output']:.4f}, {rate:.1f} samples/s"
                    progress.update(bar, completed=done, note=note)
                    if done in marks:
                        self.validate(progress)
                    if done % self.task.settings.save_every == 0 or done in marks:
                        self.save()
            except KeyboardInterrupt:
                self.save()
                raise StoppedError(
                    f"stopped at step {self.distillation.step} of {steps}: the same command goes on from there "
                    f"(state in {self.task.settings.state})"
                ) from None

    def one_step(self) -> None:
        start = time.perf_counter()
        batch = self.batch()
        generator = torch.Generator().manual_seed(self.distillation.step)
        planner = pick_ratio(self.distillation.planners, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.task.settings.bf16):
            self.losses.append(self.distillation.train_step(batch, planner))
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def validate(self, progress: Progress) -> None:
        """Note how far the final images of the averaged weights are from the original's, on noise of their own."""
        task, sampler = self.task, self.task.sampler
        if self.wanted is None:
            self.wanted = sampler.run(lambda *v: task.bundle.model.original_graph(*v)[0], self.noise, self.labels)
        model = self.model()
        found = sampler.run(ConvertedStep(model, model), self.noise, self.labels)
        names = ("output", "feature", "norm")
        means = {n: sum(row[n] for row in self.losses) / len(self.losses) if self.losses else None for n in names}
        done = self.distillation.step
        row = {"step": done, "samples": done * task.settings.recipe.batch, "seconds": round(self.seconds, 1), **means}
        self.log.append({**row, "psnr": psnr_mean(found, self.wanted)})
        self.losses = []
        progress.console.print(f"step {done}: PSNR to the original {self.log[-1]['psnr']:.2f} dB", highlight=False)

    def model(self) -> DynamicModel:
        """The model with the weights as averaged so far, in the bundle's schedule."""
        made = trained_model(self.task.bundle.model, self.distillation.averaged())
        return made.with_schedule(self.task.planner.schedule)

    def save(self) -> None:
        """Write the state whole or not at all."""
        state = {**self.distillation.state(), "fingerprint": self.task.fingerprint(), "seconds": self.seconds}
        path = self.task.settings.state / "state.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save({**state, "log": self.log, "losses": self.losses}, partial)
        partial.replace(path)

    def restore(self, state: dict[str, Any]) -> None:
        self.distillation.restore(state)
        self.log, self.losses, self.seconds = list(state["log"]), list(state["losses"]), float(state["seconds"])


def validation_steps(steps: int) -> set[int]:
    """The steps after which there is a point of the validation curve; the last is one of them."""
    return {round(steps * part / VALIDATIONS) for part in range(1, VALIDATIONS + 1)} - {0}


@contextmanager
def training_progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        yield progress


def store(task: Task, training: Training, stages: Stages) -> None:
    """Export, check and measure the trained model, and put its bundle in place."""
    settings, before = task.settings, task.bundle
    facts = {**asdict(settings.recipe), "command": settings.command, "data": settings.data, "bf16": settings.bf16}
    found = {**facts, "data_samples": len(training.data), "images": settings.images, "log": training.log}
    report, schedule = old_report(before.folder), task.planner.schedule
    report["checks"] = [check for check in report.get("checks", []) if check["name"] != IDENTITY]
    with new_folder(settings.out, force=settings.out == settings.folder) as work:
        bundle = replace(before, folder=work, model=training.model())
        with stages.stage("export ONNX"):
            write_model(bundle.model, work)
            export_onnx(bundle.model, work / ONNX)
        with stages.stage("verify in torch"):
            inputs = bundle.model.spec.example(2)
            require([check(bundle.model, inputs) for check in (check_isolation, check_batch_invariance)])
        made = Rescheduled.of(bundle, schedule, task.sampler, stages)
        report = {**made.report(report), "upcycling": found}
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            figures = made.measure(
                bundle,
                report,
                task.config,
                Path(scratch),
                stages,
                reference_steps=settings.reference_steps,
                threads=settings.threads,
            )
        write_report(work, report, figures or {})
        manifest = {**made.manifest(before.manifest), "upcycling": found}
        manifest["parity"] = {name: value for name, value in manifest["parity"].items() if name != IDENTITY}
        write_json(without_nan(manifest), work / MANIFEST)
