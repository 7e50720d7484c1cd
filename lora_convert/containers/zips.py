"""The directory of a zip archive as PyTorch writes it: nothing compressed, nothing twice, nothing that readers could
see differently. Format: PKWARE's APPNOTE.TXT (sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from lora_convert.containers.pickles import LIMITS, Reader, malformed
from lora_convert.errors import FileError
from lora_convert.report import Finding, shown

__all__ = ["Entry", "read_directory", "unsafe"]

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _DESCRIPTOR = 0x1, 0x8
_UNKNOWN = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in the archive: its bytes lie at `start` and are `size` many."""

    name: str
    start: int
    size: int
    crc: int

    @property
    def end(self) -> int:
        return self.start + self.size

    def content(self, reader: Reader) -> bytes:
        """All of its bytes, for small ones. Raises FileError if they are not those that were written."""
        data = reader.read_at(self.start, self.size)
        if zlib.crc32(data) != self.crc:
            malformed(f"the bytes of {shown(self.name)} in the archive do not have the checksum that it gives.")
        return data


def unsafe(message: str, subject: str = "") -> NoReturn:
    """Raise FileError: the archive is not as PyTorch writes it, and readers could be misled by it."""
    fix = "PyTorch does not write such files: do not load it with other programs, unless you trust whoever made it."
    raise FileError([Finding("unsafe-pickle", "error", subject, message, fix)])


def _directory_place(reader: Reader) -> tuple[int, int, int]:
    """Start, size and number of entries of the central directory, by the record at the very end of the file."""
    if reader.size < _END.size:
        malformed("the zip archive has no end.")
    at = reader.size - _END.size
    signature, disk, first_disk, here, number, size, start, comment = _END.unpack(reader.read_at(at, _END.size))
    if signature != b"PK\5\6" or comment:
        malformed("the zip archive does not end with its directory: it was cut short, or something was appended.")
    small = (disk, first_disk, here, number, size, start)
    large = _end_64(reader, at)
    if large is not None:
        at, *values = large
        limits = (*[0xFFFF] * 4, _UNKNOWN, _UNKNOWN)
        if any(old not in (new, limit) for old, new, limit in zip(small, values, limits, strict=True)):
            unsafe("The zip archive has two ends that disagree.")
        disk, first_disk, here, number, size, start = values
    if disk or first_disk or here != number:
        unsafe("The zip archive is spread over several files.")
    if start + size != at:
        unsafe("The zip archive has bytes between its directory and its end, or its directory lies elsewhere.")
    return start, size, number


def _end_64(reader: Reader, at: int) -> tuple[int, ...] | None:
    """The record of a zip64 archive, as PyTorch always writes it: its position, and the six numbers of the other."""
    at -= _LOCATOR_64.size
    if at < _END_64.size:
        return None
    signature, _, position, _ = _LOCATOR_64.unpack(reader.read_at(at, _LOCATOR_64.size))
    if signature != b"PK\6\7":
        return None
    record = _END_64.unpack(reader.read_at(at - _END_64.size, _END_64.size))
    if record[0] != b"PK\6\6" or position != at - _END_64.size:
        malformed("the zip archive lacks the records that large archives have.")
    return position, *record[4:]


def _large(extra: bytes, values: tuple[int, int, int]) -> tuple[int, int, int]:
    """Sizes and offset of an entry, those that do not fit 32 bits from its zip64 field."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, position)
        field, position = extra[position + 4 : position + 4 + size], position + 4 + size
        if kind == 1:
            numbers = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            first, second, third = (next(numbers, value) if value == _UNKNOWN else value for value in values)
            return first, second, third
    return values


def _name(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        unsafe("A file in the zip archive has a name that is not UTF-8.", shown(repr(raw)))


def _entries(directory: bytes, number: int) -> list[tuple[Entry, int, bytes]]:
    """Entries whose `start` is still that of their local header, with their flags and raw names."""
    found = []
    position = 0
    for _ in range(number):
        if position + _CENTRAL.size > len(directory):
            malformed("the directory of the zip archive is shorter than it says.")
        fields = _CENTRAL.unpack_from(directory, position)
        signature, _, _, flags, method, _, _, crc, packed, size, named, extra, comment, disk, _, _, start = fields
        if signature != b"PK\1\2":
            malformed("the directory of the zip archive is damaged.")
        position += _CENTRAL.size
        raw, more = directory[position : position + named], directory[position + named : position + named + extra]
        position += named + extra + comment
        name = _name(raw)
        size, packed, start = _large(more, (size, packed, start))
        if flags & _ENCRYPTED or disk:
            unsafe("A file in the zip archive is encrypted, or in another archive.", name)
        if method or packed != size:
            unsafe("A file in the zip archive is compressed; PyTorch stores them as they are.", name)
        found.append((Entry(name, start, size, crc), flags, raw))
    if position != len(directory):
        malformed("the directory of the zip archive is longer than it says.")
    return found


def _placed(reader: Reader, entry: Entry, flags: int, raw: bytes) -> Entry:
    """The entry with the start of its bytes, after its two headers were compared."""
    if entry.start + _LOCAL.size > reader.size:
        malformed(f"{shown(entry.name)} of the zip archive begins behind its end.")
    local = _LOCAL.unpack(reader.read_at(entry.start, _LOCAL.size))
    signature, _, local_flags, method, _, _, crc, packed, size, named, extra = local
    described = bool(flags & _DESCRIPTOR)
    start = entry.start + _LOCAL.size + named + extra
    if signature != b"PK\3\4" or start + entry.size > reader.size:
        malformed(f"{shown(entry.name)} of the zip archive is not where its directory says.")
    same = method == 0 and bool(local_flags & _DESCRIPTOR) == described and not local_flags & _ENCRYPTED
    same = same and all(value in (entry.size, _UNKNOWN, *([0] if described else [])) for value in (packed, size))
    same = same and (crc == entry.crc or (described and crc == 0))
    if not same or reader.read_at(entry.start + _LOCAL.size, named) != raw:
        unsafe("The zip archive says two things of a file, once in its directory and once beside it.", entry.name)
    return Entry(entry.name, start, entry.size, entry.crc)


def read_directory(reader: Reader, most: int) -> Mapping[str, Entry]:
    """The files of an archive by name; its directory may have at most `most` bytes.

    Raises FileError: `malformed-pickle` for what is broken, `unsafe-pickle` for duplicate names, compressed or
    overlapping files and headers that disagree.
    """
    start, size, number = _directory_place(reader)
    if number > LIMITS.entries or size > most:
        unsafe(
            f"The zip archive has {number:,} files and {size:,} bytes of names; at most {LIMITS.entries:,} are read."
        )
    entries: dict[str, Entry] = {}
    position, before = 0, ""
    found = _entries(reader.read_at(start, size), number)
    for entry, flags, raw in sorted(found, key=lambda item: item[0].start):
        if entry.name in entries:
            unsafe("The zip archive has two files of this name, and readers disagree which one counts.", entry.name)
        if entry.start < position:
            unsafe(f"Its bytes in the zip archive overlap those of {shown(before)}.", entry.name)
        entries[entry.name] = placed = _placed(reader, entry, flags, raw)
        position, before = placed.end, entry.name
    if position > start:
        unsafe("Its bytes in the zip archive overlap the directory.", before)
    return entries
