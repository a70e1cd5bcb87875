"""The loop around a distillation: its data, rounds, precision and validation, and what is written on the way."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcconvert.export.bundle import GRAPH, WEIGHTS, Bundle, read_bundle
from dcconvert.export.disk.interrupts import SHELL_BASE, Interrupted, handled_by, restore
from dcconvert.export.files import whole_file
from dcconvert.images.dataset import LabelledImages, read_images
from dcconvert.images.pixels import psnr_mean
from dcconvert.models.dit import DiTConfig
from dcconvert.passes.ir.errors import StoppedError, UsageError
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.trained.weight_sets import trained_model
from dcconvert.sampling.bundle_runs import dit_config, run_planner
from dcconvert.sampling.samplers import Sampler, initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep
from dcconvert.terminal import Stages
from dcconvert.train.distillation import (
    Distillation,
    Recipe,
    StepDistillation,
    pick_ratio,
    spread_times,
    with_new_paths,
)
from dcconvert.train.distributed import Distributed
from dcconvert.train.run_distillation import RunDistillation

TEACHER, RUNS = "teacher", "runs"  # what may stand where the path of the data would
TEACHER_STEPS, TEACHER_SOLVER = 20, "unipc"
TEACHER_SEED, VALIDATION_SEED = 1_000_000, 2_000_000  # apart from each other and from the seeds that people choose
VALIDATIONS = 8  # in a run, after the one before it


@dataclass(frozen=True)
class Settings:
    """What an upcycling was asked for. `data` None and a learning rate of 0 stand for what the mode does, nothing to
    train for what the preset does."""

    folder: Path
    out: Path
    data: str | None
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
        out = self.out.resolve()
        return out.with_name(f"{out.name}.upcycle")

    @property
    def in_place(self) -> bool:
        """Whether the bundle itself is replaced."""
        return self.out.resolve() == self.folder.resolve()


@dataclass(frozen=True)
class Task:
    """A bundle that is to be trained, with the new paths that are trained, and how it is sampled."""

    settings: Settings
    bundle: Bundle
    config: DiTConfig
    sampler: Sampler
    planner: StepPlanner

    @classmethod
    def read(cls, settings: Settings) -> Task:
        """UsageError for a bundle that cannot be trained, or a place that cannot be written to."""
        bundle = read_bundle(settings.folder)
        method, recipe = bundle.model.method, settings.recipe
        if not method.trains:
            raise UsageError(
                f"{bundle.folder} is in mode {method.mode}, which has nothing to train: use 'dcconvert tune'"
            )
        if method.stateful and settings.data is not None:
            raise UsageError(
                f"{bundle.folder} is in mode {method.mode}, which is trained on its own sampling runs: leave out --data"
            )
        if not settings.in_place and settings.out.exists():
            raise UsageError(f"{settings.out} exists already: choose another folder with -o")
        recipe = replace(recipe, lr=recipe.lr or method.learning_rate, train=recipe.train or method.trains)
        settings = replace(settings, recipe=recipe, data=settings.data or (RUNS if method.stateful else TEACHER))
        sampler, planner = run_planner(bundle, None)
        for ratio in recipe.ratios:
            bundle.model.planner.at_ratio(ratio, sampler.taus)  # raises before anything is drawn
        if recipe.ratios and not any(math.isclose(ratio, planner.schedule.ratio) for ratio in recipe.ratios):
            raise UsageError(
                f"{bundle.folder} runs at {planner.schedule.ratio:g}x, which is not among the ratios to train for: "
                f"add --ratio {planner.schedule.ratio:g}x"
            )
        bundle = replace(bundle, model=with_new_paths(bundle.model, recipe))
        return cls(settings, bundle, dit_config(bundle), sampler, planner)

    @property
    def null_class(self) -> int | None:
        return self.config.unconditional_class

    def fingerprint(self, data: LabelledImages | None) -> str:
        """What must be the same when a run goes on: options, training data, and the bundle it started from."""
        settings = self.settings
        facts = {"bundle": self.identity, **asdict(settings.recipe), "data": settings.data, "bf16": settings.bf16}
        return json.dumps({**facts, "images": settings.images, "data_content": content_of(data)})

    @cached_property
    def identity(self) -> str:
        """A hash of the bundle's weights and graphs as they were when the task was read."""
        digest = hashlib.sha256((self.settings.folder / GRAPH).read_bytes())
        with (self.settings.folder / WEIGHTS).open("rb") as file:
            for part in iter(lambda: file.read(1 << 24), b""):
                digest.update(part)
        return digest.hexdigest()

    def noise(self, seed: int, count: int) -> tuple[Tensor, Tensor]:
        """Noise [count, C, H, W] and labels, all classes in turn."""
        noise = initial_noise(seed, count, self.config.in_channels, self.config.image_size)
        return noise, labels_for(count, self.config.num_classes)


def content_of(data: LabelledImages | None) -> str:
    """A hash of training images and labels."""
    if data is None:
        return ""
    digest = hashlib.sha256(data.labels.numpy().tobytes())
    for part in data.images.split(1024):
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def training_data(task: Task, distributed: Distributed, stages: Stages) -> LabelledImages | None:
    """Images from disk, or samples of the original, kept for as long as the run is unfinished; none for mode carry."""
    settings = task.settings
    if settings.data == RUNS:
        return None
    if settings.data != TEACHER:
        return read_images(Path(str(settings.data)), task.config)
    file = settings.state / "teacher_samples.safetensors"
    about = {"bundle": task.identity, "samples": str(settings.teacher_samples)}
    if distributed.is_main and not drawn_before(file, about):
        draw_samples(task, file, about, distributed, stages)
    distributed.wait()
    found = load_file(str(file))
    return LabelledImages(found["images"], found["labels"])


def drawn_before(file: Path, about: dict[str, str]) -> bool:
    """Whether the file is whole and holds the samples that it should."""
    try:
        with safe_open(str(file), "pt") as opened:
            return (opened.metadata() or {}) == about
    except (OSError, SafetensorError):
        return False


def draw_samples(task: Task, file: Path, about: dict[str, str], distributed: Distributed, stages: Stages) -> None:
    """Draw the training images from the original into a file."""
    batch, model = task.settings.recipe.batch, task.bundle.model
    noise, labels = task.noise(TEACHER_SEED, task.settings.teacher_samples)
    sampler = Sampler(task.sampler.prediction, TEACHER_STEPS, TEACHER_SOLVER)
    with stages.stage("draw training images from the original") as tick, torch.inference_mode():
        parts = []
        for x, y in zip(noise.split(batch), labels.split(batch), strict=True):
            drawn = sampler.run(
                lambda *v: model.original_graph(*v)[0], x.to(distributed.device), y.to(distributed.device)
            )
            parts.append(drawn.cpu())
            tick(f"batches of {batch}")
        images = torch.cat(parts).clone()
    write_state(file, lambda partial: save_file({"images": images, "labels": labels}, str(partial), metadata=about))


def write_state(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside a bundle whole or not at all; UsageError if the disk does not take it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            write(partial)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        reason = error.strerror if isinstance(error, OSError) else "the disk is full or the file too large"
        raise UsageError(f"cannot write {path}: {reason}; run the same command to resume from the last save") from error


class Training:
    """A distillation from its first round to its last."""

    def __init__(self, task: Task, data: LabelledImages | None, distributed: Distributed) -> None:
        self.task, self.data, self.distributed = task, data, distributed
        model, recipe = task.bundle.model, task.settings.recipe
        self.distillation: Distillation
        if data is None:
            self.distillation = RunDistillation(model, recipe, task.sampler, distributed)
        else:
            self.distillation = StepDistillation(model, recipe, task.sampler.taus, distributed)
        self.log: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.noise, self.labels = (v.to(distributed.device) for v in task.noise(VALIDATION_SEED, task.settings.images))
        self.wanted: Tensor | None = None
        self.losses: list[dict[str, float]] = []
        self.saved = 0
        self.stopping, self.signal = False, int(signal.SIGINT)

    @property
    def samples(self) -> int:
        """Training samples seen: evaluations of the student."""
        return self.distillation.round * self.distillation.samples_a_round

    def noised_data(self, data: LabelledImages, generator: torch.Generator) -> dict[str, Tensor]:
        """The model's inputs for a round of mode chunk."""
        recipe, sampler = self.task.settings.recipe, self.task.sampler
        pick = torch.randint(len(data), (recipe.batch,), generator=generator)
        clean = data.images[pick]
        labels = without_some(data.labels[pick], recipe.class_dropout, self.task.null_class, generator)
        t = sampler.times(spread_times(recipe.batch, generator))
        noise = torch.randn(clean.shape, generator=generator)
        values = (sampler.add_noise(clean, noise, t), t, labels)
        return dict(zip(self.task.bundle.model.spec.inputs, values, strict=True))

    def start_of_runs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise and labels for a round of mode carry."""
        recipe, config = self.task.settings.recipe, self.task.config
        size = (config.in_channels, config.image_size, config.image_size)
        noise = torch.randn(recipe.batch, *size, generator=generator)
        labels = torch.randint(config.num_classes, (recipe.batch,), generator=generator)
        return {"noise": noise, "labels": without_some(labels, recipe.class_dropout, self.task.null_class, generator)}

    def one_round(self) -> None:
        """Train on the next batch or, in mode carry, on the next batch of runs."""
        start, made = time.perf_counter(), self.distillation
        generator = made.generator()
        with torch.autocast(self.distributed.device.type, torch.bfloat16, enabled=self.task.settings.bf16):
            if isinstance(made, RunDistillation):
                runs = self.distributed.share(self.start_of_runs(generator))
                losses = made.train(runs["noise"], runs["labels"], pick_ratio(made.planners, generator))
            else:
                assert isinstance(made, StepDistillation)
                assert self.data is not None
                batch = self.distributed.share(self.noised_data(self.data, generator))
                losses = made.train(batch, made.planners[pick_ratio(made.planners, generator)])
        self.losses.append(losses)
        self.seconds += time.perf_counter() - start

    def run(self, console: Console) -> None:
        """Train to the end; StoppedError if the user stops it: the state is saved between two rounds, never in one."""
        made = self.distillation
        marks = validation_rounds(made.rounds)
        with training_progress(console) as progress:
            bar = progress.add_task("train", total=made.rounds, completed=made.round, note="")
            try:
                with self.stopped_by_signals(progress):
                    if not self.log:
                        self.validate(progress)
                    while made.round < made.rounds and not self.stopping:
                        self.one_round()
                        note = f"loss {self.losses[-1]['output']:.4f}, {self.samples / self.seconds:.1f} samples/s"
                        progress.update(bar, completed=made.round, note=note)
                        if made.round in marks:
                            self.validate(progress)
                        due = made.step - self.saved >= self.task.settings.save_every
                        if due or made.round in marks or self.stopping:
                            self.save()
            except KeyboardInterrupt:
                self.stopping = True
        if self.stopping and self.saved < made.rounds * made.updates_a_round:
            raise StoppedError(
                f"stopped: run the same command to resume from step {self.saved} of "
                f"{made.rounds * made.updates_a_round} "
                f"(state in {self.task.settings.state})",
                SHELL_BASE + self.signal,
            )

    @contextmanager
    def stopped_by_signals(self, progress: Progress) -> Iterator[None]:
        """Ctrl-C and a request to terminate end the run after its present round; a second one ends it at once."""

        def ask(number: int, frame: Any) -> None:
            if self.stopping:
                raise Interrupted(number)
            self.stopping, self.signal = True, number
            progress.console.print("stopping after this round; press Ctrl-C again to stop at once, with the last save")

        before = handled_by(ask)
        try:
            yield
        finally:
            restore(before)

    @torch.no_grad()
    def validate(self, progress: Progress) -> None:
        """Note how far the final images of the averaged weights are from the original's, on noise of their own."""
        if not self.distributed.is_main:
            return
        task, sampler = self.task, self.task.sampler
        if self.wanted is None:
            self.wanted = sampler.run(lambda *v: task.bundle.model.original_graph(*v)[0], self.noise, self.labels)
        model = self.model()
        found = sampler.run(ConvertedStep(model, model), self.noise, self.labels)
        names = self.losses[0] if self.losses else ("output",)
        means = {n: sum(row[n] for row in self.losses) / len(self.losses) if self.losses else None for n in names}
        row = {"step": self.distillation.step, "samples": self.samples, "seconds": round(self.seconds, 1), **means}
        self.log.append({**row, "psnr": psnr_mean(found, self.wanted)})
        self.losses = []
        progress.console.print(
            f"step {self.distillation.step}: PSNR to the original {self.log[-1]['psnr']:.2f} dB", highlight=False
        )

    def model(self) -> DynamicModel:
        """The model with the weights as averaged so far, in the bundle's schedule."""
        made = trained_model(self.task.bundle.model, self.distillation.averaged())
        return made.with_schedule(self.task.planner.schedule)

    def save(self) -> None:
        """Write the state whole or not at all."""
        self.saved = self.distillation.step
        if not self.distributed.is_main:
            return
        fingerprint = self.task.fingerprint(self.data)
        state = {**self.distillation.state(), "fingerprint": fingerprint, "seconds": self.seconds}
        state |= {"log": self.log, "losses": self.losses}
        write_state(self.task.settings.state / "state.pt", lambda partial: torch.save(state, partial))

    def restore(self) -> bool:
        """Take up what an unfinished run left, if there is one; UsageError if it was another run or is damaged."""
        path = self.task.settings.state / "state.pt"
        if not path.exists():
            return False
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            known = json.loads(state["fingerprint"])
        except Exception as error:
            raise UsageError(f"cannot read {path}, it is damaged: delete {path.parent} to start again") from error
        asked = json.loads(self.task.fingerprint(self.data))
        if differ := [name for name in asked if asked[name] != known.get(name)]:
            name = differ[0]
            if name in ("data_content", "bundle"):
                what = "data that were changed since" if name == "data_content" else "a bundle that was changed since"
                raise UsageError(f"{path.parent} holds an unfinished run on {what}: delete the folder to start again")
            raise UsageError(
                f"{path.parent} holds an unfinished run with {name} {shown(known.get(name))}, not "
                f"{shown(asked[name])}: use the same options to resume, or delete the folder to start again"
            )
        self.distillation.restore(state)
        self.saved = self.distillation.step
        self.log, self.losses, self.seconds = list(state["log"]), list(state["losses"]), float(state["seconds"])
        return True


def without_some(labels: Tensor, share: float, null_class: int | None, generator: torch.Generator) -> Tensor:
    """Labels [B], about this share of them replaced by the unconditional class, if the model has one."""
    dropped = torch.rand(len(labels), generator=generator) < share
    return labels if null_class is None else labels.masked_fill(dropped, null_class)


def shown(value: Any) -> str:
    """A setting in a message."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def validation_rounds(rounds: int) -> set[int]:
    """The rounds after which there is a point of the validation curve; the last is one of them."""
    return {round(rounds * part / VALIDATIONS) for part in range(1, VALIDATIONS + 1)} - {0}


@contextmanager
def training_progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        yield progress
