"""The judge of an evaluation: it draws the images of every row and measures their quality."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcconvert.evaluate.comparison import Comparison, Row
from dcconvert.evaluate.feature_networks import HOW_TO_GET, NONE, Extractor, open_extractor
from dcconvert.evaluate.set_metrics import (
    NEIGHBOURS,
    Doubles,
    Real,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from dcconvert.export.files import NPZ, write_whole
from dcconvert.images.dataset import read_images
from dcconvert.images.pixels import decode_latents, is_latent, psnr, to_images
from dcconvert.models.dit import DiTConfig
from dcconvert.passes.ir.errors import UsageError
from dcconvert.sampling.default_tables import ADAMS, original_run
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Guidance, Sampler, Step, initial_noise, labels_for
from dcconvert.sampling.steps import ConvertedStep
from dcconvert.terminal import Stages

PAIRS = 256  # for the pair distance, which runs the network twice; enough for its mean


@dataclass(frozen=True)
class Wanted:
    """Which images are judged, and by what: options of the command line."""

    images: int = 64
    seed: int = 0
    reference_steps: int = 200
    real: Path | None = None
    real_images: int = 5000
    features: str = "auto"
    vae: Path | None = None

    def __post_init__(self) -> None:
        if 0 < self.images < NEIGHBOURS + 2:
            raise UsageError(f"--images {self.images}: at least {NEIGHBOURS + 2}, or 0 to measure time and memory only")


@dataclass(frozen=True)
class Distances:
    """How far images are from real ones."""

    frechet: float
    kernel: float
    kernel_error: float
    precision: float
    recall: float


@dataclass(frozen=True)
class Drawn:
    """PSNR of a row's images to the reference in dB, and its standard error; None where none were drawn.

    For a bundle also the mean number of tokens that its steps kept and, if the images decide it, GMACs of an image.
    """

    psnr: float | None = None
    psnr_error: float | None = None
    kept_tokens: float | None = None
    gmacs: float | None = None


@dataclass(frozen=True)
class Described:
    """What a network says about a row's images; None where it has no maps, no classes, or there are no real images."""

    pair_distance: float | None = None
    pair_distance_error: float | None = None
    inception_score: float | None = None
    distances: Distances | None = None


@dataclass(frozen=True)
class Judgement:
    """What was found about the images of every row, by its name, and what they were measured with.

    `floor`: the distances of real images that were held out. `described` is empty without a network.
    """

    reference: str
    latents: bool
    drawn: dict[str, Drawn]
    described: dict[str, Described]
    network: str | None = None
    real_count: int | None = None
    floor: Distances | None = None


def noted(new_step: Callable[[], Step], kept: list[list[np.ndarray]]) -> Callable[[], Step]:
    """The same function, but `kept` receives what the steps of a converted model keep: one list for each run."""

    def make() -> Step:
        made = new_step()
        if isinstance(made, ConvertedStep):
            kept.append(made.kept)
        return made

    return make


class Judge:
    """Draws the images of every row and measures them.

    The network and the real images are read when it is created, so that problems with them are reported at once.
    """

    def __init__(self, settings: Wanted, config: DiTConfig, guidance: Guidance, threads: int, stages: Stages) -> None:
        self.settings, self.config, self.guidance = settings, config, guidance
        self.limits: list[str] = []
        self.noise = initial_noise(settings.seed, settings.images, config.in_channels, config.image_size)
        self.labels = labels_for(settings.images, config.num_classes)
        self.null_class = config.unconditional_class
        self.images: dict[str, Tensor] = {}
        self.extractor = self.opened(threads, stages)
        self.real: Real | None = None
        self.floor: Distances | None = None
        if self.extractor and settings.real:
            self.read_real(settings.real, self.extractor, stages)
        elif self.extractor:
            self.limits.append("Distances to real images were not measured: give some with --real PATH.")

    def opened(self, threads: int, stages: Stages) -> Extractor | None:
        if self.config.in_channels not in (1, 3) and self.settings.vae is None:
            self.limits.append(
                "The model works on latents: feature distances and Inception Score need pictures; give --vae PATH."
            )
            return None
        with stages.stage("open the feature network"):
            found = open_extractor(self.settings.features, threads)
        if found is None:
            none = self.settings.features == NONE
            how = "(--features none)" if none else f"because no network is installed: {HOW_TO_GET}"
            self.limits.append(f"Feature distances, Inception Score, precision and recall were not measured {how}.")
        return found

    def read_real(self, path: Path, extractor: Extractor, stages: Stages) -> None:
        """Read real images: as many as are generated are held out for the floor, and the others are compared with."""
        count = self.settings.images
        with stages.stage("read real images") as tick:
            found = read_images(path, self.config, labelled=False).images
            order = torch.randperm(len(found), generator=torch.Generator().manual_seed(self.settings.seed))
            chosen = found[order[: self.settings.real_images + count]]
            if len(chosen) < 2 * count:
                raise UsageError(
                    f"{path} holds {len(found)} images: at least {2 * count} are needed, twice --images {count}"
                )
            features, _ = extractor.describe(self.pictures(chosen), tick)
        self.real = Real(features[count:])
        self.floor = distances(features[:count], self.real)

    def pictures(self, samples: Tensor) -> np.ndarray:
        """uint8 [n, H, W, 3]."""
        return to_images(decode_latents(samples, self.settings.vae) if self.settings.vae else samples)

    def judge(self, rows: Sequence[Row], comparison: Comparison, stages: Stages) -> Judgement:
        """Draw the images of the rows and of the reference, and measure them."""
        settings, first = self.settings, comparison.candidates[0]
        step = comparison.original.original_step
        drawn, described = {}, {}
        reference = f"original, {ADAMS}, {settings.reference_steps} steps"
        with stages.stage("draw images") as tick:
            many = original_run(first.sampler.prediction, settings.reference_steps, ADAMS)
            wanted = self.draw(many, lambda: step, comparison.batch, partial(tick, f"{reference}, the reference"))
            for row in rows:
                kept: list[list[np.ndarray]] = []
                made = self.draw(row.sampler, noted(row.new_step, kept), comparison.batch, partial(tick, row.name))
                self.images[row.name] = made
                drawn[row.name] = found_of(row, psnr(made, wanted), kept, comparison)
        if self.extractor is not None:
            with stages.stage("measure images") as tick:
                described = self.measure(rows, self.extractor, self.pictures(wanted), tick)
        self.images = {reference: wanted, **self.images}
        return Judgement(
            reference,
            is_latent(wanted),
            drawn,
            described,
            network=None if self.extractor is None else self.extractor.name,
            real_count=None if self.real is None else len(self.real.features),
            floor=self.floor,
        )

    def draw(
        self, sampler: Sampler | RunTable, new_step: Callable[[], Step], batch: int, tick: Callable[[], None]
    ) -> Tensor:
        options: dict[str, Any] = {"guidance": self.guidance.scale, "null_class": self.null_class}
        return sampler.run_batches(new_step, self.noise, self.labels, batch, on_step=lambda _: tick(), **options)

    def measure(self, rows: Sequence[Row], extractor: Extractor, wanted: np.ndarray, tick: Any) -> dict[str, Described]:
        """What the network says of the images of every row; `wanted`: pictures of the reference, uint8 [n, H, W, 3]."""
        found = {}
        for row in rows:
            tick(row.name)
            pictures = self.pictures(self.images[row.name])
            features, logits = extractor.describe(pictures)
            pairs = extractor.pair_distance(pictures[:PAIRS], wanted[:PAIRS]) if extractor.maps else None
            found[row.name] = Described(
                None if pairs is None else float(pairs.mean()),
                None if pairs is None else float(pairs.std(ddof=1) / len(pairs) ** 0.5),
                None if logits is None else inception_score(logits),
                None if self.real is None else distances(features, self.real),
            )
        return found

    def write_npz(self, folder: Path) -> None:
        """A file for each row, as the ADM evaluation suite reads them: arr_0 uint8 [n, H, W, 3], arr_1 labels."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, images in self.images.items():
            buffer = io.BytesIO()
            np.savez(buffer, self.pictures(images), self.labels.numpy())
            stem = "".join(letter if letter.isalnum() or letter in ".-+" else "_" for letter in name)
            write_whole(folder / f"{stem}.npz", buffer.getvalue(), NPZ)


def found_of(row: Row, values: Tensor, kept: Sequence[Sequence[np.ndarray]], comparison: Comparison) -> Drawn:
    """The figures of a row's images; `values`: their PSNR [B]; `kept`: tokens [B] of each step of each run, if any."""
    drawn = Drawn(float(values.mean()), float(values.std() / len(values) ** 0.5))
    if not kept:
        return drawn
    counts = np.concatenate([np.concatenate(run) for run in kept])
    drawn = replace(drawn, kept_tokens=float(counts.mean()))
    candidate = next(candidate for candidate in comparison.candidates if candidate.name == row.name)
    if not candidate.planner.schedule.data_dependent:
        return drawn
    return replace(drawn, gmacs=candidate.cost_of(counts) / len(values))  # what these cost, not what was expected


def distances(found: Doubles, real: Real) -> Distances:
    """Distances of features to those of real images, of which there are at least as many."""
    kernel, error = kernel_distance(found, real)
    precision, recall = precision_recall(found, real.features[: len(found)])
    return Distances(frechet_distance(found, real), kernel, error, precision, recall)
