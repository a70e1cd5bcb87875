"""Checkpoints: recognised by content, inferred from shapes, refused in one line."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.models.dit_checkpoint import infer_config, load_checkpoint, read_checkpoint
from dcconvert.passes.ir.errors import DcconvertError, UnsupportedModelError, UsageError

SMALL = DiTConfig(depth=2, width=32, heads=4, patch=2, image_size=8, in_channels=3, num_classes=5)
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    torch.manual_seed(0)
    model = DiT(SMALL)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.state_dict()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write an object as a torch file and return the path."""

    def write(content: Any, **options: Any) -> Path:
        path = tmp_path / "model.bin"
        torch.save(content, path, **options)
        return path

    return write


@pytest.fixture
def save_safe(tmp_path: Path) -> Callable[..., Path]:
    """Write a safetensors file, with `facts` as dcconvert's metadata, and return the path."""

    def write(state: State, **facts: Any) -> Path:
        path = tmp_path / "model.ckpt"
        save_file(state, path, metadata={"dcconvert": json.dumps(facts)} if facts else None)
        return path

    return write


def refusal(path: Path, kind: type[DcconvertError] = UsageError, **options: Any) -> str:
    """The message with which the file is refused, checked to be one line that names the file."""
    with pytest.raises(kind) as caught:
        read_checkpoint(path, **{"heads": 4, **options})
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_plain_state_dict(state: State, save: Callable[..., Path]) -> None:
    path = save(state)
    checkpoint = read_checkpoint(path, heads=4)
    assert checkpoint.config == SMALL
    assert (checkpoint.prediction, checkpoint.class_names, checkpoint.source) == ("eps", None, "")
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(torch.equal(checkpoint.state_dict[name], tensor) for name, tensor in state.items())


def test_loaded_module_computes_what_the_original_does(state: State, save: Callable[..., Path]) -> None:
    original = DiT(SMALL).eval()
    original.load_state_dict(state)
    path = save(state)
    model = load_checkpoint(path, heads=4)
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0]), torch.tensor([0, 5])
    assert torch.equal(model(*inputs), original(*inputs))
    assert not model.training
    assert not model.pos_embed.requires_grad
    assert model.checkpoint_info.path == path
    assert model.checkpoint_info.state_dict == {}


def test_legacy_torch_file(state: State, save: Callable[..., Path]) -> None:
    path = save({"model": state}, _use_new_zipfile_serialization=False)
    assert read_checkpoint(path, heads=4).source == "model"


def test_safetensors_metadata(state: State, save_safe: Callable[..., Path]) -> None:
    path = save_safe(state, config=SMALL.as_dict(), prediction="flow", class_names=list("abcde"))
    checkpoint = read_checkpoint(path)
    assert checkpoint.config == SMALL
    assert (checkpoint.prediction, checkpoint.class_names) == ("flow", list("abcde"))
    assert read_checkpoint(path, prediction="eps").prediction == "eps"


def test_safetensors_without_metadata(state: State, save_safe: Callable[..., Path]) -> None:
    assert read_checkpoint(save_safe(state), heads=4).config == SMALL


def test_averaged_weights_come_first(state: State, save: Callable[..., Path]) -> None:
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    options = argparse.Namespace(model="DiT-S/2", image_size=256)  # training scripts store theirs
    path = save({"model": state, "ema": averaged, "opt": {"state": {}}, "args": options, "epoch": torch.tensor(3)})
    checkpoint = read_checkpoint(path, heads=4)
    assert checkpoint.source == "ema"
    assert torch.equal(checkpoint.state_dict["blocks.0.attn.qkv.bias"], averaged["blocks.0.attn.qkv.bias"])


def test_an_entry_without_tensors_is_passed_over(state: State, save: Callable[..., Path]) -> None:
    path = save({"ema": {"decay": 0.999}, "state_dict": {"model": state}})
    assert read_checkpoint(path, heads=4).source == "state_dict.model"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes(prefix: str, state: State, save: Callable[..., Path]) -> None:
    path = save({"model": {prefix + name: tensor for name, tensor in state.items()}})
    assert set(read_checkpoint(path, heads=4).state_dict) == set(state)


def test_parameters_become_tensors(state: State, save: Callable[..., Path]) -> None:
    path = save({name: nn.Parameter(tensor) for name, tensor in state.items()})
    assert not any(isinstance(t, nn.Parameter) for t in read_checkpoint(path, heads=4).state_dict.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(dtype: torch.dtype, state: State, save: Callable[..., Path]) -> None:
    checkpoint = read_checkpoint(save({name: tensor.to(dtype) for name, tensor in state.items()}), heads=4)
    assert {tensor.dtype for tensor in checkpoint.state_dict.values()} == {torch.float32}
    torch.testing.assert_close(dict(checkpoint.state_dict), state, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_need_no_option(size: str, patch: int) -> None:
    depth, width, heads = SIZES[size]
    config = DiTConfig(depth, width, heads, patch, image_size=32)
    with torch.device("meta"):
        assert infer_config(Path("model.pt"), DiT(config).state_dict()) == config


def test_unusual_shapes(save: Callable[..., Path]) -> None:
    config = DiTConfig(11, 24, 3, 1, 5, in_channels=1, num_classes=1, learn_sigma=False, mlp_width=40)
    assert read_checkpoint(save(DiT(config).state_dict()), heads=3).config == config


def test_metadata_tells_that_there_is_no_null_class(save_safe: Callable[..., Path]) -> None:
    config = DiTConfig(depth=1, width=16, heads=2, patch=1, image_size=2, num_classes=7, null_class=False)
    path = save_safe(DiT(config).state_dict(), config=config.as_dict())
    assert read_checkpoint(path).config == config


def test_positions_are_made_where_absent(state: State, save: Callable[..., Path]) -> None:
    del state["pos_embed"]
    path = save(state)
    checkpoint = read_checkpoint(path, heads=4, image_size=8)
    assert torch.equal(checkpoint.state_dict["pos_embed"], DiT(SMALL).pos_embed)
    assert "--image-size" in refusal(path)
    assert "not a positive multiple of the patch size 2" in refusal(path, image_size=7)


def test_weights_stay_mapped_to_the_file(state: State, save: Callable[..., Path]) -> None:
    path = save(state)
    addresses = [tensor.data_ptr() for tensor in load_checkpoint(path, heads=4).state_dict().values()]
    assert max(addresses) - min(addresses) < path.stat().st_size  # inside one mapping of the file: no copies


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.pt")
    (tmp_path / "file").write_text("x")
    assert "cannot be read: Not a directory" in refusal(tmp_path / "file" / "none.pt")


def test_forbidden_file(state: State, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = save(state)
    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read: Permission denied" in refusal(path)


def test_folder(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (b"epoch 1 loss 0.3\n" * 100, "is not a checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not a checkpoint"),
        (b'{"list": {"a": 1}}', "is not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (bytes(257) + b"ustar" + bytes(250), "is a tar file"),
        (b"\x80", "is not a checkpoint"),
    ],
    ids=["empty", "text", "png", "json", "lfs", "tar", "one byte"],
)
def test_other_files(content: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert part in refusal(path)


def test_other_zip(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    np.savez(path.with_suffix(".npz"), a=np.zeros(3))
    assert "no data.pkl" in refusal(path.with_suffix(".npz"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"")
        archive.writestr("model/constants.pkl", b"")
    assert "TorchScript" in refusal(path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated(
    form: str, share: float, state: State, save: Callable[..., Path], save_safe: Callable[..., Path]
) -> None:
    path = save_safe(state) if form == "safetensors" else save(state, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "is truncated or damaged" in refusal(path)


def test_pickle_of_a_newer_protocol(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"weights": [1.0, 2.0]}))
    assert "model.state_dict()" in refusal(path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"epoch": 3, "loss": 0.1}, "top-level keys: epoch, loss"),
        ({str(i): i for i in range(9)}, "top-level keys: 0, 1, 2 and 6 more"),
        ({}, "found an empty dict"),
        ([torch.zeros(2)], "found a list"),
    ],
)
def test_no_tensors(content: Any, part: str, save: Callable[..., Path]) -> None:
    message = refusal(save(content))
    assert "holds no named tensors" in message
    assert part in message


def test_tensors_there_twice(state: State, save: Callable[..., Path]) -> None:
    state["module.pos_embed"] = state["pos_embed"]
    assert "appear twice" in refusal(save(state))


def test_missing_keys(state: State, save: Callable[..., Path]) -> None:
    for name in [name for name in state if ".mlp." in name and name.startswith("blocks")]:
        del state[name]
    message = refusal(save(state))
    assert "8 missing keys" in message
    assert "blocks.0.mlp.fc1.bias" in message
    assert "and 5 more" in message


def test_missing_blocks(state: State, save: Callable[..., Path]) -> None:
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.0.")}
    assert "all of blocks.0 (others go up to blocks.1)" in refusal(save(rest))
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    assert "10 missing keys" in refusal(save(rest))


def test_extra_keys(state: State, save: Callable[..., Path]) -> None:
    for i in range(2):
        state |= {f"blocks.{i}.attn.{name}_norm.weight": torch.ones(8) for name in "qk"}
    message = refusal(save(state), UnsupportedModelError)
    assert "a DiT/SiT does not have 4 of its tensors" in message
    assert "blocks.0.attn.q_norm.weight" in message
    assert "and 1 more" in message


def test_pixart_is_told_by_its_extra_keys(state: State, save: Callable[..., Path]) -> None:
    state["blocks.0.cross_attn.proj.weight"] = torch.zeros(32, 32)
    assert "PixArt" in refusal(save(state), UnsupportedModelError)


@pytest.mark.parametrize(
    ("names", "family", "nearest"),
    [
        (["transformer_blocks.0.attn1.to_q.weight", "proj_out.bias"], "a diffusers transformer", " for "),
        (["conv_in.weight", "down_blocks.0.transformer_blocks.0.attn1.to_q.weight"], "a U-Net", " for "),
        (["m.blocks.7.attn.qkv.bias"], "an unknown architecture", "blocks.7.attn.qkv.bias for blocks.0.attn.qkv.bias"),
        (["zzz"], "an unknown architecture", "none"),
    ],
)
def test_unknown_architecture(names: list[str], family: str, nearest: str, save: Callable[..., Path]) -> None:
    message = refusal(save({name: torch.zeros(2) for name in names}), UnsupportedModelError)
    assert f"found {family} ({len(names)} tensors: {names[0]}" in message
    assert "Facebook's DiT/SiT key names" in message
    assert nearest in message.split("nearest miss: ")[1]


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        ("blocks.1.attn.qkv.weight", (96, 16), "blocks.1.attn.qkv.weight is [96, 16], expected [96, 32]"),
        ("x_embedder.proj.weight", (32, 12), "x_embedder.proj.weight is [32, 12], a DiT has 4"),
        ("final_layer.linear.weight", (13, 32), "has 13 rows, but a DiT with this patch size has 12 or 24"),
        ("blocks.0.mlp.fc1.weight", (0, 32), "blocks.0.mlp.fc1.weight is [0, 32]"),
        ("y_embedder.embedding_table.weight", (6, 31), "expected [6, 32]"),
    ],
)
def test_wrong_shapes(name: str, shape: tuple[int, ...], part: str, state: State, save: Callable[..., Path]) -> None:
    state[name] = torch.zeros(shape)
    message = refusal(save(state))
    assert "wrong shapes" in message
    assert part in message


def test_oblong_grids_and_patches(state: State, save: Callable[..., Path]) -> None:
    oblong = state | {"pos_embed": torch.zeros(1, 15, 32)}
    assert "15 positions" in refusal(save(oblong), UnsupportedModelError)
    oblong = state | {"x_embedder.proj.weight": torch.zeros(32, 3, 2, 4)}
    assert "2x4" in refusal(save(oblong), UnsupportedModelError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights(value: float, state: State, save: Callable[..., Path]) -> None:
    state["blocks.1.mlp.fc2.weight"][3, :2] = value
    assert "blocks.1.mlp.fc2.weight has 2 NaN or infinite values (of 4096)" in refusal(save(state))


def test_integer_weights(state: State, save: Callable[..., Path]) -> None:
    state["blocks.1.mlp.fc2.weight"] = state["blocks.1.mlp.fc2.weight"].to(torch.int8)
    message = refusal(save(state), UnsupportedModelError)
    assert "blocks.1.mlp.fc2.weight is not a plain float tensor (torch.int8" in message


def test_unknown_width_asks_for_heads(save: Callable[..., Path]) -> None:
    path = save(DiT(DiTConfig(depth=1, width=128, heads=4, patch=1, image_size=2)).state_dict())
    assert "the number of heads cannot be inferred from width 128: pass --heads with one of 1, 2, 4, 8." in refusal(
        path, heads=None
    )
    assert "5 heads do not fit width 128" in refusal(path, heads=5)
    assert "0 heads do not fit width 128" in refusal(path, heads=0)


def test_image_size_against_positions(state: State, save: Callable[..., Path]) -> None:
    assert "--image-size is 16, but pos_embed is for 8" in refusal(save(state), image_size=16)


def test_unknown_prediction(state: State, save: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="Unknown prediction 'x0'"):
        read_checkpoint(save(state), heads=4, prediction="x0")


@pytest.mark.parametrize(
    ("facts", "part"),
    [
        ({"config": {"depth": 3}}, "metadata says depth is 3, but the tensors say 2"),
        ({"config": {"heads": "four"}}, "metadata 'dcconvert' is malformed"),
        ({"config": [1]}, "metadata 'dcconvert' is malformed"),
        ({"prediction": "x0"}, "metadata has prediction 'x0'"),
        ({"class_names": ["a"]}, "metadata names 1 classes, but the tensors have 5"),
    ],
)
def test_wrong_metadata(facts: dict[str, Any], part: str, state: State, save_safe: Callable[..., Path]) -> None:
    assert part in refusal(save_safe(state, **facts))
