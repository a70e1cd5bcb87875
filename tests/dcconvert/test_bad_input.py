"""Bad input from the command line: one line that says what to do, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dcconvert.cli import main
from dcconvert.models.dit import DiT, DiTConfig

CONFIG = DiTConfig(depth=3, width=32, heads=2, patch=2, image_size=8, in_channels=1, num_classes=4, learn_sigma=False)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    model = DiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def checkpoint(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "model.safetensors"
    facts = {"config": CONFIG.as_dict(), "prediction": "flow", "class_names": ["a", "b", "c", "d"]}
    save_file(weights, path, metadata={"dcconvert": json.dumps(facts)})
    return path


def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, code: int, *words: object) -> str:
    """Run the command line, expect an exit code and one line on stderr; returns the line."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == code
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(("done ", "note "))]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before
    return lines[0]


def convert(model: Path, tmp_path: Path, *more: object) -> tuple[object, ...]:
    return (model, "--ratio", "4x", "-o", tmp_path / "out", *more)


class Code:
    """What a hostile pickle asks for."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (subprocess.check_call, (["false"],))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"hello", "is not a checkpoint"),
        (b"", "is empty"),
        (pickle.dumps(Code()), "subprocess.check_call, which dcconvert does not run"),
    ],
    ids=["text", "empty", "pickle with code"],
)
def test_files_that_are_no_checkpoint(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    line = refused(capfd, tmp_path, 2, *convert(path, tmp_path))
    assert says in line


def test_missing_file(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "does not exist" in refused(capfd, tmp_path, 2, *convert(tmp_path / "none.pt", tmp_path))


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_truncated_files(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, weights: dict[str, torch.Tensor], kind: str
) -> None:
    path = tmp_path / f"model.{kind}"
    if kind == "pt":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(capfd, tmp_path, 2, *convert(path, tmp_path))


def test_missing_keys(capfd: pytest.CaptureFixture[str], tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "model.pt"
    del weights["blocks.1.attn.qkv.weight"]
    torch.save(weights, path)
    assert "blocks.1.attn.qkv.weight" in refused(capfd, tmp_path, 2, *convert(path, tmp_path, "--heads", 2))


def test_unknown_architecture(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(4, 4, 3, 3)}, path)
    assert "U-Net" in refused(capfd, tmp_path, 3, *convert(path, tmp_path))


def test_weights_that_are_not_finite(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "model.pt"
    weights["blocks.0.mlp.fc1.weight"][0, 0] = torch.nan
    torch.save(weights, path)
    assert "blocks.0.mlp.fc1.weight" in refused(capfd, tmp_path, 2, *convert(path, tmp_path, "--heads", 2))


@pytest.mark.parametrize("ratio", ["0", "1000x", "abc", "-4", "0.5", "nan"])
def test_ratios(capfd: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, ratio: str) -> None:
    line = refused(capfd, tmp_path, 2, checkpoint, "--ratio", ratio, "-o", tmp_path / "out")
    assert "ratio" in line


def test_existing_folder(capfd: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "--force" in refused(capfd, tmp_path, 2, *convert(checkpoint, tmp_path))
    assert "is not a bundle" in refused(capfd, tmp_path, 2, *convert(checkpoint, tmp_path, "--force"))


def test_target_that_cannot_be_written(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", denied)  # tests may run as root, whom no mode stops
    assert "cannot write" in refused(capfd, tmp_path, 2, *convert(checkpoint, tmp_path))


@pytest.mark.parametrize("words", [("--mode", "chunk", "--head-blocks", 2), ("--head-blocks", 2, "--tail-blocks", 1)])
def test_no_trunk_left(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, words: tuple[object, ...]
) -> None:
    assert "no trunk" in refused(capfd, tmp_path, 2, *convert(checkpoint, tmp_path, *words))


def test_a_failed_check_is_exit_1(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, weights: dict[str, torch.Tensor]
) -> None:
    """Of weights that give numbers which are not finite, nothing can be shown."""
    with safe_open(checkpoint, "pt") as file:
        facts = file.metadata()
    save_file({name: torch.full_like(value, 1e30) for name, value in weights.items()}, checkpoint, metadata=facts)
    assert "not finite" in refused(capfd, tmp_path, 1, *convert(checkpoint, tmp_path))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--threads", "1000000000"),
        ("--steps", "2147483648"),
        ("--batch", "1000000"),
        ("--image-size", "9" * 5000),
        ("--image-size", "99999"),
        ("--heads", "9" * 4000),
    ],
)
def test_options_of_absurd_size(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, weights: dict[str, torch.Tensor], option: str, value: str
) -> None:
    del weights["pos_embed"]
    torch.save(weights, tmp_path / "model.pt")
    line = refused(capfd, tmp_path, 2, *convert(tmp_path / "model.pt", tmp_path, "--heads", 2, option, value))
    assert len(line) < 500


def test_what_is_no_file(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Reading a pipe would wait for somebody to write; a name need not be UTF-8."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert "is a pipe, device or socket" in refused(capfd, tmp_path, 2, *convert(path, tmp_path))
    odd = os.fsdecode(bytes(tmp_path) + b"/x\xff\n.pt")
    assert "does not exist" in refused(capfd, tmp_path, 2, *convert(Path(odd), tmp_path))


def test_words_that_are_near_a_command(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "dcconvert evaluate" in refused(capfd, tmp_path, 2, "evalute", tmp_path)


def test_paths_with_brackets_are_shown_as_they_are(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "x[/bold].pt" in refused(capfd, tmp_path, 2, *convert(tmp_path / "x[/bold].pt", tmp_path))


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_folder_that_is_no_bundle(capfd: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    assert "not a bundle" in refused(capfd, tmp_path, 2, command, tmp_path)
