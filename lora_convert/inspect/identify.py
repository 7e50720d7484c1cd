"""identify: the library's call that says what a weight file is, on a path, bytes, an open file or a hub address."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_convert.containers import MAX_HEADER, Target, name_of, opened
from lora_convert.errors import FileError, raise_errors
from lora_convert.inspect.detect import detect
from lora_convert.inspect.detection import Detection

__all__ = ["identify"]


def identify(
    target: Target,
    *,
    family: str | None = None,
    config: str | Path | None = None,
    alphas: bool | None = None,
    hashes: bool = False,
    max_header: int = MAX_HEADER,
    skip: Sequence[str] = (),
    strict: bool = False,
) -> Detection:
    """Say what a weight file is, and why. Only the header and the few bytes of its scalars are read.

    `target` is a path, a `hf://` address, bytes or an open binary file; `family` decides a tie; `config` is a peft
    `adapter_config.json`; `alphas` reads the scalars (default: of local files); `hashes` reads the whole file.
    A bad file gives findings, or with `strict` raises FileError.
    """
    try:
        with opened(target, max_header, skip) as source:
            read_alphas = not source.remote if alphas is None else alphas
            found = detect(source, family=family, config=config, read_alphas=read_alphas)
            if hashes:
                from lora_convert.hashes import file_hashes

                reader = source.reader
                sums = file_hashes(source.chunks(), reader.read_at, reader.size, source.header.data_start)
                found = replace(found, hashes=sums)
    except FileError as error:
        found = Detection(name_of(target), "unknown", findings=error.findings)
    raise_errors(strict, found.findings)
    return found
