"""How files are made of a fuzzer's bytes: the first byte chooses a form, so that lengths and checksums come out right.

Without them a fuzzer would not get past the first check; with the form of index 0 it has to try.
"""

from __future__ import annotations

import base64
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

__all__ = ["FORMS", "STORAGE", "as_file"]

Form = Callable[[bytes], bytes]

STORAGE = struct.pack("<64f", *range(64))
"""Storage 0 of the composed PyTorch files: a FloatStorage of 64."""


def raw(data: bytes) -> bytes:
    """The bytes as they are."""
    return data


def container(data: bytes) -> bytes:
    """A safetensors file: two bytes say how many bytes of data there are, the rest is the header's JSON."""
    size = int.from_bytes(data[:2], "little")
    return struct.pack("<Q", len(data[2:])) + data[2:] + bytes(size)


def archive(data: bytes) -> bytes:
    """A zip archive of torch.save with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name, content in (("data.pkl", data), ("byteorder", b"little"), ("data/0", STORAGE), ("version", b"3\n")):
            out.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    return file.getvalue()


_BEFORE = b"".join(
    pickle.dumps(value, 2)
    for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
)


def legacy(data: bytes) -> bytes:
    """A file of torch.save before PyTorch 1.6 with this pickle."""
    return _BEFORE + data + pickle.dumps(["0"], 2) + struct.pack("<Q", 64) + STORAGE


_PNG = b"\x89PNG\r\n\x1a\n"


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


def _png(pixels: NDArray[np.uint8], *between: bytes) -> bytes:
    """A PNG of pixels (height, width, 3), with chunks before them."""
    height, width, _ = pixels.shape
    size = _chunk(b"IHDR", struct.pack(">2L5B", width, height, 8, 2, 0, 0, 0))
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    return b"".join((_PNG, size, *between, _chunk(b"IDAT", zlib.compress(lines, 1)), _chunk(b"IEND", b"")))


def text_chunk(data: bytes) -> bytes:
    """A PNG with an embedding of this JSON in a text chunk."""
    text = b"sd-ti-embedding\0" + base64.b64encode(data)
    return _png(np.full((2, 2, 3), 255, np.uint8), _chunk(b"tEXt", text))


def compressed_text_chunk(data: bytes) -> bytes:
    """A PNG with this text as its embedding, compressed."""
    return _png(np.full((2, 2, 3), 255, np.uint8), _chunk(b"zTXt", b"sd-ti-embedding\0\0" + zlib.compress(data, 1)))


_ROWS, _PICTURE = 16, 8


def _noise(size: int) -> NDArray[np.uint8]:
    values, value = np.empty(size, np.uint8), 0
    for index in range(size):
        value = (1664525 * value + 1013904223) % (1 << 32)
        values[index] = value % 255 & 15
    return values


def hidden(data: bytes) -> bytes:
    """A PNG with an embedding of this JSON in its pixels."""
    return hidden_bytes(zlib.compress(data, 1))


def hidden_bytes(data: bytes) -> bytes:
    """A PNG with these bytes in its pixels: low halves at the left, high halves at the right, black columns between."""
    columns = -(-len(data) // (_ROWS * 3)) or 1
    content = np.frombuffer(data.ljust(_ROWS * columns * 3, b"\0"), np.uint8)
    noise = _noise(content.size)
    left, right = (((half ^ noise) | 16).reshape(_ROWS, columns, 3) for half in (content & 15, content >> 4))
    black = np.zeros((_ROWS, 1, 3), np.uint8)
    return _png(np.concatenate([left, black, np.full((_ROWS, _PICTURE, 3), 201, np.uint8), black, right], 1))


def with_checksums(data: bytes) -> bytes:
    """A PNG of these chunks, each with the checksum that it should have."""
    parts, position = [_PNG], len(_PNG)
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        parts.append(_chunk(data[position + 4 : position + 8], data[position + 8 : position + 8 + size]))
        position += 12 + size
    return b"".join(parts)


FORMS: Mapping[str, tuple[Form, ...]] = {
    "headers": (raw, container),
    "pickles": (raw, archive, legacy),
    "pictures": (raw, with_checksums, text_chunk, compressed_text_chunk, hidden, hidden_bytes),
}
"""For each target, what its fuzzer's bytes can be made into."""


def as_file(target: str, data: bytes) -> bytes:
    """The file that a fuzzer's bytes stand for."""
    forms = FORMS[target]
    return forms[data[0] % len(forms)](data[1:]) if data else b""
