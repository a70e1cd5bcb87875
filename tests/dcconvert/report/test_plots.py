"""The plots: pictures that show what they are given, drawn where it belongs."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcconvert.report import plots
from dcconvert.report.sections import LatencyRow, Spread, StepCost, StepError

CURVE = [StepError(1.0, 0.1), StepError(0.5, 0.2), StepError(0.0, 0.4)]
STEPS = [StepCost(1.0, 96, 0.3), StepCost(0.5, 64, 0.2)]
ROWS = [
    {
        "name": "original, 50 steps",
        "solver": "euler",
        "mode": "original",
        "steps": 50,
        "gmacs": 26.9,
        "latency_ms": 300.0,
        "psnr": 41.9,
    },
    {
        "name": "original, 20 steps",
        "solver": "euler",
        "mode": "original",
        "steps": 20,
        "gmacs": 10.8,
        "latency_ms": 120.0,
        "psnr": 35.2,
    },
    {
        "name": "carry 4x, 50 steps",
        "solver": "euler",
        "mode": "carry",
        "steps": 50,
        "gmacs": 11.2,
        "latency_ms": 140.0,
        "psnr": 38.0,
    },
    {
        "name": "chunk 4x, 50 steps",
        "solver": "euler",
        "mode": "chunk",
        "steps": 50,
        "gmacs": 10.1,
        "latency_ms": 130.0,
        "psnr": 15.7,
    },
]
LATENCY = LatencyRow(
    runtime="ONNX Runtime CPU",
    batch=8,
    original_ms=Spread(50.0, 45.0, 60.0),
    converted_ms=Spread(30.0, 28.0, 33.0),
    speedup=1.67,
    flop_ratio=2.5,
    efficiency=0.67,
)


@pytest.mark.parametrize(
    "plot",
    [
        lambda: plots.velocity_error(CURVE),
        lambda: plots.spending(STEPS, 256, 0.54),
        lambda: plots.quality_over_cost(ROWS),
        lambda: plots.latency_bars([LATENCY, LATENCY]),
    ],
)
def test_a_plot_is_a_picture(plot):
    image = Image.open(io.BytesIO(plots.png(plot())))
    assert image.format == "PNG"
    assert min(image.size) > 200
    assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_time_runs_from_noise_to_clean():
    figures = (plots.velocity_error(CURVE), plots.spending(STEPS, 256, 0.54))
    for axes in (axes for figure in figures for axes in figure.axes):
        left, right = axes.get_xlim()
        assert left > right
        assert axes.get_ylim()[0] == 0


def test_spending_is_drawn_below_the_originals():
    figure = plots.spending(STEPS, 256, 0.54)
    kept, gmacs = figure.axes
    for axes, values, original in ((kept, [96, 64], 256), (gmacs, [0.3, 0.2], 0.54)):
        converted, line = axes.lines
        assert list(np.asarray(converted.get_ydata())) == values
        assert list(np.asarray(line.get_ydata())) == [original, original]
        assert axes.get_ylim()[1] > original


def test_spending_of_a_model_of_unknown_size():
    figure = plots.spending(STEPS, None, None)
    assert [len(axes.lines) for axes in figure.axes] == [1, 1]


def test_the_control_is_a_curve_by_cost_and_converted_models_are_points():
    figure = plots.quality_over_cost(ROWS)
    by_compute, by_latency = figure.axes
    for axes, control, carry, chunk in (
        (by_compute, [[10.8, 35.2], [26.9, 41.9]], [[11.2, 38.0]], [[10.1, 15.7]]),
        (by_latency, [[120.0, 35.2], [300.0, 41.9]], [[140.0, 38.0]], [[130.0, 15.7]]),
    ):
        assert [np.asarray(line.get_xydata()).tolist() for line in axes.lines] == [control, carry, chunk]
        assert [line.get_linestyle() for line in axes.lines] == ["--", "None", "None"]
        assert len({line.get_color() for line in axes.lines}) == 3
        texts = ["20", "50", "carry 4x, 50 steps", "chunk 4x, 50 steps"]
        assert [text.get_text() for text in axes.texts] == texts
    assert "GMACs" in by_compute.get_xlabel()
    assert "ms" in by_latency.get_xlabel()


def test_without_latencies_there_is_compute_alone():
    figure = plots.quality_over_cost([{**ROWS[0], "latency_ms": None}, *ROWS[1:]])
    [axes] = figure.axes
    assert "GMACs" in axes.get_xlabel()


def test_only_the_control_is_left():
    figure = plots.quality_over_cost(ROWS[:2])
    assert [len(axes.lines) for axes in figure.axes] == [1, 1]


def test_the_dashed_line_is_the_originals_time_by_the_ratio_of_operations():
    figure: Any = plots.latency_bars([LATENCY])
    [axes] = figure.axes
    original, converted = axes.patches
    assert [bar.get_width() for bar in (original, converted)] == [50, 30]
    line = next(line for line in axes.lines if line.get_label() == "by operations alone")
    assert list(np.asarray(line.get_xdata())) == [20, 20]


def test_each_runtime_has_its_own_panel_and_scale():
    slow = replace(LATENCY, runtime="torch", original_ms=Spread(500.0, 450.0, 600.0))
    figure = plots.latency_bars([LATENCY, slow])
    first, second = figure.axes
    assert first.get_title(loc="left") == "ONNX Runtime CPU, batch 8"
    assert second.get_xlim()[1] > 5 * first.get_xlim()[1]
