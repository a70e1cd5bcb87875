"""The main job end to end on a tiny checkpoint, and the commands on the bundle it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dcconvert
from dcconvert.cli import main
from dcconvert.dit import DiT, DiTConfig

CONFIG = DiTConfig(depth=3, width=32, heads=2, patch=2, image_size=16, in_channels=1, num_classes=4, learn_sigma=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = DiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    facts = {"config": CONFIG.as_dict(), "prediction": "flow", "class_names": ["a", "b", "c", "d"]}
    save_file(dict(model.state_dict()), path, metadata={"dcconvert": json.dumps(facts)})
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("job") / "bundle"
    words = [checkpoint, "--ratio", "4x", "-o", out, "--schedule", "falling", "--batch", 2, "--steps", 6]
    main(
        [str(word) for word in (*words, "--images", 3, "--reference-steps", 8, "--dump-graphs", out.parent / "graphs")]
    )
    return out


def test_the_bundle_is_complete(bundle: Path) -> None:
    names = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert names == {
        *("manifest.json", "model.safetensors", "graph.json", "report.json", "report.html", "samples.png"),
        *("chunk_maps.png", "onnx/route.onnx", "onnx/denoise.onnx"),
    }
    assert [path.name for path in bundle.parent.iterdir() if path.name.startswith(".")] == []
    assert len(list((bundle.parent / "graphs").glob("*.txt"))) == 6  # one a pass, two after the split


def test_the_manifest_says_what_was_done(bundle: Path, checkpoint: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["command"].startswith(f"dcconvert {checkpoint} --ratio 4x")
    assert manifest["conversion"]["schedule"] == "falling"
    assert [item["name"] for item in manifest["conversion"]["passes"]][-1] == "SplitRoute"
    assert manifest["config"] == CONFIG.as_dict()
    assert max(manifest["parity"].values()) < 1e-3


def test_the_report_measures_both_and_the_control(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    assert all(check["passed"] for check in report["checks"])
    assert {row["runtime"] for row in report["latency"]} == {"ONNX Runtime CPU", "torch CPU, eager"}
    for row in report["latency"]:
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["flop_ratio"])
    kept = [step["kept"] for step in report["compute"]["per_step"]]
    assert kept == sorted(kept, reverse=True)
    assert sum(kept) / len(kept) == pytest.approx(16, abs=0.5)
    names = [row["name"] for row in report["fidelity"]["images"]["rows"]]
    few = round(6 / report["compute"]["ratio"])
    assert names == ["original, 8 steps", "original, 6 steps", f"original, {few} steps", "converted, 6 steps"]
    assert report["buckets"]["expected_waste"] < 0.1
    page = (bundle / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    for title in ("Checks", "Latency", "Compute", "Fidelity", "Memory", "Buckets", "Passes", "Limits"):
        assert f"<h2>{title}" in page


def test_a_loaded_bundle_is_the_converted_model(bundle: Path, checkpoint: Path) -> None:
    dit = dcconvert.load_checkpoint(checkpoint)
    inputs = (torch.randn(2, 1, 16, 16), torch.tensor([900.0, 100.0]), torch.tensor([0, 3]))
    with torch.no_grad():
        fresh = dcconvert.convert(dit, 4, schedule="falling")(*inputs)
        loaded = dcconvert.load(bundle)(*inputs)
    torch.testing.assert_close(loaded, fresh, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("runtime", ["ort", "torch"])
@pytest.mark.parametrize("guidance", ["1", "2"])
def test_sample_draws_both_rows(bundle: Path, tmp_path: Path, runtime: str, guidance: str) -> None:
    out = tmp_path / "grid.png"
    words = [
        "sample",
        bundle,
        "--runtime",
        runtime,
        "-n",
        3,
        "--steps",
        2,
        "--compare",
        "--guidance",
        guidance,
        "-o",
        out,
    ]
    main([str(word) for word in words])
    with Image.open(out) as image:
        assert image.height > 2 * 32
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_evaluate_writes_its_figures(bundle: Path, tmp_path: Path) -> None:
    main(
        [
            "evaluate",
            str(bundle),
            "--runs",
            "1",
            "--images",
            "2",
            "--reference-steps",
            "3",
            "--json",
            str(tmp_path / "f.json"),
        ]
    )
    report = json.loads((tmp_path / "f.json").read_text())
    assert report["latency"][0]["batch"] == 2
    assert report["fidelity"]["images"]["count"] == 2


def test_a_bundle_from_python_works_on_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    model = dcconvert.convert(dcconvert.load_checkpoint(checkpoint), 2)
    model.save(tmp_path / "saved", batches=(1,))
    main(["sample", str(tmp_path / "saved"), "-n", "1", "--steps", "1", "-o", str(tmp_path / "one.png")])
    assert (tmp_path / "one.png").exists()
    with pytest.raises(dcconvert.UsageError, match="exists already"):
        model.save(tmp_path / "saved")


def test_inspect_shows_cuts_and_passes(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(checkpoint)])
    shown = capsys.readouterr().out
    assert "trunk starts" in shown
    assert "PackTrunk" in shown


def test_ratio_1_is_the_original(checkpoint: Path) -> None:
    dit = dcconvert.load_checkpoint(checkpoint)
    inputs = (torch.randn(2, 1, 16, 16), torch.tensor([900.0, 100.0]), torch.tensor([0, 3]))
    with torch.no_grad():
        torch.testing.assert_close(dcconvert.convert(dit, "1x")(*inputs), dit(*inputs), rtol=1e-5, atol=1e-5)
