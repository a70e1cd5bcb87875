"""`dcconvert export-triton`: a repository out of a bundle, and refusals in one line."""

from __future__ import annotations

import pytest

from tests.dcconvert.harness import contents, refusal, run_cli


@pytest.mark.parametrize("mode", ["main_job", "chunk_job"])
def test_a_repository_out_of_a_bundle(request, tmp_path, mode):
    folder = request.getfixturevalue(mode).folder
    run = run_cli("export-triton", folder, "-o", tmp_path / "repository", "--name", "tiny")
    assert run.code == 0, run.err
    assert sorted(path.name for path in (tmp_path / "repository").iterdir()) == [
        "dcconvert.json",
        "tiny",
        "tiny_denoise",
        "tiny_route",
    ]
    sequences = "sequence_batching" in (tmp_path / "repository" / "tiny" / "config.pbtxt").read_text()
    assert sequences == (mode == "main_job")  # mode carry
    assert f"Graphs: {folder / 'onnx'}" in run.out
    assert "dcconvert installed" in run.out
    assert "exists already" in refusal(2, "export-triton", folder, "-o", tmp_path / "repository")


def test_bad_input_leaves_nothing(tmp_path, chunk_job):
    assert "is not a bundle" in refusal(2, "export-triton", tmp_path, "-o", tmp_path / "repository")
    assert "letters, digits" in refusal(2, "export-triton", chunk_job.folder, "-o", tmp_path / "r", "--name", "../x")
    assert contents(tmp_path) == []
