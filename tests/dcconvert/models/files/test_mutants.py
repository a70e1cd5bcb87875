"""Checkpoints changed at random, always the same way: read right, or refused in one line, and soon."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.families import FAMILIES, made
from dcconvert.models.dit import DiT, DiTConfig
from dcconvert.models.load import load_model
from dcconvert.passes.ir.errors import UnsupportedModelError, UsageError
from tests.dcconvert.models.test_key_conversion import FLUX, in_original_names, small_flux
from tests.passes.harness import randomise

MOST_SECONDS = 10  # for one mutant, on a machine that does other things too
LONGEST_MESSAGE = 1200
State = dict[str, Tensor]


def dit_state() -> State:
    torch.manual_seed(0)
    model = DiT(DiTConfig(depth=2, width=16, heads=2, patch=2, image_size=4, in_channels=1, num_classes=3))
    randomise(model, std=0.1)
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    return {"dit": dit_state(), "flux": in_original_names(FLUX, small_flux())}


def read(path: Path) -> State | None:
    """What is read from a file or folder; None where it is refused as it should be."""
    start, found, message = time.perf_counter(), None, ""
    try:
        model = load_model(path, heads=2, image_size=4)
        found = {name: value.clone() for name, value in model.state_dict().items()}  # the file is written again
    except (UsageError, UnsupportedModelError) as error:
        message = str(error)
    assert message.isprintable(), message
    assert len(message) < LONGEST_MESSAGE, message
    assert time.perf_counter() - start < MOST_SECONDS
    return found


# --- the same data, written in another way --------------------------------------------------------------

WORDS = ("model", "net", "module", "state_dict", "denoiser", "_orig_mod", "generator", "weights", "x.y", 3)
AVERAGES = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "EMA", "swa", "averaged_model")
ODDITIES = (None, 1.5, "text", [1, 2], {"lr": 1e-4}, torch.zeros(3), (torch.zeros(1), {"k": b"v"}), float("nan"), 2**80)
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model", "net")


def wrapped(state: State, chance: random.Random) -> State:
    """Wrappers before all keys, and inside those of one block."""
    before = "".join(f"{chance.choice(WRAPPERS)}." for _ in range(chance.randrange(3)))
    inside = "".join(f"{chance.choice(WRAPPERS)}." for _ in range(chance.randrange(3)))
    return {before + name.replace("blocks.1.", f"blocks.1.{inside}"): value for name, value in state.items()}


def nested(value: Any, chance: random.Random) -> Any:
    for _ in range(chance.randrange(3)):
        around: dict[Any, Any] = {f"k{n}": chance.choice(ODDITIES) for n in range(chance.randrange(3))}
        around[chance.choice(WORDS)] = value
        value = dict(chance.sample(list(around.items()), len(around)))
    return value


def rewritten(state: State, chance: random.Random) -> Any:
    """A training file in which the averaged weights, if there are any, are `state`."""
    right = wrapped(state, chance)
    if chance.random() < 0.3:
        return nested(right, chance)
    raw = wrapped({name: value + 1 for name, value in state.items()}, chance)
    both = {chance.choice(WORDS): nested(raw, chance), chance.choice(AVERAGES): nested(right, chance)}
    both |= {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "step": chance.choice(ODDITIES)}
    return nested(dict(chance.sample(list(both.items()), len(both))), chance)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_the_same_weights_in_other_places(name, states, tmp_path):
    chance, path = random.Random(name), tmp_path / "x.pt"
    torch.save(states[name], path)
    wanted = read(path)
    assert wanted is not None
    for number in range(30):
        torch.save(rewritten(states[name], chance), path, _use_new_zipfile_serialization=number % 4 > 0)
        found = read(path)
        assert found is not None, number
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), number


# --- other data -----------------------------------------------------------------------------------------

VALUES: tuple[Callable[[Tensor], Any], ...] = (
    lambda value: torch.tensor(1.0),
    lambda value: torch.zeros(0),
    lambda value: value[..., None],
    lambda value: value.repeat(2, *[1] * (value.ndim - 1)),
    lambda value: value[:0],
    lambda value: value.flatten(),
    lambda value: value.to(torch.complex64),
    lambda value: value.to(torch.int8),
    lambda value: value.to(torch.bool),
    lambda value: value * float("nan"),
    lambda value: value.to_sparse(),
    lambda value: value.to("meta"),
    lambda value: value.reshape(-1)[:1].expand(2**20, 2**20),
    lambda value: torch.zeros(1).expand(value.shape),
    lambda value: value.numpy(),
    lambda value: [value],
    lambda value: {"weight": value},
    lambda value: "text",
)
NAMES: tuple[Callable[[str], Any], ...] = (
    lambda name: name.replace("0", "00", 1),
    lambda name: name.replace("1.", "99999999.", 1),
    lambda name: name.replace("1.", "-1.", 1),
    lambda name: name + "\n",
    lambda name: "\ud800" + name,
    lambda name: name.replace(".", "", 1),
    lambda name: name.replace(".", "..", 1),
    lambda name: name.upper(),
    lambda name: name * 50,
    lambda name: "",
    lambda name: 10**5000,
    lambda name: (name, 1),
    lambda name: name.encode(),
)


def changed(state: State, chance: random.Random) -> dict[Any, Any]:
    """A state dict with a few tensors or names that are others, or are gone."""
    made_: dict[Any, Any] = dict(state)
    for name in chance.sample(list(state), chance.choice((1, 1, 2, 5))):
        kind = chance.random()
        if kind < 0.2:
            del made_[name]
        elif kind < 0.6:
            made_[name] = chance.choice(VALUES)(state[name])
        else:
            made_[chance.choice(NAMES)(name)] = made_.pop(name)
    return made_


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_other_tensors_and_names(name, states, tmp_path):
    chance, path = random.Random(name), tmp_path / "x.pt"
    refused = 0
    for _ in range(50):
        state = changed(states[name], chance)
        torch.save(chance.choice((state, {"ema": state}, {"model": states[name], "ema": state})), path)
        refused += read(path) is None
    assert refused > 20


@pytest.mark.parametrize("form", ["zip", "sequence", "safetensors"])
def test_other_bytes(form, states, tmp_path):
    chance, path = random.Random(form), tmp_path / "x.pt"
    if form == "safetensors":
        save_file(states["dit"], path)
    else:
        content = {"ema": states["dit"], "args": {"lr": 1.0}}
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        first = chance.random() < 0.7  # where the structure is
        for _ in range(chance.choice((1, 1, 4, 30))):
            data[chance.randrange(min(3000, len(data)) if first else len(data))] = chance.randrange(256)
        path.write_bytes(data[: chance.randrange(len(data))] if chance.random() < 0.2 else data)
        read(path)


NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2**31,
    2**31 - 1,
    10**300,
    1.5,
    float("nan"),
    None,
    "x",
    [],
    {},
    [2**31],
    True,
    997,
)


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_other_configurations(name, tmp_path):
    chance = random.Random(name)
    made(FAMILIES[name])[0].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for _ in range(40):
        other = copy.deepcopy(config)
        for key in chance.sample(list(config), chance.choice((1, 2))):
            other[key] = chance.choice(NUMBERS)
        path.write_text(json.dumps(other))
        read(tmp_path)
