"""The bundle on disk: written whole or not at all, and read back as what was written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcconvert.export import bundle
from dcconvert.export.buckets import BucketSet, choose_buckets
from dcconvert.export.bundle import FORMAT_VERSION, GRAPH, ONNX, WEIGHTS, read_bundle, write_model
from dcconvert.export.files import MANIFEST, new_folder, write_json
from dcconvert.passes.ir.errors import UsageError
from dcconvert.passes.runtime.model import DynamicModel
from tests.export.harness import TOKENS, inputs

BUCKET_SET = choose_buckets([1, 4], [4, 8], TOKENS)


class StoppedError(Exception):
    """What a test stops a conversion with."""


def write(folder: Path, model: DynamicModel, **manifest: Any) -> None:
    write_model(model, folder)
    write_json({"format_version": FORMAT_VERSION, "buckets": BUCKET_SET.to_dict(), **manifest}, folder / MANIFEST)


def make(target: Path, text: str) -> Path:
    """A folder with as much as makes it a bundle."""
    target.mkdir(parents=True, exist_ok=True)
    write_json({"format_version": FORMAT_VERSION, "buckets": {}, "note": text}, target / MANIFEST)
    return target


def note(target: Path) -> str:
    return str(json.loads((target / MANIFEST).read_text())["note"])


def replace(target: Path, write: Callable[[Path], Any] = lambda work: pytest.fail("must not run")) -> None:
    """What a conversion with --force does."""
    with new_folder(target, force=True) as work:
        write(work)


def contents(folder: Path) -> list[str]:
    """Every file and folder below, with a slash after folders: shows what a failed write left behind."""
    return sorted(f"{p.relative_to(folder)}{'/' * p.is_dir()}" for p in folder.rglob("*"))


# Writing


def test_the_folder_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "er" / "bundle"
    with new_folder(target) as work:
        assert work.parent == target.parent
        (work / "file").write_text("whole")
        assert not target.exists()
    assert contents(tmp_path) == ["deep/", "deep/er/", "deep/er/bundle/", "deep/er/bundle/file"]


def test_others_may_read_a_bundle_as_far_as_the_umask_lets_them(rows_model, tmp_path):
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "bundle") as work:
            write(work, rows_model)
        assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o750
        assert {file.stat().st_mode & 0o777 for file in (tmp_path / "bundle").iterdir()} == {0o640}
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


@pytest.mark.parametrize("error", [StoppedError, KeyboardInterrupt, UsageError])
@pytest.mark.parametrize("old", [False, True])
def test_an_interrupted_block_leaves_everything_as_it_was(error, old, tmp_path):
    def stop(work: Path) -> None:
        make(work, "half")
        (work / "more").touch()
        raise error

    target = tmp_path / "bundle"
    if old:
        make(target, "old")
    with pytest.raises(error):
        replace(target, stop)
    assert contents(tmp_path) == (["bundle/", f"bundle/{MANIFEST}"] if old else [])
    if old:
        assert note(target) == "old"


def test_force_replaces_a_bundle_whole(tmp_path):
    target = make(tmp_path / "bundle", "old")
    (target / "report.html").write_text("old")
    with new_folder(target, force=True) as work:
        make(work, "new")
        assert note(target) == "old"
    assert contents(tmp_path) == ["bundle/", f"bundle/{MANIFEST}"]
    assert note(target) == "new"


def test_force_replaces_an_empty_folder(tmp_path):
    (tmp_path / "bundle").mkdir()
    with new_folder(tmp_path / "bundle", force=True) as work:
        (work / "file").touch()
    assert contents(tmp_path) == ["bundle/", "bundle/file"]


def test_a_link_to_a_bundle_stays_a_link(tmp_path):
    target = make(tmp_path / "disk" / "bundle", "old")
    link = tmp_path / "link"
    link.symlink_to(target)
    with new_folder(link, force=True) as work:
        make(work, "new")
    assert link.is_symlink()
    assert note(target) == "new"
    assert contents(tmp_path / "disk") == ["bundle/", f"bundle/{MANIFEST}"]


def test_a_target_that_exists_is_refused_without_force(tmp_path):
    target = make(tmp_path / "bundle", "old")
    with pytest.raises(UsageError, match=r"exists already: .* -o, or .* --force$"), new_folder(target):
        pytest.fail("the block must not run")
    assert contents(tmp_path) == ["bundle/", f"bundle/{MANIFEST}"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_bundle_is_never_replaced(kind, tmp_path):
    target = tmp_path / "photos"
    if kind == "folder":
        target.mkdir()
        (target / "holiday.png").touch()
    else:
        target.touch()
    before = contents(tmp_path)
    for force in (False, True):
        with pytest.raises(UsageError, match="choose another folder with -o"), new_folder(target, force):
            pytest.fail("the block must not run")
    with pytest.raises(UsageError, match="is not a bundle and will not be replaced"):
        replace(target)
    assert contents(tmp_path) == before


def test_a_parent_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**_: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)  # root may write anywhere
    with pytest.raises(UsageError, match=r"cannot write beside .*bundle: Permission denied; choose another folder"):
        replace(tmp_path / "bundle")


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write beside"):
        replace(tmp_path / "file" / "bundle")


@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk(old, rows_model, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "bundle"
    if old:
        make(target, "old")
    before = contents(tmp_path)
    monkeypatch.setattr(bundle, "save_file", full)
    left = "it is as it was" if old else "nothing was left behind"
    with pytest.raises(UsageError, match=rf"writing .*bundle failed: No space left on device; {left}"):
        replace(target, lambda work: write_model(rows_model, work))
    assert contents(tmp_path) == before


def test_a_system_that_refuses_large_files(rows_model, tmp_path):
    def limited(work: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            write_model(rows_model, work)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.raises(UsageError, match=r"failed: .*File too large.*; nothing was left behind") as error:
        replace(tmp_path / "bundle", limited)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == []


def test_the_old_bundle_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    target = make(tmp_path / "bundle", "old")
    rename = os.replace

    def refuse_new(source: Path, goal: Path) -> None:
        if (Path(source) / "new").exists():
            raise OSError(errno.EIO, "Input/output error")
        rename(source, goal)

    monkeypatch.setattr(os, "replace", refuse_new)
    with pytest.raises(UsageError, match="Input/output error"):
        replace(target, lambda work: (work / "new").touch())
    assert contents(tmp_path) == ["bundle/", f"bundle/{MANIFEST}"]


def test_json_holds_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"figure": float("nan")}, tmp_path / "report.json")


# Reading


@pytest.fixture(scope="module")
def written(rows_model, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("bundles") / "bundle"
    with new_folder(target) as work:
        write(work, rows_model, note="kept as it is")
    return target


@pytest.fixture
def spoiled(written, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(written, tmp_path / "bundle"))


def refusal(folder: Path) -> str:
    with pytest.raises(UsageError) as error:
        read_bundle(folder)
    assert "\n" not in str(error.value)
    assert "convert" in str(error.value)
    return str(error.value)


def test_a_bundle_comes_back_bit_for_bit(written, rows_model):
    found = read_bundle(written)
    assert found.folder == written
    assert found.onnx == written / ONNX
    assert found.manifest["note"] == "kept as it is"
    assert found.bucket_set == BUCKET_SET
    assert (found.model.spec, found.model.method) == (rows_model.spec, rows_model.method)
    args = tuple(inputs().values())
    with torch.no_grad():
        torch.testing.assert_close(found.model(*args), rows_model(*args), rtol=0, atol=0)
        torch.testing.assert_close(found.model.original(*args), rows_model.original(*args), rtol=0, atol=0)


def test_writing_what_was_read_changes_nothing(written, tmp_path):
    write_model(read_bundle(written).model, tmp_path)
    for name in (GRAPH, WEIGHTS):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_a_bundle_may_move(spoiled):
    assert read_bundle(spoiled.rename(spoiled.with_name("elsewhere"))).bucket_set == BUCKET_SET


def test_folders_that_are_no_bundles(tmp_path):
    assert f"no {MANIFEST}" in refusal(tmp_path)
    assert f"no {MANIFEST}" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize("version", [None, 0, FORMAT_VERSION + 1, str(FORMAT_VERSION)])
def test_another_version(version, spoiled):
    manifest = json.loads((spoiled / MANIFEST).read_text()) | {"format_version": version}
    write_json(manifest, spoiled / MANIFEST)
    assert f"has bundle format {version!r}, but this dcconvert reads {FORMAT_VERSION}" in refusal(spoiled)


@pytest.mark.parametrize("text", ["", "{", '{"format_version": 1,}', "[]", "3", "null", "\xff\xfe", "[" * 100_000])
@pytest.mark.parametrize("name", [MANIFEST, GRAPH])
def test_damaged_json(text, name, spoiled):
    (spoiled / name).write_bytes(text.encode("latin-1"))
    refusal(spoiled)


@pytest.mark.parametrize("name", [MANIFEST, GRAPH, WEIGHTS])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_files_that_were_cut_off(name, share, spoiled):
    path = spoiled / name
    size = path.stat().st_size
    os.truncate(path, min(int(size * share), size - 2))  # more than the newline at the end
    assert name in refusal(spoiled)


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS])
def test_missing_files(name, spoiled):
    (spoiled / name).unlink()
    assert name in refusal(spoiled)


@pytest.mark.parametrize("name", [MANIFEST, GRAPH, WEIGHTS])
def test_a_folder_where_a_file_should_be(name, spoiled):
    (spoiled / name).unlink()
    (spoiled / name).mkdir()
    refusal(spoiled)


def test_a_manifest_without_buckets(spoiled):
    write_json({"format_version": FORMAT_VERSION}, spoiled / MANIFEST)
    assert "the manifest's buckets cannot be read" in refusal(spoiled)


def test_a_manifest_of_format_3(spoiled):
    manifest = json.loads((spoiled / MANIFEST).read_text())
    write_json({"format_version": 3, "ladder": manifest["buckets"]}, spoiled / MANIFEST)
    assert read_bundle(spoiled).bucket_set == BUCKET_SET


@pytest.mark.parametrize("buckets", [[], None, {"buckets": []}, {**BUCKET_SET.to_dict(), "tokens": "many"}])
def test_a_manifest_with_other_buckets(buckets, spoiled):
    write_json({"format_version": FORMAT_VERSION, "buckets": buckets}, spoiled / MANIFEST)
    assert "manifest.json: buckets" in refusal(spoiled)


def test_buckets_survive_json():
    assert BucketSet.from_dict(json.loads(json.dumps(BUCKET_SET.to_dict()))) == BUCKET_SET
