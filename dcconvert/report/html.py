"""The pieces that report pages are made of: sections, tables, numbers, pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
td.number, th.number { text-align: right; white-space: nowrap }
.wide { overflow-x: auto } figure { margin: 1rem 0 } figcaption { font-size: .9rem; opacity: .8 }
img { max-width: 100%; height: auto; background: #fff } img.pixels { image-rendering: pixelated }
.pass, .fail { color: #fff; border-radius: .3rem; padding: .05rem .45rem; white-space: nowrap }
.pass, .fail { print-color-adjust: exact }
.pass { background: #006d50 } .fail { background: #b03a00; font-weight: 700 }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0 }
.card { background: var(--soft); border-radius: .5rem; padding: .6rem 1rem; min-width: 9rem }
.card b { display: block; font-size: 1.35rem } code { overflow-wrap: anywhere }
td:last-child:not(.number) { overflow-wrap: anywhere; min-width: 9rem }
@media print { body { max-width: none; margin: 0 } h2 { break-after: avoid } figure, tr { break-inside: avoid } }
"""


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page."""
    body = "\n".join(filter(None, sections))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>" if any(parts) else ""


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Cells are escaped; numbers are right-aligned; a Markup cell goes in as it is."""
    lines = [list(row) for row in rows]
    numeric = [all(isinstance(line[i], Number) for line in lines) for i in range(len(headers))]

    def cells(tag: str, values: Sequence[Any]) -> str:
        parts = []
        for value, number in zip(values, numeric, strict=True):
            text = value if isinstance(value, Markup) else html.escape(str(value))
            parts.append(f"<{tag}{' class=number' if number else ''}>{text}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    head, body = cells("th", headers), "".join(cells("td", line) for line in lines)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>' if lines else ""


class Markup(str):
    """Text that is HTML already."""


class Number(str):
    """A formatted number."""


def number(value: float | None, digits: int = 3, missing: str = "not measured") -> Number:
    if value is None:
        return Number(missing)
    text = f"{value:,.0f}" if digits == 0 else f"{value:.{digits}g}" if abs(value) < 100 else f"{value:,.1f}"
    return Number(text)


def shown(value: float | None, form: str, unit: str = "") -> str:
    """A number in running text; `form` is a format specification."""
    return "not measured" if value is None else f"{value:{form}}{unit}"


def picture(png: bytes, caption: str, pixels: bool = False) -> str:
    data, text = base64.b64encode(png).decode(), html.escape(caption)
    kind = ' class="pixels"' if pixels else ""
    image = f'<img{kind} alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def milliseconds(values: dict[str, Any]) -> Number:
    middle, low, high = (shown(values[key], ".1f") for key in ("median", "p10", "p90"))
    return Number(middle if values["median"] is None else f"{middle} ({low} to {high})")
