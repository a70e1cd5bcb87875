"""Typed records: every section of a report is a frozen dataclass that can be read from JSON and written as JSON."""

from __future__ import annotations

import dataclasses
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

BESIDE = {"json": "never"}  # metadata of a field that is not written


def stated() -> Any:
    """A field whose default is None, and which is written even then."""
    return dataclasses.field(default=None, metadata={"json": "always"})


class Record:
    """A dataclass that can be read from JSON and written as it.

    Keys that have no field are ignored, and fields that have no key take their default, so that reports of older
    versions, which had fewer or other keys, can be read. If a key is a Python keyword, its field ends in an underscore.
    """

    renamed: ClassVar[dict[str, str]] = {}  # keys of older versions, and the fields that hold them now

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Raises TypeError if a key is missing and its field has no default."""
        kinds = {name: kind for name, kind in get_type_hints(cls).items() if get_origin(kind) is not ClassVar}
        data = {cls.renamed.get(name, name): value for name, value in data.items()}
        return cls(**{name: read(kind, data[key]) for name, kind in kinds.items() if (key := name.rstrip("_")) in data})

    def to_json(self) -> dict[str, Any]:
        """The fields by name, with the records in them. A None that is the default is left out, unless `stated`."""
        found = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value, kept = getattr(self, field.name), field.metadata.get("json")
            if kept != "never" and (kept == "always" or value is not None or field.default is not None):
                found[field.name.rstrip("_")] = written(value)
        return found


class Rows(Record):
    """A section that is a list in JSON. Its only field, `rows`, holds the items; without items it is false."""

    rows: tuple[Any, ...]

    @classmethod
    def from_json(cls, data: Any) -> Self:
        return super().from_json({"rows": data})

    def __bool__(self) -> bool:
        return bool(self.rows)


def written(value: Any) -> Any:
    """A value of a record in the form that JSON needs."""
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, list | tuple):
        return [written(item) for item in value]
    return {key: written(item) for key, item in value.items()} if isinstance(value, dict) else value


def read(kind: Any, value: Any) -> Any:
    """A value from JSON as `kind`: a record, a tuple or dict of records, or None where that is allowed.

    A value of any other kind is returned as it is.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType) and NoneType in inner:
        if value is None or value == {}:  # an empty section counts as None
            return None
        kinds = [part for part in inner if part is not NoneType]
        return read(kinds[0], value) if len(kinds) == 1 else value
    if origin is tuple:
        return tuple(read(inner[0], item) for item in value)
    if origin is dict:
        return {key: read(inner[1], item) for key, item in value.items()}
    return kind.from_json(value) if isinstance(kind, type) and issubclass(kind, Record) else value
