"""Reading headers: what is refused and why, and agreement with the reference reader on valid and broken ones."""

from __future__ import annotations

import json
import struct
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FIXTURES, LORA, names_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

import lora_convert
from lora_convert.containers import MAX_HEADER, Source, open_source
from lora_convert.containers.dtypes import BITS
from lora_convert.errors import FileError, UsageError

BAD = FIXTURES / "bad"
RECORDS = json.loads((BAD / "bad.json").read_text(encoding="utf-8"))
VALUES = {"s39_nan_inf_weights", "s40_fp16_overflow", "s41_all_zero"}  # sound containers of odd values
A = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def container(header: str | bytes, data: bytes = bytes(8)) -> bytes:
    raw = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


def refusal(data: bytes) -> tuple[lora_convert.Finding, ...]:
    with pytest.raises(FileError) as caught:
        open_source(data)
    return caught.value.findings


def expected(*verdicts: str) -> list[object]:
    return [
        pytest.param(BAD / record["file"], id=record["file"].removesuffix(".safetensors"))
        for record in RECORDS
        if record["expect"] in verdicts and record["file"].removesuffix(".safetensors") not in VALUES
    ]


@pytest.mark.parametrize("path", expected("reject"))
def test_bad_files_are_findings_and_never_exceptions(path):
    found = lora_convert.identify(path)
    errors = [finding for finding in found.findings if finding.severity == "error"]
    assert errors
    assert names_of(errors) <= {
        "malformed-header", "empty-file", "not-weights", "unsafe-pickle", "malformed-pickle", "malformed-picture",
    }  # fmt: skip
    for finding in errors:
        assert finding.message.endswith(".")
    with pytest.raises(FileError):
        lora_convert.identify(path, strict=True)
    assert lora_convert.convert(path, path.parent / "never").status in ("failed", "refused")
    assert not (path.parent / "never").exists()
    assert not list(Path(tempfile.gettempdir()).glob("LORA_CONVERT_PICKLE_EXECUTED*"))


@pytest.mark.parametrize("path", expected("accept-warn"))
def test_borderline_files_open_with_a_warning(path):
    with open_source(path) as source:
        assert [finding.severity for finding in source.header.findings] == ["warning"]
        assert names_of(source.header.findings) <= {"leading-space", "unknown-field", "suspicious-name"}
        assert len(source.header.tensors) == 1


@pytest.mark.parametrize("path", [*expected("accept"), *(BAD / f"{name}.safetensors" for name in sorted(VALUES))])
def test_good_files_open_without_a_word(path):
    with open_source(path) as source:
        assert source.header.findings == ()
        assert_same(source, path.read_bytes())


def entry(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]", more: str = "") -> str:
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}}}'


@pytest.mark.parametrize(
    ("header", "subject", "message"),
    [
        (entry(dtype='"F7"'), "a", "'F7' is not one that the format defines"),
        (entry(shape="[-2]"), "a", "its shape [-2] is not a list of whole numbers"),
        (entry(shape="[true]"), "a", "its shape [true] is not a list of whole numbers"),
        (entry(shape="[4294967296,4294967296]"), "a", "its shape [4294967296, 4294967296] is too large"),
        (entry(shape="[3]"), "a", "F32 of shape [3] takes 12 bytes, but it is given 8"),
        (entry(dtype='"F4"', shape="[15]"), "a", "F4 of shape [15] takes 7.5 bytes, but it is given 8"),
        (entry(offsets="[-0,8]"), "a", "its data_offsets [-0.0, 8] are not two whole numbers"),
        (entry(offsets="[8,0]"), "a", "its bytes end (0) before they begin (8)"),
        (
            entry(shape="[4]", offsets="[0,16]"),
            "a",
            "16 bytes of data are announced, 8 are there; cut short or missing: 1 tensor",
        ),
        (entry(shape="[1]", offsets="[4,8]"), "a", "4 unused bytes lie between the header and it"),
        (entry(shape="[1]", offsets="[0,4]"), "", "4 bytes follow a, the last tensor"),
        (f'{{{A},"b":{{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}}}', "b", "begin at 4, inside those of a"),
        (f'{{{A},"b":{{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}}}', "b", "begin at 4, inside those of a"),
        ('{"a":{"dtype":"F32"}}', "a", "its header entry lacks data_offsets, shape"),
        ('{"a":["F32",[2],[0,8]]}', "a", "its header entry is a list, not an object"),
        (entry(dtype='{"F32":null}'), "a", "is not one that the format defines"),
        (f'{{"__metadata__":{{"step":1}},{A}}}', "__metadata__.step", "its value is a number, not a string"),
        (f'{{"__metadata__":[],{A}}}', "__metadata__", "it is a list, not an object of strings"),
        (f"{{{A},{A}}}", "", "the name 'a' stands twice in one object"),
        (entry(more=',"x":{"q":1,"q":2}'), "", "the name 'q' stands twice in one object"),
        (entry(more=',"x":NaN'), "", "it holds NaN"),
        (entry(more=',"x":-1e400'), "", "the number -1e400 is out of range"),
        (entry(more=f',"x":{"9" * 5000}'), "", "is out of range"),
        (entry(more=f',"x":{"[" * 126}{"]" * 126}'), "", "nested more than 127 levels"),
        (entry(more=f',"x":{"[" * 99_999}{"]" * 99_999}'), "", "nested more than 127 levels"),
        (entry(more=',"x":"\\ud800"'), "", "\\ud800 is half of a surrogate pair"),
        ('{"é":1,}', "", "at offset 16"),
        (b'{"\xff":1}', "", "byte 0xff at offset 10"),
        ("[]", "", "it is a list"),
        ("", "", "at offset 8"),
    ],
)
def test_findings_say_what_and_where(header, subject, message):
    (finding,) = refusal(container(header))
    assert (finding.name, finding.severity, finding.subject) == ("malformed-header", "error", subject)
    assert message in finding.message


def test_all_violations_are_reported_together():
    entries = {
        "dtype": '{"dtype":"F7","shape":[2],"data_offsets":[0,8]}',
        "size": '{"dtype":"F32","shape":[3],"data_offsets":[0,8]}',
        "first": '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',
        "overlap": '{"dtype":"F32","shape":[2],"data_offsets":[4,12]}',
    }
    header = ",".join(f'"{name}":{text}' for name, text in entries.items())
    findings = refusal(container(f'{{"__metadata__":{{"k":1,"k":"2","n":null}},{header}}}', bytes(16)))
    assert {finding.subject for finding in findings} == {"", "__metadata__.n", "dtype", "size", "overlap"}
    assert names_of(findings) == {"malformed-header"}


def test_many_violations_are_counted():
    header = ",".join(f'"{number}":{{}}' for number in range(1000))
    findings = refusal(container(f"{{{header}}}"))
    assert len(findings) == 21
    assert findings[-1].message.startswith("980 more")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x05" + bytes(6), "it has 7 bytes"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "header of 18,446,744,073,709,551,615 bytes, but the file has 10"),
        (struct.pack("<Q", 3) + b"{}", "header of 3 bytes, but the file has 10"),
    ],
)
def test_lengths_that_the_file_does_not_have(data, message):
    (finding,) = refusal(data)
    assert finding.name == "malformed-header"
    assert message in finding.message


@pytest.mark.parametrize("length", [0, 8, MAX_HEADER, 10**8, 2**31, 2**63, 2**64 - 1])
@pytest.mark.parametrize(
    "header",
    [
        entry(shape=f"[{10**19}]"),
        entry(shape=f"[{','.join([str(2**63)] * 100)}]"),
        entry(offsets=f"[0,{2**64 - 1}]"),
        entry(offsets=f"[0,{'9' * 4000}]"),
        entry(shape="[0,18446744073709551615]", offsets="[0,18446744073709551615]"),
    ],
)
def test_the_header_dictates_no_allocation(length, header):
    raw = header.encode()
    data = struct.pack("<Q", length or len(raw)) + raw + bytes(8)
    tracemalloc.start()
    try:
        refusal(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_max_header():
    padded = f"{{{A}}}".ljust(5000)
    data = container(padded)
    assert lora_convert.identify(data, max_header=5000).tensors == 1
    (finding,) = lora_convert.identify(data, max_header=4999).findings
    assert (finding.name, finding.severity) == ("malformed-header", "error")
    assert "5,000 bytes; at most 4,999" in finding.message
    assert "--max-header" in finding.fix


def test_max_header_is_12_mb_by_default():
    data = container(f"{{{A}}}".ljust(MAX_HEADER + 1))
    assert "at most 12,000,000" in lora_convert.identify(data).findings[0].message
    assert lora_convert.identify(data, max_header=MAX_HEADER + 1).tensors == 1


@pytest.mark.parametrize("limit", [0, -1, 100_000_001])
def test_max_header_has_bounds(limit):
    with pytest.raises(UsageError, match="--max-header must be between 1 and 100,000,000"):
        open_source(container("{}"), limit)


# Agreement with the reference reader. The exceptions are those that containers/header.py documents.

DOCUMENTED = ("stands twice in one object", "its header entry is a list", "its dtype \"{'")


def assert_same(source: Source, data: bytes) -> None:
    known = {name: (tensor["dtype"], tuple(tensor["shape"]), tensor["data"]) for name, tensor in deserialize(data)}
    ours = source.header.tensors
    assert {name: (ours[name].dtype, ours[name].shape, source.read_bytes(name)) for name in ours} == known


def assert_agreement(data: bytes) -> None:
    """Our reader refuses what the reference refuses, and reads the same from the rest."""
    try:
        deserialize(data)
        sound = True
    except SafetensorError:
        sound = False
    try:
        source = open_source(data)
    except FileError as error:
        assert not sound or any(text in finding.message for finding in error.findings for text in DOCUMENTED), error
    else:
        assert sound, source.header
        assert_same(source, data)


class Raw(str):
    """JSON text that stands as it is."""


ODD = [
    *("-0", "0.0", "1e2", "-1", "1e400", "-1E+309", "0e999", "1e-999", "1.7976931348623157e308", "01", "1.", "NaN"),
    *("1.7976931348623159e308", "18446744073709551615", "18446744073709551616", "9" * 300, "9" * 400, "9" * 5000),
    *("null", "true", "0", "7", "[]", "{}", "[0,8]", "[8,8]", "[1,2,3]", '["F32",[1],[0,4]]', '{"F32":null}', "'", ""),
    *('""', '"F32"', '"F7"', '"f32"', '"BF16"', '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\0"', '"\x01"'),
    *("[" * depth + "]" * depth for depth in (10, 124, 125, 126, 127, 128, 2000)),
    *('[{"":' * depth + "0" + "}]" * depth for depth in (61, 62, 63, 64)),
]  # fmt: skip
KEYS = ['"shape"', '"dtype"', '"data_offsets"', '"__metadata__"', '"x"', '""', '"\\ud800"', '"\ud800"', "x", '"a"', "1"]
SPACE = st.text(" \t\n\r", max_size=3) | st.sampled_from(["\x0b", "\0", "\ufeff", "\xa0", " " * 50])
NAMES = st.text('ab.é\x7f\0\u202e\U0001f600"\\/', max_size=4) | st.sampled_from(["x" * 3000, "../x", "__metadata__ "])


def as_text(node: object) -> str:
    if isinstance(node, Raw):
        return node
    if isinstance(node, dict):
        return "{" + ",".join(f"{as_text(key)}:{as_text(value)}" for key, value in node.items()) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(as_text, node)) + "]"
    return json.dumps(node, ensure_ascii=False)


@st.composite
def documents(draw: st.DrawFn) -> tuple[dict, bytes]:
    """A valid header and its data."""
    names = draw(st.lists(NAMES.filter(lambda name: name != "__metadata__"), unique=True, max_size=4))
    tensors, position = {}, 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = [*draw(st.lists(st.integers(0, 3), max_size=3)), *([8] if BITS[dtype] < 8 else [])]
        elements = 1
        for size in shape:
            elements *= size
        end = position + elements * BITS[dtype] // 8
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    document = dict(draw(st.permutations(list(tensors.items()))))
    metadata = draw(st.none() | st.dictionaries(NAMES, NAMES, max_size=3))
    if draw(st.booleans()):
        document["__metadata__"] = metadata
    return document, draw(st.binary(min_size=position, max_size=position))


def inside(node: object) -> Iterator[dict | list]:
    """All objects and lists of a document."""
    if isinstance(node, dict | list):
        yield node
        for child in node.values() if isinstance(node, dict) else node:
            yield from inside(child)


@settings(max_examples=150, deadline=None)
@given(documents(), SPACE, SPACE, st.sampled_from([None, 1]))
def test_valid_headers_are_read_as_the_reference_reads_them(document, before, after, indent):
    header = before + json.dumps(document[0], ensure_ascii=False, indent=indent) + after
    assert_agreement(container(header, document[1]))
    if not (before + after).strip(" \t\r\n"):
        with open_source(container(header, document[1])) as source:
            assert source.header.tensors.keys() == document[0].keys() - {"__metadata__"}
            assert source.header.metadata == (document[0].get("__metadata__") or {})


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_edited_headers_are_judged_as_the_reference_judges_them(data):
    document, content = data.draw(documents())
    for _ in range(data.draw(st.integers(1, 2))):
        node = data.draw(st.sampled_from(list(inside(document))))
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if keys and data.draw(st.booleans()):
            node[data.draw(st.sampled_from(keys))] = Raw(data.draw(st.sampled_from(ODD)))
        elif isinstance(node, dict):
            node[Raw(data.draw(st.sampled_from(KEYS)))] = Raw(data.draw(st.sampled_from(ODD)))
        else:
            node.append(Raw(data.draw(st.sampled_from(ODD))))
    assert_agreement(container(as_text(document), content))


@settings(max_examples=300, deadline=None)
@given(documents(), st.data())
def test_damaged_bytes_are_judged_as_the_reference_judges_them(document, data):
    damaged = bytearray(container(as_text(document[0]), document[1]))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from(["flip", "set", "cut", "insert"]))
        if kind == "flip":
            damaged[position] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            damaged[position] = data.draw(st.sampled_from(b'"\\{}[]:,0189-.eE \x00\xff'))
        elif kind == "cut" and len(damaged) > 1:
            del damaged[position]
        else:
            damaged.insert(position, data.draw(st.integers(0, 255)))
    assert_agreement(bytes(damaged))


REAL = LORA / "k_sd15_lorafa.safetensors"


def test_a_real_file_cut_short_anywhere_is_refused():
    whole = REAL.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    edges = [header_end - 1, header_end, header_end + 1, len(whole) - 1]
    for length in (*range(64), *range(64, len(whole), 199), *edges):
        found = lora_convert.identify(whole[:length])
        assert not found.ok, length
        assert names_of(found.findings) <= {"malformed-header", "empty-file"}, length
    assert lora_convert.identify(whole).ok


def test_a_real_file_with_a_flipped_bit_is_judged_as_the_reference_judges_it():
    whole = REAL.read_bytes()
    for position in (*range(8), *range(8, 1024, 3)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position * 5 % 8)
        assert_agreement(bytes(damaged))
        assert lora_convert.identify(damaged).file == "<bytes>"
