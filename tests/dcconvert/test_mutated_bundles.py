"""Bundles in which somebody changed something: each is opened, or refused in one line, whatever was changed."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcconvert.export.bundle import (
    FORMAT_VERSION,
    WEIGHTS,
    Bundle,
    manifest_buckets,
    read_bundle,
    read_manifest,
    write_model,
)
from dcconvert.export.files import MANIFEST, write_json
from dcconvert.passes.ir.errors import UsageError
from dcconvert.sampling.bundle_runs import RUN, bundle_run, dit_config, run_of, run_planner, stored_table, write_table
from dcconvert.sampling.run_table import RunTable
from dcconvert.sampling.samplers import Sampler
from tests.export.harness import CONFIG, TOKENS, convert

GRAPH = "graph.json"
OTHERS: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 7, 2**31, 2**62, 10**12, 0.5, -2.5, 1e308, "", "a", "x" * 1000, [], {}, [1], ["a"],
    [[[]]], {"a": 1}, {"node": "x"}, {"tuple": []},
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in mode steps, without hashes: an attacker can compute them."""
    folder = tmp_path_factory.mktemp("mutated") / "bundle"
    folder.mkdir()
    model = convert("steps")
    write_model(model, folder)
    sampler = Sampler("eps", 8, "euler")
    run = run_of(model, sampler, 2.0)
    assert isinstance(run, RunTable)
    write_table(run, folder)
    bucket = {"batch": 2, "tokens": 2 * TOKENS, "rows": 2, "row_tokens": TOKENS, "tile": TOKENS}
    manifest = {
        "format_version": FORMAT_VERSION,
        "buckets": {"buckets": [bucket], "tokens": TOKENS, "expected_waste": 0.0},
        "config": CONFIG.as_dict(),
        "sampler": {"prediction": "eps", "steps": 8, "solver": "euler", "class_names": ["cat", "dog"]},
        "most_buckets": 4,
        "parity": {"identity": 1e-7},
    }
    write_json(manifest, folder / MANIFEST)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*place, key))


def mutants(data: Any, count: int, seed: int) -> Iterator[Any]:
    """Copies with one value replaced, removed or doubled; places near the top as often as all those far below."""
    chance = random.Random(seed)
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for place in places(data):
        by_depth.setdefault(len(place), []).append(place)
    for _ in range(count):
        place = chance.choice(by_depth[chance.choice(list(by_depth)[1:])])
        mutant = copy.deepcopy(data)
        inner = mutant
        for key in place[:-1]:
            inner = inner[key]
        act = chance.random()
        if act < 0.1:
            del inner[place[-1]]
        elif act < 0.2 and isinstance(inner, list):
            inner.append(inner[place[-1]])
        else:
            inner[place[-1]] = chance.choice(OTHERS)
        yield mutant


def open_bundle(folder: Path, known: Bundle | None = None) -> None:
    """All that is read before anything runs; with a `known` bundle, weights and graphs are not read again."""
    if known is None:
        bundle = read_bundle(folder)
    else:
        manifest = read_manifest(folder)
        bundle = replace(known, folder=folder, manifest=manifest, bucket_set=manifest_buckets(manifest))
    if "config" in bundle.manifest:
        dit_config(bundle)
        run_planner(bundle, None)
        bundle_run(bundle)
    stored_table(bundle)


def refusal(folder: Path, known: Bundle | None = None) -> str:
    """The one line with which a bundle is refused; "" if it is opened. Every other exception fails the test."""
    said = ""
    try:
        open_bundle(folder, known)
    except UsageError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000
    return said


@pytest.mark.parametrize(("name", "count"), [(MANIFEST, 200), (RUN, 150), (GRAPH, 60)])
def test_mutants_are_opened_or_refused(name, count, folder, whole):
    data, refused = json.loads((folder / name).read_text()), 0
    known = None if name == GRAPH else read_bundle(whole)
    for mutant in mutants(data, count, seed=11):
        (folder / name).write_text(json.dumps(mutant))
        refused += bool(refusal(folder, known))
    assert refused > count / 2, "most changes do harm"


def test_the_whole_bundle_is_opened(folder):
    assert refusal(folder) == ""


def changed(folder: Path, name: str, *place: Any, value: Any) -> str:
    data = json.loads((folder / name).read_text())
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (folder / name).write_text(json.dumps(data))
    return refusal(folder)


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        (MANIFEST, ("config", "image_size"), 400_000, "config.image_size is 400000, but must be a whole number from 1"),
        (MANIFEST, ("config", "image_size"), "a", "config.image_size is 'a', but must be a whole number"),
        (MANIFEST, ("config", "image_size"), 4096, r"the config is of images \[4, 4096, 4096\], but the graphs take"),
        (MANIFEST, ("config", "in_channels"), -1, "config.in_channels is -1"),
        (MANIFEST, ("config", "num_classes"), 5000, "has a table of 11 labels"),
        (MANIFEST, ("sampler", "steps"), 2**31, "sampler.steps is 2147483648"),
        (MANIFEST, ("sampler", "class_names"), [["\x1b[2J"]], r"sampler.class_names\[0\] is"),
        (MANIFEST, ("buckets", "buckets", 0, "tokens"), 10**12, r"buckets.buckets\[0\].tokens is 1000000000000"),
        (MANIFEST, ("buckets", "tokens"), TOKENS - 1, r"buckets.tokens is 15, but must be 16|no bucket"),
        (MANIFEST, ("files",), {"../../etc/passwd": 1}, "files.../../etc/passwd is 1, but must be an object"),
        (RUN, ("rows", 1, "t"), "x", r"run.json: rows\[1\].t is 'x', but must be a number; make it with"),
        (RUN, ("rows", 0, "more"), 1, r"rows\[0\].more is 1, but must be left out"),
        (RUN, ("rows", 3, "weights"), [0.1] * 9, "but the model keeps 3 updates|reads what no earlier step"),
        (GRAPH, ("spec", "grid"), [1 << 19, 1 << 19], "tokens of width|spec.grid"),
        (GRAPH, ("spec", "input_specs", 0, "shape"), [4, 8, 1 << 39], "x the shape .*, which no model has"),
        (GRAPH, ("spec", "input_specs", 0, "shape"), [4, 8, 10], "cannot be computed"),
        (GRAPH, ("graphs", "full", "nodes", 3, "op"), "call_module", r"nodes\[3\].op is 'call_module', but must"),
        (GRAPH, ("passes", 0, "seconds"), None, r"passes\[0\].seconds is None, but must be a number"),
    ],
)  # fmt: skip
def test_faults_say_where_they_are_and_what_is_right(name, place, value, said, folder):
    message = changed(folder, name, *place, value=value)
    assert message, "it was opened"
    assert re.search(said, message), message


@pytest.mark.parametrize(
    "text", ["NaN", "1e999", "-Infinity", "1" * 5000, str(2**63), "[" * 200 + "]" * 200, "[" * 100_000]
)
def test_json_beyond_the_limits(text, folder):
    (folder / MANIFEST).write_text(f'{{"format_version": {FORMAT_VERSION}, "more": {text}}}')
    with pytest.raises(UsageError, match=r"cannot read .*manifest\.json"):
        read_manifest(folder)


def test_links_that_leave_the_bundle_are_not_followed(folder, tmp_path):
    for name in (MANIFEST, GRAPH, WEIGHTS, RUN):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        assert f"{name} is a link that leads out of its folder" in refusal(folder)
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    (folder / GRAPH).rename(folder / "own.json")
    (folder / GRAPH).symlink_to("own.json")
    assert refusal(folder) == "", "links inside are fine"
    (tmp_path / "link").symlink_to(folder)
    assert refusal(tmp_path / "link") == ""
