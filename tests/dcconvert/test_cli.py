"""The command line as its users see it: help, names, completion, and the short form without `convert`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from dcconvert import __version__
from dcconvert.cli import commands, main
from dcconvert.export import bundle
from dcconvert.options.click_classes import OTHER, Command, Commands, Option, option, options, section
from tests.dcconvert.harness import refusal, run_cli

ROOT = Path(__file__).resolve().parents[2]
NAMES = list(commands.commands)
HEAVY = {"accelerate", "diffusers", "matplotlib", "onnxruntime", "scipy", "tensorrt_rtx", "torch", "transformers"}

each_command = pytest.mark.parametrize("name", NAMES)
each_width = pytest.mark.parametrize("width", [80, 120])


def own_options(name: str) -> Iterator[Option]:
    """The options of a command but --help, which is click's."""
    return (param for param in commands.commands[name].params if isinstance(param, Option))


def parsed(name: str, *words: Any) -> dict[str, Any]:
    """The values that a command would be called with."""
    command = commands.commands[name]
    with click.Context(commands, info_name="dcconvert") as group:
        return command.make_context(name, [str(word) for word in words], parent=group).params


def shown(*words: str) -> str:
    run = run_cli(*words)
    assert run.code == 0, run.err
    return run.out


def headings(text: str) -> list[str]:
    return [line.removesuffix(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]


@each_width
def test_summaries_are_whole(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = shown("--help")
    assert max(map(len, text.splitlines())) <= width
    listed = text.partition("Commands:\n")[2].splitlines()
    summaries = {name: str(command.help).splitlines()[0] for name, command in commands.commands.items()}
    assert [line.split(maxsplit=1) for line in listed] == [[name, summary] for name, summary in summaries.items()]
    assert all(summary.endswith(".") and not summary.endswith("..") for summary in summaries.values())


def test_a_long_summary_would_be_seen() -> None:
    command = Command("long", help="word " * 30)
    group = Commands("group", commands={"long": command}, default="long")
    assert "word..." in CliRunner().invoke(group, ["--help"]).output


@each_command
@each_width
def test_every_option_says_what_it_does(monkeypatch: pytest.MonkeyPatch, name: str, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = shown(name, "--help")
    assert max(map(len, text.splitlines())) <= width
    words = "".join(text.split())  # click breaks lines at hyphens too
    for param in own_options(name):
        assert param.help, param.name
        assert param.help[0].isupper(), param.help
        assert param.help.endswith("."), param.help
        assert "".join(param.help.split()) in words
        assert all(spelling in text for spelling in param.opts)


@each_command
def test_options_stand_under_headings_as_they_are_written(name: str) -> None:
    text = shown(name, "--help")
    found = headings(text)
    assert found == [*dict.fromkeys(param.heading for param in own_options(name) if param.heading != OTHER), OTHER]
    ordered = sorted(own_options(name), key=lambda param: found.index(param.heading))
    lines = [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  -")]
    assert lines == [*(param.opts[0] for param in ordered), "-h"]


@pytest.mark.parametrize("name", ["convert", "inspect"])
def test_mode_and_preset_come_first(name: str) -> None:
    lines = [line for line in shown(name, "--help").splitlines() if line.startswith("  -")]
    assert [line.split()[0] for line in lines[:2]] == ["--mode", "--preset"]


def test_only_convert_and_inspect_have_methods() -> None:
    assert [name for name in NAMES if "mode" in {param.name for param in own_options(name)}] == ["convert", "inspect"]


def test_shared_decorators_keep_their_order() -> None:
    shared = options(section("One", option("--a"), option("--b")), section("Two", option("--c")))

    @click.command(cls=Command)
    @section("Zero", option("--z"))
    @shared
    def command(**_: Any) -> None: ...

    assert [param.name for param in command.params] == ["z", "a", "b", "c"]
    text = CliRunner().invoke(command, ["--help"]).output
    assert headings(text) == ["Zero", "One", "Two", OTHER]


def test_late_options_are_read_once_and_come_after_the_others() -> None:
    read: list[str] = []

    def late() -> Any:
        read.append("once")
        return section("One", option("--b"), option("--c"))

    @click.command(cls=Command, late=late)
    @section("Zero", option("--a"))
    def command(**_: Any) -> None: ...

    assert not read
    assert [[param.name for param in command.params] for _ in range(2)] == [["a", "b", "c"]] * 2
    assert read == ["once"]


def test_one_spelling_for_one_thing() -> None:
    pairs = {tuple(param.opts) for name in NAMES for param in own_options(name)}
    spellings = [spelling for pair in pairs for spelling in pair]
    assert sorted(spellings) == sorted(set(spellings)), "an option has a short name in some commands only"
    aliases = {alias for name in NAMES for param in own_options(name) for alias in param.aliases}
    assert not aliases.intersection(spellings), "the old name of an option is the name of another"


@pytest.mark.parametrize(
    ("name", "old", "new", "value"),
    [
        ("upcycle", ("--ratios", "2x", "--ratios", 4), ("--ratio", "2x", "--ratio", 4), {"ratios": (2.0, 4.0)}),
        ("sample", ("--count", 3), ("--images", 3), {"count": 3}),
        ("sample", ("-n", 3), ("--images", 3), {"count": 3}),
        ("stress", ("--count", 3), ("--cases", 3), {"count": 3}),
        ("build", ("--target", "ort-cuda"), ("--runtime", "ort-cuda"), {"target": "ort-cuda"}),
    ],
)
def test_old_names_work_and_are_hidden(
    name: str, old: tuple[object, ...], new: tuple[object, ...], value: dict[str, Any]
) -> None:
    assert parsed(name, "out", *old) == parsed(name, "out", *new)
    assert parsed(name, "out", *old).items() >= value.items()
    assert old[0] == "-n" or f"{old[0]} " not in shown(name, "--help")


@pytest.mark.parametrize("words", [("--ratio", "4x"), ("--ratio=4x", "--mode", "chunk")])
def test_the_short_form_converts(tmp_path: Path, words: tuple[str, ...]) -> None:
    missing = tmp_path / "model.pt"
    assert refusal(2, missing, *words) == refusal(2, "convert", missing, *words) == refusal(2, *words, missing)
    assert f"{missing} does not exist" in refusal(2, missing, *words)


def test_a_file_called_like_a_command_is_still_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(2, "smple", "--ratio", "4x").endswith("did you mean 'dcconvert sample'?")
    Path("smple").write_text("hello")
    assert "is not a checkpoint" in refusal(2, "smple", "--ratio", "4x")


def test_no_words_are_a_call_for_help() -> None:
    assert shown() == shown("--help") == shown("-h")


@pytest.mark.parametrize("words", [("--nope",), ("convert", "model.pt"), ("sample", "--images", "none", "out")])
def test_mistakes_are_exit_2(words: tuple[str, ...]) -> None:
    refusal(2, *words)


def completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> set[str]:
    """What bash would be offered for the last word."""
    monkeypatch.setenv("_DCCONVERT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(["dcconvert", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    return set(capsys.readouterr().out.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_has_a_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    monkeypatch.setattr(BashComplete, "_check_version", lambda *_: None)  # would ask the bash of this machine
    monkeypatch.setenv("_DCCONVERT_COMPLETE", f"{shell}_source")
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    source = capsys.readouterr().out
    assert f"_DCCONVERT_COMPLETE={shell}_complete" in source
    assert "_dcconvert_completion" in source


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("ev",), {"plain,evaluate"}),
        (("mod",), {"file,mod"}),  # a model for the short form
        (("--ver",), {"plain,--version"}),
        (("model.pt", "--pre"), {"plain,--preset", "plain,--prediction"}),
        (("convert", "model.pt", "--mode", "c"), {"plain,carry", "plain,chunk"}),
        (("model.pt", "--mode", "ca"), {"plain,carry"}),
        (("upcycle", "out", "--ratio"), {"plain,--ratio", "plain,--ratio-weight"}),  # not the old --ratios
        (("sample", "o"), {"file,o"}),
    ],
)
def test_completion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], offered: set[str]
) -> None:
    assert completed(monkeypatch, capsys, *words) == offered


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_start_up_leaves_heavy_packages_alone(word: str) -> None:
    code = "import sys\nfrom dcconvert.cli import main\nmain(sys.argv[1:])\nprint(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, check=True, env=env)
    assert (__version__ if word == "--version" else "Commands:") in done.stdout
    assert not HEAVY.intersection(done.stdout.split())


def test_the_page_names_every_command_and_every_old_name() -> None:
    page = (ROOT / "docs" / "command_line.md").read_text()
    assert not [name for name in NAMES if f"`{name}`" not in page]
    assert not [a for name in NAMES for param in own_options(name) for a in param.aliases if f"`{a}`" not in page]


# Signals and memory


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_with_its_code(number, code, monkeypatch, tmp_path):
    monkeypatch.setattr(bundle, "verify", lambda _: signal.raise_signal(number))
    before = signal.getsignal(number)
    run = run_cli("verify", tmp_path)
    assert (run.code, run.err.strip()) == (code, "error: interrupted; nothing was left behind")
    assert number == signal.SIGINT or signal.getsignal(number) is before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    ],
)
def test_too_little_memory_is_one_line(error, monkeypatch, tmp_path):
    def fail(_: Path) -> None:
        raise error

    monkeypatch.setattr(bundle, "verify", fail)
    assert "there is not enough memory" in refusal(2, "verify", tmp_path)


def test_errors_are_one_line_whatever_a_name_holds(tmp_path):
    assert "\\x1b[2J" in refusal(2, "verify", tmp_path / "x\x1b[2J")
    assert refusal(2, "verify", tmp_path / "x[/bold]").count("[/bold]") == 1
