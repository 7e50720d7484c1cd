"""Pictures that carry embeddings: read to the last bit from text and pixels; all else they hold is a finding."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CORPUS, FIXTURES, ROOT, names_of, read_all
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_convert
from lora_convert.containers import Source, open_source, pictures
from lora_convert.containers.pictures import LIMITS, Limits
from lora_convert.errors import FileError

PIL = pytest.importorskip("PIL.Image")

FOLDER = FIXTURES / "embeddings" / "pictures"
KEY = b"sd-ti-embedding\0"
VALUES = np.random.default_rng(0).standard_normal((2, 24)).astype(np.float32)
LANDSCAPE = np.random.default_rng(1).integers(0, 256, (32, 20, 3), np.uint8)


# a writer of our own


def described(vectors: Any = VALUES, **more: Any) -> dict[str, Any]:
    """An embedding as A1111 describes it in JSON."""
    tensor = {"TORCHTENSOR": vectors.tolist() if isinstance(vectors, np.ndarray) else vectors}
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": "sks", "step": 500} | more


def noise(size: int) -> np.ndarray:
    state, values = 0, []
    for _ in range(size):
        state = (1664525 * state + 1013904223) % 2**32
        values.append(state % 255 & 15)
    return np.array(values, np.uint8)


def carrier(data: bytes, landscape: np.ndarray = LANDSCAPE, shade: int = 0x50) -> np.ndarray:
    """A picture between two blocks that hold the data."""
    height = len(landscape)
    plain = np.frombuffer(data, np.uint8)
    size = -(-(len(plain) + 1) // (3 * height)) * 3 * height
    plain = np.resize(plain, size)
    low, high = ((half ^ noise(size) | shade).reshape(height, -1, 3) for half in (plain & 15, plain >> 4))
    gap = np.zeros((height, 1, 3), np.uint8)
    return np.concatenate([low, gap, landscape, gap, high], axis=1)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content))


def png(pixels: np.ndarray = LANDSCAPE, *more: bytes, size: tuple[int, int] = (0, 0), level: int = 6) -> bytes:
    """A PNG of 8 bits: RGB, RGBA or grey by its last dimension; `more` stands before the pixels."""
    height, width, samples = pixels.shape
    kind = {1: 0, 3: 2, 4: 6}[samples]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">2L5B", size[0] or width, size[1] or height, 8, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *more, chunk(b"IDAT", zlib.compress(rows, level)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def webp(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    PIL.fromarray(pixels).save(file, "WEBP", **({"lossless": True, "method": 0} | options))
    return file.getvalue()


def dumped(embedding: Any) -> bytes:
    return embedding if isinstance(embedding, bytes) else json.dumps(embedding).encode()


def text(embedding: Any) -> bytes:
    return chunk(b"tEXt", KEY + base64.b64encode(dumped(embedding)))


def in_text(embedding: Any) -> bytes:
    return png(LANDSCAPE, text(embedding))


def in_pixels(embedding: Any) -> bytes:
    return png(carrier(zlib.compress(dumped(embedding), 9)))


def in_webp(embedding: Any) -> bytes:
    return webp(carrier(zlib.compress(dumped(embedding), 9)))


CARRIERS: Mapping[str, Callable[[Any], bytes]] = {"text": in_text, "pixels": in_pixels, "webp": in_webp}


# what is read


def assert_read(data: bytes, vectors: np.ndarray = VALUES, name: str = "sks") -> Source:
    source = open_source(data)
    assert list(source.header.tensors) == ["string_to_param.*"]
    info = source.header.tensors["string_to_param.*"]
    assert (info.dtype, info.shape) == ("F32", vectors.shape)
    assert source.read_bytes("string_to_param.*") == vectors.tobytes()
    assert source.read("string_to_param.*").shape == vectors.shape
    assert source.header.extras == {"string_to_token.*": "265", "name": name, "step": "500"}
    return source


def refused(data: bytes) -> Any:
    """The one finding that a file is refused with."""
    with pytest.raises(FileError) as caught:
        open_source(data)
    (finding,) = caught.value.findings
    assert finding.severity == "error" and finding.message.endswith(".") and finding.fix.endswith((".", '"'))
    return finding


@pytest.mark.parametrize("name", ["text_only", "block_only"])
def test_pictures_made_by_a1111(name):
    path = FOLDER / f"{name}.png"
    (vectors,) = read_all(FOLDER / f"{name}.expected.safetensors").values()
    with open_source(path) as source:
        assert source.read_bytes("string_to_param.*") == vectors.tobytes()
        assert source.header.extras["name"] == f"img_png_{name}"
        assert source.header.extras["sd_checkpoint"] == "81761151"
        assert b"".join(source.chunks()) == path.read_bytes()  # what hashes are of
    assert lora_convert.identify(path).kind == "embedding"


@pytest.mark.parametrize("name", ["destroyed.jpeg", "plain.png"])
def test_pictures_that_carry_none(name):
    assert refused((FOLDER / name).read_bytes()).name == "no-embedding"
    assert not lora_convert.identify(FOLDER / name).ok


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), form=st.sampled_from(sorted(CARRIERS)))
def test_round_trip(data, form):
    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40)))
    numbers = data.draw(st.lists(floats, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    name = data.draw(st.text(max_size=20).filter(lambda text: text.isprintable() or text.isascii()))
    vectors = np.array(numbers, np.float32).reshape(shape)
    height, width = data.draw(st.integers(8, 60)), data.draw(st.integers(1, 30))
    landscape = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    landscape *= data.draw(st.integers(0, 1), "a picture, or a black one").__index__()
    content = json.dumps(described(vectors, name=name)).encode()
    pixels = carrier(
        zlib.compress(content, data.draw(st.integers(1, 9))), landscape, data.draw(st.integers(0, 15)) * 16
    )
    file = png(landscape, text(content)) if form == "text" else png(pixels) if form == "pixels" else webp(pixels)
    assert assert_read(file, vectors, name).header.findings == ()


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, np.full_like(pixels[..., :1], 7)], axis=2)


CONTENT = dumped(described())
HIDDEN = carrier(zlib.compress(CONTENT, 9))
TEXT = base64.b64encode(CONTENT)
SPELLINGS: Mapping[str, bytes] = {
    "tEXt": png(LANDSCAPE, chunk(b"tEXt", KEY + TEXT)),
    "zTXt": png(LANDSCAPE, chunk(b"zTXt", KEY + b"\0" + zlib.compress(TEXT))),
    "iTXt": png(LANDSCAPE, chunk(b"iTXt", KEY + b"\0\0en\0\0" + TEXT)),
    "iTXt, compressed": png(LANDSCAPE, chunk(b"iTXt", KEY + b"\1\0\0\0" + zlib.compress(TEXT))),
    "wrapped lines": png(LANDSCAPE, chunk(b"tEXt", KEY + TEXT[:60] + b"\n" + TEXT[60:] + b"\n")),
    "other texts": png(LANDSCAPE, chunk(b"tEXt", b"parameters\0a cat"), chunk(b"tEXt", KEY + TEXT)),
    "behind the end": in_text(described()) + b"more",
    "both carriers": png(HIDDEN, text(CONTENT)),
    "a black border": png(np.pad(HIDDEN, ((3, 9), (5, 2), (0, 0)))),
    "transparent": png(with_alpha(HIDDEN)),
    "webp, transparent": webp(with_alpha(HIDDEN), exact=True),
    "webp with other chunks": webp(HIDDEN, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
    "16 bits": png(HIDDEN).replace(
        png(HIDDEN)[8:],
        chunk(b"IHDR", struct.pack(">2L5B", HIDDEN.shape[1], HIDDEN.shape[0], 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.repeat(2).tobytes() for row in HIDDEN)))
        + chunk(b"IEND", b""),
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_carriers(spelling):
    assert assert_read(SPELLINGS[spelling]).header.findings == ()


@pytest.mark.parametrize("form", CARRIERS)
@pytest.mark.parametrize(
    ("content", "shapes"),
    [
        (described([0.5, -1, 2]), {"string_to_param.*": (3,)}),
        (described(1.5), {"string_to_param.*": ()}),
        (described([[[1, 2]], [[3, 4]]]), {"string_to_param.*": (2, 1, 2)}),
        (described([[], []]), {"string_to_param.*": (2, 0)}),
        ({"TORCHTENSOR": [1.0]}, {"tensor": (1,)}),
        (
            {"string_to_param": {"a": {"TORCHTENSOR": [[1]]}, "b": {"TORCHTENSOR": [[2, 3]]}}},
            {"string_to_param.a": (1, 1), "string_to_param.b": (1, 2)},
        ),
        ({"more": [{"x": {"TORCHTENSOR": [7]}}, 3]}, {"more.0.x": (1,)}),
    ],
)
def test_a_tensor_wherever_it_stands(form, content, shapes):
    source = open_source(CARRIERS[form](content))
    assert {name: info.shape for name, info in source.header.tensors.items()} == shapes
    for name, shape in shapes.items():
        assert source.read(name).shape == shape


def test_several_tensors_keep_their_values():
    parts = {str(n): VALUES * n for n in range(5)}
    content = {"string_to_param": {name: {"TORCHTENSOR": value.tolist()} for name, value in parts.items()}}
    source = open_source(in_pixels(content))
    for name, value in parts.items():
        np.testing.assert_array_equal(source.read(f"string_to_param.{name}"), value)


def test_plain_values_are_texts():
    more = {
        "name": "../../x",
        "sd_checkpoint": None,
        "rate": 0.5,
        "on": True,
        "notes": {"a.b": "ü"},
        "long": "x" * 5000,
    }
    extras = open_source(in_text(described(**more))).header.extras
    expected = {"name": "../../x", "step": "500", "rate": "0.5", "on": "True", "notes.a.b": "ü"}
    assert extras == {"string_to_token.*": "265"} | expected


def test_without_tensors():
    (finding,) = open_source(in_text({"name": "x"})).header.findings
    assert (finding.name, finding.severity) == ("empty-file", "error")


def test_what_is_beyond_float32_is_said():
    content = b'{"string_to_param": {"*": {"TORCHTENSOR": [[1e39, -1e300, NaN, Infinity, 1e400, 3.4e38, 1' + b"0" * 50
    source = open_source(in_text(content + b"]]}}}"))
    values = source.read("string_to_param.*")
    expected = [[np.inf, -np.inf, np.nan, np.inf, np.inf, 3.4e38, np.inf]]
    np.testing.assert_array_equal(values, np.array(expected, np.float32))
    (finding,) = source.header.findings
    assert (finding.name, finding.severity, finding.subject) == ("not-finite", "warning", "string_to_param.*")
    assert "3 of its 7" in finding.message


def test_carriers_that_differ():
    source = assert_read(png(carrier(zlib.compress(dumped(described(VALUES + 1)))), text(CONTENT)))
    (finding,) = source.header.findings
    assert (finding.name, finding.severity) == ("carriers-differ", "warning")


@pytest.mark.parametrize(
    "damaged",
    [
        png(carrier(zlib.compress(CONTENT)[:300] + bytes(99)), text(CONTENT)),
        png(LANDSCAPE, text(CONTENT), size=(60_000, 60_000)),
        png()[:33] + text(CONTENT) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"") + b"more",
        png(LANDSCAPE, text(CONTENT)).replace(b"IDAT", b"IDAt"),
    ],
)
def test_a_sound_text_over_damaged_pixels_is_read_with_a_warning(damaged):
    (finding,) = assert_read(damaged).header.findings
    assert (finding.name, finding.severity) == ("malformed-picture", "warning")


def test_pictures_are_known_by_their_content_and_are_no_base_models(tmp_path):
    (tmp_path / "x.pt").write_bytes(in_pixels(described()))
    with open_source(tmp_path / "x.pt") as source:
        assert source.read("string_to_param.*").tolist() == VALUES.tolist()
    with pytest.raises(FileError, match="not-weights"):
        open_source(tmp_path / "x.pt", pickles=False)


# what is refused


def test_kinds_of_pictures_that_lose_it():
    jpeg = io.BytesIO()
    PIL.fromarray(HIDDEN).save(jpeg, "JPEG", quality=100)
    frames = [PIL.fromarray(HIDDEN), PIL.fromarray(255 - HIDDEN)]
    moving = io.BytesIO()
    frames[0].save(moving, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    kinds = {
        "JPEG": jpeg.getvalue(),
        "losses": webp(HIDDEN, lossless=False, quality=90),
        "moves": moving.getvalue(),
        "AVIF": b"\0\0\0\x1cftypavif" + bytes(99),
        "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99),
    }
    for word, data in kinds.items():
        finding = refused(data)
        assert (finding.name, word in finding.message) == ("no-embedding", True), finding


def head(width: int = 20, height: int = 32, depth: int = 8, colours: int = 2, *methods: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">2L5B", width, height, depth, colours, *(methods or (0, 0, 0))))


def with_head(new: bytes, rest: bytes = png()[33:]) -> bytes:
    return png()[:8] + new + rest


def with_palette(*more: bytes) -> bytes:
    rows = b"".join(b"\0" + row[:, 0].tobytes() for row in LANDSCAPE)
    parts = [chunk(b"PLTE", bytes(range(256)) * 3), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return with_head(head(colours=3), b"".join(parts))


NOTHING: Mapping[str, bytes] = {
    "a landscape": png(),
    "webp": webp(LANDSCAPE),
    "black": png(LANDSCAPE * 0),
    "grey": png(LANDSCAPE[..., :1]),
    "a palette": with_palette(chunk(b"tRNS", b"\0\x80\xff")),
    "one pixel": png(LANDSCAPE[:1, :1]),
    "black columns": png(np.concatenate([LANDSCAPE, LANDSCAPE * 0, LANDSCAPE], axis=1)),
    "of two widths": png(np.concatenate([LANDSCAPE, LANDSCAPE[:, :2] * 0, LANDSCAPE[:, :9]], axis=1)),
    "cropped at the left": png(HIDDEN[:, 1:]),
    "cropped at the right": png(HIDDEN[:, :-1]),
    "cropped at the top": png(HIDDEN[1:]),
    "resized": png(HIDDEN[::2, ::2]),
    "the other way round": png(HIDDEN[:, ::-1]),
    "another text": png(LANDSCAPE, chunk(b"tEXt", b"sd-ti-embeddings\0" + TEXT)),
}


@pytest.mark.parametrize("case", NOTHING)
def test_pictures_without_an_embedding(case):
    assert refused(NOTHING[case]).name == "no-embedding"


GOOD = in_text(described())
ROWS = b"".join(b"\0" + row.tobytes() for row in HIDDEN)
OVERWRITTEN = HIDDEN.copy()
OVERWRITTEN[9:20, :4] |= 8
DEEP = b"[" * 4000 + b"]" * 4000
MALFORMED: Mapping[str, tuple[bytes, str]] = {
    "signature": (b"\x89PNG\n\x1a\n" + png()[8:], "first eight bytes"),
    "only a signature": (png()[:8], "cut short"),
    "no end": (png()[:-12], "cut short"),
    "end within a chunk": (GOOD[:-40], "cut short"),
    "no chunk": (png()[:33] + b"\0" * 40, "no chunk begins"),
    "no size": (png()[:8] + png()[33:], "does not begin with its size"),
    "two sizes": (png(LANDSCAPE, head()), "has two"),
    "size of a wrong length": (with_head(chunk(b"IHDR", bytes(12))), "does not begin"),
    "no width": (with_head(head(width=0)), "no pixels"),
    "3 bits": (with_head(head(depth=3)), "does not define"),
    "colours": (with_head(head(colours=5)), "does not define"),
    "method": (with_head(head(20, 32, 8, 2, 0, 1, 0)), "does not define"),
    "checksum of the size": (png()[:29] + b"\0\0\0\0" + png()[33:], "IHDR do not have the checksum"),
    "checksum of the text": (GOOD.replace(TEXT[:8], b"AAAAAAAA"), "tEXt do not have the checksum"),
    "checksum of the pixels": (png()[:-20] + b"\0\0\0" + png()[-17:], "IDAT do not have the checksum"),
    "no pixels": (png()[:33] + chunk(b"IEND", b""), "cannot be decoded"),
    "pixels cut": (png()[:33] + chunk(b"IDAT", zlib.compress(ROWS)[:500]) + chunk(b"IEND", b""), "cannot be decoded"),
    "no palette": (with_head(head(colours=3)), "cannot be decoded"),
    "pixels that are none": (png()[:33] + chunk(b"IDAT", b"x" * 99) + chunk(b"IEND", b""), "cannot be decoded"),
    "too many pixels": (png(LANDSCAPE, size=(60_000, 60_000)), "60,000 × 60,000 pixels"),
    "too many chunks": (png(LANDSCAPE, *[chunk(b"teXt", b"")] * 10_001), "more than 10,000 chunks"),
    "two texts": (png(LANDSCAPE, text(CONTENT), text(described(VALUES + 1))), "two texts"),
    "not base64": (png(LANDSCAPE, chunk(b"tEXt", KEY + b"not base64!!")), "is not base64"),
    "padding": (png(LANDSCAPE, chunk(b"tEXt", KEY + b"abcde")), "is not base64"),
    "beyond ASCII": (png(LANDSCAPE, chunk(b"tEXt", KEY + b"\xff" * 8)), "is not base64"),
    "empty": (png(LANDSCAPE, chunk(b"tEXt", KEY)), "is not JSON"),
    "long text": (png(LANDSCAPE, chunk(b"tEXt", KEY + b"A" * LIMITS.text)), "bytes; at most"),
    "zTXt bomb": (png(LANDSCAPE, chunk(b"zTXt", KEY + b"\0" + zlib.compress(bytes(45 << 20)))), "unfolds into more"),
    "zTXt cut": (png(LANDSCAPE, chunk(b"zTXt", KEY + b"\0" + zlib.compress(TEXT)[:-9])), "is cut short"),
    "zTXt garbage": (png(LANDSCAPE, chunk(b"zTXt", KEY + b"\0garbage")), "is damaged"),
    "zTXt method": (png(LANDSCAPE, chunk(b"zTXt", KEY + b"\1" + zlib.compress(TEXT))), "unknown method"),
    "iTXt bomb": (png(LANDSCAPE, chunk(b"iTXt", KEY + b"\1\0\0\0" + zlib.compress(bytes(45 << 20)))), "unfolds"),
    "iTXt parts": (png(LANDSCAPE, chunk(b"iTXt", KEY + b"\0\0" + TEXT)), "is not built"),
    "iTXt flag": (png(LANDSCAPE, chunk(b"iTXt", KEY + b"\2\0\0\0" + TEXT)), "is not built"),
    "long JSON": (in_text(b" " * (LIMITS.json + 1)), "bytes of JSON; at most"),
    "pixels: bomb": (png(carrier(zlib.compress(bytes(64 << 20), 9))), "unfolds into more than 8,388,608 bytes"),
    "pixels: cut": (png(carrier(zlib.compress(CONTENT, 9)[:-9])), "data in the pixels is"),
    "pixels: overwritten": (png(OVERWRITTEN), "data in the pixels is damaged"),
    "webp: cut": (webp(HIDDEN)[:-40], "WEBP is cut short"),
    "webp: size": (webp(HIDDEN)[:4] + b"\0\1\0\0" + webp(HIDDEN)[8:], "WEBP is cut short"),
    "webp: no pixels": (b"RIFF\x04\0\0\0WEBP" + bytes(30), "WEBP is cut short"),
    "webp: signature": (webp(HIDDEN).replace(b"\x2f", b"\x2e", 1), "do not begin as lossless"),
    "webp: nothing inside": (b"RIFF\x0c\0\0\0WEBPVP8L\0\0\0\0", "do not begin as lossless"),
    "webp: many pixels": (
        b"RIFF\x16\0\0\0WEBPVP8L\x0a\0\0\0\x2f\xff\xff\xff\x0f" + bytes(5), "16,384 × 16,384 pixels"
    ),
    "webp: damaged": (webp(HIDDEN)[:60] + b"\xff" * 90 + webp(HIDDEN)[150:], "cannot be decoded"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_pictures(case):
    data, message = MALFORMED[case]
    finding = refused(data)
    assert (finding.name, message in finding.message) == ("malformed-picture", True), finding


WRONG: Mapping[str, tuple[Any, str]] = {
    "no JSON": (b"\x80\x81", "not JSON"),
    "half of JSON": (CONTENT[:-2], "not JSON"),
    "UTF-16": (CONTENT.decode().encode("utf-16"), "not JSON"),
    "a list": ([1], "not an object"),
    "null": (b"null", "not an object"),
    "ragged": (described([[1, 2], [3]]), "different numbers"),
    "ragged below": (described([[[1], [2]], [[3], [4, 5]]]), "different numbers"),
    "mixed": (described([[1], 2]), "Not all"),
    "texts": (described([["1"]]), "Not all"),
    "a text": (described("1"), "Not all"),
    "booleans": (described([[True]]), "Not all"),
    "null in it": (described([[None]]), "Not all"),
    "objects": (described([{"TORCHTENSOR": [1]}]), "Not all"),
    "an object": (described({"a": 1}), "Not all"),
    "dimensions": (described([[[[[1]]]]]), "more than 4 dimensions"),
    "rows": (described([[1]] * 1001), "at most 1,000"),
    "width": (described([1] * 16_385), "at most 1,000 × 16,384"),
    "numbers": (b'{"a":{"TORCHTENSOR":[' + b"1," * (LIMITS.numbers + 1) + b"1]}}", "far more"),
    "lists": (described([[]] * 5000), "far more"),
    "deep lists": (b'{"a":' + DEEP + b"}", "levels deep"),
    "deeper lists": (b'{"a":' + DEEP * 2 + b"}", "far more"),
    "deep objects": (b'{"a":' * 30 + b"1" + b"}" * 30, "levels deep"),
    "texts without end": ({"a": ["x"] * 20_000}, "far more"),
    "a long name": ({"a" * 501: {"TORCHTENSOR": [1]}}, "more than 500"),
    "one name twice": ({"a": {"b": {"TORCHTENSOR": [1]}}, "a.b": {"TORCHTENSOR": [2]}}, "Two tensors"),
    "tensors": ({str(n): {"TORCHTENSOR": [n]} for n in range(101)}, "more than 100 tensors"),
    "surrogate": (b'{"name": "\\ud800"}', "surrogate"),
    "surrogate in a name": (b'{"\\udfff": {"TORCHTENSOR": [1]}}', "surrogate"),
}


@pytest.mark.parametrize("form", ["text", "pixels"])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_embedding_in_either_carrier(case, form):
    content, message = WRONG[case]
    finding = refused(CARRIERS[form](content))
    if case == "deep lists":
        assert "deep" in finding.message
    else:
        assert message in finding.message, finding
    assert finding.name == "malformed-picture"


@pytest.mark.parametrize("limit", ["chunks", "data", "pixels", "text", "json", "numbers", "lists", "quotes", "name"])
def test_every_limit_is_one(limit, monkeypatch):
    assert_read(SPELLINGS["both carriers"])
    monkeypatch.setattr(pictures, "LIMITS", Limits(**{limit: 3}))
    data = SPELLINGS["a black border" if limit in ("data", "pixels") else "tEXt"]
    assert refused(data).name == "malformed-picture"


def test_the_limit_of_the_caller_counts():
    with pytest.raises(FileError, match="at most 100 are read"):
        open_source(in_text(described()), max_header=100)
    with pytest.raises(FileError, match="more than 100 bytes"):
        open_source(in_pixels(described()), max_header=100)


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, min(5, len(data) // 10))):
        at = rng.randrange(len(changed))
        kind = rng.randrange(4)
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del changed[at : at + rng.randint(1, 9)]
        else:
            changed[at:at] = rng.randbytes(rng.randint(1, 9))
    return bytes(changed)


SMALL = dumped(described(VALUES[:, :3]))
WRAPPED: Mapping[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    "a file with text": (png(LANDSCAPE[:8, :8], text(SMALL)), bytes),
    "a file with data": (png(HIDDEN), bytes),
    "a webp": (webp(HIDDEN), bytes),
    "JSON": (SMALL, in_text),
    "base64": (base64.b64encode(SMALL), lambda data: png(LANDSCAPE[:8], chunk(b"tEXt", KEY + data))),
    "a compressed text": (zlib.compress(TEXT), lambda data: png(LANDSCAPE[:8], chunk(b"zTXt", KEY + b"\0" + data))),
    "a compressed block": (zlib.compress(SMALL), lambda data: png(carrier(data))),
    "the pixels": (zlib.compress(ROWS), lambda data: png(HIDDEN)[:33] + chunk(b"IDAT", data) + chunk(b"IEND", b"")),
    "the size": (head()[8:-4], lambda data: with_head(chunk(b"IHDR", data))),
}


@pytest.mark.parametrize("level", WRAPPED)
def test_any_change_gives_tensors_or_a_finding(level):
    """Each level of a picture is changed and wrapped soundly in those around it, so that all of the code is reached."""
    rng = random.Random(level)
    seed, wrapped = WRAPPED[level]
    for _ in range(400):
        data = wrapped(mutated(seed, rng))
        try:
            source = open_source(data)
            for name, info in source.header.tensors.items():
                assert len(source.read_bytes(name)) == info.nbytes
        except FileError as error:
            assert error.findings
            assert names_of(error.findings) <= {
                "malformed-picture", "no-embedding", "malformed-header", "not-weights", "empty-file",
            }  # fmt: skip


@pytest.mark.parametrize("data", [in_text(described()), in_pixels(described()), in_webp(described())])
def test_cut_short_anywhere(data):
    for size in range(12, len(data), 41):
        assert refused(data[:size]).name in ("malformed-picture", "malformed-header"), size


# without Pillow, and without much memory


def child(code: str, *arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


WITHOUT_PILLOW = """
import sys
sys.modules["PIL"] = None
from lora_convert.containers import open_source
from lora_convert.errors import FileError
for path in sys.argv[1:]:
    try:
        with open_source(path) as source:
            print(*source.header.tensors["string_to_param.*"].shape, source.read("string_to_param.*").sum().item())
    except FileError as error:
        print(error)
"""


def test_a_text_needs_no_pillow():
    expected = read_all(FOLDER / "text_only.expected.safetensors")["clip_l"]
    text_only, block_only = child(WITHOUT_PILLOW, FOLDER / "text_only.png", FOLDER / "block_only.png")
    assert text_only == f"1 768 {expected.sum()}"
    assert block_only.startswith("unreadable: ") and 'pip install "lora-convert[images]"' in block_only


def test_no_picture_no_pillow():
    code = (
        "import sys, lora_convert; lora_convert.identify(sys.argv[1]); "
        "print({'PIL', 'numpy', 'lora_convert.containers.pictures'} & {*sys.modules})"
    )
    assert child(code, FIXTURES / "lora" / "a_sdxl_lora.safetensors") == ["set()"]


MEASURED = """
import re, sys, time
from pathlib import Path
import lora_convert.containers.source as containers
from lora_convert.errors import FileError
began = time.perf_counter()
try:
    with containers.open_source(sys.argv[1]) as source:
        for name in source.header.tensors:
            source.read(name)
    names = "read"
except FileError as error:
    names = " ".join(finding.name for finding in error.findings)
seconds = time.perf_counter() - began
print(names, seconds, re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def measured(path: Path) -> tuple[str, float, int]:
    """What a reading in a process of its own gives: `read` or findings, seconds, and KB of memory at most."""
    (line,) = child(MEASURED, path)
    names, seconds, memory = line.rsplit(maxsplit=2)
    return names, float(seconds), int(memory)


def noisy(pixels: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (2048, pixels // 2048, 3), np.uint8)


FULL = b'{"s":{"TORCHTENSOR":[' + b",".join([b"[" + b"-0.0123456789012," * 479 + b"1]"] * 999) + b"]}}"
WIDE = '{"s":["\N{GRINNING FACE}",'.encode() + b"1.5," * (LIMITS.numbers - 9) + b"1]}"

LARGEST: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "numbers": (lambda: in_text(FULL), "read"),
    "numbers in the pixels": (
        lambda: png(carrier_of(zlib.compress(FULL), 2048, 1000), level=1), "read"
    ),
    "short numbers": (lambda: in_text(b'{"s":{"TORCHTENSOR":[' + b"1.5," * 16_000 + b"1]}}"), "read"),
    "not ASCII": (lambda: in_text(WIDE.ljust(LIMITS.json)), "read"),
    "noise": (lambda: png(noisy(LIMITS.pixels), level=0), "no-embedding"),
    "noise in a webp": (lambda: webp(noisy(LIMITS.pixels), quality=0), "no-embedding"),
    "transparent noise in a webp": (lambda: webp(with_alpha(noisy(LIMITS.pixels)), quality=0), "no-embedding"),
    "transparent noise": (lambda: png(with_alpha(noisy(LIMITS.pixels)), level=1), "malformed-picture"),
    "flat": (lambda: png(noisy(LIMITS.pixels) & 0xF0 | 0x10, level=1), "no-embedding"),
    "all blocks": (lambda: png(with_gap(noisy(LIMITS.pixels)), level=0), "no-embedding"),
    "bomb of pixels": (lambda: png(np.zeros((2, 2, 3), np.uint8), size=(60_000, 60_000)), "malformed-picture"),
    "bomb of rows": (lambda: png(np.zeros((9000, 9000, 1), np.uint8), size=(20, 32)), "no-embedding"),
    "bomb in the pixels": (lambda: in_pixels(bytes(200 << 20)), "malformed-picture"),
    "chunks": (lambda: png(LANDSCAPE, *[chunk(b"tEXt", b"sd-ti-embedding")] * 9_000), "no-embedding"),
    "texts": (lambda: in_text(b'{"a":[' + b'"\xc3\xa9",' * 9_000 + b"1]}"), "read"),
}  # fmt: skip


def with_gap(pixels: np.ndarray) -> np.ndarray:
    width = pixels.shape[1]
    pixels[:, width // 2 - 1 : width // 2 + 1] = 0
    return pixels


def carrier_of(data: bytes, height: int, width: int) -> np.ndarray:
    return carrier(data, np.full((height, width, 3), 77, np.uint8))


@pytest.mark.parametrize("case", LARGEST)
def test_time_and_memory_are_bounded(case, tmp_path):
    make, expected = LARGEST[case]
    (tmp_path / "x").write_bytes(make())
    names, seconds, kilobytes = measured(tmp_path / "x")
    assert (names, seconds < 2, kilobytes < 200_000) == (expected, True, True), (seconds, kilobytes)


# the corpus


corpus = [
    pytest.mark.corpus,
    pytest.mark.skipif(not CORPUS.is_dir(), reason="the shared corpus is not beside this checkout"),
]


class TestCorpus:
    pytestmark = corpus

    def test_bad_pictures_do_as_their_records_say(self):
        samples = json.loads((CORPUS / "bad" / "bad.json").read_text())["samples"]
        seen = [sample for sample in samples if sample["file"].startswith("image/")]
        assert len(seen) >= 7
        for sample in seen:
            names, seconds, kilobytes = measured(CORPUS / "bad" / sample["file"])
            assert (names == "read") == (sample["expect"] != "reject"), (sample["file"], names)
            assert seconds < 2 and kilobytes < 200_000, sample["file"]

    def test_embeddings_have_their_true_vectors(self):
        cases = json.loads((CORPUS / "embeddings" / "cases.json").read_text())
        seen = [case for case in cases if case["id"].startswith("img_")]
        assert len(seen) >= 5
        for case in seen:
            for file in case["files"]:
                data = (CORPUS / "embeddings" / file).read_bytes()
                if case["expected"] is None:
                    assert refused(data).name == "no-embedding", file
                    continue
                source = open_source(data)
                (vectors,) = read_all(CORPUS / "embeddings" / case["expected"]).values()
                assert source.read_bytes("string_to_param.*") == vectors.tobytes()
                assert source.header.extras["name"] == case["stored_token"]
                assert source.header.findings == ()
