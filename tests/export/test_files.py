"""The door for writing: nothing of the user's is lost, nothing that is not ours is replaced, nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from dcconvert.export.buckets import choose_buckets
from dcconvert.export.bundle import FORMAT_VERSION, adding_to, verify
from dcconvert.export.disk.interrupts import Interrupted, Signals
from dcconvert.export.disk.targets import locked, remove, temporary_name
from dcconvert.export.files import JSON, MANIFEST, PNG, new_folder, usable_folder, writable, write_json, write_whole
from dcconvert.passes.ir.errors import StoppedError, UsageError

DATA = b"\x89PNG new"
BUCKETS = choose_buckets([1], [4], 4).to_dict()


def make(target: Path, *more: str, note: str = "old") -> Path:
    """A folder with as much as makes it a bundle, and other files."""
    for name in more:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(f"{note} {name}")
    target.mkdir(exist_ok=True)
    write_json({"format_version": FORMAT_VERSION, "buckets": BUCKETS, "note": note}, target / MANIFEST)
    return target


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def refused(target: Path, *words: str, **options: Any) -> None:
    """A target is refused before the block runs, in one line that has these words; nothing changes."""
    before = sorted(map(str, target.parent.rglob("*")))
    with pytest.raises(UsageError) as error, new_folder(target, **options):
        pytest.fail("the block must not run")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(map(str, target.parent.rglob("*"))) == before


# What is replaced


def test_force_keeps_what_dcconvert_did_not_write(tmp_path):
    mine = ("notes.txt", "onnx/mine.plan", "data/model.pt", "samples/.hidden", "engines/readme")
    target = make(tmp_path / "bundle", *mine, "report.html", "onnx/route.onnx", "onnx/trt/route.onnx", "failures.json")
    (target / "link").symlink_to("notes.txt")
    (target / "empty").mkdir()
    with new_folder(target, force=True) as work:
        make(work, "onnx/full.onnx", note="new")
    assert contents(target) == sorted([*mine, "link", MANIFEST, "onnx/full.onnx"])
    assert (target / "notes.txt").read_text() == "old notes.txt"
    assert (target / "link").is_symlink()
    assert (target / "empty").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_picture_that_a_bundle_does_not_list_is_the_users(tmp_path):
    target = tmp_path / "bundle"
    for _ in range(2):
        with new_folder(target, force=True) as work:
            make(work, "report.html", note="new")
        (target / "samples.png").write_text("drawn by the user")
    assert "samples.png" in contents(target)


@pytest.mark.parametrize(
    "manifest", ["", "{}", '{"manifest_version": 3, "name": "an extension"}', '{"format_version": "4"}', "[4]", "\xff"]
)
def test_a_folder_with_another_manifest_is_no_bundle(manifest, tmp_path):
    target = tmp_path / "extension"
    target.mkdir()
    (target / MANIFEST).write_bytes(manifest.encode("latin-1"))
    refused(target, "is not a bundle and will not be replaced", force=True)


def test_a_folder_that_holds_an_input_is_never_replaced(tmp_path):
    target = make(tmp_path / "bundle", "weights/model.pt")
    for path in (target / "weights" / "model.pt", target, tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target / "weights")
        refused(target, "holds", "which is read", force=True, inputs=[path])


def test_an_update_keeps_everything_else(tmp_path):
    target = make(
        tmp_path / "bundle", "notes.txt", "engines/x/a.engine", "failures.json", "onnx/trt/a.onnx", "onnx/mine"
    )
    inode = (target / "engines/x/a.engine").stat().st_ino
    with new_folder(target, force=True, update=True, without={"onnx"}) as work:
        make(work, "onnx/route.onnx", note="new")
    kept = ["notes.txt", "engines/x/a.engine", "failures.json", "onnx/mine", MANIFEST, "onnx/route.onnx"]
    assert contents(target) == sorted(kept)
    assert (target / "engines/x/a.engine").stat().st_ino == inode, "large files are not copied"


def test_what_appears_during_the_work_is_kept(tmp_path):
    target = make(tmp_path / "bundle")
    with new_folder(target, force=True) as work:
        make(work, note="new")
        (target / "notes.txt").write_text("written meanwhile")
    assert contents(target) == [MANIFEST, "notes.txt"]
    with pytest.raises(UsageError, match="exists already"), new_folder(tmp_path / "other") as work:
        make(tmp_path / "other", "thesis.tex")
    assert contents(tmp_path / "other") == [MANIFEST, "thesis.tex"]


def place(kind: str, path: Path) -> Path:
    """Something that is neither a folder nor a file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "nowhere":
        path.symlink_to(path.parent / "nothing")
    else:
        path.symlink_to("/dev/null")
    return path


@pytest.mark.parametrize("kind", ["pipe", "socket", "loop", "nowhere", "device"])
def test_other_things_are_never_replaced(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = place(kind, Path("out"))
    for force in (False, True):
        refused(path, "leads nowhere" if kind in ("loop", "nowhere") else "choose another", force=force)
    with pytest.raises(UsageError, match=r"cannot write out: it is (a|something) .* not replaced; choose another file"):
        write_whole(path, DATA, PNG)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert path.is_symlink() or not path.is_file()


def test_the_device_itself_is_never_replaced():
    for target in (Path("/dev/null"), Path("/dev/stdout")):
        with pytest.raises(UsageError, match="is not replaced"):
            writable(target, JSON)


# Single files


def test_only_a_file_of_the_same_format_is_replaced(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK weights of a month")
    with pytest.raises(UsageError, match="exists and is not a PNG image; choose another file"):
        write_whole(path, DATA, PNG)
    assert path.read_bytes() == b"PK weights of a month"
    for before in (b"", b"\x89PNG old"):
        path.write_bytes(before)
        write_whole(path, DATA, PNG)
        assert path.read_bytes() == DATA


def test_files_of_a_bundle_are_not_written_over(tmp_path):
    target = make(tmp_path / "bundle", "report.json", "notes.json")
    for name in ("notes.json", "report.json"):
        (target / name).write_text("{}")
    with pytest.raises(UsageError, match="belongs to the bundle"):
        writable(target / "report.json", JSON)
    writable(target / "notes.json", JSON)


def test_names_of_temporary_files_cannot_be_planted(tmp_path):
    secret, path = tmp_path / "secret", tmp_path / "s.png"
    secret.write_text("secret")
    for name in (".s.png.partial", f"{temporary_name(path)}lock", f"{temporary_name(path)}abc"):
        (tmp_path / name).symlink_to(secret)
    with pytest.raises(UsageError, match="cannot write beside"):  # somebody else's link is in the way of the lock
        write_whole(path, DATA, PNG)
    (tmp_path / f"{temporary_name(path)}lock").unlink()
    write_whole(path, DATA, PNG)
    assert secret.read_text() == "secret"
    assert path.read_bytes() == DATA


def test_long_names_and_names_that_are_no_utf8(tmp_path):
    for name in ("n" * 250 + ".png", os.fsdecode(b"\xff\xfe.png")):
        write_whole(tmp_path / name, DATA, PNG)
        assert (tmp_path / name).read_bytes() == DATA
        with new_folder(tmp_path / f"{name}x") as work:
            (work / "file").touch()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_for_files_is_tried_first(tmp_path):
    usable_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=f"{path.name}"):
            usable_folder(path)


# Several runs, killed runs


def test_a_second_run_on_a_target_is_refused(tmp_path):
    target = make(tmp_path / "bundle")
    with new_folder(target, force=True) as work:
        make(work, note="new")
        for again in (new_folder(target, force=True), new_folder(target.parent / "." / "bundle", force=True)):
            with pytest.raises(UsageError, match=r"another run of dcconvert is writing .*bundle: wait"), again:
                pytest.fail("the block must not run")
        with pytest.raises(UsageError, match="another run"), adding_to(target):
            pytest.fail("the block must not run")
    assert json.loads((target / MANIFEST).read_text())["note"] == "new"
    with new_folder(target, force=True) as work:
        make(work, note="newer")


def test_what_killed_runs_left_is_removed_by_the_next(tmp_path):
    target, start = make(tmp_path / "bundle"), temporary_name(tmp_path / "bundle")
    make(tmp_path / f"{start}12345678", "model.safetensors")
    make(tmp_path / f"{start}12345678-old")
    (tmp_path / f"{start}lock").touch()
    others = [make(tmp_path / name) for name in (".bundle-backup", "bundle2", f"{temporary_name(tmp_path / 'b')}x")]
    with new_folder(target, force=True) as work:
        make(work, note="new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["bundle", *(path.name for path in others)])


def test_a_bundle_that_a_killed_run_moved_away_comes_back(tmp_path):
    target, start = tmp_path / "bundle", temporary_name(tmp_path / "bundle")
    make(tmp_path / f"{start}12345678-old")
    make(tmp_path / f"{start}12345678", note="new")
    refused_at = pytest.raises(UsageError, match="exists already")
    with refused_at, new_folder(target):
        pytest.fail("the block must not run")
    assert contents(tmp_path) == [f"bundle/{MANIFEST}"]
    assert json.loads((target / MANIFEST).read_text())["note"] == "old"


def test_a_lock_of_a_dead_process_is_void(tmp_path):
    if (child := os.fork()) == 0:
        with locked(tmp_path / "x"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path / "x"):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind(number, tmp_path):
    target = make(tmp_path / "bundle")

    def stopped() -> None:
        with new_folder(target, force=True) as work:
            make(work, "half", note="new")
            signal.raise_signal(number)

    with Signals() as signals:
        with pytest.raises(Interrupted):
            stopped()
        assert signals.exit_code == 128 + number
    assert contents(tmp_path) == [f"bundle/{MANIFEST}"]
    assert json.loads((target / MANIFEST).read_text())["note"] == "old"


def test_a_signal_between_the_renames_waits(tmp_path, monkeypatch):
    target, rename = make(tmp_path / "bundle"), os.replace

    def interrupted(source: Path, goal: Path) -> None:
        rename(source, goal)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(os, "replace", interrupted)

    def replaced() -> None:
        with new_folder(target, force=True) as work:
            make(work, note="new")

    with Signals(), pytest.raises(StoppedError, match=r"interrupted, but .*bundle is complete"):
        replaced()
    assert contents(tmp_path) == [f"bundle/{MANIFEST}"]
    assert json.loads((target / MANIFEST).read_text())["note"] == "new"


def test_a_folder_that_may_not_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    target = make(tmp_path / "bundle")
    target.chmod(0o555)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    refused(target, "may not be written (its mode is dr-xr-xr-x)", force=True)


def test_closed_folders_can_be_removed(tmp_path):
    target = make(tmp_path / "bundle", "onnx/a.onnx")
    for folder in (target / "onnx", target):
        folder.chmod(0o500)
    remove(target)
    assert list(tmp_path.iterdir()) == []


# The list of hashes


def test_the_manifest_lists_what_was_written(tmp_path):
    target = tmp_path / "bundle"
    with new_folder(target) as work:
        make(work, "onnx/route.onnx", "report.html", note="new")
    (target / "notes.txt").write_text("mine")
    with new_folder(target, force=True, update=True) as work:
        (work / "report.html").write_text("newer")
    listed = json.loads((target / MANIFEST).read_text())["files"]
    assert set(listed) == {"onnx/route.onnx", "report.html"}
    assert listed["report.html"]["bytes"] == len("newer")
    assert contents(target) == sorted([*listed, MANIFEST, "notes.txt"])


def test_what_is_added_is_listed(tmp_path):
    target = tmp_path / "bundle"
    with new_folder(target) as work:
        make(work, "report.html")
    with adding_to(target):
        make(target / "onnx" / "trt", "a.onnx")
        (target / "onnx" / "trt" / MANIFEST).unlink()
    assert set(json.loads((target / MANIFEST).read_text())["files"]) == {"report.html", "onnx/trt/a.onnx"}


@pytest.mark.parametrize("change", ["longer", "other", "gone", "link", "pipe"])
def test_a_changed_file_is_named(change, tmp_path):
    target = tmp_path / "bundle"
    with new_folder(target) as work:
        make(work, "report.html", "run.json")
    path = target / "report.html"
    text = path.read_text()
    path.unlink()
    if change == "link":
        (tmp_path / "elsewhere").write_text(text)
        path.symlink_to(tmp_path / "elsewhere")
    elif change == "pipe":
        os.mkfifo(path)
    elif change != "gone":
        path.write_text(f"{text} more" if change == "longer" else text.upper())
    found = verify(target)
    assert len(found.wrong) == 1
    assert "report.html" in found.wrong[0]
    assert (found.listed, found.same) == (True, 1)


def test_without_locks_nothing_of_another_run_is_removed(tmp_path, monkeypatch):
    """Some file systems have none: what looks like litter may be the work of a run that goes on."""

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    target = tmp_path / "out"
    work = tmp_path / f"{temporary_name(target)}1234"
    work.mkdir()
    with locked(target):
        assert work.is_dir()
