"""Records out of JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from dcconvert.records import BESIDE, Record, Rows, stated


@dataclass(frozen=True)
class Point(Record):
    x: float
    y: float | None = None


@dataclass(frozen=True)
class Points(Rows):
    rows: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Drawing(Record):
    points: Points
    named: dict[str, tuple[Point, ...]]
    origin: Point | None = None
    label: str | int | None = None


def test_records_are_read_with_all_that_is_in_them():
    read = Drawing.from_json(
        {"points": [{"x": 1}, {"x": 2, "y": 3}], "named": {"a": [{"x": 4}]}, "origin": {"x": 0}, "label": 7}
    )
    assert read == Drawing(Points((Point(1), Point(2, 3))), {"a": (Point(4),)}, Point(0), 7)


def test_unknown_keys_are_ignored_and_missing_ones_take_their_default():
    assert Point.from_json({"x": 1, "z": 2}) == Point(1, None)
    with pytest.raises(TypeError, match="'x'"):
        Point.from_json({"y": 1})


@pytest.mark.parametrize("empty", [None, {}])
def test_an_empty_section_is_none(empty):
    assert Drawing.from_json({"points": [], "named": {}, "origin": empty}) == Drawing(Points(), {})


def test_rows_are_false_without_any():
    assert not Points()
    assert Points((Point(1),))


@dataclass(frozen=True)
class Label(Record):
    class_: int
    name: str | None = None
    colour: str | None = stated()
    place: int = field(default=0, metadata=BESIDE)


def test_what_is_written_and_what_is_left_out():
    assert Label(3).to_json() == {"class": 3, "colour": None}
    assert Label.from_json({"class": 3, "name": "boot"}) == Label(3, "boot")
