"""Tables of a report, declared by their columns; the page and the terminal print the same cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.table import Table as TerminalTable

R = TypeVar("R")
Cell = str | bool  # bool: whether a check passed


@dataclass(frozen=True)
class Column(Generic[R]):
    """A heading, and what a row shows below it. Numbers are aligned to the right."""

    heading: str
    cell: Callable[[R], Cell]
    number: bool = True


def words(heading: str, cell: Callable[[R], Cell]) -> Column[R]:
    """A column of text."""
    return Column(heading, cell, number=False)


@dataclass(frozen=True)
class Table:
    """Headings, which of them stand above numbers, and rows of cells."""

    headings: tuple[str, ...]
    numbers: tuple[bool, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @classmethod
    def of(cls, columns: Sequence[Column[R]], rows: Iterable[R]) -> Table:
        """The cells of `rows`, one line for each."""
        headings, numbers = (tuple(getattr(column, name) for column in columns) for name in ("heading", "number"))
        return cls(headings, numbers, tuple(tuple(column.cell(row) for column in columns) for row in rows))

    def __bool__(self) -> bool:
        return bool(self.rows)

    def for_terminal(self, title: str, **options: Any) -> TerminalTable:
        """The same table as rich prints it; `options` are those of `rich.table.Table`."""
        result = TerminalTable(title=title, title_justify="left", **options)
        for heading, number in zip(self.headings, self.numbers, strict=True):
            result.add_column(heading, justify="right" if number else "left")
        for row in self.rows:
            result.add_row(*map(str, row))
        return result


def number(value: float | None, digits: int = 3, missing: str = "not measured") -> str:
    """A number in a cell, with so many significant digits; 0 digits: a whole number."""
    if value is None:
        return missing
    return f"{value:,.0f}" if digits == 0 else f"{value:.{digits}g}" if abs(value) < 100 else f"{value:,.1f}"


def shown(value: float | None, form: str, unit: str = "", missing: str = "not measured") -> str:
    """A number in running text; `form` is a format specification."""
    return missing if value is None else f"{value:{form}}{unit}"
