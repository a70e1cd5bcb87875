"""The report: whole, escaped, in one file, and without what was not measured."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dcconvert.images.pixels import png_bytes
from dcconvert.report.conversion import page, report_json, terminal_table, without_nan, write_report
from dcconvert.report.notes import state_note

VOID = {"meta", "img", "br"}
ORIGINAL, CARRY = {"mode": "original", "solver": "euler"}, {"mode": "carry", "solver": "euler"}
SPREAD = {"median": 8.0, "p10": 7.0, "p90": 9.5, "runs": 9}


@pytest.fixture
def report() -> dict[str, Any]:
    """One of everything."""
    return {
        "command": "dcconvert model.pt --ratio 4x",
        "created": "2026-01-01T00:00:00Z",
        "source": {"path": "model.pt", "sha256": "abc123", "kind": "DiT checkpoint (ema), predicts eps"},
        "model": {"grid": [8, 8], "tokens": 64, "width": 32, "depth": 3, "parameters": 70_000},
        "conversion": {
            "ratio": 4.0,
            "mode": "chunk",
            "schedule": "constant",
            "router": "predictability",
            "kept_tokens_mean": 16.0,
            "passes": [
                {"name": "PackTrunk", "matches": 24, "notes": ["one", "two"], "nodes_before": 7, "nodes_after": 9,
                 "seconds": 0.125},
            ],
        },
        "buckets": {
            "buckets": [{"batch": 8, "tokens": 128, "rows": 8, "row_tokens": 16, "tile": 16}],
            "expected_waste": 0.034,
        },
        "limits": ["Nobody has looked at it."],
        "machine": {"cpu": "a processor", "torch": "2.13"},
        "checks": [
            {"name": "identity", "value": 2e-7, "tolerance": 1e-5, "detail": "three packings", "passed": True},
            {"name": "isolation", "value": 0.5, "tolerance": 1e-6, "detail": "loud", "passed": False},
        ],
        "compute": {
            "original_gmacs": 2.0,
            "per_step": [{"tau": 1.0, "kept": 16, "gmacs": 0.8}, {"tau": 0.5, "kept": 16, "gmacs": 0.8}],
            "run_gmacs": {"original": 4.0, "converted": 1.6, "steps": 2},
            "ratio": 2.5,
        },
        "latency": [
            {"runtime": "ONNX Runtime CPU", "batch": 8, "original_ms": {**SPREAD, "median": 16.0},
             "converted_ms": SPREAD, "speedup": 2.0, "flop_ratio": 2.5, "efficiency": 0.8,
             "stages_ms": {"route": 2.0, "plan": 0.1, "denoise": 5.9}},
        ],
        "memory": [
            {"runtime": "ONNX Runtime CPU, batch 8", "model": "original", "peak_mb": 1200.0},
            {"runtime": "ONNX Runtime CPU, batch 8", "model": "converted", "peak_mb": 600.0},
        ],
        "fidelity": {
            "velocity_error": [{"tau": 1.0, "error": 0.2}, {"tau": 0.5, "error": 0.3}],
            "images": {
                "reference": "original, 200 steps",
                "count": 16,
                "latents": False,
                "rows": [
                    {"name": "original, 200 steps", "mode": "original", "solver": "euler", "steps": 200,
                     "gmacs": 400.0, "latency_ms": 3200.0, "psnr": None},
                    {"name": "original, 1 steps", "mode": "original", "solver": "euler", "steps": 1,
                     "gmacs": 2.0, "latency_ms": 16.5, "psnr": 21.5},
                    {"name": "chunk 4x, 2 steps", "mode": "chunk", "solver": "euler", "steps": 2,
                     "gmacs": 1.6, "latency_ms": None, "psnr": 17.25},
                ],
            },
        },
    }  # fmt: skip


MEASURED = ("checks", "compute", "latency", "memory", "fidelity", "buckets", "limits")
TITLES = {
    "checks": "Checks",
    "compute": "Compute",
    "latency": "Latency",
    "memory": "Memory",
    "fidelity": "Fidelity to the original, without training",
    "buckets": "Buckets",
    "limits": "Limits",
}


class Page(HTMLParser):
    """What a browser makes of it: balanced tags, headings, cells, links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.cells and {"td", "th"} & set(self.open):
            self.cells[-1] += data


def rows_of(report: dict[str, Any]) -> dict[str, list[str]]:
    """The terminal's table as it is printed: the first column of every row, and the others."""
    console = Console(width=160, file=io.StringIO())
    console.print(terminal_table(report))
    assert isinstance(console.file, io.StringIO)
    lines = [re.split("[│┃]", line)[1:-1] for line in console.file.getvalue().splitlines()]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines if cells}


def test_every_section_is_there(report):
    found = Page(page(report, {"samples": png_bytes(Image.new("RGB", (2, 2)))}))
    order = ["Samples", "Checks", "Latency", "Compute", TITLES["fidelity"], "Memory", "Buckets", "Passes", "Limits"]
    assert found.headings == [*order, "How this was made"]


def test_the_figures_are_there(report):
    cells = Page(page(report, {})).cells
    for text in ("passed", "failed", "2e-07", "16.0 (7.0 to 9.5)", "route 2.0, plan 0.1, denoise 5.9", "21.5", "17.2",
                 "1,200", "600", "7 → 9", "one; two", "abc123", "a processor"):  # fmt: skip
        assert text in cells
    assert cells[cells.index("original, 1 steps") :][:5] == ["original, 1 steps", "1", "2", "16.5", "21.5"]
    assert cells[cells.index("chunk 4x, 2 steps") :][:5] == ["chunk 4x, 2 steps", "2", "1.6", "not measured", "17.2"]
    assert "400.0" not in cells  # the reference is no row of its own comparison
    assert "3.4% of the kept tokens" in page(report, {})


def test_nothing_is_fetched(report):
    found = Page(page(report, {"samples": png_bytes(Image.new("RGB", (2, 2)))}))
    assert len(found.links) == 5  # samples and four plots
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
    assert not found.tags & {"script", "link", "iframe", "object"}
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page(report, {})
    assert "url(" not in page(report, {})
    assert "@import" not in page(report, {})


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_not_measured_is_left_out(name, report):
    del report[name]
    headings = Page(page(report, {})).headings
    assert TITLES[name] not in headings
    assert set(TITLES.values()) - set(headings) == {TITLES[name]}
    terminal_table(report)


@pytest.mark.parametrize("name", ["checks", "latency", "memory", "limits"])
def test_an_empty_list_is_left_out(name, report):
    report[name] = []
    assert TITLES[name] not in Page(page(report, {})).headings


def test_a_report_of_nothing():
    assert Page(page({}, {})).headings == ["How this was made"]
    assert rows_of({})


def test_text_is_escaped(report):
    evil = '<script>alert("&")</script>'

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return evil if isinstance(value, str) else value

    text = page(poison(report), {evil: b""})
    found = Page(text)
    assert "script" not in found.tags
    assert "<script" not in text
    assert evil in found.cells


def test_not_a_number_becomes_null(report):
    report["checks"][0]["value"] = math.nan
    report["latency"][0]["speedup"] = math.inf
    clean = without_nan({**report, "pair": (1, -math.inf), 3: [np.float64("nan")]})
    assert clean["checks"][0]["value"] is None
    assert clean["latency"][0]["speedup"] is None
    assert clean["pair"] == [1, None]
    assert clean["3"] == [None]
    assert math.isnan(report["checks"][0]["value"])  # the report itself stays
    assert "NaN" not in report_json(report)
    assert json.loads(report_json(report))["checks"][0]["value"] is None


def test_images_that_blew_up_are_not_hidden(report):
    report["fidelity"]["images"]["rows"][-1]["psnr"] = math.nan
    report["fidelity"]["velocity_error"][-1]["error"] = math.nan
    clean = without_nan(report)
    cells = Page(page(clean, {})).cells
    assert cells[cells.index("chunk 4x, 2 steps") + 4] == "not finite"
    assert rows_of(clean)["PSNR, chunk 4x, 2 steps"] == ["", "not finite", "1.6 GMACs"]
    assert rows_of(report)["PSNR, chunk 4x, 2 steps"] == ["", "nan dB", "1.6 GMACs"]


@pytest.mark.parametrize(
    "path",
    [
        ("latency", 0, "speedup"),
        ("latency", 0, "flop_ratio"),
        ("latency", 0, "efficiency"),
        ("latency", 0, "converted_ms", "median"),
        ("latency", 0, "stages_ms", "plan"),
        ("compute", "ratio"),
        ("buckets", "expected_waste"),
        ("fidelity", "velocity_error", 0, "error"),
    ],
)
def test_a_number_that_is_missing_costs_no_section(path, report):
    report = copy.deepcopy(report)  # parts of it are shared
    everything = Page(page(report, {})).headings
    *parents, last = path
    place: Any = report
    for key in parents:
        place = place[key]
    place[last] = math.nan
    clean = without_nan(report)
    assert Page(page(clean, {})).headings == everything
    assert rows_of(clean)
    if path[0] != "fidelity":
        assert "not measured" in page(clean, {})


def test_a_check_without_a_finite_value_says_so(report):
    report["checks"][1]["value"] = None
    cells = Page(page(report, {})).cells
    assert cells[cells.index("isolation") - 1 : cells.index("isolation") + 2] == ["failed", "isolation", "not finite"]


@pytest.mark.parametrize("name", ["velocity_error", "images"])
def test_half_of_the_fidelity(name, report):
    del report["fidelity"][name]
    assert TITLES["fidelity"] in Page(page(report, {})).headings
    terminal_table(report)


def test_units(report):
    text = page(report, {})
    for unit in ("original, ms", "peak, MB", "PSNR, dB", "GMACs per image", "80%", "2.50x", "8 x 8", "70,000"):
        assert unit in text


def test_a_report_that_was_written_before_can_still_be_read():
    old = json.loads((Path(__file__).parent / "old_report.json").read_text())
    headings = Page(page(old, {})).headings
    assert {"Checks", "Latency", "Compute", "Memory", "Buckets", "Passes"} <= set(headings)
    assert "PSNR, carry 4x, 50 steps" in rows_of(old)


def test_keys_that_older_reports_lack_may_be_missing(report):
    everything = Page(page(report, {})).headings
    for section, *path in (("latency", 0, "stages_ms"), ("compute", "per_step"), ("fidelity", "velocity_error")):
        *parents, last = path
        place: Any = report[section]
        for key in parents:
            place = place[key]
        del place[last]
    del report["fidelity"]["images"]["latents"]
    report["fidelity"]["later"] = {"unknown": 1}
    assert Page(page(report, {})).headings == everything


TRAINED = {
    "train": ["lora", "<router>"],
    "data": "images.npz",
    "data_samples": 60_000,
    "images": 16,
    "log": [
        {"samples": 0, "seconds": 0.0, "psnr": 15.0, "output": None},
        {"samples": 48, "seconds": 90.0, "psnr": 17.25, "output": 0.2},
    ],
    "earlier": [{"psnr": 14.0}],
}


def test_a_training_is_told(report):
    text = " ".join(page({**report, "upcycling": TRAINED}, {}).split())
    assert "trained (lora, &lt;router&gt;) on 48 samples of 60000 images (images.npz) in 1.5 minutes" in text
    assert "15.00 dB before and 17.25 dB after" in text
    assert "trained once before" in text
    assert "<h2>Fidelity to the original</h2>" in text
    own = page({**report, "upcycling": {**TRAINED, "data": None, "data_samples": 0, "earlier": []}}, {})
    assert "48 samples of its own sampling runs in 1.5 minutes" in " ".join(own.split())
    assert "before; see" not in own


def test_files(report, tmp_path):
    before = copy.deepcopy(report)
    png = png_bytes(Image.new("RGB", (2, 2), "red"))
    write_report(tmp_path, report, {"samples": png})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "samples.png"]
    assert (tmp_path / "samples.png").read_bytes() == png
    assert json.loads((tmp_path / "report.json").read_text()) == report == before
    text = (tmp_path / "report.html").read_bytes().decode("utf-8")
    assert base64.b64encode(png).decode() in text
    assert "64 → 16" in text


def test_the_title_names_model_and_ratio(report):
    assert "<title>dcconvert: model.pt at 4x</title>" in page(report, {})
    report["conversion"]["ratio"] = 2.5
    assert "<h1>dcconvert: model.pt at 2.5x</h1>" in page(report, {})


def test_terminal_rows(report):
    assert rows_of(report) == {
        "": ["original", "converted", "ratio"],
        "tokens in the trunk, mean": ["64", "16", "4.00x"],
        "GMACs per image, 2 steps": ["4.00", "1.60", "2.50x"],
        "step, mean, ONNX Runtime CPU, batch 8": ["16.0 ms", "8.0 ms", "2.00x (80% of 2.50x)"],
        "peak memory": ["1200 MB", "600 MB", "2.00x"],
        "PSNR, original, 1 steps": ["21.5 dB", "", "2.0 GMACs, 16 ms"],
        "PSNR, chunk 4x, 2 steps": ["", "17.2 dB", "1.6 GMACs"],
        "padding in the buckets, expected": ["", "3.4%", ""],
        "checks passed": ["", "1 of 2", ""],
    }


def test_memory_that_could_not_be_measured(report):
    report["memory"][0]["peak_mb"] = None
    assert "peak memory" not in rows_of(report)
    assert "not measured" in Page(page(report, {})).cells


def test_the_terminal_table_says_what_it_is_about(report):
    assert terminal_table(report).title == "chunk at 4x"
    report["conversion"]["mode"] = "carry"
    assert terminal_table(report).title == "carry at 4x"


def test_what_mode_carry_adds_is_among_the_facts(report):
    facts = {"state_dtype": "float16", "state_mb_a_sample": 0.5, "state_mb_batch_8": 4.0, "warm_up_steps": 3}
    report["conversion"] |= {"mode": "carry", **facts, "sampler": "unipc, 50 steps"}
    cells = Page(page(report, {})).cells
    for name, text in (("state dtype", "float16"), ("state mb batch 8", "4.0"), ("warm up steps", "3")):
        assert cells[cells.index(name) + 1] == text
    assert cells[cells.index("sampler") + 1] == "unipc, 50 steps"


def test_the_size_of_the_state_is_told_for_every_batch():
    assert state_note(2_500_000, (1, 8)) == "State of a sampling run: 2.5 MB at batch 1, 20.0 MB at batch 8"
    assert state_note(33_000_000, (64,)) == "State of a sampling run: 2,112.0 MB at batch 64"
