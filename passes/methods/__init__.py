"""The methods: one file each, and this registry, through which everything else finds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.methods.carry import Carry
from dcconvert.passes.methods.chunk import Chunk
from dcconvert.passes.methods.dc_dit import DcDit
from dcconvert.passes.methods.ddit import DDiT
from dcconvert.passes.methods.method import Method
from dcconvert.passes.methods.sparsedit import SparseDiT
from dcconvert.passes.methods.steps import Steps
from dcconvert.passes.methods.tome import ToMe

METHODS: dict[str, type[Method]] = {found.name: found for found in (Steps, Carry, Chunk, DcDit, SparseDiT, DDiT, ToMe)}
MODES = ("steps", "carry", "chunk")  # the project's own methods; the others are published ones
DEFAULT = "steps"  # the best at equal time without training (benchmarks/fitted.py)
PRESETS = tuple(name for name in METHODS if name not in MODES)


def find(name: str) -> type[Method]:
    """The method with this name; raises UsageError for an unknown name."""
    if name not in METHODS:
        raise UsageError(f"unknown method '{name}': choose one of {', '.join(METHODS)}")
    return METHODS[name]


def method_of(mode: str = DEFAULT, ratio: float | None = None, **options: Any) -> Method:
    """The method with this name and these options. In some methods, the ratio decides some of the options.

    Raises UsageError for an unknown method, an unknown option, or a value that is out of range.
    """
    found = find(mode)
    if unknown := sorted({*options} - {*found.option_names()}):
        known = ", ".join(found.option_names())
        raise UsageError(f"method {mode} has no option '{unknown[0]}': it has {known}")
    return found(**options) if ratio is None else found.for_ratio(ratio, **options)


def method_from_dict(data: Mapping[str, Any]) -> Method:
    """The method that a bundle was made with, from the output of `Method.as_dict` or from a bundle of format 2."""
    given = dict(data)
    if "guard" in given:  # its name up to format 3
        given["max_staleness"] = given.pop("guard")
    if "method" not in given:
        given = from_format_2(given)
    return method_of(str(given.pop("method")), **given)


def from_format_2(data: Mapping[str, Any]) -> dict[str, Any]:
    """Name and options of a method, from the options of a format 2 bundle, where all methods shared one set."""
    given = dict(data)
    mode, trunk, dechunk = given.pop("mode"), given.pop("trunk", "plain"), given.pop("dechunk", "gaussian")
    by_trunk = {"sparse-dense": "sparsedit", "patch-sizes": "ddit"}
    name = by_trunk.get(trunk, mode)
    if name == "chunk" and given.get("router") == "merge":
        name = "tome"
    elif name == "chunk" and dechunk != "gaussian":
        name = "dc-dit"
    return {"method": name, **{option: given[option] for option in find(name).option_names() if option in given}}
