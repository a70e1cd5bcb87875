"""The Python API: any module in, the same call out, written and read back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import dcconvert
from dcconvert import Converted, Options, UnsupportedModelError, UsageError, convert, load
from dcconvert.environment import machine
from dcconvert.export.bundle import read_bundle
from dcconvert.export.runtimes.ort import OrtModel
from dcconvert.models.example_inputs import dit_inputs
from dcconvert.passes.methods import method_of
from dcconvert.passes.planning.schedule import LEVELS, Policy
from tests.dcconvert.harness import CONFIG, TOKENS, contents, tiny_dit
from tests.passes.harness import diffusers_call, first_tensor, relative

IDENTITY = 1e-5


@pytest.fixture(scope="module")
def by_name() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """diffusers' DiT, called as its pipeline does."""
    torch.manual_seed(0)
    module, (x,), kwargs = diffusers_call()
    return module, {"hidden_states": x, "timestep": kwargs["timestep"], "class_labels": kwargs["class_labels"]}


@pytest.fixture(scope="module")
def from_diffusers(by_name) -> Converted:
    module, inputs = by_name
    return convert(module, "2x", example_inputs=inputs, options=Options("carry"))


@pytest.fixture(scope="module")
def saved(from_diffusers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "bundle"
    assert from_diffusers.save(folder, batches=(2,)) == folder
    return folder


# Converting


@torch.no_grad()
def test_a_ratio_of_one_is_the_original():
    dit = tiny_dit()
    inputs = dit_inputs(dit, 5, seed=3)
    wanted = dit(*inputs)
    model = convert(dit, 1)
    assert relative(model(*inputs), wanted) < IDENTITY
    assert relative(model.original(*inputs), wanted) < IDENTITY
    assert model.with_schedule(Policy("constant", 4).timetable())(*inputs).shape == wanted.shape


@torch.no_grad()
def test_a_converted_model_differs_from_its_original_by_dropping_tokens(main_job):
    inputs = dit_inputs(tiny_dit(), 2)
    run, spec = main_job.model.start(2), main_job.model.spec
    for time in (1000, 900):  # the first step keeps everything
        x, _, y = inputs
        inputs = x * 0.98, torch.full((2,), float(time)), y
        [found] = run.step(dict(zip(spec.inputs, inputs, strict=True)))
    assert run.last_plan.counts.tolist() < [TOKENS, TOKENS]
    error = relative(found, main_job.model.original(*inputs))
    assert 1e-4 < error < 1
    assert relative(main_job.model.original(*inputs), tiny_dit()(*inputs)) < IDENTITY


@torch.no_grad()
def test_a_module_called_by_name(by_name, from_diffusers):
    module, inputs = by_name
    found, wanted = from_diffusers(**inputs), module(**inputs)
    assert type(found) is type(wanted)
    assert found.sample.shape == wanted.sample.shape
    assert relative(found.sample, wanted.sample) < IDENTITY  # the first step of a run keeps everything
    other = {name: value[:2] for name, value in inputs.items()}  # another batch, another order
    again = from_diffusers(**dict(reversed(other.items())))
    torch.testing.assert_close(again.sample, found.sample[:2], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_calls_go_on_with_the_image_of_the_call_before(by_name, from_diffusers):
    module, inputs = by_name
    model = from_diffusers.with_schedule(Policy("constant", 4).timetable())
    for time in (990, 900):
        inputs = {**inputs, "timestep": torch.full_like(inputs["timestep"], time)}
        found = model(**inputs).sample
    assert model.followed.run.last_plan.counts.tolist() == [4] * len(found)
    assert IDENTITY < relative(found, module(**inputs).sample) < 1
    everything = from_diffusers.with_schedule(Policy("constant", 1).timetable())(**inputs)
    assert relative(everything.sample, module(**inputs).sample) < IDENTITY


@torch.no_grad()
def test_a_module_called_by_position():
    class Wrapped(nn.Module):
        """Another class, another signature, the time not called t."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_dit()

        def forward(self, image, when, label):
            return {"prediction": self.inner(image, when, label)}

    module, inputs = Wrapped().eval(), dit_inputs(tiny_dit(), 3)
    model = convert(module, 4, example_inputs=list(inputs), schedule="rising", timestep="when", timestep_scale=1000)
    assert model.spec.timestep == "when"
    assert model(*inputs)["prediction"].shape == inputs[0].shape
    everything = model.with_schedule(Policy("constant", 1).timetable())(*inputs)["prediction"]
    assert relative(everything, module(*inputs)["prediction"]) < IDENTITY


def test_inputs_that_must_be_given():
    with pytest.raises(UsageError, match="capturing a Linear needs example_inputs"):
        convert(nn.Linear(2, 2))


@pytest.mark.parametrize("ratio", [0, -4, 0.5, "abc", "", float("nan"), float("inf"), "1000x"])
def test_ratios_that_cannot_be(ratio):
    with pytest.raises(UsageError, match="ratio"):
        convert(tiny_dit(), ratio)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "sideways"}, "unknown schedule 'sideways'"),
        ({"options": method_of("carry", head_blocks=2, tail_blocks=1)}, "block"),
        ({"preset": "crystal ball"}, "unknown method"),
        ({"timestep": "when"}, "when"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(UsageError, match=words) as error:
        convert(tiny_dit(), 4, **options)
    assert "\n" not in str(error.value)


def test_timesteps_of_another_scale_than_was_said():
    x, t, y = dit_inputs(tiny_dit(), 3)
    with pytest.raises(UsageError, match=r"timesteps such as 0\.\d+, but timestep_scale.* is 1000"):
        convert(tiny_dit(), 4, example_inputs=(x, t / 1000, y))


def test_a_module_without_tokens():
    with pytest.raises(UnsupportedModelError) as error:
        convert(nn.Linear(4, 4), example_inputs=(torch.randn(3, 4),), options=method_of("chunk"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("job", "trunk"), [("main_job", "CarryTrunk"), ("chunk_job", "PackTrunk")])
def test_graphs_can_be_dumped(job, trunk, request):
    folder = request.getfixturevalue(job).checkpoint.parent / "graphs"
    names = contents(folder)
    assert len(names) >= 5
    assert any(trunk in name for name in names)
    assert all((folder / name).read_text() for name in names)


@pytest.mark.parametrize(
    ("job", "blocks", "trunk"),
    [("main_job", "0 head, 3 trunk, 0 tail", "CarryTrunk: "), ("chunk_job", "1 head, 1 trunk, 1 tail", "PackTrunk: ")],
)
def test_summary(job, blocks, trunk, request):
    text = request.getfixturevalue(job).model.summary()
    assert "8x8 = 64 tokens, 16 kept on average (4x)" in text
    assert f"3 blocks: {blocks}" in text
    assert "schedule falling" in text
    assert trunk in text


# Saving and loading


@torch.no_grad()
def test_a_bundle_gives_what_the_model_gave(saved, by_name, from_diffusers):
    _, inputs = by_name
    model = load(saved)
    assert isinstance(model, Converted)
    torch.testing.assert_close(model(**inputs).sample, from_diffusers(**inputs).sample, rtol=0, atol=0)
    found, wanted = model.original(**inputs), from_diffusers.original(**inputs)
    torch.testing.assert_close(found.sample, wanted.sample, rtol=0, atol=0)
    assert model.method == from_diffusers.method
    assert model.schedule == from_diffusers.schedule


@torch.no_grad()
def test_the_main_jobs_bundle_gives_what_its_model_gave(main_job):
    model, inputs = load(str(main_job.folder)), dit_inputs(tiny_dit(), 3, seed=7)
    torch.testing.assert_close(model(*inputs), main_job.model(*inputs), rtol=0, atol=0)


@torch.no_grad()
def test_a_saved_model_runs_in_onnx_runtime(saved, by_name, from_diffusers):
    bundle, inputs = read_bundle(saved), {name: value[:2] for name, value in by_name[1].items()}
    session = OrtModel(bundle.onnx, bundle.model.planner, bundle.bucket_set, threads=1)
    [found] = session.start(2).step({name: value.numpy() for name, value in inputs.items()})
    np.testing.assert_allclose(found, first_tensor(from_diffusers(**inputs)).numpy(), rtol=1e-3, atol=1e-3)


def test_what_a_bundle_says_about_itself(saved, from_diffusers):
    facts = json.loads((saved / "manifest.json").read_text())
    assert facts["conversion"]["ratio"] == 2
    assert facts["conversion"]["router"] == from_diffusers.method.router
    assert [entry["name"] for entry in facts["conversion"]["passes"]] == [r.name for r in from_diffusers.records]
    assert (facts["grid"], facts["tokens"]) == ([4, 4], 16)
    assert {bucket["batch"] for bucket in facts["buckets"]["buckets"]} == {2}
    assert facts["machine"] == machine()


def test_a_bundle_is_not_overwritten(saved, from_diffusers, monkeypatch):
    before = (saved / "manifest.json").read_bytes(), contents(saved.parent)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("the work must not start"))
    with pytest.raises(UsageError, match="exists already"):
        from_diffusers.save(saved)
    assert ((saved / "manifest.json").read_bytes(), contents(saved.parent)) == before


def test_saving_that_fails_leaves_nothing(from_diffusers, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.onnx, "export", interrupt)
    with pytest.raises(KeyboardInterrupt):
        from_diffusers.save(tmp_path / "bundle")
    assert contents(tmp_path) == []


def test_buckets_have_no_padding(main_job):
    bucket_set = main_job.model.choose_buckets(batches=(1, 4))
    assert bucket_set.batches == (1, 4)
    assert bucket_set.tokens == TOKENS
    assert bucket_set.lengths[-1] == TOKENS
    assert bucket_set.expected_waste == 0
    assert len(bucket_set.lengths) <= LEVELS


def test_loading_what_is_no_bundle(tmp_path):
    with pytest.raises(UsageError, match="is not a bundle"):
        load(tmp_path)


# Odds and ends


def test_random_inputs_of_a_dit():
    x, t, y = dit_inputs(tiny_dit(), 6, seed=1)
    assert x.shape == (6, 1, 16, 16)
    assert ((t >= 0) & (t <= 1000)).all()
    assert y.tolist() == [0, 1, 2, 3, 0, 1]
    assert torch.equal(x, dit_inputs(tiny_dit(), 6, seed=1)[0])
    assert not torch.equal(x, dit_inputs(tiny_dit(), 6, seed=2)[0])


def test_the_machine():
    facts = machine()
    assert facts["cores"] >= 1
    assert facts["torch"] == torch.__version__
    assert facts["onnxruntime"]
    json.dumps(facts)


def test_the_package_exports_what_it_lists():
    assert all(hasattr(dcconvert, name) for name in dcconvert.__all__)
    assert dcconvert.DiT(CONFIG).cfg == CONFIG
