"""The pieces of a page, and what the environment promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError

import dcconvert.report
from dcconvert.report.html import data_uri, environment
from dcconvert.report.tables import Table

TEMPLATES = Path(dcconvert.report.__file__).parent / "templates"


def rendered(call: str, **values: object) -> str:
    imports = '{% from "macros.html.j2" import limits, picture, section, table %}'
    return environment().from_string(imports + call).render(values)


def test_a_table():
    data = Table(("what", "<many>"), (False, True), (("<b>", "1.5"), (True, "not measured"), (False, "2")))
    text = rendered("{{ table(data) }}", data=data)
    assert '<th>what</th><th class="number">&lt;many&gt;</th>' in text
    assert '<td>&lt;b&gt;</td><td class="number">1.5</td>' in text
    assert '<td><span class="pass">passed</span></td><td class="number">not measured</td>' in text
    assert '<td><span class="fail">failed</span></td><td class="number">2</td>' in text
    assert rendered("{{ table(data) }}", data=Table(("what",), (False,), ())).strip() == ""


def test_a_section():
    text = rendered('{% call section("A & B") %}text{% endcall %}')
    assert "".join(text.split("\n")) == "<section><h2>A &amp; B</h2>text</section>"


def test_a_picture():
    text = rendered("{{ picture(png, caption) }}", png=b"\x89PNG", caption='"><script>')
    assert 'src="data:image/png;base64,iVBORw=="' in text
    assert "<script" not in text
    assert 'class="pixels"' not in text
    assert 'class="pixels"' in rendered("{{ picture(png, caption, pixels=true) }}", png=b"", caption="")
    assert rendered("{{ picture(none, '') }}").strip() == ""


def test_an_address_needs_no_escape():
    assert not set(data_uri(bytes(range(256)))) & set("<>&\"'")


def test_a_misspelt_name_is_an_error():
    with pytest.raises(UndefinedError):
        rendered("{{ rows }}")


def test_nothing_is_marked_as_safe_and_nothing_runs_or_is_fetched():
    for path in TEMPLATES.iterdir():
        text = path.read_text()
        assert path.name.endswith(".html.j2")
        for words in (
            "| safe",
            "|safe",
            "autoescape",
            "<script",
            "<link",
            "http://",
            "https://",
            " style=",
            " onload=",
        ):
            assert words not in text, f"{path.name}: {words}"
