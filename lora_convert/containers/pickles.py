"""A machine of our own for Python pickles, which can run nothing: names are looked up in a table, never imported.

Opcodes and their arguments are those of protocols 2 to 5 (Lib/pickletools.py of CPython describes each). What a pickle
builds are inert objects of this module and plain Python values. Dictionaries are lists of pairs here, because hashing a
key that a stranger composed can take for ever.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

from lora_convert.containers.dtypes import BITS
from lora_convert.errors import FileError
from lora_convert.report import Finding, shown

__all__ = [
    "LIMITS",
    "Array",
    "Limits",
    "Machine",
    "Module",
    "Storage",
    "Stream",
    "Stub",
    "Table",
    "Tensor",
    "malformed",
]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what one file may ask for; every file seen in the wild is far below."""

    opcodes: int = 300_000  # a tensor takes about 33, so a whole SDXL checkpoint 90,000
    string: int = 16 << 20  # bytes of one string
    integer: int = 32  # bytes of one integer
    line: int = 512  # bytes of a name in a GLOBAL
    made: int = 32 << 20  # bytes that calls may copy (`_codecs.encode`), items that they may walk
    dimensions: int = 16
    depth: int = 100  # containers in containers
    nodes: int = 300_000  # values visited when the result is walked, a shared one as often as it is met
    name: int = 500  # characters of a tensor's name
    tensors: int = 20_000
    entries: int = 100_000  # files in a zip archive
    shared: int = 4  # all tensors together may be so many times as large as the file …
    spare: int = 8 << 20  # … and so many bytes, for views that repeat their elements
    extras: int = 1_000  # plain values beside the tensors that are kept …
    extra: int = 4_096  # … and characters of one


LIMITS = Limits()

_FIX = "Do not load it with other programs either, unless you trust whoever made it."


def malformed(message: str) -> NoReturn:
    """Raise FileError: the file breaks PyTorch's format."""
    fix = "The file is damaged or was not written by PyTorch: fetch it again."
    raise FileError([Finding("malformed-pickle", "error", "", message, fix)])


class Reader(Protocol):
    """Random access to bytes."""

    size: int

    def read_at(self, offset: int, size: int) -> bytes: ...


class Stream:
    """Bytes `start` to `end` of a reader, taken one after the other; never more is asked for than is there."""

    def __init__(self, reader: Reader, start: int, end: int, name: str) -> None:
        self._reader, self._end, self.start, self.name = reader, end, start, name
        self._buffer, self._base, self._at = b"", start, 0

    @property
    def position(self) -> int:
        """Of the next byte, in the file."""
        return self._base + self._at

    def take(self, size: int) -> bytes:
        """The next bytes. Raises FileError if there are fewer."""
        if self._at + size > len(self._buffer):
            self._refill(size)
        data = self._buffer[self._at : self._at + size]
        self._at += size
        return data

    def _refill(self, size: int) -> None:
        position = self.position
        if size > self._end - position:
            left = self._end - position
            malformed(
                f"{self.name} ends too early: {size:,} bytes are announced at {self.where(position)}, {left} left."
            )
        self._buffer = self._reader.read_at(position, min(max(size, 1 << 16), self._end - position))
        self._base, self._at = position, 0

    def line(self) -> bytes:
        """The bytes up to the next line feed, which is taken as well."""
        data = bytearray()
        while (byte := self.take(1)) != b"\n":
            data += byte
            if len(data) > LIMITS.line:
                malformed(f"a name in {self.name} at {self.where(self.position)} is too long.")
        return bytes(data)

    def where(self, position: int) -> str:
        """A position as it is said to people."""
        return f"byte {position - self.start}"


@dataclass(frozen=True, slots=True)
class Stub:
    """A name out of the file that stands for itself, or an object of such a class: nothing behind it was imported."""

    name: str


@dataclass(slots=True)
class Table:
    """A dictionary, as pairs in their order."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Module:
    """An object of a class of torch.nn that holds parameters."""

    parameters: Table = field(default_factory=Table)


@dataclass(frozen=True, slots=True)
class Storage:
    """Where a tensor's elements lie: the record's key; `size` in bytes; `dtype` None if it is untyped."""

    key: str
    dtype: str | None
    size: int
    itemsize: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage: `offset` and `strides` count elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(slots=True)
class Array:
    """A numpy array whose elements stand in the pickle itself."""

    dtype: str = "U8"
    shape: tuple[int, ...] = (0,)  # until it gets its state
    data: bytes = b""
    fortran: bool = False


@dataclass(slots=True)
class _Dtype:
    """A numpy dtype: its code, and the name that safetensors gives it."""

    code: str
    name: str
    swapped: bool = False


_STORAGES: Mapping[str, str | None] = MappingProxyType(
    {
        "torch.FloatStorage": "F32", "torch.HalfStorage": "F16", "torch.BFloat16Storage": "BF16",
        "torch.DoubleStorage": "F64", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
        "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8",
        "torch.BoolStorage": "BOOL", "torch.ComplexFloatStorage": "C64",
        "torch.storage.UntypedStorage": None, "torch.storage._UntypedStorage": None,
    }
)  # fmt: skip

_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64",
        "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
        "torch.bool": "BOOL", "torch.complex64": "C64", "torch.uint16": "U16", "torch.uint32": "U32",
        "torch.uint64": "U64", "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2",
        "torch.float8_e4m3fnuz": "F8_E4M3FNUZ", "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
        "torch.float8_e8m0fnu": "F8_E8M0",
    }
)  # fmt: skip

_NUMPY: Mapping[str, str] = MappingProxyType(
    {
        "f2": "F16", "f4": "F32", "f8": "F64", "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64", "b1": "BOOL",
        "u1": "U8", "u2": "U16", "u4": "U32", "u8": "U64",
    }
)  # fmt: skip

_UNPACK: Mapping[str, str] = MappingProxyType(
    {
        "F16": "<e", "F32": "<f", "F64": "<d", "I8": "<b", "I16": "<h", "I32": "<i", "I64": "<q", "BOOL": "<?",
        "U8": "<B", "U16": "<H", "U32": "<I", "U64": "<Q",
    }
)  # fmt: skip

_OPAQUE = (
    "pytorch_lightning.", "lightning.pytorch.", "lightning.fabric.", "lightning_fabric.", "omegaconf.",
    "argparse.Namespace",
)  # fmt: skip
"""How names begin that training frameworks leave in checkpoints: kept as stubs, which do nothing and hold nothing."""

_MODULES = frozenset({"torch.nn.modules.container.ParameterDict", "torch.nn.modules.container.ParameterList"})


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


class Machine:
    """Runs one pickle of a stream. Raises FileError: `unsafe-pickle` for what could do harm, `malformed-pickle`.

    `stubs` are the names that were kept as stubs.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.opcodes = self.made = 0
        self.position = stream.position
        self.stubs: set[str] = set()

    def run(self) -> Any:
        """What the pickle builds. The stream is left behind its end."""
        take = self.stream.take
        while True:
            self.position = self.stream.position
            code = take(1)[0]
            self.opcodes += 1
            if self.opcodes > LIMITS.opcodes:
                self.refuse(f"has more than {LIMITS.opcodes:,} opcodes")
            if code == 0x2E:  # STOP
                value = self.pop()
                if self.stack or self.marks:
                    self.broken("the pickle stops before it is complete")
                return value
            action = _ACTIONS.get(code)
            if action is None:
                self._unknown(code)
            else:
                action(self)

    def _unknown(self, code: int) -> NoReturn:
        if code in _REFUSED:
            self.refuse(f"uses the opcode {_REFUSED[code]}, which PyTorch never writes")
        self.broken(f"{code:#04x} is no opcode of protocols 2 to 5")

    def refuse(self, what: str) -> NoReturn:
        """Raise FileError: the pickle asks for something that it must not have."""
        place = f"{self.stream.where(self.position)} of {self.stream.name}"
        message = f"The pickle {what} (at {place}); nothing of it was run."
        raise FileError([Finding("unsafe-pickle", "error", "", message, _FIX)])

    def broken(self, what: str) -> NoReturn:
        """Raise FileError: it is no correct pickle."""
        malformed(f"{what} (at {self.stream.where(self.position)} of {self.stream.name}).")

    def spend(self, amount: int) -> None:
        """Account for bytes copied or items walked by a call."""
        self.made += amount
        if self.made > LIMITS.made:
            self.refuse("unfolds into far more than it holds")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            self.broken("the stack is empty")
        return self.stack.pop()

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            self.broken("the stack is empty")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        """Everything above the last mark."""
        if not self.marks:
            self.broken("there is no mark")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def unsigned(self, size: int) -> int:
        """The next bytes as an unsigned little-endian number."""
        return int.from_bytes(self.stream.take(size), "little")

    def counted_bytes(self, size: int) -> bytes:
        """Bytes behind their number, which is an unsigned number of `size` bytes."""
        length = self.unsigned(size)
        if length > LIMITS.string:
            if length > 1 << 31:
                self.broken(f"a string announces {length:,} bytes")
            self.refuse(f"has a string of {length:,} bytes")
        return self.stream.take(length)

    def text(self, size: int) -> str:
        """UTF-8 behind its number of bytes."""
        return self.decoded(self.counted_bytes(size))

    def decoded(self, data: bytes) -> str:
        """Bytes as the UTF-8 that they have to be."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.broken("a string is not UTF-8")

    def remember(self, index: int) -> None:
        """Put the top of the stack into the memo; picklers count their entries."""
        if index > self.opcodes:
            self.refuse(f"has the memo index {index:,}, far beyond its entries")
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            self.broken(f"the memo has no entry {index}")
        self.push(self.memo[index])

    def name(self, module: str, name: str) -> None:
        """Push what a global's name stands for; refuse it if it is not in the tables."""
        full = f"{module}.{name}"
        if full.startswith(_OPAQUE):
            self.stubs.add(full)
        elif full not in _KNOWN:
            self.refuse(f"names {shown(full)}, which is not needed for tensors and may run code")
        self.push(Stub(full))

    def referred(self, reference: Any) -> Storage | Stub:
        """What a persistent id refers to: a storage, or in the old format a class, with its source text beside it."""
        if isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "module":
            if not isinstance(reference[1], Stub):
                self.refuse("refers to a class that is none")
            return reference[1]
        return self.storage(reference)

    def storage(self, reference: Any) -> Storage:
        """The storage of a persistent id."""
        if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
            self.refuse("refers to something that is not a storage")
        kind, key, _, number = reference[1:5]
        if not isinstance(kind, Stub) or kind.name not in _STORAGES:
            self.refuse("refers to a storage of an unknown class")
        if not isinstance(key, str) or not key.isascii() or not key.isdigit() or len(key) > 20:
            self.broken("a storage's key is not a number")
        if not _is_count(number) or (len(reference) == 6 and reference[5] is not None):
            self.broken(f"storage {key} has no plain size")
        dtype = _STORAGES[kind.name]
        itemsize = BITS[dtype] // 8 if dtype else 1
        return Storage(key, dtype, number * itemsize, itemsize)

    def call(self, function: Any, arguments: Any) -> Any:
        """What a REDUCE makes of a name and its arguments."""
        if not isinstance(function, Stub) or not isinstance(arguments, tuple):
            self.refuse("calls something that is not a name")
        if function.name.startswith(_OPAQUE):
            return function
        if function.name not in _CALLS:
            self.refuse(f"calls {shown(function.name)}")
        return _CALLS[function.name](self, arguments)

    def create(self, kind: Any) -> Any:
        """What a NEWOBJ makes."""
        if not isinstance(kind, Stub):
            self.refuse("makes an object of something that is not a class")
        if kind.name in _MODULES:
            return Module()
        if kind.name == "collections.OrderedDict":
            return Table()
        if not kind.name.startswith(_OPAQUE):
            self.refuse(f"makes an object of {shown(kind.name)}")
        return kind

    def build(self, target: Any, state: Any) -> None:
        """Give an object its state; that of dictionaries (`_metadata`), parameters and stubs means nothing here."""
        if isinstance(target, Module):
            _module_state(target, state)
        elif isinstance(target, _Dtype):
            _dtype_state(self, target, state)
        elif isinstance(target, Array):
            _array_state(self, target, state)
        elif not isinstance(target, Table | Tensor | Stub):
            self.refuse("sets the state of something that has none")


def _module_state(module: Module, state: Any) -> None:
    if not isinstance(state, Table):
        return
    for key, value in state.pairs:
        if key == "_parameters" and isinstance(value, Table):
            module.parameters = value


def _dtype_state(machine: Machine, dtype: _Dtype, state: Any) -> None:
    if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
        machine.broken("a numpy dtype has an unknown state")
    dtype.swapped = state[1] == ">"


def _array_state(machine: Machine, array: Array, state: Any) -> None:
    """The state of numpy.ndarray: version, shape, dtype, whether in Fortran's order, bytes."""
    if not isinstance(state, tuple) or len(state) != 5:
        machine.broken("a numpy array has an unknown state")
    _, shape, dtype, fortran, data = state
    _fill(machine, array, shape, dtype, fortran is True, data)


def _fill(machine: Machine, array: Array, shape: Any, dtype: Any, fortran: bool, data: Any) -> None:
    sizes = _sizes(machine, shape)
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        machine.refuse("has a numpy array of something that is not a number")
    if dtype.swapped:
        machine.broken("a numpy array is big-endian, which is not supported")
    if prod(sizes) * BITS[dtype.name] != 8 * len(data):
        machine.broken("a numpy array's shape does not fit its bytes")
    array.dtype, array.shape, array.data, array.fortran = dtype.name, sizes, data, fortran


def _sizes(machine: Machine, value: Any) -> tuple[int, ...]:
    """A shape or strides."""
    if not isinstance(value, tuple) or len(value) > LIMITS.dimensions or not all(map(_is_count, value)):
        machine.broken("a tensor's shape or strides are not a few whole numbers")
    return value


def _tensor(machine: Machine, arguments: tuple[Any, ...], dtype: str | None) -> Tensor:
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage):
        machine.broken("a tensor has no storage")
    sizes, steps = _sizes(machine, shape), _sizes(machine, strides)
    dtype = dtype or storage.dtype
    if dtype is None or not _is_count(offset) or len(sizes) != len(steps):
        machine.broken("a tensor's dtype, offset or strides are missing")
    last = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    if 0 not in sizes and (last + 1) * BITS[dtype] > 8 * storage.size:
        machine.refuse("has a tensor that reaches beyond its storage")
    return Tensor(storage, dtype, offset, sizes, steps)


def _rebuild_tensor(machine: Machine, arguments: tuple[Any, ...]) -> Tensor:
    if len(arguments) != 4:
        machine.broken("a tensor has the wrong number of arguments")
    return _tensor(machine, arguments, None)


def _rebuild_tensor_v2(machine: Machine, arguments: tuple[Any, ...]) -> Tensor:
    if len(arguments) not in (6, 7):
        machine.broken("a tensor has the wrong number of arguments")
    _no_flags(machine, arguments[6:])
    return _tensor(machine, arguments, None)


def _rebuild_tensor_v3(machine: Machine, arguments: tuple[Any, ...]) -> Tensor:
    if len(arguments) not in (7, 8):
        machine.broken("a tensor has the wrong number of arguments")
    dtype = arguments[6]
    if not isinstance(dtype, Stub) or dtype.name not in _DTYPES:
        machine.broken("a tensor has an unknown dtype")
    _no_flags(machine, arguments[7:])
    return _tensor(machine, arguments, _DTYPES[dtype.name])


def _no_flags(machine: Machine, metadata: tuple[Any, ...]) -> None:
    """The metadata of a view can say that its numbers are to be negated or conjugated."""
    for value in metadata:
        if not (value is None or (isinstance(value, Table) and not value.pairs)):
            machine.broken("a tensor is a negated or conjugated view, which is not supported")


def _rebuild_parameter(machine: Machine, arguments: tuple[Any, ...]) -> Tensor:
    if len(arguments) not in (3, 4) or not isinstance(arguments[0], Tensor):
        machine.broken("a parameter has no tensor")
    return arguments[0]


def _ordered_dict(machine: Machine, arguments: tuple[Any, ...]) -> Table:
    if not arguments:
        return Table()
    if len(arguments) != 1 or not isinstance(arguments[0], list):
        machine.broken("a dictionary is made of something else than pairs")
    machine.spend(64 * len(arguments[0]))
    pairs = [tuple(pair) for pair in arguments[0] if isinstance(pair, list | tuple) and len(pair) == 2]
    if len(pairs) != len(arguments[0]):
        machine.broken("a dictionary is made of something else than pairs")
    return Table(pairs)


def _same(machine: Machine, arguments: tuple[Any, ...]) -> Any:
    """A collection made of another (a set of a list): the other one, for nothing is looked up in it."""
    if len(arguments) > 1 or not all(isinstance(argument, list | tuple) for argument in arguments):
        machine.broken("a collection is made of something else")
    return arguments[0] if arguments else ()


def _device(machine: Machine, arguments: tuple[Any, ...]) -> str:
    if not arguments or not isinstance(arguments[0], str):
        machine.broken("a device has no name")
    return arguments[0]


def _encode(machine: Machine, arguments: tuple[Any, ...]) -> bytes:
    """Bytes, as protocol 2 writes them in a text of their code points."""
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] not in ("latin1", "latin-1"):
        machine.refuse("encodes text other than as Latin-1")
    machine.spend(len(arguments[0]))
    try:
        return arguments[0].encode("latin-1")
    except UnicodeEncodeError:
        machine.broken("bytes have values beyond 255")


def _no_bytes(machine: Machine, arguments: tuple[Any, ...]) -> bytes:
    """No bytes at all, as protocol 2 writes them."""
    if arguments:
        machine.refuse("makes bytes of something")
    return b""


def _numpy_dtype(machine: Machine, arguments: tuple[Any, ...]) -> _Dtype:
    code = arguments[0] if arguments and isinstance(arguments[0], str) else ""
    if code not in _NUMPY:
        machine.refuse(f"has values of numpy's dtype {shown(code)!r}, which is not a plain number")
    return _Dtype(code, _NUMPY[code])


def _numpy_scalar(machine: Machine, arguments: tuple[Any, ...]) -> Any:
    if len(arguments) != 2 or not isinstance(arguments[0], _Dtype) or not isinstance(arguments[1], bytes):
        machine.refuse("has a numpy scalar that is not a plain number")
    dtype, data = arguments
    if len(data) * 8 != BITS[dtype.name]:
        machine.broken("a numpy scalar has the wrong size")
    return struct.unpack(_UNPACK[dtype.name], data[::-1] if dtype.swapped else data)[0]


def _numpy_reconstruct(machine: Machine, arguments: tuple[Any, ...]) -> Array:
    if not arguments or not isinstance(arguments[0], Stub) or arguments[0].name != "numpy.ndarray":
        machine.refuse("has an array of an unknown class")
    return Array()


def _numpy_frombuffer(machine: Machine, arguments: tuple[Any, ...]) -> Array:
    if len(arguments) != 4:
        machine.broken("a numpy array has the wrong number of arguments")
    data, dtype, shape, order = arguments
    array = Array()
    _fill(machine, array, shape, dtype, order == "F", data)
    return array


_Call = Callable[[Machine, tuple[Any, ...]], Any]

_CALLS: Mapping[str, _Call] = MappingProxyType(
    {
        "collections.OrderedDict": _ordered_dict,
        "torch._utils._rebuild_tensor": _rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
        "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
        "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
        "torch.Size": _same,
        "torch.device": _device,
        "__builtin__.set": _same,
        "builtins.set": _same,
        "_codecs.encode": _encode,
        "__builtin__.bytes": _no_bytes,
        "builtins.bytes": _no_bytes,
        "numpy.dtype": _numpy_dtype,
        "numpy.core.multiarray.scalar": _numpy_scalar,
        "numpy._core.multiarray.scalar": _numpy_scalar,
        "numpy.core.multiarray._reconstruct": _numpy_reconstruct,
        "numpy._core.multiarray._reconstruct": _numpy_reconstruct,
        "numpy.core.numeric._frombuffer": _numpy_frombuffer,
        "numpy._core.numeric._frombuffer": _numpy_frombuffer,
    }
)
"""What a pickle may call, and our own function that stands for it."""

_KNOWN = frozenset({*_CALLS, *_STORAGES, *_DTYPES, *_MODULES, "numpy.ndarray"})
"""Every name that a pickle may say."""


def _append(machine: Machine, items: list[Any]) -> None:
    target = machine.top()
    if not isinstance(target, list):
        machine.broken("items are appended to something that is not a list")
    target.extend(items)


def _set_items(machine: Machine, items: list[Any]) -> None:
    target = machine.top()
    if len(items) % 2:
        machine.broken("a dictionary has a key without a value")
    if isinstance(target, Table):
        target.pairs.extend(zip(items[::2], items[1::2], strict=True))
    elif not isinstance(target, Stub):
        machine.broken("items are set in something that is not a dictionary")


def _set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    _set_items(machine, [key, value])


def _append_one(machine: Machine) -> None:
    _append(machine, [machine.pop()])


def _tuple_of(number: int) -> Callable[[Machine], None]:
    def action(machine: Machine) -> None:
        items = [machine.pop() for _ in range(number)]
        machine.push(tuple(items[::-1]))

    return action


def _table(machine: Machine) -> None:
    items = machine.pop_mark()
    machine.push(Table())
    _set_items(machine, items)


def _protocol(machine: Machine) -> None:
    protocol = machine.unsigned(1)
    if not 2 <= protocol <= 5:
        machine.broken(f"there is no pickle protocol {protocol}")


def _frame(machine: Machine) -> None:
    size = machine.unsigned(8)
    if size > LIMITS.string << 3:
        machine.broken(f"a frame announces {size:,} bytes")


def _integer(machine: Machine) -> None:
    machine.push(int.from_bytes(machine.stream.take(4), "little", signed=True))


def _long(size: int) -> Callable[[Machine], None]:
    def action(machine: Machine) -> None:
        length = machine.unsigned(size)
        if length > LIMITS.integer:
            machine.refuse(f"has an integer of {length:,} bytes")
        machine.push(int.from_bytes(machine.stream.take(length), "little", signed=True))

    return action


def _global(machine: Machine) -> None:
    module, name = machine.stream.line(), machine.stream.line()
    machine.name(machine.decoded(module), machine.decoded(name))


def _stack_global(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str) or len(name) + len(module) > LIMITS.line:
        machine.broken("a global's name is not a text")
    machine.name(module, name)


def _reduce(machine: Machine) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.push(machine.call(function, arguments))


def _new_object(machine: Machine) -> None:
    arguments, kind = machine.pop(), machine.pop()
    if not isinstance(arguments, tuple):
        machine.broken("a class gets something else than arguments")
    machine.push(machine.create(kind))


def _new_object_ex(machine: Machine) -> None:
    machine.pop()
    _new_object(machine)


def _build(machine: Machine) -> None:
    state = machine.pop()
    machine.build(machine.top(), state)


def _pop(machine: Machine) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.pop()


def _pop_mark(machine: Machine) -> None:
    machine.pop_mark()


_ACTIONS: Mapping[int, Callable[[Machine], None]] = MappingProxyType(
    {
        0x80: _protocol,
        0x95: _frame,
        # the stack and the memo
        ord("("): lambda machine: machine.marks.append(len(machine.stack)),
        ord("0"): _pop,
        ord("1"): _pop_mark,
        ord("2"): lambda machine: machine.push(machine.top()),
        ord("q"): lambda machine: machine.remember(machine.unsigned(1)),
        ord("r"): lambda machine: machine.remember(machine.unsigned(4)),
        0x94: lambda machine: machine.remember(len(machine.memo)),
        ord("h"): lambda machine: machine.recall(machine.unsigned(1)),
        ord("j"): lambda machine: machine.recall(machine.unsigned(4)),
        # plain values
        ord("N"): lambda machine: machine.push(None),
        0x88: lambda machine: machine.push(True),
        0x89: lambda machine: machine.push(False),
        ord("J"): _integer,
        ord("K"): lambda machine: machine.push(machine.unsigned(1)),
        ord("M"): lambda machine: machine.push(machine.unsigned(2)),
        0x8A: _long(1),
        0x8B: _long(4),
        ord("G"): lambda machine: machine.push(struct.unpack(">d", machine.stream.take(8))[0]),
        ord("X"): lambda machine: machine.push(machine.text(4)),
        0x8C: lambda machine: machine.push(machine.text(1)),
        0x8D: lambda machine: machine.push(machine.text(8)),
        ord("T"): lambda machine: machine.push(machine.text(4)),  # a str of Python 2
        ord("U"): lambda machine: machine.push(machine.text(1)),
        ord("B"): lambda machine: machine.push(machine.counted_bytes(4)),
        ord("C"): lambda machine: machine.push(machine.counted_bytes(1)),
        0x8E: lambda machine: machine.push(machine.counted_bytes(8)),
        0x96: lambda machine: machine.push(machine.counted_bytes(8)),
        # collections
        ord(")"): lambda machine: machine.push(()),
        ord("t"): lambda machine: machine.push(tuple(machine.pop_mark())),
        0x85: _tuple_of(1),
        0x86: _tuple_of(2),
        0x87: _tuple_of(3),
        ord("]"): lambda machine: machine.push([]),
        0x8F: lambda machine: machine.push([]),  # a set
        ord("l"): lambda machine: machine.push(machine.pop_mark()),
        0x91: lambda machine: machine.push(machine.pop_mark()),  # a frozen set
        ord("a"): _append_one,
        ord("e"): lambda machine: _append(machine, machine.pop_mark()),
        0x90: lambda machine: _append(machine, machine.pop_mark()),
        ord("}"): lambda machine: machine.push(Table()),
        ord("d"): _table,
        ord("s"): _set_item,
        ord("u"): lambda machine: _set_items(machine, machine.pop_mark()),
        # objects
        ord("c"): _global,
        0x93: _stack_global,
        ord("R"): _reduce,
        0x81: _new_object,
        0x92: _new_object_ex,
        ord("b"): _build,
        ord("Q"): lambda machine: machine.push(machine.referred(machine.pop())),
    }
)
"""What each opcode does."""

_REFUSED: Mapping[int, str] = MappingProxyType(
    {
        ord("i"): "INST", ord("o"): "OBJ", ord("P"): "PERSID", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4",
        0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER", ord("I"): "INT", ord("L"): "LONG", ord("F"): "FLOAT",
        ord("S"): "STRING", ord("V"): "UNICODE", ord("g"): "GET", ord("p"): "PUT",
    }
)  # fmt: skip
