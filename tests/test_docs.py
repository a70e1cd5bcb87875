"""The pages: every file that they link to is there, and every page is in the index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#:]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = LINK.findall(page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_index_has_every_page():
    listed = {Path(link).name for link in LINK.findall((ROOT / "docs" / "index.md").read_text())}
    assert listed == {page.name for page in PAGES} - {"README.md", "index.md"}


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_project_that_a_page_names_are_there(page):
    modules = re.findall(r"python -m (benchmarks|training)\.(\w+)", page.read_text())
    assert not [name for folder, name in modules if not (ROOT / folder / f"{name}.py").is_file()]
