"""Tables: cells under their headings, on the page and in the terminal."""

from __future__ import annotations

import pytest

from dcconvert.report.tables import Column, Table, number, shown, words

COLUMNS: tuple[Column[tuple[str, float]], ...] = (
    words("what", lambda row: row[0]),
    Column("how many", lambda row: number(row[1])),
)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 3, "not measured"),
        (0.0, 3, "0"),
        (2e-7, 3, "2e-07"),
        (1.23456, 3, "1.23"),
        (99.94, 3, "99.9"),
        (1234.56, 3, "1,234.6"),
        (-1234.56, 3, "-1,234.6"),
        (1234.56, 0, "1,235"),
        (8, 0, "8"),
    ],
)
def test_numbers(value, digits, text):
    assert number(value, digits) == text


def test_numbers_in_running_text():
    assert shown(0.5, ".1%") == "50.0%"
    assert shown(2.0, ".2f", "x") == "2.00x"
    assert shown(None, ".2f", "x") == "not measured"
    assert shown(None, ".2f", missing="") == ""


def test_a_table_is_made_of_its_columns():
    made = Table.of(COLUMNS, [("one", 1.5), ("two", 2.0)])
    assert made == Table(("what", "how many"), (False, True), (("one", "1.5"), ("two", "2")))
    assert made
    assert not Table.of(COLUMNS, [])


def test_the_terminal_aligns_numbers_to_the_right():
    printed = Table.of(COLUMNS, [("one", 1.5)]).for_terminal("title")
    assert [column.justify for column in printed.columns] == ["left", "right"]
    assert [list(column.cells) for column in printed.columns] == [["one"], ["1.5"]]
