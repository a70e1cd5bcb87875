"""A model on ONNX Runtime: what torch computes, in buckets, and clear errors for what cannot run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dcconvert.export.buckets import BucketSet, choose_buckets
from dcconvert.export.runtimes.ort import CPU, CUDA, OrtModel, make_session, pick
from dcconvert.passes.ir.errors import CheckFailedError, UsageError
from dcconvert.passes.planning.chunk_plan import Plan
from dcconvert.passes.planning.layout import Bucket
from dcconvert.passes.planning.schedule import Policy
from dcconvert.passes.planning.step_planner import StepPlanner
from dcconvert.passes.runtime.model import DynamicModel
from dcconvert.passes.runtime.run import StageTimes, fill_batch
from tests.export.harness import TOKENS, OneStep, arrays, tensors

BUCKET_SET = choose_buckets([1, 4], [4, 7, 11], TOKENS)


@pytest.fixture(scope="module")
def runtime(rows_model, rows_onnx) -> OneStep:
    """A runtime on BUCKET_SET that nothing has run yet when a test starts."""
    return OneStep(OrtModel(rows_onnx, rows_model.planner, BUCKET_SET, threads=1))


@pytest.fixture(autouse=True)
def _unused(runtime):
    runtime.last_plan = runtime.last_times = None


def plan_of(runtime: OneStep) -> Plan:
    assert runtime.last_plan is not None
    return runtime.last_plan


def falling(model: DynamicModel) -> StepPlanner:
    return model.with_schedule(Policy("falling", 2).timetable()).planner


def by_torch(model: DynamicModel, given: dict[str, np.ndarray], keep: np.ndarray) -> np.ndarray:
    """The converted model in torch on a keep mask, in the smallest plan."""
    with torch.no_grad():
        _, live = model.route(tensors(given))
        return model.denoise(tensors(given), live, model.planner.planner.plan(keep))[0].numpy()


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


# Results


@pytest.mark.parametrize("bucket", BUCKET_SET.buckets, ids=lambda bucket: f"{bucket.batch}x{bucket.row_tokens}")
def test_every_bucket_computes_what_torch_does(bucket, runtime, rows_model):
    given = arrays(bucket.batch)
    (found,) = runtime.step(given, np.full(bucket.batch, bucket.row_tokens))
    plan = plan_of(runtime)
    assert plan.packed_index.shape == (bucket.tokens // bucket.tile, bucket.tile)
    assert plan.grid_index.shape == (bucket.rows, bucket.row_tokens)
    assert_close(found, by_torch(rows_model, given, plan.keep))
    if bucket.row_tokens == TOKENS:
        with torch.no_grad():
            assert_close(found, rows_model.original(*tensors(given).values()).numpy())


def test_a_call_does_what_the_converted_module_does(runtime, rows_model):
    given = arrays(4)
    with torch.no_grad():
        wanted = rows_model(*tensors(given).values()).numpy()
    for names in (list(given), list(reversed(given))):  # inputs go by name
        (found,) = runtime({name: given[name] for name in names})
        assert plan_of(runtime).counts.tolist() == [8] * 4
        assert_close(found, wanted)


@pytest.mark.parametrize("counts", [[4, 4, 4], [7, 3, 5], [16, 1, 11]])
def test_without_buckets_the_plan_is_as_small_as_it_can_be(counts, rows_model, rows_onnx):
    runtime = OneStep(OrtModel(rows_onnx, rows_model.planner, threads=1))
    given = arrays(3)
    (found,) = runtime.step(given, np.array(counts))
    plan = plan_of(runtime)
    assert plan.counts.tolist() == counts
    assert plan.grid_index.shape == (3, max(counts))
    assert_close(found, by_torch(rows_model, given, plan.keep))


def test_several_samples_share_a_row_when_packing_in_bins(bins_model, bins_onnx):
    given = arrays(4)
    keep = []
    for bucket_set in (None, BucketSet((Bucket(4, 64, 4, 16, 4),), TOKENS, 0.0)):
        runtime = OneStep(OrtModel(bins_onnx, bins_model.planner, bucket_set, threads=1))
        (found,) = runtime.step(given, np.array([9, 3, 16, 4]))
        keep.append(plan_of(runtime).keep)
        assert len(set(plan_of(runtime).segment_ids[1]) - {-1}) > 1
        assert_close(found, by_torch(bins_model, given, keep[-1]))
    np.testing.assert_array_equal(keep[0], keep[1])


def test_a_batch_between_the_buckets_is_filled_with_copies_of_its_last_sample(runtime, rows_model):
    given, counts = arrays(3), np.array([4, 7, 2])
    (found,) = runtime.step(given, counts)
    plan = plan_of(runtime)
    assert len(found) == 3
    assert plan.counts.tolist() == [4, 7, 2, 2]
    np.testing.assert_array_equal(plan.keep[3], plan.keep[2])
    assert_close(found, by_torch(rows_model, given, plan.keep[:3]))
    assert {name: len(value) for name, value in given.items()} == {"x": 3, "t": 3, "y": 3}


def test_mixed_timesteps_follow_a_falling_schedule(rows_model, rows_onnx):
    planner = falling(rows_model)
    bucket_set = choose_buckets([4], planner.schedule.counts(np.linspace(0, 1, 9), TOKENS), TOKENS)
    runtime = OneStep(OrtModel(rows_onnx, planner, bucket_set))
    given = arrays(4) | {"t": np.array([1000, 500, 0, 250], np.float32)}
    (found,) = runtime(given)
    assert plan_of(runtime).counts.tolist() == [12, 8, 4, 6]  # 0.5/ratio to 1.5/ratio of 16
    assert_close(found, by_torch(rows_model, given, plan_of(runtime).keep))
    with torch.no_grad():
        whole = rows_model.with_schedule(planner.schedule)(*tensors(given).values())
    assert_close(found, whole.numpy())


def test_samples_do_not_depend_on_their_batch(runtime):
    given = arrays(4)
    (together,) = runtime(given)
    for i in range(4):
        (alone,) = runtime({name: value[i : i + 1] for name, value in given.items()})
        assert_close(alone[0], together[i])


def test_the_last_step_is_remembered(runtime):
    assert (runtime.last_plan, runtime.last_times) == (None, None)
    runtime(arrays(1))
    plan, times = runtime.last_plan, runtime.last_times
    assert min(times.route, times.plan, times.denoise) > 0
    assert times.total == times.route + times.plan + times.denoise
    runtime(arrays(4))
    assert runtime.last_plan is not plan
    assert runtime.last_times is not times
    assert StageTimes(1, 2, 4).total == 7


# What cannot run


def test_a_batch_above_the_buckets(runtime):
    with pytest.raises(UsageError, match="batch 5 is outside the buckets, which go from 1 to 4"):
        runtime(arrays(5))


@pytest.mark.parametrize("counts", [[0, 4], [17, 4]])
def test_counts_that_no_sample_has(counts, runtime):
    with pytest.raises(UsageError, match="whole numbers from 1 to 16"):
        runtime.step(arrays(2), np.array(counts))


@pytest.mark.parametrize("name", ["x", "t"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sample", [0, 2])
def test_a_value_that_is_not_finite_names_its_sample(name, value, sample, runtime):
    given = arrays(3)  # fills up to four: the copy of a bad last sample is not the one to name
    given[name][(sample, *[1] * (given[name].ndim - 1))] = value
    with pytest.raises(CheckFailedError, match=f"sample {sample} of the batch has non-finite values"):
        runtime(given)
    assert runtime.last_plan is None


@pytest.mark.parametrize(("name", "kind"), [("t", "float64"), ("x", "float16"), ("y", "int32")])
def test_an_input_of_another_type(name, kind, rows_model, rows_onnx):
    given = arrays(3)
    given[name] = given[name].astype(kind)
    with pytest.raises(UsageError, match=rf"input {name} is {kind}, but the model needs \w+: convert it"):
        OrtModel(rows_onnx, rows_model.planner).start(3).step(given)


def test_an_unknown_provider():
    with pytest.raises(UsageError, match=r"no TeapotExecutionProvider \(it has .*CPUExecutionProvider"):
        make_session(Path("unread.onnx"), "TeapotExecutionProvider")


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA")
def test_cuda_without_cuda(rows_model, rows_onnx):
    with pytest.raises(UsageError, match=f"no {CUDA}"):
        OrtModel(rows_onnx, rows_model.planner, provider=CUDA)


def test_a_session_that_fell_back_to_another_provider(rows_onnx, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, options, providers: real(path, providers=[CPU]))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load\nlibcublas.so.13"))
    with pytest.raises(CheckFailedError, match=f"should run on {CUDA} but runs on {CPU}; Failed to load libcublas"):
        make_session(rows_onnx / "route.onnx", CUDA)


def test_without_onnxruntime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"pip install 'dcconvert\[cpu\]'"):
        make_session(Path("unread.onnx"))


def test_files_that_are_missing_or_cut_off(rows_onnx, tmp_path):
    path = tmp_path / "route.onnx"
    with pytest.raises(UsageError, match=r"cannot load .*route\.onnx"):
        make_session(path)
    path.write_bytes((rows_onnx / "route.onnx").read_bytes()[:-1000])
    with pytest.raises(UsageError, match=r"cannot load .*route\.onnx") as error:
        make_session(path)
    assert "\n" not in str(error.value)


# Parts


@pytest.mark.parametrize("version", ["1.20.1", "1.24.4", "1.25.0", "1.32.0", "2.0.0rc1"])
def test_versions_that_are_right_are_taken(rows_onnx, monkeypatch, version):
    monkeypatch.setattr(onnxruntime, "__version__", version)
    make_session(rows_onnx / "route.onnx")


def test_a_version_that_nobody_tried_is_refused(rows_onnx, monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.9.0")
    with pytest.raises(UsageError, match=r"1\.9\.0 is too old for .*install one with pip install 'onnxruntime>=1\.20'"):
        make_session(rows_onnx / "route.onnx")


@pytest.mark.parametrize("version", ["1.23.2", "1.24.4"])
def test_a_version_that_is_silently_wrong_is_refused(tmp_path, monkeypatch, version):
    """ONNX Runtime 1.24 loads graphs of opset 24, which older bundles have, and attends to padding."""
    path = tmp_path / "old.onnx"
    nothing = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(nothing, opset_imports=[onnx.helper.make_opsetid("", 24)]), path)
    monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.raises(UsageError, match=rf"onnxruntime {version} is too old for .*install 'onnxruntime>=1\.25'"):
        make_session(path)


def test_the_number_of_threads_reaches_the_session(rows_onnx):
    session = make_session(rows_onnx / "route.onnx", threads=1)
    assert session.get_session_options().intra_op_num_threads == 1
    assert session.get_providers() == [CPU]


def test_a_session_is_given_what_it_takes(runtime):
    given = arrays(1) | {"unrelated": np.zeros(1)}
    assert set(pick(runtime.model.sessions["route"], given)) == {"x", "t", "y"}


def test_fill_batch():
    value = np.arange(6).reshape(3, 2)
    assert fill_batch(value, 3).tolist() == value.tolist()
    assert fill_batch(value, 5).tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
