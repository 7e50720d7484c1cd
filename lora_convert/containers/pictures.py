"""Pictures that carry a textual-inversion embedding, as A1111 writes them: in a text chunk, in the pixels, or in both.

The embedding is JSON in which a tensor stands as `{"TORCHTENSOR": nested list}`. As a text it is base64 in the chunk
`sd-ti-embedding` of a PNG. In pixels it is compressed by zlib; the low four bits of its bytes stand in a block at the
picture's left, the high four in one at its right, in the low four bits of every red, green and blue, mixed with noise,
and a black column parts each block from the picture (`EmbeddingEncoder`, `embedding_to_b64`, `insert_image_data_embed`
of A1111's modules/textual_inversion/image_embedding.py). Chunks: PNG (Third Edition, W3C, sections 5 and 11), and
"WebP Container Specification" and "WebP Lossless Bitstream" of developers.google.com/speed/webp.

Texts are read by a parser of our own. Pillow decodes pixels, and gets to see nothing else: a file that is composed anew
of the chunks that hold them, after its size was checked.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from lora_convert.containers.header import Header, Span, TensorInfo, check_names
from lora_convert.containers.torch_file import Fold, Unfolding
from lora_convert.errors import FileError
from lora_convert.report import Finding, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lora_convert.containers.source import Reader

__all__ = ["LIMITS", "Limits", "is_picture", "read_picture"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what one picture may ask for. A1111 makes at most 75 vectors, of 768 or 1,024 numbers."""

    chunks: int = 10_000  # in the file
    data: int = 16 << 20  # bytes of compressed pixels
    pixels: int = 5 << 20  # 2048 × 2560; decoding a WEBP takes 20 bytes for each
    text: int = 12 << 20  # bytes of base64
    json: int = 8 << 20  # bytes; a number takes about 23
    numbers: int = 1 << 19  # commas in the JSON …
    lists: int = 4_096  # … and opening brackets, and braces …
    quotes: int = 20_000  # … and quotes: texts take most memory
    dimensions: int = 4
    depth: int = 20  # objects in objects
    tensors: int = 100
    rows: int = 1_000
    width: int = 16_384
    name: int = 500  # characters of a tensor's name
    extras: int = 1_000  # plain values that are kept …
    extra: int = 4_096  # … and characters of one


LIMITS = Limits()

_PNG = b"\x89PNG\r\n\x1a\n"
_KEYWORD = b"sd-ti-embedding\0"
_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_DEPTHS: Mapping[int, tuple[int, ...]] = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Colour type of a PNG -> the bits of a sample that it may have."""

_GREY = frozenset({0, 4})
_DEFLATED = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
"""How what zlib compressed begins, for each of its levels."""

_LOSSY: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "a JPEG"),
    (4, b"ftypavif", "an AVIF"),
    (4, b"ftypavis", "an AVIF"),
    (4, b"ftypheic", "a HEIC"),
    (4, b"ftypmif1", "a HEIC"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL"),
    (0, b"\xff\x0a", "a JPEG XL"),
)
"""Where in the file, which bytes, which kind of picture: those that change the pixels a little when saved."""


def _lossy(first: bytes) -> str | None:
    return next((what for at, mark, what in _LOSSY if first[at:].startswith(mark)), None)


def is_picture(first: bytes) -> bool:
    """Whether a file that begins so is a picture, of a kind that may carry an embedding or that has destroyed it."""
    return first.startswith(_PNG[:4]) or (first[:4], first[8:12]) == (b"RIFF", b"WEBP") or _lossy(first) is not None


_DAMAGED = "The picture is damaged, or was changed after it was written: fetch the original."


def _malformed(message: str, subject: str = "", fix: str = _DAMAGED) -> NoReturn:
    """Raise FileError: the picture, or the embedding in it, breaks its format."""
    raise FileError([Finding("malformed-picture", "error", subject, message, fix)])


def _excessive(message: str, subject: str = "") -> NoReturn:
    """Raise FileError: it is beyond `LIMITS`."""
    _malformed(message, subject, "No known embedding comes near that.")


def _nothing(message: str) -> NoReturn:
    """Raise FileError: it is a picture and no more."""
    fix = (
        "Pictures that carry one are PNGs or lossless WEBPs with a stripe of noise at either side; what was saved as "
        "JPEG, resized or cropped has lost it. Look for the original, or for the embedding as .pt or .safetensors."
    )
    raise FileError([Finding("no-embedding", "error", "", message, fix)])


@dataclass(frozen=True, slots=True)
class Picture:
    """What a picture's file says before anything is decoded.

    `text` is the base64 of an embedding, `pixels` composes a file that holds the pixels alone; `grey` pictures have
    no room for data.
    """

    width: int
    height: int
    pixels: Callable[[], bytes]
    text: bytes | None = None
    grey: bool = False


# PNG


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A part of a PNG: `start` is where its content begins, `size` the content's."""

    kind: bytes
    start: int
    size: int

    def whole(self, reader: Reader) -> bytes:
        """The chunk as it stands in the file. Raises FileError if its checksum is wrong."""
        data = reader.read_at(self.start - 8, self.size + 12)
        if zlib.crc32(data[4:-4]) != int.from_bytes(data[-4:], "big"):
            _malformed(f"The bytes of its chunk {self.kind.decode()} do not have the checksum that it gives.")
        return data

    def content(self, reader: Reader) -> bytes:
        """What is in the chunk. Raises FileError if its checksum is wrong."""
        return self.whole(reader)[8:-4]


def _chunks(reader: Reader) -> Iterator[_Chunk]:
    """The chunks of a PNG up to its end. What follows the end no reader looks at."""
    position = len(_PNG)
    for _ in range(LIMITS.chunks):
        if position + 12 > reader.size:
            _malformed("The PNG is cut short: it has no end.")
        size, kind = struct.unpack(">I4s", reader.read_at(position, 8))
        if not (kind.isascii() and kind.isalpha()):
            _malformed(f"At byte {position} of the PNG no chunk begins.")
        if position + 12 + size > reader.size:
            _malformed(f"The PNG is cut short: its chunk {kind.decode()} at byte {position} has {size:,} bytes.")
        yield _Chunk(kind, position + 8, size)
        if kind == b"IEND":
            return
        position += 12 + size
    _excessive(f"The PNG has more than {LIMITS.chunks:,} chunks.")


def _png(reader: Reader) -> Picture:
    if reader.read_at(0, min(len(_PNG), reader.size)) != _PNG:
        _malformed("It begins like a PNG, but its first eight bytes are not those of one.")
    chunks = list(_chunks(reader))
    first = chunks[0]
    if first.kind != b"IHDR" or first.size != 13 or sum(chunk.kind == b"IHDR" for chunk in chunks) > 1:
        _malformed("The PNG does not begin with its size, or has two.")
    width, height, depth, colours, *methods = struct.unpack(">2L5B", first.content(reader))
    if depth not in _DEPTHS.get(colours, ()) or methods[:2] != [0, 0] or methods[2] > 1 or not width or not height:
        _malformed("The PNG has no pixels, or is of a kind that the format does not define.")

    def pixels() -> bytes:
        parts = [chunk for chunk in chunks if chunk.kind in _PIXEL_CHUNKS]
        _check_data(sum(chunk.size for chunk in parts))
        return _PNG + b"".join(chunk.whole(reader) for chunk in parts)

    return Picture(width, height, pixels, _text(reader, chunks), colours in _GREY)


def _check_data(size: int) -> None:
    if size > LIMITS.data:
        _excessive(f"The picture has {size:,} bytes of pixels; at most {LIMITS.data:,} are read.")


def _text(reader: Reader, chunks: Sequence[_Chunk]) -> bytes | None:
    """The base64 of the embedding in a text chunk, None if there is no such chunk."""
    found = [
        chunk
        for chunk in chunks
        if chunk.kind in _TEXTS
        and chunk.size >= len(_KEYWORD)
        and reader.read_at(chunk.start, len(_KEYWORD)) == _KEYWORD
    ]
    if not found:
        return None
    if len(found) > 1:
        _malformed("The PNG has two texts sd-ti-embedding, and readers disagree which one counts.")
    if found[0].size > LIMITS.text:
        _excessive(f"Its text sd-ti-embedding has {found[0].size:,} bytes; at most {LIMITS.text:,} are read.")
    return _TEXTS[found[0].kind](found[0].content(reader)[len(_KEYWORD) :])


def _compressed_text(content: bytes) -> bytes:
    if content[:1] != b"\0":
        _malformed("Its text sd-ti-embedding is compressed by an unknown method.")
    return _inflated(content[1:], LIMITS.text, "text sd-ti-embedding")


def _international_text(content: bytes) -> bytes:
    parts = content[2:].split(b"\0", 2)  # language, translated keyword, text
    if content[:1] not in (b"\0", b"\1") or len(parts) != 3:
        _malformed("Its text sd-ti-embedding is not built as such texts are.")
    return _compressed_text(content[1:2] + parts[2]) if content[0] else parts[2]


_TEXTS: Mapping[bytes, Callable[[bytes], bytes]] = MappingProxyType(
    {b"tEXt": lambda content: content, b"zTXt": _compressed_text, b"iTXt": _international_text}
)
"""Kind of a text chunk -> how its text is got out of what follows the keyword."""


def _inflated(data: bytes, most: int, what: str) -> bytes:
    """What zlib compressed; bytes behind its end do not count."""
    machine = zlib.decompressobj()
    try:
        content = machine.decompress(data, most + 1)
    except zlib.error as error:
        _malformed(f"Its {what} is damaged: {error}.")
    if len(content) > most:
        _excessive(f"Its {what} unfolds into more than {most:,} bytes.")
    if not machine.eof:
        _malformed(f"Its {what} is cut short.")
    return content


# WEBP

_BARREN: Mapping[bytes, str] = MappingProxyType(
    {b"VP8 ": "saved with losses, which destroys an embedding", b"ANMF": "that moves, which carries no embedding"}
)
"""Chunks of a WEBP in place of lossless pixels, and what they make of it."""


def _webp(reader: Reader) -> Picture:
    end = 8 + int.from_bytes(reader.read_at(4, 4), "little")
    position = 12
    for _ in range(LIMITS.chunks):
        if position + 8 > min(end, reader.size):
            break
        kind, size = struct.unpack("<4sL", reader.read_at(position, 8))
        if kind in _BARREN:
            _nothing(f"It is a WEBP picture {_BARREN[kind]}.")
        if position + 8 + size > min(end, reader.size):
            break
        if kind == b"VP8L":
            return _lossless(reader, position + 8, size)
        position += 8 + size + size % 2
    _malformed("The WEBP is cut short: it has no pixels.")


def _lossless(reader: Reader, start: int, size: int) -> Picture:
    first = reader.read_at(start, min(size, 5))
    bits = int.from_bytes(first[1:], "little")
    if len(first) < 5 or first[0] != 0x2F or bits >> 29:
        _malformed("The WEBP's pixels do not begin as lossless ones do.")

    def pixels() -> bytes:
        _check_data(size)
        chunk = struct.pack("<4sL", b"VP8L", size) + reader.read_at(start, size) + bytes(size % 2)
        return struct.pack("<4sL4s", b"RIFF", 4 + len(chunk), b"WEBP") + chunk

    return Picture((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, pixels)


# the data in the pixels


def _decoded(picture: Picture) -> NDArray[np.uint8]:
    """The pixels as (height, width, 3): red, green and blue of 8 bits. Raises FileError, whatever Pillow raises."""
    if picture.width * picture.height > LIMITS.pixels:
        size = f"{picture.width:,} × {picture.height:,} pixels"
        _excessive(f"The picture has {size}; at most {LIMITS.pixels:,} in all are decoded.")
    data = picture.pixels()
    try:
        from PIL import Image
    except ImportError:
        message = "The picture may carry an embedding in its pixels, and Pillow, which reads them, is not installed."
        fix = 'Install it with: pip install "lora-convert[images]"'
        raise FileError([Finding("unreadable", "error", "", message, fix)]) from None
    import numpy as np

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
            if image.size != (picture.width, picture.height):
                raise ValueError("it has two sizes")
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:  # of a stranger's bytes Pillow makes almost any
        _malformed(f"The picture's pixels cannot be decoded: {shown(str(error) or type(error).__name__).rstrip('.')}.")


def _without_border(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The pixels without rows and columns at the edges in which none has some red, some green and some blue."""
    import numpy as np

    bright = pixels.min(axis=2) > 0
    rows, columns = (np.flatnonzero(bright.any(axis=axis)) for axis in (1, 0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if rows.size else pixels


def _noise(size: int) -> NDArray[np.uint8]:
    """A1111's noise: the low four bits of x mod 255 for each x of x ← 1664525·x + 1013904223 (mod 2³²) from x = 0.

    n steps at once are the same rule with another factor and summand, so that each round doubles what is known.
    """
    import numpy as np

    factor, summand = 1664525, 1013904223
    values = np.empty(size, np.uint32)
    values[:1], known = summand, 1
    while known < size:
        part = values[: min(known, size - known)]
        values[known : known + part.size] = part * np.uint32(factor) + np.uint32(summand)
        summand = (factor * summand + summand) % (1 << 32)
        factor = factor * factor % (1 << 32)
        known *= 2
    return (values % 255 & 15).astype(np.uint8)


def _hidden(pixels: NDArray[np.uint8]) -> bytes | None:
    """What the blocks beside the outermost black columns hold, padding included; None if there are none."""
    import numpy as np

    black = np.flatnonzero(np.bitwise_or.reduce(pixels, axis=(0, 2)) & 15 == 0)
    if black.size < 2:
        return None
    left, right = pixels[:, : black[0]], pixels[:, black[-1] + 1 :]
    if left.shape != right.shape or left.size < 2:
        return None
    size = min(left.size, LIMITS.json)
    noise = _noise(size)
    low, high = (block.reshape(-1)[:size] & 15 ^ noise for block in (left, right))
    data = (high << 4 | low).tobytes()
    return data if data.startswith(_DEFLATED) else None


def _from_pixels(picture: Picture, most: int) -> _Content:
    """The embedding in the pixels. Raises FileError, `no-embedding` if there is none."""
    nothing = "The picture carries no embedding: neither a text sd-ti-embedding, nor data in its pixels."
    if picture.grey:
        _nothing(nothing)
    pixels = _decoded(picture)
    # A1111 looks within the border; of a low picture this may cut the data's own edge
    data = _hidden(_without_border(pixels)) or _hidden(pixels)
    if data is None:
        _nothing(nothing)
    return _content(_inflated(data, most, "data in the pixels"))


# the embedding


def _integer(literal: str) -> float:
    return int(literal) if len(literal) <= 20 else float(literal)


def _numbers(name: str, value: Any) -> tuple[tuple[int, ...], list[float]]:
    """Shape and numbers of a nested list, in C's order."""
    shape: list[int] = []
    level = [value]
    while level and all(type(item) is list for item in level):
        sizes = {len(item) for item in level}
        if len(sizes) > 1:
            _malformed("Its rows have different numbers of elements.", shown(name))
        shape += sizes
        level = [child for item in level for child in item]
        if len(shape) > LIMITS.dimensions:
            _excessive(f"It has more than {LIMITS.dimensions} dimensions.", shown(name))
    if not all(type(item) in (int, float) for item in level):
        _malformed("Not all of its elements are numbers, or its rows have different depths.", shown(name))
    if shape and (shape[-1] > LIMITS.width or any(size > LIMITS.rows for size in shape[:-1])):
        size = " × ".join(map(str, shape))
        _excessive(f"It has {size} numbers; at most {LIMITS.rows:,} × {LIMITS.width:,} are read.", shown(name))
    return tuple(shape), level


class _Content:
    """What the JSON holds: tensors (shape, bytes of F32) and plain values; dots join the names of what is nested."""

    def __init__(self) -> None:
        self.tensors: dict[str, tuple[tuple[int, ...], bytes]] = {}
        self.extras: dict[str, str] = {}
        self.findings: list[Finding] = []

    def add(self, name: str, value: Any, depth: int = 0) -> None:
        """Collect everything below a value."""
        if depth > LIMITS.depth:
            _excessive(f"Its embedding nests values more than {LIMITS.depth} levels deep.")
        if len(name) > LIMITS.name:
            _excessive(f"A name in its embedding has more than {LIMITS.name:,} characters.")
        _check_text(name)
        if isinstance(value, dict) and "TORCHTENSOR" in value:
            self._add_tensor(name or "tensor", value["TORCHTENSOR"])
        elif isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, child in items:
                self.add(f"{name}.{key}" if name else str(key), child, depth + 1)
        elif isinstance(value, str | int | float) and len(self.extras) < LIMITS.extras:
            text = value if isinstance(value, str) else repr(value)
            if len(text) <= LIMITS.extra:
                _check_text(text)
                self.extras[name] = text

    def _add_tensor(self, name: str, value: Any) -> None:
        import numpy as np

        if name in self.tensors:
            _malformed("Two tensors have this name.", shown(name))
        if len(self.tensors) >= LIMITS.tensors:
            _excessive(f"Its embedding has more than {LIMITS.tensors:,} tensors.")
        shape, numbers = _numbers(name, value)
        exact = np.array(numbers, np.float64)
        with np.errstate(over="ignore"):
            values = exact.astype("<f4")
        lost = int((np.isfinite(exact) & ~np.isfinite(values)).sum())
        if lost:
            message = f"{lost:,} of its {len(numbers):,} numbers are too large for float32 and became infinity."
            self.findings.append(Finding("not-finite", "warning", name, message))
        self.tensors[name] = shape, values.tobytes()


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        _malformed("A text in its embedding has half of a surrogate pair.")


def _content(raw: bytes) -> _Content:
    """The embedding that JSON describes."""
    bounds = ((b",", LIMITS.numbers), (b"[", LIMITS.lists), (b"{", LIMITS.lists), (b'"', LIMITS.quotes))
    if any(raw.count(mark) > most for mark, most in bounds):
        _excessive("The data in it has far more lists, texts or numbers than an embedding.")
    try:
        value = json.loads(raw.decode("utf-8"), parse_int=_integer)
    except RecursionError:
        _excessive("The data in it is JSON that is nested too deep.")
    except ValueError as error:
        _malformed(f"The data in it is not JSON: {shown(str(error)).rstrip('.')}.")
    if not isinstance(value, dict):
        _malformed("The data in it is JSON, but not an object as embeddings are.")
    content = _Content()
    content.add("", value)
    return content


def _from_text(text: bytes, most: int) -> _Content:
    """The embedding in a text chunk."""
    try:
        raw = base64.b64decode(b"".join(text.split()), validate=True)
    except ValueError as error:
        _malformed(f"Its text sd-ti-embedding is not base64: {shown(str(error)).rstrip('.')}.")
    if len(raw) > most:
        _excessive(f"Its text sd-ti-embedding has {len(raw):,} bytes of JSON; at most {most:,} are read.")
    return _content(raw)


def _compared(content: _Content, picture: Picture, most: int) -> list[Finding]:
    """What is to be said of the pixels of a picture whose text holds an embedding."""
    try:
        other = _from_pixels(picture, most)
    except FileError as error:
        return [replace(found, severity="warning") for found in error.findings if found.name == "malformed-picture"]
    if (other.tensors, other.extras) == (content.tensors, content.extras):
        return []
    message = "Its text and its pixels carry different embeddings. The text's is taken, as A1111 does."
    return [Finding("carriers-differ", "warning", "", message, "Ask the author which one is meant.")]


def _header(reader: Reader, path: str, content: _Content, said: Sequence[Finding]) -> tuple[Header, Unfolding]:
    """The header of an embedding, and a reader that has its tensors behind the file's end."""
    end = reader.size
    tensors, folds = {}, []
    for name, (shape, data) in content.tensors.items():
        span = Span(end, end + len(data)) if data else Span(0, 0)
        end += len(data)
        tensors[name] = TensorInfo("F32", shape, span)
        if data:
            folds.append(Fold(span.start, span.end, partial(bytes, data)))
    findings = [*content.findings, *said, *check_names(list(tensors))]
    if not tensors:
        findings.append(Finding("empty-file", "error", "", "There are no tensors in the embedding."))
    return Header(path, tensors, extras=content.extras, findings=tuple(findings)), Unfolding(reader, folds)


def read_picture(reader: Reader, path: str, most: int) -> tuple[Header, Unfolding]:
    """The header of the embedding that a picture carries, and the reader that its spans are of.

    Its tensors are F32, named as in A1111's `.pt` files (`string_to_param.*`); JSON gives their numbers as float64, of
    which float32 is the original. `extras` are its plain values (`name`, `step`, …). `most` bounds the JSON in bytes,
    together with `LIMITS.json`.

    A PNG with a text is read without Pillow. Where the pixels carry another embedding, the text's is taken, because so
    does A1111, with the finding `carriers-differ` (not without Pillow). Raises FileError: `no-embedding` for a picture
    that carries none, `malformed-picture` for a damaged one or one beyond `LIMITS`, `unreadable` if Pillow is missing.
    """
    what = _lossy(reader.read_at(0, min(reader.size, 16)))
    if what:
        _nothing(f"It is {what} picture; such are saved with losses as a rule, which destroys an embedding.")
    most = min(most, LIMITS.json)
    picture = _png(reader) if reader.read_at(0, 4) == _PNG[:4] else _webp(reader)
    if picture.text is None:
        return _header(reader, path, _from_pixels(picture, most), ())
    content = _from_text(picture.text, most)
    return _header(reader, path, content, _compared(content, picture, most))
