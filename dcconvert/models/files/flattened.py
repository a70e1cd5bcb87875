"""The tensors of a file by their dotted names, however they are nested in dicts, lists and placeholders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dcconvert.models.files.inert_pickle import PARAMETERS, SUBCLASS, Inert, Named
from dcconvert.passes.ir.errors import UsageError

MAX_DEPTH = 64
MAX_VISITS = 200_000  # dicts may share parts, so that a small file can be walked through without end
MAX_NAME, MAX_PATH = 200, 500  # characters of a key, and of all keys down to a tensor
OF_MODULES = ("_modules", "_parameters", "_buffers")  # attributes of a pickled nn.Module; its state dict skips them
UNSAVED = "_non_persistent_buffers_set"


@dataclass(frozen=True)
class Entry:
    """A tensor of a file; `value` is a placeholder for one of a kind that is not read. `group`: the dict it lies in."""

    name: str
    value: Any
    group: int

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.value, Tensor)


class Walk:
    """One pass over a file's content. `scalars`: the numbers of each key, wherever it is."""

    def __init__(self, content: Any) -> None:
        self.scalars: dict[str, set[int | float]] = {}
        self.visits = 0
        self.entries: list[Entry] = []
        self.visit(content, "", 0, 0)

    def visit(self, value: Any, path: str, group: int, depth: int) -> None:
        if isinstance(value, Tensor) or is_odd_tensor(value):
            self.entries.append(Entry(path, value, group))
            return
        if depth > MAX_DEPTH:
            return
        self.visits += 1
        if self.visits > MAX_VISITS:
            raise UsageError(f"more than {MAX_VISITS} values are nested in it; save the state dict alone.")
        group = self.visits
        for key, inner in parts(value):
            name = as_name(key)
            below = path if name in OF_MODULES and is_module(value) else f"{path}.{name}".lstrip(".")
            if len(below) > MAX_PATH:
                continue
            if isinstance(inner, int | float) and not isinstance(inner, bool):
                named = path.rpartition(".")[2] if isinstance(value, list | tuple) else name
                self.scalars.setdefault(named, set()).add(inner)
            elif isinstance(inner, Tensor | Inert | Mapping | list | tuple):
                self.visit(inner, below, group, depth + 1)


def parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a dict, a list or a placeholder holds, by key."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, Inert):
        states = value.state if isinstance(value.state, tuple) else (value.state,)  # of a class with slots: two dicts
        args = value.args if isinstance(value.args, tuple) else ()
        for state in (*states, *args):
            if isinstance(state, Mapping):
                yield from saved(state).items()
        yield from value.entries.items()
        yield from enumerate(value.members)


def is_module(value: Any) -> bool:
    """Whether these are the attributes of a pickled nn.Module, or a placeholder that has them."""
    state = value.state if isinstance(value, Inert) else value
    return isinstance(state, Mapping) and all(name in state for name in OF_MODULES)


def saved(state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """An object's attributes; of a pickled nn.Module without the buffers that its state dict leaves out."""
    buffers, left_out = state.get("_buffers"), state.get(UNSAVED)
    if not (isinstance(buffers, Mapping) and isinstance(left_out, list)):
        return state
    names = [name for name in left_out if isinstance(name, str)]
    return {**state, "_buffers": {name: value for name, value in buffers.items() if name not in names}}


def is_odd_tensor(value: Any) -> bool:
    """Whether a placeholder stands for a tensor: sparse, quantised, of a subclass, or pickled without torch.save."""
    return isinstance(value, Inert) and (
        value.name.startswith("torch._utils._rebuild_") or value.name in (*PARAMETERS, SUBCLASS)
    )


def kind_of(value: Inert) -> str:
    """What a placeholder for a tensor is called."""
    args = value.args if isinstance(value.args, tuple) else ()
    if value.name in PARAMETERS and args and isinstance(args[0], Inert):
        return kind_of(args[0])
    names = [part.name for part in args[:2] if isinstance(part, Named)]  # of a subclass
    return printable((names or [value.name])[-1].rpartition(".")[2][:MAX_NAME])


def as_name(key: Any) -> str:
    """A key as it can be shown in one line."""
    if isinstance(key, bytes):
        key = key.decode("latin-1")
    if isinstance(key, int) and not -(2**63) < key < 2**63:
        return "number"
    text = key if isinstance(key, str) else str(key) if isinstance(key, int | float | bool | None) else "key"
    return printable(text[:MAX_NAME])


def printable(text: str) -> str:
    """The text with what does not print in one line as escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
