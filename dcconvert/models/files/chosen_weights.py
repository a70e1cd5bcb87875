"""Which weights of a training file are taken: averaged ones before raw ones, wherever the script has put them.

Every dict and every common prefix under which the keys of a known model lie is a candidate. Wrappers (`module.`,
`_orig_mod.` and others) may be anywhere in a key.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from dcconvert.models.files.flattened import MAX_NAME, Entry, Walk, kind_of, printable
from dcconvert.models.files.inert_pickle import Inert
from dcconvert.models.files.tensor_files import Facts, read_file, some
from dcconvert.models.files.torch_file import SAVE_PLAINLY
from dcconvert.models.files.unquantised import unquantised
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError

# A tensor of each known model whose name tells where the model's keys begin, and what its keys begin with.
ANCHORS = ("x_embedder.proj.weight", "img_in.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight")
TOPS = frozenset(
    (
        *("x_embedder", "t_embedder", "y_embedder", "pos_embed", "blocks", "final_layer", "hnet"),
        *("context_embedder", "joint_blocks", "img_in", "txt_in", "time_in", "vector_in", "guidance_in"),
        *("double_blocks", "single_blocks", "t_block", "csize_embedder", "ar_embedder"),
    )
)
WRAPPERS = frozenset(
    (
        *("module", "model", "net", "denoiser", "_orig_mod", "_forward_module"),
        *("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module"),
    )
)
AVERAGED = {"ema", "emas", "swa", "avg", "averaged", "average", "shadow", "polyak", "emamodel", "modelema", "netema"}
RAW = {"online", "raw", "current", "collected", "backup", "nonema", "noema"}
OTHER = {"discriminator", "disc", "critic", "fake"}  # a network of the same kind that makes no images
TEACHER = {"teacher"}  # of a distillation; where it is an average, it is the better of both
DECAY = re.compile(r"0?\.9\d*")  # of an average, in its key
NO_WEIGHTS = {"opt", "optim", "optimizer", "optimizers", "expavg", "grad", "grads", "gradients"}
UNUSED_HEADS = re.compile(
    r"((repa_?)?projectors?|(repa_?)?proj(ection)?_?heads?|align(ment)?_\w+|repa\w*|logvar\w*|loss\w*|lpips\w*)\."
)
N_AVERAGED = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
COUNTERS = {N_AVERAGED, "initted", "step", "decay", "num_updates", "updates", "iteration", "global_step"}
FIXED = "pos_embed"  # is not trained, so some averages leave it out
STATED = ("num_classes", "num_heads", "dechunk_kernel_sigma")  # what options beside the weights may tell
WHOLE = 0.9  # of the tensors of the largest candidate; what holds fewer is a part of something else
MOST_VALUES = 8  # a stored byte: tied weights count twice, and packed ones are not read
MIN_AVERAGED = 8  # nameless tensors that are worth a line


@dataclass
class Weights:
    """The tensors that were taken from a file, under the names of a known model.

    `source`: the dotted key they lay under, "" at the top. `passed_over`: other weights, a text each. `dropped`: parts
    of the model that take no part in its output, and counters.
    """

    tensors: dict[str, Tensor]
    facts: Facts
    source: str = ""
    averaged: bool = False
    passed_over: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    count: int = 0  # of the tensors, where they were taken away
    stated: dict[str, int | float] = field(default_factory=dict)  # numbers of STATED that the training's options say

    def as_dict(self) -> dict[str, Any]:
        """For manifests and reports."""
        return {
            "key": self.source,
            "averaged": self.averaged,
            "tensors": self.count or len(self.tensors),
            "passed_over": self.passed_over,
            "left_out": self.dropped,
        }

    def lines(self) -> list[str]:
        """What was taken, and what not, for people; nothing for a file that holds one state dict."""
        if not (self.source or self.averaged or self.passed_over or self.dropped):
            return []
        where = self.source or "the top level"
        found = [
            f"Weights: {where}{' (averaged)' if self.averaged else ''}, {self.count or len(self.tensors)} tensors."
        ]
        found += [f"Passed over: {'; '.join(self.passed_over)}."] if self.passed_over else []
        found += [f"Left out, as no part of the output: {'; '.join(self.dropped)}."] if self.dropped else []
        return found


def read_weights(path: Path, key: str | None = None) -> Weights:
    """The weights of a checkpoint file: those under `key`, or the best.

    UsageError for a file without any, or without this key, UnsupportedModelError for quantised ones.
    """
    content, facts = read_file(path)
    try:
        walk = Walk(content)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    weights = chosen(path, walk.entries, content, facts, key)
    weights.tensors = unquantised(path, weights.tensors)
    found = {name: walk.scalars.get(name, set()) for name in STATED}
    weights.stated = {name: next(iter(values)) for name, values in found.items() if len(values) == 1}
    return weights


# --- candidates ----------------------------------------------------------------------------------------


def words(path: str) -> list[set[str]]:
    """The words of each part of a dotted key: model_EMA is model and ema, and nonema."""
    found = []
    for part in path.split("."):
        split = re.sub(r"([a-z])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3_\2\4", part).lower()
        plain = re.findall(r"[a-z]+", split)
        found.append({*plain, *(a + b for a, b in pairwise(plain))})
    return found


def is_averaged(path: str) -> bool:
    """Whether a key says that weights are averaged; the innermost part that says anything decides."""
    for part in reversed(words(path)):
        if part & RAW:
            return False
        if part & AVERAGED:
            return True
    return False


def mentions(path: str, terms: Collection[str]) -> bool:
    return any(part & set(terms) for part in words(path))


@dataclass
class Candidate:
    """Tensors under one key that may be the model. `names`: the model's name of each tensor."""

    prefix: str
    order: int
    averaged: bool
    entries: list[Entry] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def known(self) -> int:
        return sum(name.partition(".")[0] in TOPS for name in self.names)

    def rank(self, most: int) -> tuple[bool, bool, bool, bool, float, int]:
        """Less is better: whole, the network that makes the images, averaged, not called raw, averaged for longest, and
        first in the file."""
        whole = self.known >= WHOLE * most
        other, raw = mentions(self.prefix, OTHER), mentions(self.prefix, RAW | TEACHER)
        decay = max(map(float, DECAY.findall(self.prefix)), default=0.0)
        return (not whole, other, not self.averaged, raw, -decay, self.order)

    def said(self) -> str:
        kind = "averaged, " if self.averaged else ""
        return f"{self.prefix or 'the top level'} ({kind}{len(self.names)} tensors{self.note})"


def prefix_of(name: str, anchor: Sequence[str]) -> str | None:
    """What stands before a model's own name in a key, if the key is that of `anchor`; wrappers may lie in between."""
    parts = name.split(".")
    at = len(parts) - 1
    for wanted in reversed(anchor):
        while at >= 0 and parts[at] in WRAPPERS:
            at -= 1
        if at < 0 or parts[at] != wanted:
            return None
        at -= 1
    return ".".join(parts[: at + 1])


def candidates(entries: Sequence[Entry]) -> list[Candidate]:
    """The places of a file that hold the keys of a known model, in the file's order."""
    anchors = [anchor.split(".") for anchor in ANCHORS]
    places: dict[str, int] = {}
    for number, entry in enumerate(entries):
        for anchor in anchors:
            if entry.name.endswith(anchor[-1]) and (prefix := prefix_of(entry.name, anchor)) is not None:
                places.setdefault(prefix, number)
    places = {prefix: number for prefix, number in places.items() if not mentions(prefix, NO_WEIGHTS)}
    found = with_entries(entries, places)
    most = max((candidate.known for candidate in found), default=0)
    # What holds little is a part of another model: its tensors are told of there, and not taken out of it.
    whole = {candidate.prefix: candidate.order for candidate in found if candidate.known >= WHOLE * most}
    return with_entries(entries, whole)


def with_entries(entries: Sequence[Entry], places: Mapping[str, int]) -> list[Candidate]:
    """A candidate for each prefix of `places`, with the tensors of which it is the longest prefix."""
    counters = {entry.name.removesuffix(N_AVERAGED).rstrip(".") for entry in entries if entry.name.endswith(N_AVERAGED)}
    found = {
        prefix: Candidate(prefix, number, is_averaged(prefix) or not counters.isdisjoint(wrapped(prefix)))
        for prefix, number in places.items()
    }
    groups: dict[tuple[str, int], list[tuple[str, Entry]]] = defaultdict(list)
    for entry in entries:
        parts = entry.name.split(".")
        own = [prefix for at in range(len(parts)) if (prefix := ".".join(parts[:at])) in found]
        if own:
            start = own[-1].count(".") + 1 if own[-1] else 0
            name = ".".join(part for part in parts[start:] if part not in WRAPPERS)
            groups[own[-1], entry.group].append((name, entry))
    for (prefix, _), members in groups.items():
        if any(name.partition(".")[0] in TOPS for name, _ in members):
            found[prefix].names += [name for name, _ in members]
            found[prefix].entries += [entry for _, entry in members]
    return list(found.values())


def wrapped(prefix: str) -> list[str]:
    """The prefix, and what is left of it without the wrappers at its end."""
    found, parts = [prefix], prefix.split(".")
    while parts and parts[-1] in WRAPPERS:
        parts.pop()
        found.append(".".join(parts))
    return found


def nameless(entries: Sequence[Entry], raw: Candidate) -> list[Candidate]:
    """Averaged weights without names of their own, told by those of the raw ones.

    They are a list in the order of the parameters, or have names from which the dots were taken.
    """
    groups: dict[tuple[str, int], list[Entry]] = defaultdict(list)
    for entry in entries:
        prefix, _, _ = entry.name.rpartition(".")
        groups[prefix, entry.group].append(entry)
    undotted = {}
    for entry, name in zip(raw.entries, raw.names, strict=True):
        parts = entry.name.split(".")
        undotted.update({"".join(parts[start:]): name for start in range(len(parts))})
    found: list[Candidate] = []
    for (prefix, _), members in groups.items():
        if not is_averaged(prefix) or len(members) < MIN_AVERAGED or mentions(prefix, NO_WEIGHTS):
            continue
        last = [entry.name.rpartition(".")[2] for entry in members]
        made = Candidate(prefix, len(found), averaged=True, entries=members)
        if all(name.isdecimal() for name in last):
            made.names = names_in_order(members, raw)
            if not made.names:
                made.note = ", which have no names and do not match those of the raw weights"
            found.append(made)
        elif sum(name in undotted for name in last) >= WHOLE * len(members):
            made.names = [undotted.get(name, name) for name in last]
            found.append(made)
    return found


def names_in_order(members: Sequence[Entry], raw: Candidate) -> list[str]:
    """The names of a list of tensors, if it has the shapes of the raw ones, all or the trained, in their order."""
    shapes = [shape_of(entry) for entry in members]
    for fixed in (None, FIXED):
        pairs = [(name, entry) for name, entry in zip(raw.names, raw.entries, strict=True) if name != fixed]
        pairs = [(name, entry) for name, entry in pairs if name not in COUNTERS]
        if shapes == [shape_of(entry) for _, entry in pairs]:
            return [name for name, _ in pairs]
    return []


def shape_of(entry: Entry) -> tuple[int, ...] | None:
    return tuple(entry.value.shape) if isinstance(entry.value, Tensor) else None


# --- the choice ----------------------------------------------------------------------------------------


def chosen(path: Path, entries: Sequence[Entry], content: Any, facts: Facts, key: str | None = None) -> Weights:
    """The best candidate, or that of a key; where there is none, the largest dict of tensors, for messages about it."""
    found = candidates(entries)
    most = max((candidate.known for candidate in found), default=0)
    if not most:
        return largest(path, entries, content, facts)
    raws = [candidate for candidate in found if not candidate.averaged]
    if len(raws) == len(found):
        found += nameless(entries, raws[0])
    wanted = [candidate for candidate in found if candidate.names and candidate.prefix == key]
    if key is not None and not wanted:
        there = some([candidate.prefix or '""' for candidate in found if candidate.names])
        raise UsageError(f"{path}: no weights lie under {printable(key[:MAX_NAME])!r}: choose one of {there}.")
    best = min(wanted or found, key=lambda candidate: candidate.rank(most))
    others = [candidate for candidate in found if candidate is not best]
    used = {id(entry) for candidate in found for entry in candidate.entries}
    rest = [entry for entry in entries if id(entry) not in used and not entry.name.endswith(N_AVERAGED)]
    tensors = assembled(path, best)
    weights = Weights(tensors, facts, best.prefix, best.averaged)
    if best.averaged and FIXED not in tensors:
        weights.tensors |= fixed_tensor(raws)
    weights.passed_over = [candidate.said() for candidate in others]
    if rest:
        tops = list(dict.fromkeys(entry.name.partition(".")[0] for entry in rest))
        weights.passed_over.append(f"{len(rest)} other tensors ({some(tops)})")
    leave_out(weights)
    return weights


def fixed_tensor(raws: Iterable[Candidate]) -> dict[str, Tensor]:
    """The position table of the raw weights, which is the same in both."""
    for raw in raws:
        for name, entry in zip(raw.names, raw.entries, strict=True):
            if name == FIXED and isinstance(entry.value, Tensor):
                return {FIXED: entry.value}
    return {}


def assembled(path: Path, best: Candidate) -> dict[str, Tensor]:
    """A candidate's tensors by the model's names; UsageError for names that occur twice or are of no plain tensors."""
    made: dict[str, Tensor] = {}
    for name, entry in zip(best.names, best.entries, strict=True):
        if name in made:
            raise UsageError(
                f"{path}: some tensors appear twice, with and without a `module.` prefix ({name}); {SAVE_PLAINLY}."
            )
        if not isinstance(entry.value, Tensor):
            raise UnsupportedModelError(
                f"{path}: {name} is not a plain tensor ({kind_of(entry.value)}): save it as a plain float32 tensor."
            )
        made[name] = entry.value
    check_stored(path, made)
    return made


def check_stored(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """UsageError for tensors that repeat few stored values: as contiguous fp32 they might fill any memory."""
    storages = {}
    for name, value in tensors.items():
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if value.numel() * value.element_size() > storage.nbytes():
            raise UsageError(
                f"{path}: {name} is {list(value.shape)} on {storage.nbytes()} stored bytes (an expanded tensor): save "
                "contiguous tensors."
            )
    if sum(value.numel() for value in tensors.values()) > MOST_VALUES * (sum(storages.values()) + 2**20):
        raise UsageError(f"{path}: its tensors share too few stored bytes: save each as a tensor of its own.")


def leave_out(weights: Weights) -> None:
    """Remove what takes no part in the output: heads of a training loss, and counters."""
    heads: dict[str, int] = defaultdict(int)
    for name in list(weights.tensors):
        if name in COUNTERS and weights.tensors[name].numel() <= 1:
            del weights.tensors[name]
            weights.dropped.append(name)
        elif UNUSED_HEADS.match(name):
            del weights.tensors[name]
            heads[name.partition(".")[0]] += 1
    weights.dropped += [f"{head} ({count} tensors)" for head, count in heads.items()]


def largest(path: Path, entries: Sequence[Entry], content: Any, facts: Facts) -> Weights:
    """The group with most named tensors, of a file that holds no known model."""
    groups: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        if not entry.name.rpartition(".")[2].isdecimal() and not mentions(entry.name, NO_WEIGHTS):
            groups[entry.group].append(entry)
    best = max(groups.values(), key=len, default=[])
    tensors = {entry.name: entry.value for entry in best if isinstance(entry.value, Tensor)}
    check_stored(path, tensors)
    if not tensors:
        raise UsageError(f"{path}: holds no named tensors ({described(content)}); {SAVE_PLAINLY}.")
    return Weights(tensors, facts)


def described(content: Any) -> str:
    if isinstance(content, Inert):
        return f"found the pickled code {printable(content.name[:100])}, which dcconvert does not run"
    if isinstance(content, dict):
        return (
            f"top-level keys: {some([printable(str(key)[:40]) for key in content])}"
            if content
            else "found an empty dict"
        )
    return f"found a {type(content).__name__}"
