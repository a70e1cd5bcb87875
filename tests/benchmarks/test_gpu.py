"""The benchmark for GPU machines, tiny and on a CPU: what it writes, what it skips and why, and its parity."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import dcconvert
from benchmarks import gpu, gpu_cases, gpu_table, tables
from benchmarks.gpu_backend import TorchRuntime
from dcconvert.passes.ir.pass_runner import run_graph_passes
from dcconvert.passes.methods import method_of
from dcconvert.passes.rewrite.write_in_place import WriteInPlace
from tests.passes.harness import dit_call

ON_A_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="its reasons are those of a machine without a GPU")


def run(out: Path, *words: str) -> dict[str, Any]:
    gpu.main(["--tiny", "--runs", "2", "--out", str(out), *words])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    parts = [part for part in gpu.PARTS if part != "onnxruntime"]
    return run(tmp_path_factory.mktemp("gpu") / "gpu.json", "--parts", *parts)


def rows(result: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["part"] == part]


def test_every_case_is_measured_or_says_why_not(result):
    assert {row["part"] for row in result["rows"]} == {*gpu.PARTS} - {"onnxruntime"}
    for row in rows(result, "parity") + rows(result, "latency") + rows(result, "attention"):
        assert "skipped" not in row, row
    assert result["settings"]["tiny"] is True
    assert result["machine"]["torch"] == torch.__version__


def test_parity_in_every_precision(result):
    assert [row["form"] for row in rows(result, "parity")] == list(gpu_cases.FORMS)
    for row in rows(result, "parity"):
        assert row["dropping_changes"] > 0.02  # or the errors would say little
        assert set(row["precisions"]) == set(gpu_cases.DTYPES)
        for name, found in row["precisions"].items():
            assert found["within"], (row["form"], name, found)
            assert 0 <= found["all_kept_error"] <= found["tolerance"] == gpu_cases.TOLERANCES[name]
        halves = [row["precisions"][name]["all_kept_error"] for name in ("fp32", "fp16", "bf16")]
        assert halves == sorted(halves), "fewer digits, larger errors"


def test_a_speed_up_stands_beside_the_operations_saved(result):
    for row in rows(result, "latency"):
        assert row["kept"] * 4 == row["tokens"]
        assert row["original_ms"]["runs"] == row["converted_ms"]["runs"] == 2
        assert row["speedup"] == pytest.approx(row["original_ms"]["median"] / row["converted_ms"]["median"], rel=0.01)
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["flop_ratio"], rel=0.01)
        assert row["flop_ratio"] > 1
        assert (row["state_mb"] > 0) == (row["form"] == "carry")


def test_all_forms_of_attention_compute_the_same(result):
    even, mixed = rows(result, "attention")
    assert set(even["ms"]) == set(even["error"]) == {*mixed["ms"], "rows without a mask"}
    for row in (even, mixed):
        assert max(row["error"].values()) < row["tolerance"]


@ON_A_CPU
def test_what_is_missing_is_named(result):
    for row in rows(result, "tensorrt"):
        assert row["skipped"].startswith(("not installed: ", "RuntimeError: engines run on a GPU"))


@pytest.mark.slow
def test_onnx_runtime_gives_the_original_with_everything_kept(tmp_path):
    result = run(tmp_path / "gpu.json", "--parts", "onnxruntime")
    found = rows(result, "onnxruntime")
    assert [row["form"] for row in found] == ["steps", "steps", "carry", "chunk"]
    assert all(row["all_kept_error"] < row["tolerance"] for row in found)
    resident, from_host = found[:2]
    assert (resident["runtime"], from_host["runtime"]) == ("eager", gpu.WITH_HOST)
    assert resident["original_error"] < resident["tolerance"]
    for row in (resident, from_host):
        assert row["skip_error"] < row["tolerance"]
        assert row["gmacs"]["full"] == row["gmacs"]["original"] > 20 * row["gmacs"]["skip"]
        assert [run["ratio"] for run in row["runs"]] == [2, 4, 8]
    shown = gpu_table.onnx_table({**result, "machine": {"gpu": "a GPU"}}, tables.markdown)
    assert shown.count("| DiT-S/2, 64 px, batch 2, ") == 2
    assert f"| {resident['skip_ms']['median']:.2f} | {resident['runs'][0]['speedup']:.2f} |" in shown


def test_onnx_runtime_is_measured_with_and_without_cuda_graphs():
    plan = gpu.Plan(torch.device("cuda"), tiny=False, runs=20)
    found = gpu.jobs(("onnxruntime",), plan, gpu_cases.Models(plan.device, (1, 4), torch.device("cpu")))
    steps = [(job.facts["batch"], job.facts["runtime"]) for job in found if job.facts["form"] == "steps"]
    assert steps == [(8, "eager"), (8, "CUDA graph"), (1, "CUDA graph"), (8, gpu.WITH_HOST)]


def test_libraries_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas.so.13:\n no such file"))
    with pytest.raises(ImportError, match=r"^Failed to load libcublas.so.13: no such file$"):
        gpu.check_provider(True)


def test_no_time_left(tmp_path):
    found = run(tmp_path / "gpu.json", "--minutes", "0")
    assert len(found["rows"]) > 10
    assert {row["skipped"] for row in found["rows"]} == {"out of time"}


def failing(out: Path, error: str, fresh: bool = True) -> tuple[int, list[dict[str, Any]]]:
    """What a worker returns and the rows it leaves, in this process, where every parity case fails."""

    def fails() -> dict[str, Any]:
        raise RuntimeError(error)

    args = gpu.parsed(["--tiny", "--runs", "2", "--out", str(out), "--parts", "parity", "attention"])
    record, wanted = gpu.prepared(args)
    if fresh:
        record.write()
    jobs = [replace(job, measure=fails) if job.part == "parity" else job for job in wanted]
    status = gpu.measure(record, jobs)
    return status, json.loads(out.read_text())["rows"]


def test_a_case_that_fails_leaves_the_others(tmp_path):
    status, found = failing(tmp_path / "gpu.json", "no kernel\n for this")
    assert status == 0
    parity, others = ([row for row in found if (row["part"] == "parity") == wanted] for wanted in (True, False))
    assert {row["skipped"] for row in parity} == {"RuntimeError: no kernel for this"}
    assert others
    assert all("ms" in row for row in others)


@pytest.mark.parametrize("said", ["CUDA error:", "CUDA failure 700:"])
def test_after_an_error_of_cuda_a_worker_stops_and_the_next_goes_on_behind_it(said, tmp_path):
    words = (tmp_path / "gpu.json", f"{said}\n an illegal memory access")
    status, found = failing(*words)
    assert (status, len(found)) == (gpu.BROKEN, 1)
    assert found[0]["skipped"] == f"RuntimeError: {said} an illegal memory access"
    status, found = failing(*words, fresh=False)
    assert (status, len(found)) == (gpu.BROKEN, 2)


def supervised(tmp_path: Path, script: str, minutes: str = "9") -> list[dict[str, Any]]:
    """The rows of a run whose workers are shell scripts: `row` adds one, as a measured case does."""
    out = tmp_path / "gpu.json"
    args = gpu.parsed(["--tiny", "--out", str(out), "--minutes", minutes, "--parts", "attention", "parity"])
    record, wanted = gpu.prepared(args)
    add = "import json, sys; p = sys.argv[1]; d = json.load(open(p)); d['rows'].append({}); json.dump(d, open(p, 'w'))"
    row = f'{sys.executable} -c "{add}" {out}'
    gpu.supervise(record, wanted, lambda _: subprocess.Popen(["sh", "-c", script.replace("ROW", row)]))
    assert len(record.rows) == len(wanted) == 5
    assert json.loads(out.read_text())["rows"] == record.rows
    return record.rows


def test_a_process_that_dies_costs_one_case(tmp_path):
    found = supervised(tmp_path, "ROW; kill -SEGV $$")
    assert [row.get("skipped", "measured") for row in found] == [
        "measured",
        "its process died with status -11",
        "measured",
        "its process died with status -11",
        "measured",
    ]


def test_a_broken_process_is_followed_by_another(tmp_path):
    assert supervised(tmp_path, f"ROW; exit {gpu.BROKEN}") == [{}] * 5


def test_a_process_that_breaks_at_once_is_not_started_for_ever(tmp_path):
    assert {row["skipped"] for row in supervised(tmp_path, f"exit {gpu.BROKEN}")} == {"its process died with status 75"}


def test_a_case_without_an_end_is_stopped_when_time_is_up(tmp_path):
    first, second, *others = supervised(tmp_path, "ROW; exec sleep 600", minutes="0.02")
    assert first == {}
    assert second["skipped"] == "its process was stopped, because time was up"
    assert {row["skipped"] for row in others} == {"out of time"}


def test_a_trial_does_not_take_the_place_of_the_result(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--tiny"])
    assert stop.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_the_most_telling_cases_come_first():
    plan = gpu.Plan(torch.device("cuda"), tiny=False, runs=20)
    found = gpu.jobs(("steps", "latency"), plan, gpu_cases.Models(plan.device, (1, 4), torch.device("cpu")))
    first = [job.facts for job in found[:12]]
    assert {(f["model"], f["pixels"], f["dtype"]) for f in first} == {("DiT-XL/2", 256, "bf16")}
    assert [f["batch"] for f in first[:3]] == [8, 1, 32]
    assert {f.get("form", "steps") for f in first} == {"steps", *gpu_cases.FORMS}
    covered = {(job.facts["model"], job.facts["pixels"], job.facts["batch"]) for job in found if job.priority == 1}
    assert covered == set(itertools.product(("DiT-XL/2", "DiT-B/2"), (256, 512), (1, 8, 32)))
    for name, values in {"ratio": {2, 4, 16}, "dtype": {"fp16", "bf16"}}.items():
        assert {job.facts[name] for job in found if job.part == "latency"} == values


def test_cases_that_share_a_model_follow_each_other():
    plan = gpu.Plan(torch.device("cuda"), tiny=False, runs=20)
    found = gpu.jobs(gpu.PARTS, plan, gpu_cases.Models(plan.device, (1, 4), torch.device("cpu")))
    for rank in (gpu.FIRST, gpu.LAST):
        places = [place for place, _ in itertools.groupby(job.place for job in found if job.priority == rank)]
        assert len(places) == len(set(places))


def test_steps_of_all_or_nothing(result):
    [row] = rows(result, "steps")
    assert row["gmacs"]["full"] == row["gmacs"]["original"] > 20 * row["gmacs"]["skip"]
    assert row["bytes"]["skip"]["unfused"] < row["bytes"]["original"]["unfused"] < row["bytes"]["full"]["unfused"]
    for run in row["runs"]:
        mean = run["full_share"] * row["gmacs"]["full"] + (1 - run["full_share"]) * row["gmacs"]["skip"]
        assert row["gmacs"]["original"] / mean == pytest.approx(run["ratio"], rel=0.02)
    [parity] = rows(result, "step parity")
    assert all(found["within"] for found in parity["precisions"].values())
    [ceiling] = rows(result, "ceilings")
    assert ceiling["gb_per_s"] > 0 < ceiling["tflops_bf16"]


def test_the_table_shows_a_result(tmp_path, result):
    assert tables.on_gpu("gpu", gpu_table.gpu_table, tmp_path) == "gpu.json: not measured yet.\n"
    shown = {**result, "machine": {**result["machine"], "gpu": "a GPU"}}
    shown["rows"] = [{**row, "runtime": "CUDA graph"} for row in result["rows"]]
    (tmp_path / "gpu.json").write_text(json.dumps(shown))
    table = tables.on_gpu("gpu", gpu_table.gpu_table, tmp_path)
    [steps], [carry] = rows(result, "steps"), [row for row in rows(result, "latency") if row["form"] == "carry"]
    [by_steps] = [run["speedup"] for run in steps["runs"] if run["ratio"] == 4]
    assert "| DiT-S/2, 64 px, batch 2 | " in table
    assert f"| {by_steps:.2f} | {carry['speedup']:.2f} |" in table
    assert "Measured on a GPU: a GPU; torch" in table


def test_the_table_of_chunks_has_both_forms_of_attention(result):
    captured = [{**row, "runtime": "CUDA graph"} for row in result["rows"]]
    machine = {**result["machine"], "gpu": "a GPU"}
    table = gpu_table.chunk_table({"rows": captured, "machine": machine}, tables.markdown)
    made = {row["form"]: row for row in rows(result, "latency")}
    rows_of_attention, varlen = (f"{made[form]['speedup']:.2f}" for form in ("chunk", "chunk, varlen"))
    assert f"| {made['chunk']['flop_ratio']:.2f} | {rows_of_attention} | {varlen} |" in table


def test_the_bound_is_the_slower_of_operations_and_bytes():
    ceiling = {"tflops_bf16": 100, "gb_per_s": 1000}
    for least, wanted in ((1_000_000_000, 2.0), (5_000_000_000, 5.0)):  # 200 G operations take two milliseconds
        row = {"gmacs": {"original": 50}, "batch": 2, "bytes": {"original": {"least": least}}}
        assert gpu_table.bound(row, ceiling) == pytest.approx(wanted)


@pytest.mark.parametrize("mode", ["carry", "chunk"])
def test_a_step_of_the_backend_is_the_models(mode):
    dit, (x, t, y), _ = dit_call()
    model = dcconvert.convert(dit, 2, options=method_of(mode), steps=3)
    assert isinstance(model, dcconvert.Converted)
    runs = [backend.start(3) for backend in (model, TorchRuntime(model, "eager"))]
    with torch.no_grad():
        for factor in (1, 0.9, 0.8):
            wanted, found = (run.step({"x": x, "t": t * factor, "y": y})[0] for run in runs)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("runtime", ["CUDA graph", "compiled"])
@pytest.mark.parametrize("mode", ["carry", "chunk"])
def test_captured_and_compiled_steps_on_a_gpu(runtime, mode):
    dit, inputs, _ = dit_call()
    model = dcconvert.convert(dit, 2, options=method_of(mode, router="pool"), steps=3)
    assert isinstance(model, dcconvert.Converted)
    if mode == "carry":
        run_graph_passes(model.denoise_graph, [WriteInPlace()])
    model.to("cuda")
    x, t, y = (value.cuda() for value in inputs)
    runs = [TorchRuntime(model, name).start(3) for name in ("eager", runtime)]
    with torch.no_grad():
        for factor in (1, 0.9, 0.8):
            wanted, found = (run.step({"x": x, "t": t * factor, "y": y})[0].clone() for run in runs)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
