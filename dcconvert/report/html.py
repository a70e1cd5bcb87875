"""The pages of a report, rendered from the templates beside this file. No HTML is written in Python."""

from __future__ import annotations

import base64
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from dcconvert.report.tables import shown


def render(template: str, **values: object) -> str:
    """A whole page. The values are escaped."""
    return environment().get_template(template).render(values)


@cache
def environment() -> Environment:
    """Where templates are found, and the filters that they use."""
    result = Environment(
        loader=PackageLoader("dcconvert.report"),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelt name is an error instead of a gap on the page
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    result.filters |= {"shown": shown, "data_uri": data_uri}
    return result


def data_uri(png: bytes) -> str:
    """PNG data as a data URI, which holds all of it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
