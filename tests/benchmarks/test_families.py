"""Every family is converted, exported and run on ONNX Runtime in both modes, or refused for a reason."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.families import BATCH, FAMILIES, STRUCTURAL, checks, converted, main, measured
from dcconvert.export.checks.parity import check_identity, check_isolation
from dcconvert.passes.methods import MODES

pytestmark = pytest.mark.slow

REFUSED = {
    "latte": "no repeating transformer blocks found",
    "hunyuan-dit": "no repeating transformer blocks found",
    "sana": r"aten\.matmul\.default in transformer_blocks.* multiplies tokens with tokens",
}


@pytest.mark.parametrize("mode", ["carry", "chunk"])  # steps: tests/passes/methods/test_steps.py
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_keeping_everything_gives_the_original(name, mode):
    model = converted(FAMILIES[name], mode)
    inputs = model.spec.example(BATCH)
    assert check_identity(model, inputs).value < 1e-6
    assert check_isolation(model, inputs).passed


AGREE = [
    *(("sd35", "carry"), ("flux", "carry"), ("flux", "chunk"), ("qwen-image", "chunk")),
    *(("pixart", "steps"), ("flux", "steps")),
]


@pytest.mark.parametrize(("name", "mode"), AGREE)
def test_onnx_runtime_agrees(name, mode):
    """The script does the same for all of them."""
    assert checks(converted(FAMILIES[name], mode))["failed"] == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_not_supported_says_why(name):
    row = measured(name, FAMILIES[name], "carry")
    assert re.search(REFUSED[name], row["reason"])
    assert "\n" not in row["reason"]


def test_the_script_writes_a_row_for_each_family_and_mode(tmp_path, capsys):
    target = tmp_path / "families.json"
    words = ["--only", "sana", "sit", "--output", str(target)]
    main(words, check=lambda model: {"identity": 0.0, "failed": ["denoise"]})
    rows = json.loads(target.read_text())["rows"]
    assert [(row["family"], row["mode"]) for row in rows] == [
        (f, m) for f in ("sana", "sit") for m in (*MODES, *STRUCTURAL)
    ]
    said = capsys.readouterr().out
    assert "sana, carry: aten.matmul.default in transformer_blocks" in said
    assert "sit, chunk: ['denoise']" in said
