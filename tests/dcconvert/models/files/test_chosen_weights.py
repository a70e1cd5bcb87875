"""Which weights of a training file are taken, and under which names."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.models.dit_checkpoint import load_checkpoint, read_checkpoint
from dcconvert.models.files.chosen_weights import Weights, is_averaged, read_weights
from dcconvert.passes.ir.errors import DcconvertError, UnsupportedModelError, UsageError
from tests.dcconvert.harness import run_cli

CONFIG = DiTConfig(depth=2, width=32, heads=2, patch=2, image_size=8, in_channels=3, num_classes=5)
State = dict[str, Tensor]


def state_of(seed: int) -> State:
    torch.manual_seed(seed)
    model = DiT(CONFIG)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    fixed = DiT(CONFIG).state_dict()["pos_embed"]
    return {**model.state_dict(), "pos_embed": fixed}


RAW, AVERAGE = state_of(0), state_of(1)
TRAINED = [name for name in RAW if name != "pos_embed"]


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def without_positions(state: State) -> State:
    return {name: state[name] for name in TRAINED}


def taken(content: Any, tmp_path: Path) -> Weights:
    torch.save(content, tmp_path / "x.pt")
    return read_weights(tmp_path / "x.pt")


def same(found: State, wanted: State) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


class Plain(nn.Module):
    """A training script's model: a DiT in a wrapper."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.net = DiT(CONFIG)
        self.net.load_state_dict(state)


class Persistent(Plain):
    """As StyleGAN's and EDM's code pickles modules: a function and a dict with the attributes."""

    def __reduce__(self) -> Any:
        return rebuilt, ({"type": "class", "state": self.__dict__},)


def rebuilt(meta: Any) -> Any:
    raise AssertionError("the pickle's function ran")


AVERAGED_FILES: dict[str, tuple[Callable[[], Any], str]] = {
    "facebook": (lambda: {"model": RAW, "ema": AVERAGE, "opt": {}, "args": argparse.Namespace(lr=1)}, "ema"),
    "same dict names": (lambda: {"model": RAW, "model_ema": AVERAGE}, "model_ema"),
    "ema_model": (lambda: {"model": RAW, "ema_model": AVERAGE}, "ema_model"),
    "state_dict_ema": (lambda: {"state_dict": RAW, "state_dict_ema": AVERAGE}, "state_dict_ema"),
    "ema_state_dict": (lambda: {"state_dict": RAW, "ema_state_dict": AVERAGE}, "ema_state_dict"),
    "capitals": (lambda: {"model": RAW, "EMA": AVERAGE}, "EMA"),
    "camel case": (lambda: {"model": RAW, "modelEma": AVERAGE}, "modelEma"),
    "average first": (lambda: {"net_ema": AVERAGE, "net": RAW}, "net_ema"),
    "nested": (
        lambda: {"step": 3, "state": {"model": RAW, "ema": {"decay": 0.9, "model": AVERAGE}}},
        "state.ema.model",
    ),
    "shadow and backup": (
        lambda: {"model": RAW, "ema": {"backup": RAW, "shadow": without_positions(AVERAGE)}},
        "ema.shadow",
    ),
    "online and average": (
        lambda: {"ema": {"initted": torch.tensor(True), **under("online_model.", RAW), **under("ema_model.", AVERAGE)}},
        "ema.ema_model",
    ),
    "by prefix": (
        lambda: {"state_dict": {**under("model.", RAW), **under("ema.module.", AVERAGE)}},
        "state_dict.ema.module",
    ),
    "averaged model": (
        lambda: {"model": RAW, "swa": {"n_averaged": torch.tensor(3), **under("module.", AVERAGE)}},
        "swa.module",
    ),
    "named parameters in order": (
        lambda: {"model": RAW, "ema": {"shadow_params": list(AVERAGE.values())}},
        "ema.shadow_params",
    ),
    "trained parameters in order": (
        lambda: {"model": RAW, "ema": {"decay": 0.9, "shadow_params": [AVERAGE[name] for name in TRAINED]}},
        "ema.shadow_params",
    ),
    "names without dots": (
        lambda: {
            "state_dict": {
                **under("model.diffusion_model.", RAW),
                "model_ema.decay": torch.tensor(0.9),
                **{f"model_ema.diffusion_model{name.replace('.', '')}": AVERAGE[name] for name in TRAINED},
                "first_stage_model.encoder.weight": torch.zeros(3),
            }
        },
        "state_dict.model_ema",
    ),
    "pickled module": (lambda: {"model": RAW, "ema": Plain(AVERAGE)}, "ema.net"),
    "module with its own way of pickling": (lambda: {"ema": Persistent(AVERAGE)}, "ema.state.net"),
    "wrapped blocks": (
        lambda: {
            "model": RAW,
            "ema": {
                "_orig_mod.module."
                + name.replace("attn.", "_checkpoint_wrapped_module.attn._fsdp_wrapped_module."): value
                for name, value in AVERAGE.items()
            },
        },
        "ema._orig_mod.module",
    ),
}


@pytest.mark.parametrize("name", AVERAGED_FILES)
def test_averaged_weights_are_taken(name, tmp_path):
    make, where = AVERAGED_FILES[name]
    weights = taken(make(), tmp_path)
    assert same(weights.tensors, AVERAGE)
    assert (weights.source, weights.averaged) == (where, True)
    assert f"Weights: {where} (averaged), {len(AVERAGE)} tensors." in weights.lines()


def test_an_average_of_the_same_library_is_told_by_its_counter(tmp_path):
    model = AveragedModel(Plain(AVERAGE))
    weights = taken({"model": model.state_dict()}, tmp_path)
    assert same(weights.tensors, AVERAGE)
    assert weights.averaged


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "model.", "net.", "denoiser.", "_orig_mod.", "_fsdp_wrapped_module.", "model.net._orig_mod."),
        *("_forward_module.module.", "state_dict.model.", "whatever.the_transformer."),
    ],
)
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_prefixes(prefix, form, tmp_path):
    path = tmp_path / f"x.{form}"
    state = under(prefix, RAW)
    save_file(state, path) if form == "safetensors" else torch.save({"epoch": 1, "model": state}, path)
    weights = read_weights(path)
    assert same(weights.tensors, RAW)
    assert not weights.averaged


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_inside_keys(wrapper, tmp_path):
    state = {name.replace("blocks.1.", f"blocks.1.{wrapper}."): value for name, value in RAW.items()}
    assert same(taken({"module": state}, tmp_path).tensors, RAW)


def test_what_deepspeed_writes(tmp_path):
    content = {"module": RAW, "buffer_names": [], "optimizer": {"state": {}}, "ds_version": "0.17"}
    weights = taken(content, tmp_path)
    assert same(weights.tensors, RAW)
    assert weights.source == "module"


def test_moments_of_the_optimiser_are_no_averages(tmp_path):
    weights = taken({"model": RAW, "optimizer": {"exp_avg": AVERAGE, "ema": AVERAGE}}, tmp_path)
    assert same(weights.tensors, RAW)
    assert "tensors (optimizer)" in weights.passed_over[0]


@pytest.mark.parametrize(
    ("path", "averaged"),
    [
        *[
            (path, True)
            for path in ("ema", "model_ema", "emaModel", "EMA.module", "ema_0", "net.ema", "swa_model", "averaged")
        ],
        *[
            (path, False)
            for path in ("model", "schema", "non_ema", "ema.online_model", "ema.backup", "cinema", "no_ema")
        ],
    ],
)
def test_words_for_averages(path, averaged):
    assert is_averaged(path) is averaged


def test_raw_weights_that_say_so_come_last(tmp_path):
    assert same(taken({"raw": RAW, "smooth": AVERAGE}, tmp_path).tensors, AVERAGE)
    assert same(taken({"fake_unet": RAW, "generator": AVERAGE}, tmp_path).tensors, AVERAGE)
    assert same(taken({"teacher": RAW, "student": AVERAGE}, tmp_path).tensors, AVERAGE)
    assert same(taken({"student": RAW, "teacher_ema": AVERAGE}, tmp_path).tensors, AVERAGE)
    assert same(taken({"emas": {"0.99": RAW, "0.9999": AVERAGE}}, tmp_path).tensors, AVERAGE)


def test_a_key_can_be_chosen(tmp_path):
    torch.save({"model": RAW, "ema": AVERAGE}, tmp_path / "x.pt")
    assert same(read_weights(tmp_path / "x.pt", "model").tensors, RAW)
    with pytest.raises(UsageError, match="no weights lie under 'net': choose one of model, ema"):
        read_weights(tmp_path / "x.pt", "net")


def test_a_part_of_an_average_is_not_mixed_in(tmp_path):
    part = {name: AVERAGE[name] for name in list(AVERAGE)[:9]}
    weights = taken({"model": RAW, "ema": part}, tmp_path)
    assert same(weights.tensors, RAW)
    assert weights.passed_over == ["9 other tensors (ema)"]


def test_averages_whose_names_cannot_be_told_are_passed_over(tmp_path):
    values = [value.clone() for value in AVERAGE.values()][::-1]
    weights = taken({"model": RAW, "ema": {"shadow_params": values}}, tmp_path)
    assert same(weights.tensors, RAW)
    assert "have no names and do not match" in weights.passed_over[0]


def test_heads_of_another_loss_are_left_out(tmp_path):
    """REPA's projections to another network's features."""
    extra = {f"projectors.0.{n}.{part}": torch.ones(2) for n in (0, 2, 4) for part in ("weight", "bias")}
    weights = taken({"model": RAW, "ema": {**AVERAGE, **extra}, "steps": 3}, tmp_path)
    assert same(weights.tensors, AVERAGE)
    assert weights.dropped == ["projectors (6 tensors)"]


def test_other_unknown_parts_are_not(tmp_path):
    torch.save({"ema": {**AVERAGE, "register_tokens": torch.ones(1, 4, 32)}}, tmp_path / "x.pt")
    with pytest.raises(UnsupportedModelError, match="register_tokens"):
        read_checkpoint(tmp_path / "x.pt", heads=2)


def test_a_checkpoint_is_the_model_that_was_saved(tmp_path):
    """Against the model itself: read from the file of a whole training, its output is the same bit for bit."""
    model = DiT(CONFIG).eval()
    model.load_state_dict(AVERAGE)
    options = argparse.Namespace(num_classes=5, num_heads=2)
    torch.save({"model": RAW, "model_ema": under("module.", AVERAGE), "args": options}, tmp_path / "x.pt")
    before = torch.get_rng_state()
    found = load_checkpoint(tmp_path / "x.pt")  # with no option: the training's own tell the heads
    assert torch.equal(torch.get_rng_state(), before)
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0]), torch.tensor([0, 5])
    assert torch.equal(found(*inputs), model(*inputs))
    assert not found.checkpoint_info.null_class_assumed
    weights = found.checkpoint_info.weights
    assert weights is not None
    assert weights.averaged


def test_heads_of_another_model_in_the_options(tmp_path):
    """Width 384 is that of DiT-S, which has 6 heads; 8 may be those of an autoencoder."""
    small = DiT(DiTConfig(depth=1, width=384, heads=6, patch=2, image_size=4)).state_dict()
    torch.save({"model": small, "args": {"num_heads": 8}}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="num_heads is 8, but a DiT of width 384 usually has 6"):
        read_checkpoint(tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt", heads=8).config.heads == 8


@pytest.mark.parametrize(
    ("classes", "stated", "option", "found"),
    [
        (1, None, None, (1, False, False)),
        (6, None, None, (5, True, True)),
        (6, None, False, (6, False, False)),
        (6, 5, None, (5, True, False)),
        (6, 6, None, (6, False, False)),
        (6, 77, None, (5, True, True)),
    ],
)
def test_the_null_class(classes, stated, option, found, tmp_path):
    """A class table of `classes` rows, and num_classes in the training's options; the option of the caller wins."""
    state = {**RAW, "y_embedder.embedding_table.weight": torch.ones(classes, 32)}
    torch.save({"model": state, "args": {"num_classes": stated}}, tmp_path / "x.pt")
    checkpoint = read_checkpoint(tmp_path / "x.pt", heads=2, null_class=option)
    assert (checkpoint.config.num_classes, checkpoint.config.null_class, checkpoint.null_class_assumed) == found


# --- files that are not what they say ------------------------------------------------------------------


def refusal(content: Any, tmp_path: Path, kind: type[DcconvertError] = UsageError) -> str:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(kind) as caught:
        read_checkpoint(tmp_path / "x.pt", heads=2)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_expanded_tensors(tmp_path):
    name = "blocks.0.mlp.fc1.weight"
    assert "an expanded tensor" in refusal({**RAW, name: torch.zeros(1).expand(2**20, 2**20)}, tmp_path)
    few = {name: torch.zeros(10**6).as_strided(value.shape, value.stride()) for name, value in RAW.items()}
    shared = torch.zeros(4096)
    many = {f"blocks.{n}.x.weight": shared[:4096] for n in range(3000)}
    assert "share too few stored bytes" in refusal(many, tmp_path)
    assert "share" not in refusal({**few, "odd": torch.zeros(2)}, tmp_path, UnsupportedModelError)


def test_a_dict_that_holds_itself(tmp_path):
    loop: dict[str, Any] = {"model": RAW}
    loop["loop"] = loop
    torch.save(loop, tmp_path / "x.pt")
    assert same(read_weights(tmp_path / "x.pt").tensors, RAW)


def test_dicts_that_share_their_parts(tmp_path):
    """Sixty dicts, each twice in the next: walked through, they are 2^60."""
    inner: dict[str, Any] = {"x": torch.zeros(1)}
    for _ in range(60):
        inner = {"a": inner, "b": inner}
    assert "nested in it" in refusal(inner, tmp_path)


def test_many_empty_tensors(tmp_path):
    save_file({f"a{n}.weight": torch.zeros(0) for n in range(20_000)}, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedModelError, match="an unknown architecture"):
        read_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.99999999.attn.qkv.weight", UsageError),
        ("blocks.00.attn.qkv.weight", UnsupportedModelError),
        ("blocks.0.\ud800.weight", UnsupportedModelError),
        ("blocks.0.line\nline.weight", UnsupportedModelError),
        ("blocks." + "9" * 5000 + ".attn.qkv.weight", UnsupportedModelError),
    ],
)
def test_odd_names(name, kind, tmp_path):
    assert len(refusal({**RAW, name: torch.zeros(2)}, tmp_path, kind)) < 1000


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.tensor(1.0), "a DiT has 4 non-empty axes there"),
        (torch.zeros(2, 2).to_sparse(), "not a plain tensor"),
        (torch.zeros(2, 2, device="meta"), "not a plain tensor"),
        (torch.zeros(2, 2, dtype=torch.int8), "quantised weights"),
    ],
)
def test_odd_tensors(value, said, tmp_path):
    kind = UsageError if value.ndim == 0 else UnsupportedModelError
    assert said in refusal({**RAW, "x_embedder.proj.weight": value}, tmp_path, kind)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_that_torch_quantised(tmp_path):
    value = torch.quantize_per_tensor(torch.zeros(2, 2), 0.1, 0, torch.qint8)
    assert "_rebuild_qtensor" in refusal({**RAW, "x_embedder.proj.weight": value}, tmp_path, UnsupportedModelError)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(tmp_path):
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    assert "nested" in refusal({**RAW, "x_embedder.proj.weight": nested}, tmp_path, UnsupportedModelError)


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ("blocks.0.attn.qkv.weight.absmax", "bitsandbytes, 4 bits"),
        ("blocks.0.attn.qkv.SCB", "bitsandbytes, 8 bits"),
        ("blocks.0.attn.qkv.qweight", "GPTQ"),
        ("blocks.0.attn.qkv.weight._data", "Quanto"),
    ],
)
def test_quantised_weights_are_named(extra, kind, tmp_path):
    assert kind in refusal({**RAW, extra: torch.zeros(2)}, tmp_path, UnsupportedModelError)


def test_a_scale_of_something_else(tmp_path):
    more = {"blocks.0.attn.qkv.weight_scale": torch.tensor(0.5)}
    assert "the weight is not fp8" in refusal({**RAW, **more}, tmp_path, UnsupportedModelError)


@pytest.mark.parametrize(("suffix", "scale"), [("scale_weight", 0.5), ("weight_scale", 0.25), ("", 1.0)])
def test_scaled_fp8(suffix, scale, tmp_path):
    name = "blocks.0.attn.qkv"
    small = (RAW[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    more = {f"{name}.{suffix}": torch.tensor(scale), "scaled_fp8": torch.zeros(0)} if suffix else {}
    save_file({**RAW, f"{name}.weight": small, **more}, tmp_path / "x.safetensors")
    found = read_weights(tmp_path / "x.safetensors").tensors
    assert found.keys() == RAW.keys()
    assert torch.equal(found[f"{name}.weight"].float(), small.float() * scale)


# --- what is said --------------------------------------------------------------------------------------


@pytest.fixture
def inspected(tmp_path, monkeypatch) -> Callable[..., str]:
    """What `inspect` says of a file's content before it looks at the graph."""

    def stop(*_: Any, **__: Any) -> None:
        raise UsageError("far enough")

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("dcconvert.commands.inspect.captured", stop)

    def say(content: Any, *words: Any) -> str:
        torch.save(content, tmp_path / "x.pt")
        run = run_cli("inspect", tmp_path / "x.pt", "--heads", 2, *words)
        assert "far enough" in run.err
        return run.out

    return say


def test_inspect_says_what_was_taken(inspected):
    head = {"projectors.0.0.weight": torch.zeros(2, 2)}
    said = inspected({"model": RAW, "ema": {**AVERAGE, **head}, "opt": {"state": {0: torch.zeros(1)}}})
    assert "Weights: ema (averaged), 32 tensors." in said
    assert "Passed over: model (32 tensors); 1 other tensors (opt)." in said
    assert "Left out, as no part of the output: projectors (1 tensors)." in said
    assert "True (assumed: the last class; change it with --no-null-class)" in said


def test_options_for_what_the_file_does_not_say(inspected):
    said = inspected({"model": RAW, "ema": AVERAGE}, "--no-null-class", "--weights", "model")
    assert "Weights: model, 32 tensors." in said
    assert "assumed: the last class" not in said
