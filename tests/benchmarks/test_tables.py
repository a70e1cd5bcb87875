"""The tables of README and docs are those of the committed results."""

from __future__ import annotations

import pytest

from benchmarks import tables


@pytest.mark.parametrize("page", tables.PAGES)
def test_pages_show_the_committed_results(page: str) -> None:
    text = (tables.ROOT / page).read_text()
    assert tables.MARKER.search(text), f"{page} holds no table"
    assert tables.rewritten(text) == text, "run python -m benchmarks.tables"
