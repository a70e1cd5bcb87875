"""A pickle read as data: its tensors are built, and every class or function it names becomes a placeholder.

`pickletools` splits the stream into opcodes; here they are carried out on plain lists and dicts. A name in the stream
is never imported, looked up or called, so nothing in a file can run. `torch.load(weights_only=True)` refuses a file for
one unknown class beside the weights; this reads it, and lets in less: weights_only calls `bytearray` for any number of
bytes, and hashes keys that a small file can make endless.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import torch
from torch import Tensor

MOST_COPIED = 1 << 29  # bytes
MAX_OPCODES = 3_000_000  # a state dict of 1000 tensors has about 40,000
MAX_DIMENSIONS = 64
SCALARS = (str, bytes, int, float, bool, type(None))  # keys of dicts; to hash a tuple of shared tuples takes forever
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.QInt8Storage": torch.int8,  # the bytes of quantised tensors, which are not built
    "torch.QUInt8Storage": torch.uint8,
    "torch.QInt32Storage": torch.int32,
    "torch.QUInt4x2Storage": torch.uint8,
    "torch.QUInt2x4Storage": torch.uint8,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,
}
DICTS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict")
PARAMETERS = (
    "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
)
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
UNTYPED_TENSOR, SUBCLASS = "torch._utils._rebuild_tensor_v3", "torch._tensor._rebuild_from_type_v2"


class PickleError(ValueError):
    """A stream that cannot be read; the message says why."""


@dataclass(frozen=True)
class Named:
    """A class or function that the stream names, and nothing else about it."""

    name: str


@dataclass(eq=False)
class Inert:
    """What stands for an object of a class: the data that the stream gives it.

    `state` is what pickle would restore its attributes from, `entries` and `members` what it would put into it if it
    were a dict or a list.
    """

    name: str
    args: Any = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)
    members: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{self.name}>"


@dataclass(frozen=True)
class Stored:
    """Bytes of the file that tensors share. `data` is None while the bytes have not been found."""

    dtype: torch.dtype
    data: torch.UntypedStorage | None

    def tensor(self, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Any:
        """The tensor that lies there; PickleError if it would reach beyond the bytes."""
        if self.data is None:
            return None
        numbers = [offset, *size[:MAX_DIMENSIONS], *stride[:MAX_DIMENSIONS]]
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
            raise PickleError("a tensor whose size or strides are no numbers")
        if len(numbers) != 1 + 2 * len(size):
            raise PickleError(f"a tensor of {len(size)} dimensions with {len(stride)} strides")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if math.prod(size) else -1
        if (last + 1) * dtype.itemsize > self.data.nbytes():
            raise PickleError(f"a tensor of size {list(size)} on {self.data.nbytes()} bytes")
        return torch.empty(0, dtype=dtype).set_(self.data, offset, tuple(size), tuple(stride))


Persistent = Callable[[Any], Stored]


def read_pickle(file: IO[bytes], stored: Persistent) -> Any:
    """The content of a stream, which is left behind the pickle's end.

    `stored` gives the bytes for a reference to a storage, as torch writes it: a tuple ("storage", type, key, ...).
    Raises PickleError for a damaged stream.
    """
    machine = Machine(stored)
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(file)):
            if count > MAX_OPCODES:
                raise PickleError(f"more than {MAX_OPCODES} pickled values")
            OPCODES[opcode.name](machine, arg)
        return machine.stack[-1]
    except PickleError:
        raise
    except Exception as error:  # a stream that is no pickle can go wrong in any opcode
        said = str(error).splitlines()[:1]
        raise PickleError(said[0][:100] if said and said[0] else type(error).__name__) from None


class Machine:
    """The stack machine of a pickle."""

    def __init__(self, stored: Persistent) -> None:
        self.stored = stored
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}
        self.copied = 0  # bytes that were copied into objects, about

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, _: Any = None) -> Any:
        return self.stack.pop()

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        found, self.stack = self.stack, self.below.pop()
        return found

    def take(self, count: int) -> None:
        """The last values become a tuple."""
        cut = len(self.stack) - count
        if cut < 0:
            raise PickleError("nothing on the stack")
        self.stack[cut:] = [tuple(self.stack[cut:])]

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        entries = target.entries if isinstance(target, Inert) else target if isinstance(target, dict) else {}
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            entries[key if isinstance(key, SCALARS) else Inert("key", key)] = value

    def new_dict(self, _: Any) -> None:
        pairs = self.since_mark()
        self.push({})
        self.set_items(pairs)

    def add(self, values: list[Any]) -> None:
        target = self.stack[-1]
        members = target.members if isinstance(target, Inert) else target if isinstance(target, list) else []
        members.extend(values)

    def global_(self, arg: str | None) -> None:
        if arg is None:
            name, module = self.pop(), self.pop()
        else:
            module, _, name = arg.partition(" ")
        if not (isinstance(module, str) and isinstance(name, str)):
            raise PickleError("a name that is no text")
        self.push(Named(f"{module}.{name}"))

    def build(self, _: Any) -> None:
        """The attributes of a placeholder; those of a real tensor, list or dict are left alone."""
        state = self.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state

    def object(self, named: Any, args: Any) -> None:
        first = args[0] if isinstance(args, tuple) and args else None
        if isinstance(first, str | bytes | list | tuple | dict):  # what `made` may copy, again and again
            self.copied += len(first) * (1 if isinstance(first, str | bytes) else 8)
            if self.copied > MOST_COPIED:
                raise PickleError(f"objects made of more than {MOST_COPIED >> 20} MB of values")
        self.push(made(named.name if isinstance(named, Named) else type(named).__name__, args))

    def reduce(self, _: Any) -> None:
        args, named = self.pop(), self.pop()
        self.object(named, args)

    def instance(self, arg: str | None) -> None:
        """INST and OBJ: a class and its arguments since the mark."""
        args = self.since_mark()
        named = Named(arg.replace(" ", ".", 1)) if arg else args.pop(0)
        self.object(named, tuple(args))

    def new_with_keywords(self, _: Any) -> None:
        keywords, args, named = self.pop(), self.pop(), self.pop()
        self.object(named, (*args, keywords))

    def persistent(self, key: Any) -> None:
        if not (isinstance(key, tuple) and key and key[0] in ("storage", b"storage")):
            raise PickleError("a reference to something that is no storage")
        self.push(self.stored(key))


def made(name: str, args: Any) -> Any:
    """What a class or function of this name gives for arguments: tensors, dicts and sizes, else a placeholder."""
    if not isinstance(args, tuple):
        return Inert(name, args)
    first = args[0] if args else None
    if name in DICTS:
        pairs = first if isinstance(first, list) else list(first.items()) if isinstance(first, dict) else []
        return {key: value for key, value in pairs if isinstance(key, SCALARS)}
    if name in TENSORS and isinstance(first, Stored) and not any(flags(args[6:])):
        return tensor_or(name, args, first.tensor(first.dtype, *args[1:4]))
    if name == UNTYPED_TENSOR and isinstance(first, Stored) and not any(flags(args[7:])):
        dtype = DTYPES.get(args[6].name if isinstance(args[6], Named) else "")
        return Inert(name, args) if dtype is None else tensor_or(name, args, first.tensor(dtype, *args[1:4]))
    if name in PARAMETERS and isinstance(first, Tensor):
        return first
    if name == SUBCLASS and len(args) > 2 and isinstance(first, Named):  # function, class, its arguments, attributes
        inner = made(first.name, args[2])
        return inner if isinstance(inner, Tensor) else Inert(name, args)
    if name == "_codecs.encode" and isinstance(first, str):  # bytes, as the first three protocols have them
        return first.encode("latin-1")
    if name == "torch.Size":
        return tuple(first or ())
    return Inert(name, args)


def tensor_or(name: str, args: Any, tensor: Any) -> Any:
    return Inert(name, args) if tensor is None else tensor


def flags(metadata: Any) -> list[bool]:
    """What a tensor is beyond its bytes: conjugated, negated."""
    return [bool(value) for part in metadata if isinstance(part, Mapping) for value in part.values()]


def nothing(machine: Machine, arg: Any) -> None:
    pass


def literal(machine: Machine, arg: Any) -> None:
    machine.push(arg)


def constant(make: Callable[[], Any]) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.push(make())


def unknown(what: str) -> Callable[[Machine, Any], None]:
    """Something from outside the stream: a registered class, a buffer."""
    return lambda machine, arg: machine.push(Inert(f"{what} {arg if isinstance(arg, int) else ''}".strip()))


OPCODES: dict[str, Callable[[Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP", "READONLY_BUFFER"), nothing),
    **dict.fromkeys(
        (
            *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
            *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
            *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        ),
        literal,
    ),
    "NONE": constant(lambda: None),
    "NEWTRUE": constant(lambda: True),
    "NEWFALSE": constant(lambda: False),
    "EMPTY_LIST": constant(list),
    "EMPTY_TUPLE": constant(tuple),
    "EMPTY_DICT": constant(dict),
    "EMPTY_SET": constant(list),  # a set would hash what is put into it
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), unknown("extension")),
    "NEXT_BUFFER": unknown("buffer"),
    "MARK": Machine.mark,
    "POP": Machine.pop,
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "FROZENSET": lambda machine, _: machine.push(machine.since_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.take(1),
    "TUPLE2": lambda machine, _: machine.take(2),
    "TUPLE3": lambda machine, _: machine.take(3),
    "DICT": Machine.new_dict,
    "APPEND": lambda machine, _: machine.add([machine.pop()]),
    "APPENDS": lambda machine, _: machine.add(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.add(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, arg: machine.push(machine.memo[int(arg)])),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), lambda machine, arg: machine.put(arg)),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), Machine.global_),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), Machine.reduce),
    **dict.fromkeys(("INST", "OBJ"), Machine.instance),
    "NEWOBJ_EX": Machine.new_with_keywords,
    "BUILD": Machine.build,
    "PERSID": Machine.persistent,
    "BINPERSID": lambda machine, _: machine.persistent(machine.pop()),
}
