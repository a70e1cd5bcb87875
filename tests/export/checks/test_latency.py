"""Times taken in turns, their spread by hand, and memory of a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dcconvert.export.checks.latency import interleaved, peak_memory, spread


class Clock:
    """Stands still until somebody works."""

    def __init__(self) -> None:
        self.now = 100.0
        self.log: list[str] = []

    def work(self, name: str, seconds: Iterator[float]) -> None:
        self.log.append(name)
        self.now += next(seconds)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_candidates_take_turns(clock):
    slow, fast = iter([8.0, 1.0, 2.0, 3.0]), iter([9.0, 0.25, 0.5, 0.75])
    calls = {"slow": lambda: clock.work("slow", slow), "fast": lambda: clock.work("fast", fast)}
    times = interleaved(calls, runs=3, tick=lambda: clock.log.append("tick"))
    assert clock.log == ["slow", "fast", *["slow", "fast", "tick"] * 3]
    assert times == {"slow": [1, 2, 3], "fast": [0.25, 0.5, 0.75]}  # the first turn only warms up


@pytest.mark.parametrize("warm_up", [0, 1, 4])
def test_warming_up_is_not_measured(warm_up, clock):
    durations = iter([10.0] * warm_up + [1.0, 2.0])
    times = interleaved({"only": lambda: clock.work("only", durations)}, runs=2, warm_up=warm_up)
    assert len(clock.log) == warm_up + 2
    assert times == {"only": [1, 2]}


def test_ticks_are_not_measured(clock):
    durations = iter([1.0] * 3)

    def tick() -> None:
        clock.now += 50

    assert interleaved({"only": lambda: clock.work("only", durations)}, runs=2, tick=tick) == {"only": [1, 1]}


def test_spread_by_hand():
    # Eleven values: the 10th, 50th and 90th percentile are the second, sixth and tenth.
    seconds = [0.011, 0.001, 0.010, 0.002, 0.009, 0.003, 0.008, 0.004, 0.007, 0.005, 0.006]
    assert spread(seconds) == {"median": 6.0, "p10": 2.0, "p90": 10.0, "runs": 11}
    # Two: a tenth, a half and nine tenths of the way from one to the other.
    assert spread([0.1, 0.2]) == {"median": 150.0, "p10": 110.0, "p90": 190.0, "runs": 2}
    assert spread([0.0012346]) == {"median": 1.235, "p10": 1.235, "p90": 1.235, "runs": 1}


# Memory


def adding(path: Path, megabytes: int) -> Path:
    """An ONNX file that adds a weight of so many megabytes to x [1]."""
    weight = numpy_helper.from_array(np.zeros(megabytes * 250_000, np.float32), "weight")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    nodes = [helper.make_node("Add", ["x", "weight"], ["sum"])]
    nodes.append(helper.make_node("ReduceSum", ["sum"], ["total"], keepdims=0))
    nodes.append(helper.make_node("Reshape", ["total", "shape"], ["y"]))
    shape = numpy_helper.from_array(np.array([1]), "shape")
    graph = helper.make_graph(nodes, "adding", [x], [y], [weight, shape])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


FEED = {"x": np.ones(1, np.float32)}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return adding(tmp_path_factory.mktemp("small") / "small.onnx", 1)


def measured(files: list[Path], folder: Path) -> float:
    megabytes = peak_memory(files, [FEED] * len(files), folder)
    assert megabytes is not None
    return megabytes


def test_a_larger_model_and_a_second_one_take_more(small, tmp_path):
    large = adding(tmp_path / "large.onnx", 100)
    one = measured([small], tmp_path)
    assert measured([large], tmp_path) > one + 150  # its weight and the sum
    assert measured([small, large], tmp_path) > one + 150


def test_the_process_that_asks_does_not_count(small, tmp_path):
    before = measured([small], tmp_path)
    ballast = np.ones(50_000_000)  # 400 MB, all of it touched
    after = measured([small], tmp_path)
    assert ballast[-1] == 1
    assert abs(after - before) < 40
    assert 10 < after < 400


def test_a_process_that_dies_has_no_figure(small, tmp_path):
    assert peak_memory([tmp_path / "nothing.onnx"], [FEED], tmp_path) is None
    assert peak_memory([small], [{"z": FEED["x"]}], tmp_path) is None


def test_the_probe_finds_what_this_environment_has(small, tmp_path, monkeypatch):
    """The fresh process runs this interpreter, whatever PATH says."""
    monkeypatch.setenv("PATH", os.devnull)
    assert measured([small], tmp_path) > 10
