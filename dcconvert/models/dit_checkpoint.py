"""DiT and SiT checkpoints: which weights a file holds, the architecture they imply, the module they make."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from dcconvert.export.files import file_sha256
from dcconvert.models.dc_dit import RefinedConfig, RefinedDiT
from dcconvert.models.dc_dit_checkpoint import check_refined, check_sigma, is_refined, refined_config
from dcconvert.models.dit import DiT, DiTConfig, sincos_positions
from dcconvert.models.files.chosen_weights import Weights, read_weights
from dcconvert.models.files.tensor_files import PREDICTIONS, plain, some
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError

HEADS_OF_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16}  # DiT-S, -B, -L, -XL (paper, table 1)
POSITIONS = "pos_embed"
MAX_TOKENS = 2**16  # a position table that is computed has no tensor in the file that bounds it
MOST_COMPARED = 2000  # names that are compared with those of a DiT, for a message
FAMILIES = (
    (r"(^|\.)(down_blocks|up_blocks|input_blocks|output_blocks)\.", "a U-Net"),
    (r"(^|\.)(single_)?transformer_blocks\.", "a diffusers transformer"),
    (r"(^|\.)(double_blocks|single_blocks)\.", "a Flux transformer"),
    (r"(^|\.)joint_blocks\.", "an MMDiT (Stable Diffusion 3)"),
    (r"(^|\.)cross_attn\.", "a transformer with cross-attention (PixArt or similar)"),
    (r"(^|\.)(in_blocks|out_blocks)\.", "a U-ViT"),
    (r"^x_embedder\.proj[12]\.|^in_context_", "JiT"),
    (r"^blocks\.\d+\.mlp\.w12\.", "LightningDiT or another DiT with gated MLPs"),
    (r"(^|\.)(encoder|decoder)\.", "an autoencoder"),
    (r"(^|\.)self_attn\.", "a language model"),
)


@dataclass
class Checkpoint:
    """A checkpoint file after checking: every tensor fp32, finite, and of the shape `config` asks for."""

    path: Path
    sha256: str
    config: DiTConfig
    state_dict: dict[str, Tensor] = field(repr=False)
    prediction: str
    class_names: list[str] | None
    source: str  # nested key the weights came from, such as "ema"; "" where they lay at the top
    refined: RefinedConfig | None = None  # of a DC-DiT, whose `config` is that of its blocks on tokens of one pixel
    prediction_assumed: bool = False  # neither the file nor the caller said what the model predicts
    null_class_assumed: bool = False  # nor whether the last class is the one of guidance
    weights: Weights | None = None  # which were taken, without the tensors


class LoadedDiT(DiT):
    """A DiT made from a checkpoint; `checkpoint_info` is that checkpoint without its tensors."""

    checkpoint_info: Checkpoint

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.config)
        self.checkpoint_info = replace(checkpoint, state_dict={})


class LoadedRefined(RefinedDiT):
    """A DC-DiT made from a checkpoint, as `LoadedDiT`."""

    checkpoint_info: Checkpoint

    def __init__(self, checkpoint: Checkpoint, config: RefinedConfig) -> None:
        super().__init__(config)
        self.checkpoint_info = replace(checkpoint, state_dict={})


def load_checkpoint(
    path: str | Path,
    heads: int | None = None,
    image_size: int | None = None,
    prediction: str | None = None,
    null_class: bool | None = None,
) -> LoadedDiT:
    """Return the DiT in the file at `path`, in eval mode; arguments and errors as in `read_checkpoint`.

    UnsupportedModelError for a DC-DiT and others, which `load_model` reads.
    """
    model = load_dit(path, heads, image_size, prediction, null_class)
    if not isinstance(model, LoadedDiT):
        raise UnsupportedModelError(f"{path}: a DC-DiT, not a DiT: read it with dcconvert.load_model.")
    return model


def load_dit(
    path: str | Path,
    heads: int | None = None,
    image_size: int | None = None,
    prediction: str | None = None,
    null_class: bool | None = None,
    weights: Weights | None = None,
) -> LoadedDiT | LoadedRefined:
    """Return the DiT or DC-DiT in the file at `path`, in eval mode; arguments and errors as in `read_checkpoint`."""
    checkpoint = read_checkpoint(path, heads, image_size, prediction, null_class, weights)
    with torch.device("meta"):  # the file's tensors become the parameters: the weights are in memory once
        model = LoadedRefined(checkpoint, checkpoint.refined) if checkpoint.refined else LoadedDiT(checkpoint)
    model.load_state_dict(checkpoint.state_dict, assign=True)
    return model.eval()


def read_checkpoint(
    path: str | Path,
    heads: int | None = None,
    image_size: int | None = None,
    prediction: str | None = None,
    null_class: bool | None = None,
    weights: Weights | None = None,
) -> Checkpoint:
    """Read and check a checkpoint.

    `heads`, `image_size` (latent pixels), `prediction` ("eps" or "flow") and `null_class` (whether the last row of the
    class table is the "no class" of guidance) tell what the file does not. `weights`: what was read from it already.
    Raises UsageError for a file that cannot be read or lacks something, UnsupportedModelError for a
    readable one that holds another architecture.
    """
    path = Path(path)
    if prediction is not None and prediction not in PREDICTIONS:
        raise UsageError(f"Unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}.")
    weights = weights or read_weights(path)
    tensors, facts = weights.tensors, weights.facts
    known = {**stated(path, weights, heads), **facts.config}
    if null_class is not None:
        known["null_class"] = null_class
    refined = None
    if is_refined(tensors):
        refined = refined_config(
            path,
            tensors,
            lambda width: choose_heads(path, width, known.get("heads") if heads is None else heads),
            bool(known.get("null_class", True)),
        )
        check_refined(path, tensors, refined)
        check_sigma(path, weights.stated.get("dechunk_kernel_sigma"), refined)
        config = refined.dit()
    else:
        _check_keys(path, tensors)
        config = infer_config(path, tensors, heads, image_size, known)
        _check_shapes(path, tensors, config)
    state_dict = {name: plain(path, name, tensor) for name, tensor in tensors.items()}
    if POSITIONS not in state_dict:
        state_dict[POSITIONS] = sincos_positions(config.width, config.grid)
    names = facts.class_names
    if names is not None and len(names) != config.num_classes:
        raise UsageError(f"{path}: metadata names {len(names)} classes, but the tensors have {config.num_classes}.")
    predicts = prediction or facts.prediction
    return Checkpoint(
        path,
        file_sha256([path]),
        config,
        state_dict,
        predicts or "eps",
        names,
        weights.source,
        refined,
        prediction_assumed=not predicts,
        null_class_assumed=config.null_class and "null_class" not in known,
        weights=replace(weights, tensors={}, count=len(tensors)),
    )


def stated(path: Path, weights: Weights, option: int | None) -> dict[str, int]:
    """What the options beside the weights tell of a model's configuration.

    UsageError for heads that published models of this width do not have, unless the caller says how many there are
    (`option`): the number may be that of another model in the same file.
    """
    found: dict[str, int] = {}
    table = weights.tensors.get("y_embedder.embedding_table.weight")
    shape = [] if table is None else list(table.shape)
    if len(shape) != 2:
        return {}
    rows, width = shape
    classes, heads = weights.stated.get("num_classes"), weights.stated.get("num_heads")
    if classes in (rows, rows - 1):
        found["null_class"] = int(classes != rows)
    if isinstance(heads, int) and heads > 0 and width % heads == 0:
        found["heads"] = heads
        usual = HEADS_OF_WIDTH.get(width, heads)
        if option is None and usual != heads:
            raise UsageError(
                f"{path}: its options say num_heads is {heads}, but a DiT of width {width} usually has {usual}: "
                "pass --heads."
            )
    return found


# --- architecture --------------------------------------------------------------------------------------


def infer_config(
    path: Path,
    tensors: Mapping[str, Tensor],
    heads: int | None = None,
    image_size: int | None = None,
    known: Mapping[str, int] | None = None,
) -> DiTConfig:
    """The configuration that the tensors' names and shapes imply; `known` is one the file itself states."""
    known = known or {}
    width, in_channels, patch, patch_columns = _shape(path, tensors, "x_embedder.proj.weight", 4)
    if patch != patch_columns:
        raise UnsupportedModelError(f"{path}: patches are {patch}x{patch_columns}, but only square ones are supported.")
    rows, _ = _shape(path, tensors, "y_embedder.embedding_table.weight", 2)
    hidden, _ = _shape(path, tensors, "blocks.0.mlp.fc1.weight", 2)
    outputs, _ = _shape(path, tensors, "final_layer.linear.weight", 2)
    if outputs not in (plain := patch**2 * in_channels, 2 * plain):
        what = (
            f"final_layer.linear.weight has {outputs} rows, but a DiT with this patch size has {plain} or {2 * plain}"
        )
        raise UsageError(f"{path}: wrong shapes: {what}.")
    null_class = bool(known.get("null_class", rows > 1))  # a single class is trained without
    config = DiTConfig(
        depth=len(_block_indices(tensors)),
        width=width,
        heads=choose_heads(path, width, known.get("heads") if heads is None else heads),
        patch=patch,
        image_size=_choose_image_size(path, tensors, patch, image_size, known.get("image_size")),
        in_channels=in_channels,
        num_classes=rows - int(null_class),
        learn_sigma=outputs == 2 * plain,
        null_class=null_class,
        mlp_width=0 if hidden == 4 * width else hidden,
    )
    chosen = {"heads", "mlp_width"}  # the option wins; 0 and 4 * width mean the same
    for name, value in config.as_dict().items():
        if name not in chosen and known.get(name, value) != value:
            raise UsageError(f"{path}: metadata says {name} is {known[name]}, but the tensors say {value}.")
    return config


def _shape(path: Path, tensors: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    shape = tuple(tensors[name].shape)
    if len(shape) != ndim or 0 in shape:
        raise UsageError(f"{path}: wrong shapes: {name} is {list(shape)}, a DiT has {ndim} non-empty axes there.")
    return shape


def choose_heads(path: Path, width: int, heads: int | None) -> int:
    chosen = HEADS_OF_WIDTH.get(width, 0) if heads is None else heads
    if chosen > 0 and width % chosen == 0:
        return chosen
    divisors = [n for n in range(1, min(width, 1024) + 1) if width % n == 0]
    usual = [n for n in divisors if 16 <= width // n <= 128 and width // n % 8 == 0]  # sizes attention kernels take
    problem = (
        f"the number of heads cannot be inferred from width {width}"
        if heads is None
        else f"{number(heads)} heads do not fit width {width}"
    )
    raise UsageError(f"{path}: {problem}: pass --heads with one of {', '.join(map(str, usual or divisors))}.")


def number(value: int) -> str:
    """An option's number as it can be shown: one of thousands of digits cannot."""
    return str(value) if -(2**63) < value < 2**63 else "that many"


def _choose_image_size(
    path: Path, tensors: Mapping[str, Tensor], patch: int, option: int | None, known: int | None
) -> int:
    """Latent pixels, from the position table if there is one; otherwise from the option or the metadata."""
    if POSITIONS not in tensors:
        size = known if option is None else option
        if size is None:
            raise UsageError(
                f"{path}: cannot infer the image size without {POSITIONS}: pass --image-size (latent pixels)."
            )
        if size < 1 or size % patch:
            raise UsageError(f"{path}: image size {number(size)} is not a positive multiple of the patch size {patch}.")
        if (size // patch) ** 2 > MAX_TOKENS:
            raise UsageError(
                f"{path}: image size {number(size)} gives more than {MAX_TOKENS} tokens: pass a smaller one."
            )
        return size
    tokens = _shape(path, tensors, POSITIONS, 3)[1]
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise UnsupportedModelError(f"{path}: {POSITIONS} has {tokens} positions, but only square grids are supported.")
    if option is not None and option != side * patch:
        raise UsageError(
            f"{path}: --image-size is {number(option)}, but {POSITIONS} is for {side * patch} latent pixels."
        )
    return side * patch


def _shapes_of(config: DiTConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in DiT(config).state_dict().items()}


@functools.cache
def _known_kinds() -> frozenset[str]:
    return frozenset(map(_kind, _shapes_of(DiTConfig(depth=1, width=4, heads=1, patch=1, image_size=1))))


def _kind(name: str) -> str:
    """The tensor's name with the block number taken out."""
    return re.sub(r"^blocks\.(0|[1-9]\d{0,8})\.", "blocks.N.", name)


def _block_indices(names: Collection[str]) -> list[int]:
    return sorted({int(match[1]) for name in names if (match := re.match(r"blocks\.(0|[1-9]\d{0,8})\.", name))})


def _check_keys(path: Path, names: Collection[str]) -> None:
    """Raise unless the names are those of a DiT: all of them (the position table may be absent), no others."""
    known = _known_kinds()
    kinds = {_kind(name) for name in names}
    if len(kinds & known) < len(known) / 2:
        _refuse_architecture(path, names)
    if extra := [name for name in names if _kind(name) not in known]:
        raise UnsupportedModelError(
            f"{path}: looks like {_family(extra) or 'a variant of DiT'}: a DiT/SiT does not have "
            f"{len(extra)} of its tensors ({some(extra)}); pass such a model as an nn.Module to dcconvert.convert() "
            "(docs/models.md)."
        )
    indices = _block_indices(names)
    if gap := [i for i, index in enumerate(indices) if i != index]:
        raise UsageError(f"{path}: missing keys: all of blocks.{gap[0]} (others go up to blocks.{indices[-1]}).")
    blocks = range(max(len(indices), 1))
    expected = {kind.replace(".N.", f".{i}.") for kind in known for i in blocks} - {POSITIONS}
    if missing := sorted(expected - set(names)):
        raise UsageError(f"{path}: {len(missing)} missing keys ({some(missing)}): save the whole state dict.")


def _check_shapes(path: Path, tensors: Mapping[str, Tensor], config: DiTConfig) -> None:
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {shape}"
        for name, shape in _shapes_of(config).items()
        if name in tensors and list(tensors[name].shape) != shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UsageError(f"{path}: wrong shapes: {wrong[0]}{more}; its tensors do not belong to one DiT.")


def _refuse_architecture(path: Path, names: Collection[str]) -> NoReturn:
    kinds = {re.sub(r"\d+", "0", name): name for name in list(names)[:MOST_COMPARED]}
    near = [
        (difflib.SequenceMatcher(None, match, wanted).ratio(), f"{kinds[match]} for {wanted}")
        for wanted in (kind.replace(".N.", ".0.") for kind in _known_kinds())
        for match in difflib.get_close_matches(wanted, kinds, n=1, cutoff=0.5)
    ]
    misses = ", ".join(text for _, text in sorted(near, reverse=True)[:2]) or "none"
    raise UnsupportedModelError(
        f"{path}: found {_family(names) or 'an unknown architecture'} ({len(names)} tensors: {some(names)}), but only "
        f"Facebook's DiT/SiT key names are supported in files (nearest miss: {misses}); "
        "pass such a model as an nn.Module to dcconvert.convert()."
    )


def _family(names: Collection[str]) -> str | None:
    return next((title for pattern, title in FAMILIES if any(re.search(pattern, name) for name in names)), None)
