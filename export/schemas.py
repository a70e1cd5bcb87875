"""What the JSON files of a bundle may hold: one schema for each file, and the message that says what does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dcconvert.export.disk.json_text import AGAIN
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.serialise.treespec import shown

Shape = Callable[[Any, str], None]  # takes a value and its place in the file; raises Mismatch
MOST_STEPS = 100_000  # of a run
MOST_TOKENS = 1 << 20  # of a sample
MOST_PACKED = 1 << 30  # tokens of a batch, and slots of its attention rows
MOST_NODES = 1_000_000


class Mismatch(Exception):  # noqa: N818  (never leaves this module)
    """A value that does not fit."""

    def __init__(self, place: str, found: Any, wanted: str) -> None:
        super().__init__(place, found, wanted)
        self.place, self.found, self.wanted = place, found, wanted


def fitting(data: Any, shape: Shape, path: Path, again: str = AGAIN) -> Any:
    """The data of a file, which fit a shape; UsageError names the file, the place in it, what is there and what should
    be."""
    try:
        shape(data, "")
    except Mismatch as error:
        place = error.place.removeprefix(".") or "the whole"
        fault = f"is {shown(error.found)}, but must be {error.wanted}"
        raise UsageError(f"{path}: {place} {'is missing' if error.found is MISSING else fault}; {again}") from None
    return data


MISSING = object()


def whole(low: int = 0, high: int = 1 << 40) -> Shape:
    wanted = f"a whole number from {low} to {high}"

    def check(value: Any, place: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise Mismatch(place, value, wanted)

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Shape:
    wanted = "a number" if low == -math.inf else f"a number from {low:g} to {high:g}"

    def check(value: Any, place: str) -> None:
        if type(value) not in (int, float) or not (math.isfinite(value) and low <= value <= high):
            raise Mismatch(place, value, wanted)

    return check


def text(most: int = 100_000) -> Shape:
    def check(value: Any, place: str) -> None:
        if not isinstance(value, str) or len(value) > most:
            raise Mismatch(place, value, f"a text of at most {most} characters")

    return check


def choice(*known: Any) -> Shape:
    def check(value: Any, place: str) -> None:
        if not any(type(value) is type(one) and value == one for one in known):
            raise Mismatch(place, value, f"one of {', '.join(map(str, known))}")

    return check


def anything(value: Any, place: str) -> None:
    pass


def nullable(shape: Shape) -> Shape:
    return lambda value, place: None if value is None else shape(value, place)


def listing(shape: Shape, least: int = 0, most: int = MOST_NODES) -> Shape:
    def check(value: Any, place: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            size = f"{least}" if least == most else f"{least} to {most}"
            raise Mismatch(place, value, f"a list of {size} entries")
        for number, item in enumerate(value):
            shape(item, f"{place}[{number}]")

    return check


def mapping(shape: Shape) -> Shape:
    def check(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise Mismatch(place, value, "an object")
        for name, item in value.items():
            shape(item, f"{place}.{name[:80]}")

    return check


def record(needed: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None, more: bool = False) -> Shape:
    """An object with these keys; with `more`, others are not looked at."""
    known = {**needed, **(optional or {})}

    def check(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise Mismatch(place, value, "an object")
        for name in needed:
            if name not in value:
                raise Mismatch(f"{place}.{name}", MISSING, "")
        for name, item in value.items():
            if name in known:
                known[name](item, f"{place}.{name}")
            elif not more:
                raise Mismatch(f"{place}.{name[:80]}", item, "left out")

    return check


FLAG, TEXT, NAMES = choice(True, False), text(), listing(text(1000))
SIZES = listing(whole(0, 1 << 40), most=16)

BUCKETS = record(
    {
        "buckets": listing(
            record(
                {
                    "batch": whole(1, MOST_TOKENS),
                    "tokens": whole(1, MOST_PACKED),
                    "rows": whole(1, MOST_TOKENS),
                    "row_tokens": whole(1, MOST_TOKENS),
                    "tile": whole(1, MOST_PACKED),
                }
            ),
            least=1,
            most=10_000,
        ),
        "tokens": whole(1, MOST_TOKENS),
        "expected_waste": number(),
    }
)
SAMPLER = record(
    {"prediction": text(100), "steps": whole(1, MOST_STEPS), "solver": text(100)},
    {"class_names": nullable(listing(text(1000)))},
    more=True,
)
CONFIG = record(
    {
        "depth": whole(1, 10_000),
        "width": whole(1, 1 << 20),
        "heads": whole(1, 10_000),
        "patch": whole(1, 1 << 16),
        "image_size": whole(1, 1 << 16),
    },
    {
        "in_channels": whole(1, 1 << 16),
        "num_classes": whole(0, 1 << 24),
        "learn_sigma": FLAG,
        "null_class": FLAG,
        "mlp_width": whole(0, 1 << 22),
    },
)
UPCYCLING = record(
    {name: anything for name in ("train", "data", "samples", "ratios")}
    | {"log": listing(record({"psnr": anything}, more=True), least=1)},
    {"earlier": listing(mapping(anything))},
    more=True,
)
MANIFEST = record(
    {},  # formats differ; the version has its own message
    {
        "format_version": whole(0, 1000),
        "conversion": mapping(anything),
        "grid": listing(whole(1, MOST_TOKENS), 2, 2),
        "tokens": whole(1, MOST_TOKENS),
        "buckets": BUCKETS,
        "ladder": BUCKETS,  # up to format 3
        "steps": whole(1, MOST_STEPS),
        "most_buckets": whole(2, 10_000),
        "sampler": SAMPLER,
        "config": CONFIG,
        "parity": mapping(nullable(number())),
        "calibration": record({}, {"run_steps": whole(1, MOST_STEPS)}, more=True),
        "upcycling": UPCYCLING,
        "files": mapping(record({"sha256": text(64), "bytes": whole()})),
    },
    more=True,
)

INPUT = record(
    {"name": TEXT, "batched": FLAG, "shape": SIZES, "dtype": text(100)},
    {"value": anything, "rows": whole()},  # an argument, which `graph_json.decode` reads
)
REACH = record(
    {"held": whole(), "attentions": whole(), "share": number(0, 1), "head": whole(), "tail": whole(), "notes": NAMES}
)
STATE = record({"name": TEXT, "channels": whole(1), "width": whole(1), "dtype": text(100)})
SPEC = record(
    {
        "input_specs": listing(INPUT, least=1, most=1000),
        "in_spec": TEXT,
        "out_spec": TEXT,
        "grid": listing(whole(1, MOST_TOKENS), 2, 2),
        "width": whole(1),
        "depth": whole(0),
        "timestep": nullable(TEXT),
        "timestep_scale": number(1e-6, 1e9),
        "image": TEXT,
    },
    {
        **dict.fromkeys(("route_inputs", "live", "denoise_inputs", "constants", "prepare_inputs"), NAMES),
        "live_shapes": listing(SIZES),
        "states": listing(STATE, most=100_000),
        "updates": whole(0, 100),
        "update_dtype": text(100),
        "reach": nullable(REACH),
    },
)
SCHEDULE = record(
    {"kind": text(100), "ratio": number(1)},
    {
        "warm_up": whole(-1, MOST_STEPS),
        "refresh": whole(0, MOST_STEPS),
        "knots": listing(listing(number(), 2, 2)),
        "base": number(),
        "threshold": number(),
        "mean": number(0, 1),
        "centre": number(0, 1),
        "dense_first": whole(0, MOST_STEPS),
        "levels": listing(whole(1, MOST_TOKENS), most=10_000),
    },
)
PASS = record(
    {"name": TEXT, "matches": whole(), "notes": listing(TEXT), "nodes_before": whole(), "nodes_after": whole()}
    | {"seconds": number()}
)
NODE = record(
    {
        "name": TEXT,
        "op": choice("placeholder", "get_attr", "call_function", "output"),
        "target": TEXT,
        "args": listing(anything),
        "kwargs": mapping(anything),
    },
    {"parameter": FLAG},
)
GRAPH = record(
    {
        "version": whole(0, 1000),
        "spec": SPEC,
        "schedule": SCHEDULE,
        "passes": listing(PASS),
        "graphs": mapping(record({"version": whole(0, 1000), "nodes": listing(NODE)})),
    },
    {"method": mapping(anything), "options": mapping(anything)},  # "options" up to format 2
)

ROW = record(
    {"t": number(), "tau": number(), "outputs": listing(number(), least=1, most=1000)},
    {name: number() for name in ("state", "noise", "scale", "shift")} | {"weights": listing(number(), most=100)},
)
RUN = record(
    {"version": whole(0, 1000), "rows": listing(ROW, 1, 10_000), "prediction": text(100), "guidance": number()},
    {"name": text(1000), "fitted": FLAG},
)
