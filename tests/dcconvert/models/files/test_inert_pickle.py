"""Pickles as data: real tensors, placeholders for the rest, and nothing that runs."""

from __future__ import annotations

import argparse
import builtins
import collections
import copyreg
import datetime
import io
import os
import pathlib
import pickle
import struct
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dcconvert.models.files import inert_pickle
from dcconvert.models.files.inert_pickle import Inert, PickleError, Stored, read_pickle
from dcconvert.models.files.torch_file import read_torch
from dcconvert.passes.ir.errors import UsageError


def never(key: Any) -> Stored:
    raise PickleError("no storages here")


def read(stream: bytes) -> Any:
    return read_pickle(io.BytesIO(stream), never)


class Config:
    """A class of the training script."""

    def __init__(self) -> None:
        self.width = 64

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("code of the pickle's class ran")


class Reduces:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_is_what_pickle_reads(protocol):
    data = {
        "list": [1, -2, 3.5, 10**30, True, None],
        "nested": {"tuple": (1, ("a", b"b")), 7: "seven"},
        "text": "Straße\n\ud800",
        "ordered": collections.OrderedDict(a=1, b=2),
    }
    data["again"] = data["list"]
    assert read(pickle.dumps(data, protocol)) == pickle.loads(pickle.dumps(data, protocol))


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_beside_the_weights_are_placeholders(protocol):
    data = {
        "scalar": np.float64(3),
        "path": pathlib.PurePosixPath("/data"),
        "when": datetime.datetime(2026, 1, 2),
        "config": Config(),
        "options": argparse.Namespace(num_classes=10),
        "default": collections.defaultdict(list, a=[1]),
    }
    found = read(pickle.dumps(data, protocol))
    assert isinstance(found["scalar"], Inert)
    assert isinstance(found["path"], Inert)
    assert found["config"].state == {"width": 64}
    assert found["options"].state == {"num_classes": 10}
    assert found["default"] == {"a": [1]}


def calls(module: str, name: str, *args: str) -> bytes:
    """A pickle that calls a function, written by hand."""
    words = b"".join(b"\x8c" + bytes([len(arg)]) + arg.encode() for arg in args)
    return b"\x80\x04c" + f"{module}\n{name}\n".encode() + b"(" + words + b"tR."


HOSTILE = {
    "os.system": pickle.dumps(Reduces(os.system, "touch PWNED")),
    "eval": pickle.dumps(Reduces(eval, "open('PWNED', 'w')")),
    "exec": pickle.dumps(Reduces(exec, "open('PWNED', 'w')")),
    "open": pickle.dumps(Reduces(open, "PWNED", "w")),
    "torch.hub.load": calls("torch.hub", "load", "somebody/repository", "model"),
    "torch.load": calls("torch", "load", "PWNED"),
    "bytearray of a terabyte": b"\x80\x02cbuiltins\nbytearray\n(L1000000000000L\ntR.",
    "tensor of a terabyte": b"\x80\x02ctorch\nTensor\n(L1000000000000L\nt\x81.",
    "getattr chain": b"\x80\x04cbuiltins\ngetattr\n(cos\n__dict__\n\x8c\x06systemtR(\x8c\x0btouch PWNEDtR.",
    "name with dots": b"\x80\x04\x8c\x02os\x8c\x0cpath.os.open\x93(\x8c\x05PWNEDK\x42tR.",
    "instance": b"(S'touch PWNED'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch PWNED'\no.",
    "new with keywords": b"\x80\x04cos\nsystem\n(\x8c\x0btouch PWNEDt}\x92.",
    "build on a class": b"\x80\x02ccollections\nOrderedDict\n}X\x03\x00\x00\x00getcos\nsystem\nsb.",
    "build on a function": b"\x80\x02cos\nsystem\nN}X\x08\x00\x00\x00__code__X\x01\x00\x00\x00xs\x86b.",
    "set state": b"\x80\x02cbuiltins\nset\n)R}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsbX\x01\x00\x00\x00xb.",
    "extension": b"\x80\x02\x82\x7b.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_a_pickle_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    get = collections.OrderedDict.get
    for module, function in (("os", "system"), ("builtins", "eval"), ("builtins", "exec"), ("torch.hub", "load")):
        monkeypatch.setattr(f"{module}.{function}", lambda *_, **__: pytest.fail("it ran"))
    monkeypatch.setattr(builtins, "getattr", getattr)
    copyreg.add_extension("os", "system", 123)
    try:
        found = read(HOSTILE[name])
    finally:
        copyreg.remove_extension("os", "system", 123)
    assert not list(tmp_path.iterdir())
    assert collections.OrderedDict.get is get
    assert type(found).__module__ == "dcconvert.models.files.inert_pickle"


@pytest.mark.parametrize("key", ["module", b"x", 7, ("module", 1), ("storage",)])
def test_persistent_ids_name_storages_only(key):
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 2)
    pickler.persistent_id = lambda value: key if value == "here" else None  # type: ignore[method-assign]
    pickler.dump(["here"])
    with pytest.raises(PickleError):
        read(file.getvalue())


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x02.",
        b"\x80\x02]",
        b"\x80\x02h\x07.",
        b"\x80\x02\x86.",
        b"\x80\x02(lt.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.",
        b"\x80\x02L" + b"9" * 9999 + b"L\n.",
        b"\xff",
    ],
)
def test_streams_that_are_no_pickle(stream):
    with pytest.raises(PickleError):
        read(stream)


def test_shared_tuples_cannot_be_made_to_take_forever():
    """A tuple of two equal parts, 60 deep: to hash it, as a key of a dict, takes 2^60 steps."""
    stream = b"\x80\x02}K\x01\x85q\x000" + b"h\x00h\x00\x86q\x000" * 60 + b"h\x00K\x01s."
    (key,) = read(stream)
    assert isinstance(key, Inert)


# --- tensors -------------------------------------------------------------------------------------------

BASE = torch.arange(24.0).reshape(4, 6)
TENSORS = {
    "strides": BASE.t(),
    "view": BASE[1:, 2:5],
    "shared": BASE[0],
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 5),
    "parameter": nn.Parameter(BASE.clone()),
    "bool": torch.tensor([True, False]),
    "complex": torch.tensor([1 + 2j]),
    **{str(dtype): BASE.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8)},
    "fp8": BASE.to(torch.float8_e4m3fn),
    "uint16": torch.arange(5).to(torch.uint16),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_what_torch_reads(zipped, tmp_path):
    known = {name: value for name, value in TENSORS.items() if zipped or name not in ("fp8", "uint16")}
    torch.save({"a": known, "b": [BASE[1:]]}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    found = read_torch(tmp_path / "x.pt")
    wanted = torch.load(tmp_path / "x.pt", weights_only=True)
    for name, value in wanted["a"].items():
        assert found["a"][name].dtype == value.dtype, name
        assert found["a"][name].stride() == value.stride(), name
        bits = torch.uint8 if name == "fp8" else value.dtype
        assert torch.equal(found["a"][name].view(bits), value.detach().view(bits)), name
    assert found["a"]["shared"].untyped_storage().data_ptr() == found["a"]["view"].untyped_storage().data_ptr()


def test_attributes_of_tensors_and_parameters_are_left_alone(tmp_path):
    parameter = nn.Parameter(torch.ones(3))
    parameter.keep = Config()  # type: ignore[attr-defined]
    torch.save(parameter, tmp_path / "x.pt")
    assert torch.equal(read_torch(tmp_path / "x.pt"), torch.ones(3))


class Rewritten:
    """A tensor's pickle with another size or strides."""

    def __init__(self, size: Any, stride: Any, offset: Any = 0) -> None:
        self.rest = offset, size, stride

    def __reduce__(self) -> Any:
        storage = torch.zeros(4).storage()
        return torch._utils._rebuild_tensor_v2, (storage, *self.rest, False, collections.OrderedDict())


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((5,), (1,), 0),
        ((2,), (4,), 0),
        ((4,), (1,), 1),
        ((-1,), (1,), 0),
        ((2,), (-1,), 1),
        ((2, 2), (1,), 0),
        ((2**61, 2**61), (0, 1), 0),
        (("a",), (1,), 0),
        ((1,) * 70, (1,) * 70, 0),
        ((2,), (1,), None),
    ],
)
@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_tensors_beyond_their_bytes(size, stride, offset, tmp_path):
    torch.save({"x": Rewritten(size, stride, offset)}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="truncated or damaged"):
        read_torch(tmp_path / "x.pt")


def test_sizes_of_a_sequence_of_storages(tmp_path):
    """The count before a storage's bytes says more than the file holds."""
    torch.save({"x": torch.zeros(4)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(content.replace(struct.pack("<q", 4), struct.pack("<q", 2**60)))
    with pytest.raises(UsageError, match="truncated or damaged"):
        read_torch(tmp_path / "x.pt")


def test_a_small_file_makes_no_large_objects(monkeypatch):
    """The same list, made into sizes again and again."""
    monkeypatch.setattr(inert_pickle, "MOST_COPIED", 8 * 5000)
    sizes = b"ctorch\nSize\n" + b"(" + b"".join(b"K\x01" for _ in range(1000)) + b"l\x85"  # Size, ([1, 1, ...],)
    stream = b"\x80\x02" + b"(" + b"".join(sizes + b"R" for _ in range(6)) + b"l."
    with pytest.raises(PickleError, match="objects made of more than"):
        read(stream)
