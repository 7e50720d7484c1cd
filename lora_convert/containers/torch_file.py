"""Files of `torch.save` as headers: zip archives, the format before PyTorch 1.6, and plain pickles of numpy arrays.

Formats: torch/serialization.py of PyTorch (`_save`, `_legacy_save`). Tensors are located, not loaded: one that lies in
one piece is a span of the file; the others (views with strides, arrays inside the pickle) have spans behind the file's
end, which `Unfolding` fills when they are read.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from lora_convert.containers import dtypes
from lora_convert.containers.header import Header, Span, TensorInfo, check_names
from lora_convert.containers.pickles import (
    LIMITS,
    Array,
    Machine,
    Module,
    Storage,
    Stream,
    Table,
    Tensor,
    malformed,
)
from lora_convert.containers.zips import Entry, read_directory, unsafe
from lora_convert.report import Finding, counted, listed, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_convert.containers.source import Reader

__all__ = ["Unfolding", "is_torch", "read_torch"]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_ZIP = b"PK\3\4"
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))

_RECORDS = re.compile(
    r"(data\.pkl|version|byteorder|data/\d+|\.data/serialization_id|\.format_version|\.storage_alignment)"
)
_TORCHSCRIPT = re.compile(r"constants\.pkl")

_WRAPPERS = ("state_dict",)
"""Keys under which checkpoints of trainers keep the weights; what stands beside them is training state."""


def is_torch(first: bytes) -> bool:
    """Whether a file that begins so is to be read as one of `torch.save`."""
    return first.startswith((_ZIP, *_PICKLES))


@dataclass(frozen=True, slots=True)
class Fold:
    """A tensor that does not lie in one piece: where it is said to be, and how to get its bytes."""

    start: int
    end: int
    content: Callable[[], bytes]


class Unfolding:
    """A file with the tensors that do not lie in it in one piece behind its end. `size` is the file's own."""

    def __init__(self, reader: Reader, folds: Sequence[Fold]) -> None:
        self._reader, self._folds = reader, folds
        self._starts = [fold.start for fold in folds]
        self._last: tuple[int, bytes] | None = None
        self.size = reader.size

    def read_at(self, offset: int, size: int) -> bytes:
        if offset < self.size or not self._folds or not size:
            return self._reader.read_at(offset, size)
        fold = self._folds[bisect_right(self._starts, offset) - 1]
        last = self._last  # pieces of one tensor are asked for one after the other
        if last is None or last[0] != fold.start:
            self._last = last = (fold.start, fold.content())
        return last[1][offset - fold.start : offset - fold.start + size]

    def close(self) -> None:
        self._reader.close()


class Unpacked:
    """What a pickle was found to hold: tensors and plain values by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor | Array] = {}
        self.extras: dict[str, str] = {}
        self.nodes = 0

    def add(self, name: str, value: Any, depth: int = 0) -> None:
        """Collect everything below a value; names of what is nested are joined by dots."""
        self.nodes += 1
        if depth > LIMITS.depth:
            unsafe(f"The pickle nests collections more than {LIMITS.depth} levels deep.", shown(name))
        if self.nodes > LIMITS.nodes:
            unsafe(f"The pickle unfolds into more than {LIMITS.nodes:,} values.")
        if len(name) > LIMITS.name:
            unsafe(f"A name in the pickle has more than {LIMITS.name:,} characters.")
        if isinstance(value, Tensor | Array):
            self._add_tensor(name or "tensor", value)
        elif isinstance(value, Table | Module | list | tuple):
            self.nodes += len(_items(value))
            for key, child in _children(value):
                self.add(f"{name}.{key}" if name else key, child, depth + 1)
        elif isinstance(value, str | int | float) and len(self.extras) < LIMITS.extras:
            text = value if isinstance(value, str) else repr(value)
            if len(text) <= LIMITS.extra:
                self.extras[name] = text

    def _add_tensor(self, name: str, value: Tensor | Array) -> None:
        if name in self.tensors:
            malformed(f"two tensors have the name {shown(name)!r}.")
        if len(self.tensors) >= LIMITS.tensors:
            unsafe(f"The pickle has more than {LIMITS.tensors:,} tensors.")
        self.tensors[name] = value


def _items(value: Table | Module | list[Any] | tuple[Any, ...]) -> Sequence[Any]:
    if isinstance(value, list | tuple):
        return value
    return (value.parameters if isinstance(value, Module) else value).pairs


def _children(value: Table | Module | list[Any] | tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """What a collection holds, by the names that it has there."""
    if isinstance(value, list | tuple):
        yield from ((str(number), child) for number, child in enumerate(value))
        return
    items = _items(value)
    # of a key that stands twice, a dictionary keeps the last value
    pairs = {key: child for key, child in items if type(key) in (str, int)}
    yield from ((key if isinstance(key, str) else str(key), child) for key, child in pairs.items())
    if any(isinstance(child, Tensor | Array) for key, child in items if type(key) not in (str, int)):
        malformed("a tensor's name is not a text.")


def _simo_list(value: Any) -> str | None:
    """The component of a list of matrices, up and down in turn, as cloneofsimo's `save_lora_weight` writes it.

    Of text encoders only the attention's matrices are trained, which are all of one square shape; UNets have several.
    """
    if (
        not isinstance(value, list)
        or not value
        or len(value) % 2
        or not all(isinstance(item, Tensor) for item in value)
    ):
        return None
    pairs = [(up.shape, down.shape) for up, down in zip(value[::2], value[1::2], strict=True)]
    if not all(len(up) == len(down) and len(up) in (2, 4) and up[1] == down[0] for up, down in pairs):
        return None
    sizes = {(up[0], down[1]) for up, down in pairs}
    square = len(sizes) == 1 and all(rows == columns for rows, columns in sizes)
    return "text_encoder" if square else "unet"


def _unpacked(value: Any) -> tuple[Unpacked, list[Finding]]:
    """Tensors and plain values of what a pickle built, and what is to be said of the rest."""
    found = Unpacked()
    findings: list[Finding] = []
    component = _simo_list(value)
    if component is not None:
        for number, matrix in enumerate(value):
            found.add(f"{component}:{number // 2}:{'down' if number % 2 else 'up'}", matrix)
        return found, findings
    if isinstance(value, Table):
        named = {key: child for key, child in value.pairs if isinstance(key, str)}
        wrapper = next((key for key in _WRAPPERS if isinstance(named.get(key), Table)), None)
        if wrapper is not None:
            beside = Unpacked()
            beside.add("", Table([(key, child) for key, child in value.pairs if key != wrapper]))
            found.add("", named[wrapper])
            found.extras.update(beside.extras)
            if beside.tensors:
                said = counted(len(beside.tensors), "tensor")
                message = f"Beside {wrapper} stand {said} of the training, not read: {listed(list(beside.tensors))}."
                findings.append(Finding("beside-weights", "note", "", message))
            return found, findings
    found.add("", value)
    return found, findings


def _is_whole(tensor: Tensor) -> bool:
    """Whether the elements lie in their order without gaps."""
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _gathered(
    reader: Reader, start: int, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> NDArray[Any]:
    """The elements of a view whose first one lies at `start` of the file; strides count elements.

    What lies between them is read as well, unless it is much more than they are.
    """
    import numpy as np

    reach = (sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + 1) * itemsize
    if reach <= max(LIMITS.spare, 2 * prod(shape) * itemsize):
        elements = np.frombuffer(reader.read_at(start, reach), f"V{itemsize}")
        steps = tuple(step * itemsize for step in strides)
        return np.lib.stride_tricks.as_strided(elements, shape, steps, writeable=False)
    axis = max(range(len(shape)), key=lambda axis: (shape[axis] - 1) * strides[axis])
    others, steps = (sizes[:axis] + sizes[axis + 1 :] for sizes in (shape, strides))
    places = range(start, start + shape[axis] * strides[axis] * itemsize, strides[axis] * itemsize)
    return np.stack([_gathered(reader, place, itemsize, others, steps) for place in places], axis)


def _in_order(array: Array) -> bytes:
    """The bytes of an array in C's order."""
    if not array.fortran or len(array.shape) < 2:
        return array.data
    import numpy as np

    elements = np.frombuffer(array.data, f"V{dtypes.BITS[array.dtype] // 8}")
    return elements.reshape(array.shape, order="F").tobytes()


class _Placing:
    """Gives every tensor its span, real or behind the file's end."""

    def __init__(self, reader: Reader, start_of: Callable[[Storage], int]) -> None:
        self._reader, self._start_of = reader, start_of
        self._end = reader.size
        self._total = 0
        self.folds: list[Fold] = []

    def place(self, name: str, value: Tensor | Array) -> TensorInfo:
        size = prod(value.shape) * dtypes.BITS[value.dtype] // 8
        self._total += size
        if self._total > LIMITS.shared * self._reader.size + LIMITS.spare:
            message = f"With it the tensors have {self._total:,} bytes, but the file has {self._reader.size:,}."
            unsafe(message, shown(name))
        return TensorInfo(value.dtype, value.shape, self._span(value, size))

    def _span(self, value: Tensor | Array, size: int) -> Span:
        if size == 0:
            return Span(0, 0)
        if isinstance(value, Array):
            return self._fold(size, lambda: _in_order(value))
        itemsize = dtypes.BITS[value.dtype] // 8
        first = self._start_of(value.storage) + value.offset * itemsize
        if _is_whole(value):
            return Span(first, first + size)
        return self._fold(size, lambda: _gathered(self._reader, first, itemsize, value.shape, value.strides).tobytes())

    def _fold(self, size: int, content: Callable[[], bytes]) -> Span:
        start = self._end
        self._end += size
        self.folds.append(Fold(start, self._end, content))
        return Span(start, self._end)


def _header(
    reader: Reader, path: str, value: Any, stubs: set[str], start_of: Callable[[Storage], int]
) -> tuple[Header, Unfolding]:
    """The header of what the pickle built, and the reader that its spans are of."""
    found, findings = _unpacked(value)
    placing = _Placing(reader, start_of)
    tensors = {name: placing.place(name, tensor) for name, tensor in found.tensors.items()}
    if stubs:
        message = f"The pickle names classes of a trainer, which were not imported: {listed(sorted(stubs))}."
        findings.append(Finding("unsafe-pickle", "note", "", message))
    if not tensors:
        findings.append(Finding("empty-file", "error", "", "There are no tensors in the file."))
    header = Header(path, tensors, extras=found.extras, findings=(*findings, *check_names(list(tensors))))
    return header, Unfolding(reader, placing.folds)


def _root(entries: Mapping[str, Entry]) -> str:
    """The folder that all files of the archive lie in. Raises FileError for names that PyTorch does not write."""
    root = next(iter(entries), "").partition("/")[0]
    names = {name: name.removeprefix(f"{root}/") for name in entries}
    if any(_TORCHSCRIPT.fullmatch(name) for name in names.values()) and f"{root}/data.pkl" in entries:
        unsafe("This is a TorchScript archive, which is a program and not only weights.")
    for name, rest in names.items():
        if rest == name or not _RECORDS.fullmatch(rest):
            unsafe("PyTorch puts no such file into its archives.", name)
    if f"{root}/data.pkl" not in entries:
        malformed("it is a zip archive, but not one of PyTorch's: it has no data.pkl.")
    return root


def _read_zip(reader: Reader, path: str, most: int) -> tuple[Header, Unfolding]:
    entries = read_directory(reader, most)
    root = _root(entries)
    order = entries.get(f"{root}/byteorder")
    if order is not None and (order.size > 16 or order.content(reader) != b"little"):
        malformed("it was written by a big-endian machine, which is not supported.")
    record = entries[f"{root}/data.pkl"]
    _check_size(record.size, most)
    record.content(reader)
    machine = Machine(Stream(reader, record.start, record.end, "data.pkl"))
    value = machine.run()
    if machine.stream.position != record.end:
        unsafe(f"{record.end - machine.stream.position:,} bytes follow the pickle in data.pkl.")

    def start_of(storage: Storage) -> int:
        entry = entries.get(f"{root}/data/{storage.key}")
        if entry is None:
            malformed(f"the storage data/{storage.key} is not in the archive.")
        if entry.size != storage.size:
            sizes = f"{storage.size:,} bytes by the pickle and {entry.size:,} in the archive"
            malformed(f"the storage data/{storage.key} has {sizes}.")
        return entry.start

    return _header(reader, path, value, machine.stubs, start_of)


def _check_size(size: int, most: int) -> None:
    if size > most:
        unsafe(f"The pickle has {size:,} bytes; at most {most:,} are read. --max-header allows more.")


def _legacy_places(reader: Reader, stream: Stream, keys: Any, itemsizes: Mapping[str, Storage]) -> dict[str, Span]:
    """Where the storages lie behind the pickles: for each key 8 bytes of length and its elements."""
    if not isinstance(keys, list) or len(keys) > LIMITS.entries or not all(isinstance(key, str) for key in keys):
        malformed("the list of its storages is not a list of names.")
    places: dict[str, Span] = {}
    position = stream.position
    for key in keys:
        storage = itemsizes.get(key)
        if storage is None or key in places:
            malformed(f"its storage {shown(key)} is listed twice, or belongs to no tensor.")
        if position + 8 > reader.size:
            malformed("it ends before its last storage.")
        number = int.from_bytes(reader.read_at(position, 8), "little")
        end = position + 8 + number * storage.itemsize
        if end > reader.size or number * storage.itemsize != storage.size:
            malformed(f"its storage {shown(key)} has {number:,} elements by its length, or is cut short.")
        places[key] = Span(position + 8, end)
        position = end
    if position != reader.size:
        malformed(f"{reader.size - position:,} bytes follow its last storage.")
    return places


class _Watching(Machine):
    """A machine that keeps the storages which it meets."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self.storages: dict[str, Storage] = {}

    def storage(self, reference: Any) -> Storage:
        storage = super().storage(reference)
        known = self.storages.setdefault(storage.key, storage)
        if known != storage:
            self.broken(f"storage {storage.key} has two sizes or dtypes")
        return storage


def _read_legacy(reader: Reader, path: str, stream: Stream) -> tuple[Header, Unfolding]:
    if Machine(stream).run() != _PROTOCOL:
        malformed("it has another version of PyTorch's old format than 1001.")
    system = Machine(stream).run()
    if not isinstance(system, Table) or ("little_endian", True) not in system.pairs:
        malformed("it was written by a big-endian machine, which is not supported.")
    machine = _Watching(stream)
    value = machine.run()
    places = _legacy_places(reader, stream, Machine(stream).run(), machine.storages)

    def start_of(storage: Storage) -> int:
        if storage.key not in places:
            malformed(f"its storage {storage.key} is missing.")
        return places[storage.key].start

    return _header(reader, path, value, machine.stubs, start_of)


def _read_pickle(reader: Reader, path: str, most: int) -> tuple[Header, Unfolding]:
    """The old format of PyTorch, else a plain pickle, which can hold numpy arrays."""
    stream = Stream(reader, 0, min(reader.size, most), "the file")
    machine = Machine(stream)
    value = machine.run()
    if type(value) is int and value == _MAGIC:
        return _read_legacy(reader, path, stream)
    if stream.position != reader.size:
        unsafe(f"{reader.size - stream.position:,} bytes follow the pickle, which another program could run.")

    def start_of(storage: Storage) -> int:
        malformed(f"its storage {storage.key} is missing.")

    return _header(reader, path, value, machine.stubs, start_of)


def read_torch(reader: Reader, path: str, most: int) -> tuple[Header, Unfolding]:
    """The header of a file of `torch.save`, and the reader that its spans are of. No tensor byte is touched.

    `most` bounds the pickle and the archive's directory, in bytes. Raises FileError (`unsafe-pickle`,
    `malformed-pickle`).
    """
    if reader.read_at(0, 4) == _ZIP:
        return _read_zip(reader, path, most)
    return _read_pickle(reader, path, most)
