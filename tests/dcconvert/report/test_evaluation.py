"""The page and the tables of an evaluation, from its figures alone."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from dcconvert.report.evaluation import EvaluationReport, evaluation_page

SPREAD = {"median": 8.0, "p10": 7.0, "p90": 9.5, "runs": 9}
ROW = {"solver": "euler", "steps": 50, "step_ms": SPREAD, "peak_mb": 800.0, "attention_step_mb": 2.0}


@pytest.fixture
def figures() -> dict[str, Any]:
    """One of everything."""
    quality = {"psnr": 41.9, "psnr_error": 0.1, "pair_distance": 0.1, "pair_distance_error": 0.01}
    distances = {"frechet": 12.3, "kernel": 0.001, "kernel_error": 0.0001, "precision": 0.7, "recall": 0.6}
    original = {"name": "original, 50 steps", "mode": "original", "control": "time", "gmacs": 26.9, "state_mb": 0.0}
    carry = {"name": "carry 4x", "mode": "carry", "control": "", "gmacs": 11.9, "state_mb": 3.5}
    time = {"latency_ms": 300.0, "images_per_second": 3.3}
    execution = {"name": "carry 4x", "computed_tokens": 12345.0, "waste": 0.2, "step_ms": SPREAD, "speedup": 1.5}
    report = {
        "command": "dcconvert evaluate <a>",
        "bundles": {"#1 carry 4x": "<a>", "#2 chunk 4x": "b"},
        "batch": 8,
        "guidance": 4.0,
        "lite_cfg": 2.0,
        "limits": ["One & only."],
        "machine": {"cpu": "a processor"},
        "execution": [{**execution, "form": form} for form in ("padded", "packed")],
        "images": {"count": 64, "reference": "original, 200 steps", "network": "inception", "real_count": 100,
                   "floor": {**distances, "frechet": 1.25}},
        "runtime": "ONNX Runtime CPU",
        "rows": [{**ROW, **kind, **time, **quality, **distances} for kind in (original, carry)],
    }  # fmt: skip
    return copy.deepcopy(report)  # parts of it are shared


def printed(report: dict[str, Any]) -> str:
    console = Console(width=200, file=io.StringIO())
    for part in EvaluationReport.from_json(report).for_terminal():
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_page_has_every_section_and_plot(figures):
    page = evaluation_page(EvaluationReport.from_json(figures).with_pictures({"samples": b"png"}))
    titles = ["Quality", "Bundles", "Cost", "Ways of running a mixed batch", "Samples", "Limits", "How this was made"]
    places = [page.index(f"<h2>{title}</h2>") for title in titles]
    assert places == sorted(places)
    assert page.count("data:image/png;base64,") == 5
    for text in ("41.90 ± 0.10", "1.00 ± 0.10", "64 real images, held out", "1.25", "8 (9.5)", "12,345", "20.0%",
                 "guidance 4, the unconditional half at 2x", "network inception, 100 real images", "3.5"):  # fmt: skip
        assert text in page
    assert "default-src 'none'" in page
    assert "dcconvert evaluate &lt;a&gt;" in page
    assert "<a>" not in page


def test_what_was_not_measured_is_left_out(figures):
    del figures["images"]
    for row in figures["rows"]:
        for key in ("psnr", "psnr_error", "peak_mb"):
            del row[key]
    figures |= {"guidance": 1, "lite_cfg": None, "limits": [], "bundles": {"carry 4x": "a"}}
    page = evaluation_page(EvaluationReport.from_json(figures))
    for text in ("Quality", "Bundles", "Samples", "Limits", "peak MB"):
        assert text not in page
    assert "no guidance" in page
    assert "attn MB" in page


def test_the_terminal_prints_what_the_page_shows(figures):
    text = printed(figures)
    for words in ("Cost of a run: ONNX Runtime CPU, batch 8", "Quality: 64 images", "speed-up", "One & only.", "<a>"):
        assert words in text
    assert "#1 carry 4x: <a>" in text


def test_a_name_is_printed_once(figures):
    *_, execution, _ = EvaluationReport.from_json(figures).for_terminal()
    assert isinstance(execution, Table)
    assert list(execution.columns[0].cells) == ["carry 4x", ""]


def test_the_report_is_written_as_it_was_read(figures):
    assert EvaluationReport.from_json(figures).to_json() == figures
    assert EvaluationReport.from_json(figures).with_pictures({"samples": b"png"}).to_json() == figures


def test_what_was_not_measured_is_not_written(figures):
    del figures["images"]
    for row in figures["rows"]:
        for key in ("psnr", "psnr_error", "frechet"):
            del row[key]
        row["peak_mb"] = None  # the process died, which is said
    figures["lite_cfg"] = None
    assert EvaluationReport.from_json(figures).to_json() == figures
