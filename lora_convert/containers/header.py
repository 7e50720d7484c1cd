"""The header of a weight file: names, dtypes and shapes, and a strict parser of safetensors headers.

Format: https://huggingface.co/docs/safetensors (8 bytes of little-endian length, a JSON object, the tensors' bytes).
The parser accepts exactly what the reference reader (safetensors 0.8) accepts, with two exceptions: it refuses
duplicate names also where the reference takes the last one in silence, and two spellings that no writer uses and the
format does not define, which the reference's JSON library lets through: `["F32",[2],[0,8]]` for a tensor's entry and
`{"F32":null}` for a dtype. It says of every violation what and where it is.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from lora_convert.containers.dtypes import BITS
from lora_convert.errors import FileError
from lora_convert.report import MOST_FINDINGS, Finding, counted, printable, shown

__all__ = ["MAX_HEADER", "MAX_HEADER_LIMIT", "Header", "Span", "TensorInfo", "check_names", "parse_header"]

MAX_HEADER = 12_000_000
"""Bytes of JSON read without being asked to read more. The largest adapters known need 1 MB."""

MAX_HEADER_LIMIT = 100_000_000
"""The reference reader's own bound."""

_MOST_LEVELS = 127  # of nesting, in the reference reader's JSON
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `end` (exclusive), counted from the start of the file.

    Tensors that do not lie in one piece (views in PyTorch's files) stand behind its end, for the source's reader.
    """

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header gives it; `where` says how to get its bytes."""

    dtype: str
    shape: tuple[int, ...]
    where: Span

    @property
    def nbytes(self) -> int:
        return self.where.end - self.where.start


@dataclass(frozen=True)
class Header:
    """What a weight file says of itself, without its tensors' values.

    `findings` are borderline observations that did not prevent reading; `data_start` is where tensor bytes begin.
    """

    path: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    data_start: int = 0


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"it holds {literal}")


def _number(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise ValueError(f"the number {shown(literal, 40)} is out of range")
    return value


def _integer(literal: str) -> float:
    # The format's integers are unsigned and have 64 bits; "-0" and longer ones are floats to the reference reader.
    return _number(literal) if literal == "-0" or len(literal) > 20 else int(literal)


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _is_too_deep(content: object) -> bool:
    level: list[Any] = [content]
    for _ in range(_MOST_LEVELS):
        inside = (value.values() if isinstance(value, dict) else value for value in level)
        level = [child for children in inside for child in children if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _malformed(subject: str, message: str) -> Finding:
    return Finding("malformed-header", "error", subject, message, "The file is damaged or was not written correctly.")


def _unique(twice: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice += [name for name, number in Counter(name for name, _ in pairs).items() if number > 1]
    return content


def _load(text: str) -> tuple[dict[str, Any], list[str]]:
    """The header's JSON object, and names that stand twice in one object.

    Raises RecursionError or ValueError for what the reference reader does not take.
    """
    twice: list[str] = []
    content = json.loads(
        text,
        object_pairs_hook=partial(_unique, twice),
        parse_constant=_refuse_constant,
        parse_float=_number,
        parse_int=_integer,
    )
    if not isinstance(content, dict):
        raise ValueError(f"it is {_json_type(content)}")
    if _is_too_deep(content):
        raise RecursionError
    if "\\u" in text:
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # a lone surrogate escape decodes, but is no text
    return content, twice


def _parse_json(raw: bytes) -> tuple[dict[str, Any], list[Finding]]:
    """The header's JSON object, and findings for duplicate names. Raises FileError if there is no object."""
    text = ""
    try:
        text = raw.decode("utf-8")
        content, twice = _load(text)
    except UnicodeDecodeError as error:
        wrong = f"it is not UTF-8, byte {error.object[error.start]:#04x} at offset {8 + error.start}"
    except UnicodeEncodeError as error:
        wrong = f"\\u{ord(error.object[error.start]):x} is half of a surrogate pair"
    except RecursionError:
        wrong = f"it is nested more than {_MOST_LEVELS} levels deep"
    except json.JSONDecodeError as error:
        wrong = f"{error.msg} at offset {8 + len(text[: error.pos].encode())}"
    except ValueError as error:
        wrong = str(error)
    else:
        return content, [_malformed("", f"the name {shown(name)!r} stands twice in one object.") for name in twice]
    raise FileError([_malformed("", f"the header is not a JSON object: {shown(wrong)}.")])


def _is_unsigned(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**64


def _wrong_fields(dtype: object, shape: object, offsets: object) -> str | None:
    """What is wrong with the three fields of an entry, as a sentence; None if nothing is."""
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"its dtype {shown(str(dtype))!r} is not one that the format defines."
    if not isinstance(shape, list) or not all(map(_is_unsigned, shape)):
        return f"its shape {shown(json.dumps(shape))} is not a list of whole numbers."
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_unsigned, offsets)):
        return f"its data_offsets {shown(json.dumps(offsets))} are not two whole numbers."
    start, end = offsets
    if end < start:
        return f"its bytes end ({end}) before they begin ({start})."
    return _wrong_size(dtype, shape, end - start)


def _wrong_size(dtype: str, shape: list[int], given: int) -> str | None:
    elements = 1
    for size in shape:
        elements *= size
        if elements >= 2**64:  # what the reference's 64-bit arithmetic refuses; also keeps the product small
            return f"its shape {shown(json.dumps(shape))} is too large."
    bits = elements * BITS[dtype]
    if bits != 8 * given:
        return f"{dtype} of shape {shown(json.dumps(shape))} takes {bits / 8:g} bytes, but it is given {given}."
    return None


def _check_entry(name: str, entry: object) -> tuple[TensorInfo | None, list[Finding]]:
    """One tensor's entry as TensorInfo with offsets relative to the data, or the findings that say what is wrong."""
    if not isinstance(entry, dict):
        return None, [_malformed(name, f"its header entry is {_json_type(entry)}, not an object.")]
    missing = sorted(_FIELDS - entry.keys())
    if missing:
        return None, [_malformed(name, f"its header entry lacks {', '.join(missing)}.")]
    wrong = _wrong_fields(entry["dtype"], entry["shape"], entry["data_offsets"])
    if wrong:
        return None, [_malformed(name, wrong)]
    findings = [
        Finding("unknown-field", "warning", name, f"its header entry has the unknown field {shown(extra)!r}.")
        for extra in sorted(entry.keys() - _FIELDS)
    ]
    return TensorInfo(entry["dtype"], tuple(entry["shape"]), Span(*entry["data_offsets"])), findings


def _check_layout(tensors: Mapping[str, TensorInfo], data_size: int, complete: bool) -> list[Finding]:
    """Findings for gaps, overlaps and a cut: the tensors must tile the data exactly.

    Where the tensors are not `complete`, because entries could not be read, gaps mean nothing.
    """
    findings = []
    position, before = 0, "the header"
    ordered = sorted(tensors.items(), key=lambda item: (item[1].where.start, item[1].where.end))
    for name, tensor in ordered:
        start, end = tensor.where.start, tensor.where.end
        if start > position and complete:
            findings.append(_malformed(name, f"{start - position} unused bytes lie between {shown(before)} and it."))
        elif start < position:
            message = f"its bytes begin at {start}, inside those of {shown(before)}, which end at {position}."
            findings.append(_malformed(name, message))
        if end >= position:
            position, before = end, name
    cut = [name for name, tensor in ordered if tensor.where.end > data_size]
    if cut:
        message = f"the file ends before it does: {position:,} bytes of data are announced, {data_size:,} are there"
        findings.append(_malformed(cut[0], f"{message}; cut short or missing: {counted(len(cut), 'tensor')}."))
    if position < data_size and complete:
        message = f"{data_size - position} bytes follow {shown(before)}, the last tensor; the format allows none."
        findings.append(_malformed("", message))
    return findings


def _check_metadata(content: object) -> tuple[dict[str, str], list[Finding]]:
    if content is None:
        return {}, []
    if not isinstance(content, dict):
        return {}, [_malformed("__metadata__", f"it is {_json_type(content)}, not an object of strings.")]
    findings = [
        _malformed(f"__metadata__.{key}", f"its value is {_json_type(value)}, not a string.")
        for key, value in content.items()
        if not isinstance(value, str)
    ]
    return content, findings


_IMITATION = re.compile("[\\W_]*".join(["", *"metadata", ""]), re.IGNORECASE)


def _suspicious(name: str) -> str | None:
    """Why a tensor name is one that no trainer writes, or None."""
    if not name:
        return "it is empty"
    if printable(name) != name:
        return "it has control or formatting characters"
    if "/" in name or "\\" in name:
        return "it looks like a path"
    if _IMITATION.fullmatch(name):
        return "it imitates the metadata entry"
    return "it is longer than 500 characters" if len(name) > 500 else None


def check_names(names: Sequence[str]) -> list[Finding]:
    """Warnings for names that no trainer writes."""
    return [
        Finding("suspicious-name", "warning", name, f"No trainer writes such a tensor name: {reason}.")
        for name in names
        if (reason := _suspicious(name))
    ]


def _raise_if_any(findings: list[Finding]) -> None:
    if not findings:
        return
    more = len(findings) - MOST_FINDINGS
    if more > 0:
        findings = [*findings[:MOST_FINDINGS], _malformed("", f"{more} more tensors break the format.")]
    raise FileError(findings)


def parse_header(raw: bytes, file_size: int, path: str) -> Header:
    """Parse the JSON of a safetensors header.

    `raw` is the header without its 8 bytes of length, `file_size` the size of the whole file in bytes. Raises FileError
    with every violation of the format found (`malformed-header`).
    """
    content, broken = _parse_json(raw)
    data_start = 8 + len(raw)
    data_size = file_size - data_start
    findings: list[Finding] = []
    if not raw.startswith(b"{"):
        message = "The header starts with white space; the format wants `{` first, though common readers accept it."
        findings.append(Finding("leading-space", "warning", "", message))
    metadata, wrong = _check_metadata(content.pop("__metadata__", None))
    tensors = {}
    complete = not broken
    for name, entry in content.items():
        tensor, said = _check_entry(name, entry)
        if tensor is None:
            complete = False
            broken += said
        else:
            tensors[name] = tensor
            findings += said
    _raise_if_any([*broken, *wrong, *_check_layout(tensors, data_size, complete)])
    if not tensors:
        findings.append(Finding("empty-file", "error", "", "There are no tensors in the file."))
    placed = {
        name: TensorInfo(
            tensor.dtype, tensor.shape, Span(data_start + tensor.where.start, data_start + tensor.where.end)
        )
        for name, tensor in tensors.items()
    }
    return Header(
        path,
        placed,
        metadata,
        findings=(*findings, *check_names(list(tensors))),
        data_start=data_start,
    )
