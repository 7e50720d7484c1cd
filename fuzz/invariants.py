"""What must hold of every file, whatever is in it."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any

from safetensors import SafetensorError, deserialize

import lora_convert
from lora_convert.cli.text import detection_lines
from lora_convert.containers import open_source
from lora_convert.containers.dtypes import BITS
from lora_convert.containers.pickles import LIMITS
from lora_convert.errors import FileError
from lora_convert.families import FAMILIES
from lora_convert.report import to_json

__all__ = ["CHECKS", "Escape", "check_file", "check_header", "make_ready", "nothing_else_happens"]

_MOST_READ = 4 << 20  # bytes; reading tensors that only repeat themselves would slow the fuzzer down

_HARMLESS = ("builtins.id", "sys._getframe", "gc.", "object.__")
"""How the audit events begin that a reader may cause."""


class Escape(BaseException):
    """Something was done that reading a file does not need. No `except Exception` hides it."""


_watched = threading.local()


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if getattr(_watched, "on", False) and not event.startswith(_HARMLESS):
        _watched.on = False
        raise Escape(event, repr(arguments)[:200])


@functools.cache
def _hook() -> None:
    sys.addaudithook(_audit)  # for ever: hooks cannot be taken away


def make_ready(target: str, files: Iterable[bytes]) -> None:
    """Let everything be imported and loaded that is when it is first needed: the tables of families, and by files."""
    for family in FAMILIES.values():
        for component in family.components:
            assert component.modules
    for file in files:
        CHECKS[target](file)


@contextlib.contextmanager
def nothing_else_happens() -> Iterator[None]:
    """In the block this thread imports, runs, opens and sends nothing; Escape is raised as soon as it does.

    `make_ready` comes before it. Events: docs.python.org/3/library/audit_events.
    """
    _hook()
    _watched.on = True
    try:
        yield
    finally:
        _watched.on = False


def check_file(data: bytes) -> None:
    """A file is refused with findings, or read within the limits; and it can be described."""
    try:
        with open_source(data) as source:
            sizes = {name: tensor.nbytes for name, tensor in source.header.tensors.items()}
            assert sum(sizes.values()) <= LIMITS.shared * len(data) + LIMITS.spare
            assert b"".join(source.chunks()) == data
            for name, tensor in source.header.tensors.items():
                assert 8 * tensor.nbytes == prod(tensor.shape) * BITS[tensor.dtype]
                if tensor.nbytes <= _MOST_READ:
                    assert len(source.read_bytes(name)) == tensor.nbytes
    except FileError as error:
        assert any(finding.severity == "error" for finding in error.findings)
    found = lora_convert.identify(data)
    assert json.loads(to_json(found.as_dict()))["file"] == "<bytes>"
    assert all(line.replace("\x1b", "").isprintable() for line in detection_lines(found, True))


_DOCUMENTED = ("stands twice in one object", "its header entry is a list", "its dtype \"{'")
"""Of the findings for what the reference reader takes and ours does not (see lora_convert/containers/header.py)."""


def check_header(data: bytes) -> None:
    """The strict reader takes what the reference reader takes, and sees the same tensors in it."""
    try:
        entries = deserialize(data)  # type: ignore[no-untyped-call]
        known = {name: (entry["dtype"], tuple(entry["shape"]), entry["data"]) for name, entry in entries}
    except SafetensorError:
        known = None
    try:
        with open_source(data, pickles=False) as source:
            ours = {
                name: (tensor.dtype, tensor.shape, source.read_bytes(name))
                for name, tensor in source.header.tensors.items()
            }
    except FileError as error:
        said = [finding.message for finding in error.findings]
        assert known is None or any(text in message for text in _DOCUMENTED for message in said), said
    else:
        assert ours == known
    check_file(data)


CHECKS: Mapping[str, Callable[[bytes], None]] = {
    "headers": check_header,
    "pickles": check_file,
    "pictures": check_file,
}
"""For each target, what is asked of its files."""
